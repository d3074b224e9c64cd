"""The deadline of a connection's current state, with a timer that is rarely replaced."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable


class Deadline:
    """Calls `on_expired` when the most recently set deadline has passed.

    A new timer for each state of each request would cost too much. If the deadline moves to a later time, the
    running timer is kept. When it fires before the deadline, it is rescheduled. `at` is the deadline on the
    loop's clock, in seconds.
    """

    __slots__ = ("_loop", "_on_expired", "_timer", "at")

    def __init__(self, loop: asyncio.AbstractEventLoop, on_expired: Callable[[], None]) -> None:
        self._loop = loop
        self._on_expired = on_expired
        self._timer: asyncio.TimerHandle | None = None
        self.at = math.inf

    def set(self, seconds: float) -> None:
        """Set the deadline to `seconds` from now."""
        self.at = self._loop.time() + seconds
        if self._timer is None or self._timer.when() > self.at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(self.at, self._fire)

    def clear(self) -> None:
        """Remove the deadline."""
        self.at = math.inf

    def close(self) -> None:
        """Cancel the timer and release the callback."""
        if self._timer is not None:
            self._timer.cancel()
        del self._on_expired

    def _fire(self) -> None:
        self._timer = None
        left = self.at - self._loop.time()
        if left <= 0:
            self._on_expired()
        elif left < math.inf:
            self._timer = self._loop.call_at(self.at, self._fire)
