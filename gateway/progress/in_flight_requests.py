"""In-flight requests: single flight (`single_flight.py`), with the number of callers of each one.

    join -> start -> wait for the in-flight request -> leave
    the last caller leaves -> dropped at once while its query is queued; completed once a call is on the wire

A dropped in-flight request may need time to end. The next caller does not wait for this, and starts a new
one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from functools import partial
from typing import Any, Generic, TypeVar

from gateway.progress.single_flight import SingleFlight
from gateway.upstream.awaited_query import AwaitedQuery

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class InFlightRequests(Generic[K, T]):
    """Runs one in-flight request at a time per key, for as long as its response is wanted.

    `fetch` makes an in-flight request. Its arguments are the key, its awaited query, and the requirement.
    """

    def __init__(self, fetch: Callable[[K, AwaitedQuery, Any], Coroutine[Any, Any, T]]) -> None:
        self._fetch = fetch
        self._in_flight: SingleFlight[K, T] = SingleFlight()
        self._queries: dict[K, AwaitedQuery] = {}  # of keys with callers or an in-flight request

    def __contains__(self, key: K) -> bool:
        """Tell whether an in-flight request for this key runs."""
        return key in self._in_flight

    @property
    def closed(self) -> bool:
        """Tell whether `aclose` was called: no in-flight request can start any more."""
        return self._in_flight.closed

    def get_or_create_query(self, key: K) -> AwaitedQuery:
        """Return the awaited query of a key; create it if there is none."""
        query = self._queries.get(key)
        if query is None:
            query = self._queries[key] = AwaitedQuery()
        return query

    def in_flight_query_of(self, key: K) -> AwaitedQuery | None:
        """Return the awaited query of the in-flight request for this key; None if there is none."""
        query = self._queries.get(key)
        return query if query is not None and query.in_flight else None

    def add_caller(self, key: K, client: bytes) -> None:
        """Add a caller or subscriber of this client. Until it leaves, it waits for each in-flight request."""
        self.get_or_create_query(key).join(client)

    def remove_caller(self, key: K, client: bytes) -> None:
        """Remove a caller or subscriber. An unwanted in-flight request is dropped unless it must finish."""
        query = self._queries[key]
        query.leave(client)
        if query.clients:
            return
        if not query.in_flight:
            del self._queries[key]
        elif not query.keep_without_callers and not query.runs_to_end:
            self._drop(key, query)

    def join_or_start(
        self, key: K, *, keep_without_callers: bool = False, requirement: Any = None
    ) -> asyncio.Future[T]:
        """Return the in-flight request for the key, or start one. Await it through `asyncio.shield`.

        `keep_without_callers`: it is not dropped when no caller waits. `requirement` applies only to
        one that starts now. After `aclose` the future is cancelled, and none starts.
        """
        query = self.get_or_create_query(key)
        if query.in_flight:
            query.keep_without_callers |= keep_without_callers
            return self._in_flight.join_or_start(key, partial(self._run, key, query, requirement))
        query.begin(keep_without_callers=keep_without_callers, on_unwanted=partial(self._drop, key))
        request = self._in_flight.join_or_start(key, partial(self._run, key, query, requirement))
        if request.done():  # closed, or it ended in this iteration of the event loop
            self._end(key, query)
        return request

    async def aclose(self) -> None:
        """Cancel every in-flight request, and start no more."""
        await self._in_flight.aclose()

    async def _run(self, key: K, query: AwaitedQuery, requirement: Any) -> T:
        try:
            return await self._fetch(key, query, requirement)
        finally:
            self._end(key, query)

    def _drop(self, key: K, query: AwaitedQuery) -> None:
        query.dropped = True
        self._end(key, query)
        self._in_flight.drop(key)

    def _end(self, key: K, query: AwaitedQuery) -> None:
        query.in_flight = False
        # After a drop the key may have a new awaited query, which belongs to another in-flight request.
        if not query.clients and self._queries.get(key) is query:
            del self._queries[key]
