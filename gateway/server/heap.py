"""Gives memory back to the system when many connections have closed.

glibc keeps what was freed below something that still lives, and connections' buffers lie mixed: of 4,000
unfinished heads of 16 KB, 70 MB, 8 MB were given back by themselves. `malloc_trim` gives back the rest
(`python -m tests.attacks.siege` shows it). It takes some milliseconds, so it is not called often.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

_CROWD = 500  # connections
_SECONDS = 10.0


def _malloc_trim() -> Callable[[], object]:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # another C library than glibc
        return lambda: None
    return lambda: trim(0)


class HeapTrim:
    """Trims the heap when `_CROWD` connections have closed since the last time, at most every `_SECONDS`."""

    def __init__(
        self, *, trim: Callable[[], object] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._trim = trim or _malloc_trim()
        self._clock = clock
        self._most = 0  # connections since the last time
        self._next = 0.0

    def look(self, connections: int) -> bool:
        """Note how many connections there are now; tell whether the heap was trimmed."""
        self._most = max(self._most, connections)
        if self._most - connections < _CROWD or self._clock() < self._next:
            return False
        self._most = connections
        self._next = self._clock() + _SECONDS
        self._trim()
        return True
