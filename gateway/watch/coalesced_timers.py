"""Sleeping in company: who has to wake at about the same time wakes together, a few at a time.

Work that comes bit by bit finds a process asleep and its caches cold each time, and costs double. Work
that comes all at once holds up everybody else. So a sleeper joins the next wake that others have set, if
that is near enough and has room; else it sets one, so late that a few others are likely to join.

Groups stay together, for who wakes together is soon due together. Were all of them equally patient, they
would come to follow each other just out of reach, half full for ever; so the more slept together, the less
they wait for more, and catch up with those who wait.
"""

from __future__ import annotations

import asyncio
import random
from bisect import bisect_left, insort
from operator import attrgetter

_TOGETHER = 20  # more gain nothing, and what the last of them brings comes the later
_CONTENTMENT = 0.9  # the share of its patience that a full group has lost

_moment = attrgetter("moment")


class _WakeUp:
    """A moment on the loop's clock, and who sleeps until then: one timer for all."""

    __slots__ = ("moment", "sleepers", "timer")

    def __init__(self, moment: float) -> None:
        self.moment = moment
        self.sleepers: list[asyncio.Future[int]] = []
        self.timer: asyncio.TimerHandle


class CoalescedTimers:
    """The wakes of one event loop's sleepers. For that loop's thread only."""

    def __init__(self) -> None:
        self._with_room: list[_WakeUp] = []  # in order
        self._moments: set[float] = set()  # of all wakes to come
        self._count = 0

    async def sleep(self, seconds: float, *, late: float, company: int = 1) -> int:
        """Sleep for so many seconds, or up to `late` longer where others wake then; return how many did.

        `company`: what the last sleep returned.
        """
        loop = asyncio.get_running_loop()
        wake = self._join(loop.time() + seconds, seconds, late, company)
        sleeper: asyncio.Future[int] = loop.create_future()
        wake.sleepers.append(sleeper)
        if len(wake.sleepers) == _TOGETHER:
            self._with_room.remove(wake)
        self._count += 1
        try:
            return await sleeper
        except asyncio.CancelledError:
            wake.sleepers.remove(sleeper)
            if not wake.sleepers:
                wake.timer.cancel()
                self._forget(wake)
            raise
        finally:
            self._count -= 1

    def _join(self, due: float, seconds: float, late: float, company: int) -> _WakeUp:
        place = bisect_left(self._with_room, due, key=_moment)
        if place < len(self._with_room) and self._with_room[place].moment <= due + late:
            return self._with_room[place]
        moment = due
        # If all sleep for as long, so many are due within a moment's reach, and it takes so long for enough.
        if self._count * late / seconds >= 1:
            patience = late * (1 - _CONTENTMENT * min(company / _TOGETHER, 1))
            moment += min(patience, _TOGETHER * seconds / self._count)
        if moment in self._moments:  # a crowd that is due at one moment would stay together for ever
            moment = random.uniform(due, due + late)  # noqa: S311  # guards nothing
        wake = _WakeUp(moment)
        wake.timer = asyncio.get_running_loop().call_at(moment, self._ring, wake)
        self._moments.add(moment)
        insort(self._with_room, wake, key=_moment)
        return wake

    def _ring(self, wake: _WakeUp) -> None:
        self._forget(wake)
        for sleeper in wake.sleepers:
            if not sleeper.done():  # else it was cancelled, and its task has not run since
                sleeper.set_result(len(wake.sleepers))

    def _forget(self, wake: _WakeUp) -> None:
        self._moments.discard(wake.moment)
        if wake in self._with_room:
            self._with_room.remove(wake)
