"""Samples log lines, so that logging under load costs little and rare lines are always written.

As in zap's sampler, the first lines of a kind in each window of time are written, and then every n-th line.
The window is a second, if nothing else is said. Each written line carries the number of lines suppressed
before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass


@dataclass(slots=True)
class LogSeries:
    """The lines of one kind: `first` lines in each window are written, then every `every`-th line."""

    first: int
    every: int
    window_seconds: float = 1.0
    until: float = 0.0
    count: int = 0  # within this window
    suppressed: int = 0

    def take(self, now: float) -> int | None:
        """Decide about one line, as `LogSampler.take` does. `now` is on the sampler's clock, in seconds."""
        if now >= self.until:
            self.until = now + self.window_seconds
            self.count = 0
        self.count += 1
        if self.count > self.first and (self.count - self.first) % self.every:
            self.suppressed += 1
            return None
        suppressed, self.suppressed = self.suppressed, 0
        return suppressed


class LogSampler:
    """Decides for each log line whether it is written.

    Kinds are never removed, so they must come from a bounded set. `clock` is monotonic, in seconds.
    """

    def __init__(
        self,
        *,
        first: int = 10,
        every: int = 1000,
        window_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._first = first
        self._every = every
        self._window_seconds = window_seconds
        self._clock = clock
        self._kinds: dict[Hashable, LogSeries] = {}

    def take(self, kind: Hashable) -> int | None:
        """Decide about one line of a kind.

        Returns:
            The number of lines suppressed since the last written one; None if this line is suppressed too.
        """
        return self.kind(kind).take(self._clock())

    def kind(self, kind: Hashable) -> LogSeries:
        """Return the series of a kind, for hot paths that keep it to save the lookup."""
        found = self._kinds.get(kind)
        if found is None:
            found = self._kinds[kind] = LogSeries(self._first, self._every, self._window_seconds)
        return found
