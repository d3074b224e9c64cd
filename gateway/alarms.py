"""Sleeping in company: who has to wake at about the same time wakes together, a few at a time.

Work that comes bit by bit finds a process asleep and its caches cold each time, and costs double. Work
that comes all at once holds up everybody else. So a sleeper joins the next wake that others have set, if
that is near enough and has room; else it sets one, so late that a few others are likely to join.
"""

from __future__ import annotations

import asyncio
import random
from bisect import bisect_left, insort

_TOGETHER = 8


class Alarms:
    """The wakes of one event loop's sleepers. For that loop's thread only."""

    def __init__(self) -> None:
        self._wakes: list[float] = []  # in order, on the loop's clock; only those that have room
        self._sleepers: dict[float, int] = {}
        self._count = 0

    async def sleep(self, seconds: float, *, late: float) -> None:
        """Sleep for so many seconds, or up to `late` longer where others wake then."""
        loop = asyncio.get_running_loop()
        due = loop.time() + seconds
        wake = self._join(due, seconds, late)
        self._count += 1
        try:
            await asyncio.sleep(wake - loop.time())
        finally:
            self._count -= 1
            self._leave(wake)

    def _join(self, due: float, seconds: float, late: float) -> float:
        place = bisect_left(self._wakes, due)
        if place < len(self._wakes) and self._wakes[place] <= due + late:
            wake = self._wakes[place]
            self._sleepers[wake] += 1
            if self._sleepers[wake] == _TOGETHER:
                del self._wakes[place]
            return wake
        # If all sleep for as long, so many are due within a moment's reach, and it takes so long for enough.
        company = self._count * late / seconds
        wake = due + (min(late, _TOGETHER * seconds / self._count) if company >= 1 else 0.0)
        if wake in self._sleepers:  # a crowd that is due at one moment would stay together for ever
            wake = random.uniform(due, due + late)  # noqa: S311  # guards nothing
        self._sleepers[wake] = self._sleepers.get(wake, 0) + 1
        if self._sleepers[wake] == 1:
            insort(self._wakes, wake)
        return wake

    def _leave(self, wake: float) -> None:
        self._sleepers[wake] -= 1
        if not self._sleepers[wake]:
            del self._sleepers[wake]
            place = bisect_left(self._wakes, wake)
            if place < len(self._wakes) and self._wakes[place] == wake:
                del self._wakes[place]
