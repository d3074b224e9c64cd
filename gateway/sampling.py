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
class _Kind:
    until: float = 0.0
    count: int = 0  # within this second
    untold: int = 0


class Sampler:
    """Decides line by line. Kinds are kept for ever: take them from bounded sets. `clock` is monotonic."""

    def __init__(
        self, *, first: int = 10, every: int = 1000, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._first = first
        self._every = every
        self._clock = clock
        self._kinds: dict[Hashable, _Kind] = {}

    def take(self, kind: Hashable) -> int | None:
        """Return how many of this kind went untold since the last line, or None: this one does too."""
        seen = self._kinds.get(kind)
        if seen is None:
            seen = self._kinds[kind] = _Kind()
        now = self._clock()
        if now >= seen.until:
            seen.until = now + _WINDOW_SECONDS
            seen.count = 0
        seen.count += 1
        if seen.count > self._first and (seen.count - self._first) % self._every:
            seen.untold += 1
            return None
        untold, seen.untold = seen.untold, 0
        return untold
