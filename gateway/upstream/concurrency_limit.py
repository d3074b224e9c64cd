"""The limit of concurrent calls, `upstream.max_in_flight`. Each call has a slot.

acquire -> a slot is free -> slot
-> else wait in the queue (`query_queue.py`), which is fair to clients -> slot
release -> the next query in the queue gets the slot
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gateway.upstream.awaited_query import AwaitedQuery
from gateway.upstream.query_queue import QueryQueue


class ConcurrencyLimit:
    """Gives out a fixed number of slots."""

    def __init__(self, slots: int) -> None:
        self._free = slots  # 0 while a query is queued
        self._queue = QueryQueue()

    async def acquire(self, state: AwaitedQuery, *, is_refresh: bool) -> ConcurrencySlot:
        """Wait for a slot. `state` has the clients that wait; `is_refresh`: an older snapshot is known."""
        if self._free:
            self._free -= 1
        else:
            await self._wait_in_queue(state, is_refresh=is_refresh)
        return ConcurrencySlot(self._release)

    async def _wait_in_queue(self, state: AwaitedQuery, *, is_refresh: bool) -> None:
        query = self._queue.add(
            is_refresh=is_refresh, client=self._queue.client_with_shortest_queue(state.clients)
        )
        state.queue_entry = query
        try:
            await query.future
        except asyncio.CancelledError:
            self._queue.discard(query)
            if not query.future.cancelled():  # the query was cancelled after it had received a slot
                self._release()
            raise
        finally:
            state.queue_entry = None

    def _release(self) -> None:
        for is_refresh in self._queue.service_order():
            while (query := self._queue.pop(is_refresh=is_refresh)) is not None:
                if not query.future.done():
                    self._queue.record_served(is_refresh=is_refresh)
                    query.future.set_result(None)
                    return
        self._free += 1


class ConcurrencySlot:
    """The slot of a call. `release` gives it back to the limit.

    Usually the slot is released when the query has parsed the response. If the query is cancelled earlier,
    the slot is released at the end of the call: when the response has arrived, or after
    `upstream.attempt_timeout_seconds`.
    """

    __slots__ = ("_cancelled", "_ended", "_free")

    def __init__(self, free: Callable[[], None]) -> None:
        self._free: Callable[[], None] | None = free
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
        free, self._free = self._free, None
        if free is not None:
            free()
