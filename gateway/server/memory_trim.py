"""Returns free memory to the system after many connections have closed.

glibc keeps freed memory that lies below memory in use. The buffers of connections are interleaved with other
memory: after 4,000 unfinished heads of 16 KB were freed, only 8 of 70 MB returned to the system.
`malloc_trim` returns the rest (measured with `python -m tests.attacks.siege`). It takes some milliseconds, so
it is called rarely.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

_MIN_CLOSED = 100  # connections
_INTERVAL_SECONDS = 10.0


def _malloc_trim() -> Callable[[], object]:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # another C library than glibc
        return lambda: None
    return lambda: trim(0)


class MemoryTrim:
    """Trims the heap after `_MIN_CLOSED` connections have closed, at most once per `_INTERVAL_SECONDS`.

    It waits until no more connections close, because a trim in between would keep the memory of the rest.
    """

    def __init__(
        self, *, trim: Callable[[], object] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._trim = trim or _malloc_trim()
        self._clock = clock
        self._peak = 0  # largest number of connections since the last trim
        self._previous = 0  # number of connections at the previous call
        self._next_trim_at = 0.0

    def observe(self, connections: int) -> bool:
        """Record the current number of connections, and trim the heap if that is due; tell whether it was."""
        self._peak = max(self._peak, connections)
        still_closing, self._previous = connections < self._previous, connections
        if still_closing or self._peak - connections < _MIN_CLOSED or self._clock() < self._next_trim_at:
            return False
        self._peak = connections
        self._next_trim_at = self._clock() + _INTERVAL_SECONDS
        self._trim()
        return True
