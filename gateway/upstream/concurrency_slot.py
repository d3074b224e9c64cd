"""One of the `upstream.max_in_flight` slots for calls, held by a call."""

from __future__ import annotations

import asyncio


class ConcurrencySlot:
    """The concurrency slot of a call. The creator has acquired `semaphore`; `release` releases it.

    Usually the slot is released when the query has parsed the response. If the query is cancelled earlier,
    the slot is released at the end of the call: when the response has arrived, or after
    `upstream.attempt_timeout_seconds`.
    """

    __slots__ = ("_cancelled", "_ended", "_semaphore")

    def __init__(self, semaphore: asyncio.Semaphore) -> None:
        self._semaphore: asyncio.Semaphore | None = semaphore
        self._ended = self._cancelled = False

    def on_call_end(self) -> None:
        """Record that the call has ended. The query may not have parsed the response yet."""
        self._ended = True
        if self._cancelled:
            self.release()

    def on_query_cancelled(self) -> None:
        """Record that the query was cancelled while the call was in flight."""
        self._cancelled = True
        if self._ended:
            self.release()

    def release(self) -> None:
        """Free the slot. A second release has no effect."""
        semaphore, self._semaphore = self._semaphore, None
        if semaphore is not None:
            semaphore.release()
