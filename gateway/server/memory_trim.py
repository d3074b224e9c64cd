"""Returns free memory to the system after many connections have closed.

glibc keeps freed memory that lies below a live allocation, and the buffers of connections are interleaved:
of 70 MB for 4,000 unfinished heads of 16 KB, only 8 MB were returned. `malloc_trim` returns the rest
(measured with `python -m tests.attacks.siege`). It takes some milliseconds, so it is called rarely.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

_MIN_CLOSED = 500  # connections
_INTERVAL_SECONDS = 10.0


def _malloc_trim() -> Callable[[], object]:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # another C library than glibc
        return lambda: None
    return lambda: trim(0)


class MemoryTrim:
    """Trims the heap after `_MIN_CLOSED` connections have closed, at most once per `_INTERVAL_SECONDS`."""

    def __init__(
        self, *, trim: Callable[[], object] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._trim = trim or _malloc_trim()
        self._clock = clock
        self._peak = 0  # connections since the last trim
        self._next = 0.0

    def observe(self, connections: int) -> bool:
        """Record the current number of connections; return whether the heap was trimmed."""
        self._peak = max(self._peak, connections)
        if self._peak - connections < _MIN_CLOSED or self._clock() < self._next:
            return False
        self._peak = connections
        self._next = self._clock() + _INTERVAL_SECONDS
        self._trim()
        return True
