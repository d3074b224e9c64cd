"""The server's clock as seen from here: what all replicas tell moments by.

Each answer of the server brings its time, read somewhere between the moment the question was
sent and the moment the answer was there. So our clock is ahead of the server's by something
between `sent - time` and `received - time`, and many answers together narrow that down. Whoever
converts a moment chooses the end on the safe side, that which makes things older.
"""

from __future__ import annotations

import math

MICROSECONDS = 1_000_000


class ServerClock:
    """Converts between the process's monotonic clock (seconds) and the server's (Unix microseconds)."""

    def __init__(self, *, ahead_seconds: float) -> None:
        """`ahead_seconds`: how far our clock is ahead, by guess, until the server has told."""
        self._least = self._most = ahead_seconds
        self._known = False

    def observe(self, time: int, *, sent: float, received: float) -> None:
        """Learn from an answer: `time` is the server's, the other two are ours."""
        least, most = sent - time / MICROSECONDS, received - time / MICROSECONDS
        # Clocks drift, and the server's may be set: what contradicts the newest answer is over.
        if not self._known or least > self._most or most < self._least:
            self._least, self._most, self._known = least, most, True
        else:
            self._least, self._most = max(self._least, least), min(self._most, most)

    def ours(self, time: int) -> float:
        """Return a moment of the server's on our clock, rather too early than too late."""
        return time / MICROSECONDS + self._least

    def servers(self, moment: float) -> int:
        """Return a moment of ours on the server's clock, rather too early than too late."""
        return math.floor((moment - self._most) * MICROSECONDS)
