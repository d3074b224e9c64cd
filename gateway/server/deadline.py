"""The deadline of a connection's state."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable


class Deadline:
    """Calls `passed` when the deadline that was set last has passed.

    A timer for each state of each request would cost too much: moving the deadline later only notes it, and a
    timer that fires early is set anew. `at` is on the loop's clock.
    """

    __slots__ = ("_loop", "_passed", "_timer", "at")

    def __init__(self, loop: asyncio.AbstractEventLoop, passed: Callable[[], None]) -> None:
        self._loop = loop
        self._passed = passed
        self._timer: asyncio.TimerHandle | None = None
        self.at = math.inf

    def set(self, seconds: float) -> None:
        """Set the deadline to so many seconds from now."""
        self.at = self._loop.time() + seconds
        if self._timer is None or self._timer.when() > self.at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(self.at, self._fire)

    def clear(self) -> None:
        """Have no deadline."""
        self.at = math.inf

    def close(self) -> None:
        """Have none any more, and let go of what would have been called."""
        if self._timer is not None:
            self._timer.cancel()
        del self._passed

    def _fire(self) -> None:
        self._timer = None
        left = self.at - self._loop.time()
        if left <= 0:
            self._passed()
        elif left < math.inf:
            self._timer = self._loop.call_at(self.at, self._fire)
