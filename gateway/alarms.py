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

_TOGETHER = 10
_CONTENTMENT = 0.75  # the share of its patience that a full group has lost

_moment = attrgetter("moment")


class _Wake:
    """A moment on the loop's clock, and how many sleep until then."""

    __slots__ = ("moment", "sleepers")

    def __init__(self, moment: float) -> None:
        self.moment = moment
        self.sleepers = 0


class Alarms:
    """The wakes of one event loop's sleepers. For that loop's thread only."""

    def __init__(self) -> None:
        self._with_room: list[_Wake] = []  # in order
        self._moments: set[float] = set()  # of all wakes to come
        self._count = 0

    async def sleep(self, seconds: float, *, late: float, company: int = 1) -> int:
        """Sleep for so many seconds, or up to `late` longer where others wake then; return how many did.

        `company`: what the last sleep returned.
        """
        loop = asyncio.get_running_loop()
        wake = self._join(loop.time() + seconds, seconds, late, company)
        self._count += 1
        try:
            await asyncio.sleep(wake.moment - loop.time())
        except asyncio.CancelledError:
            wake.sleepers -= 1
            if not wake.sleepers:
                self._forget(wake)
            raise
        else:
            self._forget(wake)
            return wake.sleepers
        finally:
            self._count -= 1

    def _join(self, due: float, seconds: float, late: float, company: int) -> _Wake:
        place = bisect_left(self._with_room, due, key=_moment)
        if place == len(self._with_room) or self._with_room[place].moment > due + late:
            self._set(due, seconds, late, company)
            place = bisect_left(self._with_room, due, key=_moment)
        wake = self._with_room[place]
        wake.sleepers += 1
        if wake.sleepers == _TOGETHER:
            del self._with_room[place]
        return wake

    def _set(self, due: float, seconds: float, late: float, company: int) -> None:
        moment = due
        # If all sleep for as long, so many are due within a moment's reach, and it takes so long for enough.
        if self._count * late / seconds >= 1:
            patience = late * (1 - _CONTENTMENT * min(company / _TOGETHER, 1))
            moment += min(patience, _TOGETHER * seconds / self._count)
        if moment in self._moments:  # a crowd that is due at one moment would stay together for ever
            moment = random.uniform(due, due + late)  # noqa: S311  # guards nothing
        self._moments.add(moment)
        insort(self._with_room, _Wake(moment), key=_moment)

    def _forget(self, wake: _Wake) -> None:
        self._moments.discard(wake.moment)
        place = bisect_left(self._with_room, wake.moment, key=_moment)
        if place < len(self._with_room) and self._with_room[place] is wake:
            del self._with_room[place]
