"""Coalesced timers: asyncio tasks that are due at about the same time wake together, in small groups.

If tasks wake one by one, the processor's caches are cold each time, and the work costs twice as much. If very
many wake at once, they delay all other tasks. So a task joins an existing timer that has room, if this delays
the task by at most `max_delay`. Otherwise it starts a new timer, which may be due a little later than the
task, so that a few other tasks can join.

Tasks that wake together are due together the next time. If all groups were delayed equally, the distance
between two half-full groups would never change, and they would never merge. So a large group is delayed less
than a small one. With each round it comes closer to the small group before it, until they merge.
"""

from __future__ import annotations

import asyncio
import random
from bisect import bisect_left, insort
from operator import attrgetter

_MAX_GROUP = 20  # larger groups gain nothing and delay their last member
_FULL_GROUP_REDUCTION = 0.9  # a full group is delayed by a tenth of `max_delay`

_when = attrgetter("when")


class _Timer:
    """A time on the loop's clock, and the tasks that sleep until then."""

    __slots__ = ("handle", "sleepers", "when")

    def __init__(self, when: float) -> None:
        self.when = when
        self.sleepers: list[asyncio.Future[int]] = []
        self.handle: asyncio.TimerHandle


class CoalescedTimers:
    """The coalesced timers of one event loop. Use it on that loop's thread only."""

    def __init__(self) -> None:
        self._with_room: list[_Timer] = []  # timers that more tasks can join, sorted by time
        self._times: set[float] = set()  # when the pending timers are due
        self._sleeper_count = 0

    async def sleep(self, seconds: float, *, max_delay: float, group_size: int = 1) -> int:
        """Sleep for `seconds`, and for up to `max_delay` seconds longer to wake together with other tasks.

        `group_size` is the result of the caller's previous `sleep`. Return the number of tasks that wake
        together.
        """
        loop = asyncio.get_running_loop()
        timer = self._timer_for(loop.time() + seconds, seconds, max_delay, group_size)
        sleeper: asyncio.Future[int] = loop.create_future()
        timer.sleepers.append(sleeper)
        if len(timer.sleepers) == _MAX_GROUP:
            self._with_room.remove(timer)
        self._sleeper_count += 1
        try:
            return await sleeper
        except asyncio.CancelledError:
            timer.sleepers.remove(sleeper)
            if not timer.sleepers:
                timer.handle.cancel()
                self._remove(timer)
            raise
        finally:
            self._sleeper_count -= 1

    def _timer_for(self, due: float, seconds: float, max_delay: float, group_size: int) -> _Timer:
        position = bisect_left(self._with_room, due, key=_when)
        if position < len(self._with_room) and self._with_room[position].when <= due + max_delay:
            return self._with_room[position]
        when = due
        # `_sleeper_count * max_delay / seconds` is the expected number of tasks that become due within
        # `max_delay`, if all sleep for `seconds`. A delay is useful only if at least one task is expected to
        # join. The second argument of `min` is the expected time until the group is full.
        if self._sleeper_count * max_delay / seconds >= 1:
            delay = max_delay * (1 - _FULL_GROUP_REDUCTION * min(group_size / _MAX_GROUP, 1))
            when += min(delay, _MAX_GROUP * seconds / self._sleeper_count)
        if when in self._times:  # two groups with the same time would wake together: too many tasks at once
            when = random.uniform(due, due + max_delay)  # noqa: S311  # not security-relevant
        timer = _Timer(when)
        timer.handle = asyncio.get_running_loop().call_at(when, self._wake, timer)
        self._times.add(when)
        insort(self._with_room, timer, key=_when)
        return timer

    def _wake(self, timer: _Timer) -> None:
        self._remove(timer)
        for sleeper in timer.sleepers:
            if not sleeper.done():  # a cancelled sleeper stays in the list until its task has run
                sleeper.set_result(len(timer.sleepers))

    def _remove(self, timer: _Timer) -> None:
        self._times.discard(timer.when)
        if timer in self._with_room:
            self._with_room.remove(timer)
