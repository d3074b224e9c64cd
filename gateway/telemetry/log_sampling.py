"""Which log lines are written when there are too many of a kind.

In each second the first few of a kind are written, then every so many-th, with the number of
those that went untold before it: as zap's sampler does, so that a hot process spends its time on
answers, and what is rare is always told.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

_WINDOW_SECONDS = 1.0


@dataclass(slots=True)
class LogSeries:
    """The lines of one kind: `first` in each second are written, then every `every`th."""

    first: int
    every: int
    until: float = 0.0
    count: int = 0  # within this second
    unnotified: int = 0

    def take(self, now: float) -> int | None:
        """Do as `LogSampler.take`; `now` is on its clock."""
        if now >= self.until:
            self.until = now + _WINDOW_SECONDS
            self.count = 0
        self.count += 1
        if self.count > self.first and (self.count - self.first) % self.every:
            self.unnotified += 1
            return None
        unnotified, self.unnotified = self.unnotified, 0
        return unnotified


class LogSampler:
    """Decides line by line. Kinds are kept for ever: take them from bounded sets. `clock` is monotonic."""

    def __init__(
        self, *, first: int = 10, every: int = 1000, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._first = first
        self._every = every
        self._clock = clock
        self._kinds: dict[Hashable, LogSeries] = {}

    def take(self, kind: Hashable) -> int | None:
        """Return how many of this kind went untold since the last line, or None: this one does too."""
        return self.kind(kind).take(self._clock())

    def kind(self, kind: Hashable) -> LogSeries:
        """Return a kind, for those who take of it too often to look it up."""
        found = self._kinds.get(kind)
        if found is None:
            found = self._kinds[kind] = LogSeries(self._first, self._every)
        return found
