"""Estimates the offset of the server's clock, which all replicas use as the common clock.

Each reply has the server's time, read between the moments when the request was sent and the reply was
received. So the local clock is ahead of the server's by an offset between `sent - time` and `received -
time`; several replies narrow this interval. Conversions use the end of the interval that makes snapshots
look older.
"""

from __future__ import annotations

import math

MICROSECONDS = 1_000_000


class ServerClock:
    """Converts between the process's monotonic clock (seconds) and the server's (Unix microseconds)."""

    def __init__(self, *, ahead_seconds: float) -> None:
        """`ahead_seconds`: the assumed offset of the local clock until the first reply."""
        self._least = self._most = ahead_seconds
        self._known = False

    def observe(self, time: int, *, sent: float, received: float) -> None:
        """Use a reply: `time` is the server's time, `sent` and `received` are local times."""
        least, most = sent - time / MICROSECONDS, received - time / MICROSECONDS
        # Clocks drift, and the server's clock may be set: an interval that contradicts the latest is
        # replaced.
        if not self._known or least > self._most or most < self._least:
            self._least, self._most, self._known = least, most, True
        else:
            self._least, self._most = max(self._least, least), min(self._most, most)

    def ours(self, time: int) -> float:
        """Convert a server time to a local time, rounded towards the past."""
        return time / MICROSECONDS + self._least

    def servers(self, moment: float) -> int:
        """Convert a local time to a server time, rounded towards the past."""
        return math.floor((moment - self._most) * MICROSECONDS)
