"""In-flight requests: single flight (`single_flight.py`), with the number of callers of each request.

    join -> start -> wait for the in-flight request -> leave
    the last caller leaves -> dropped at once while its query is queued; completed once a call is on the wire

A dropped in-flight request may need time to end. The next caller does not wait for this, and starts a new
one. In this module, a *request* is an in-flight request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from functools import partial
from typing import Any, Generic, TypeVar

from gateway.progress.single_flight import SingleFlight
from gateway.upstream.query_state import QueryState

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class InFlightRequests(Generic[K, T]):
    """Runs one request at a time per key, for as long as its response is wanted.

    `fetch` makes a request. Its arguments are the key, its query state, and the requirement.
    """

    def __init__(self, fetch: Callable[[K, QueryState, Any], Coroutine[Any, Any, T]]) -> None:
        self._fetch = fetch
        self._in_flight: SingleFlight[K, T] = SingleFlight()
        self._states: dict[K, QueryState] = {}  # of keys with callers, subscribers or a request in flight

    def __contains__(self, key: K) -> bool:
        """Tell whether a request for this key is in flight."""
        return key in self._in_flight

    @property
    def closed(self) -> bool:
        """Tell whether `aclose` was called: no request can start any more."""
        return self._in_flight.closed

    def query_state(self, key: K) -> QueryState:
        """Return the query state of a key; create it if there is none."""
        state = self._states.get(key)
        if state is None:
            state = self._states[key] = QueryState()
        return state

    def query_state_of(self, key: K) -> QueryState | None:
        """Return the query state of the request in flight for this key; None if there is no request."""
        state = self._states.get(key)
        return state if state is not None and state.in_flight else None

    def add_caller(self, key: K, client: bytes) -> None:
        """Add a caller or subscriber of this client. Until it leaves, it waits for each request."""
        self.query_state(key).join(client)

    def remove_caller(self, key: K, client: bytes) -> None:
        """Remove a caller or subscriber. An unwanted request is dropped unless it must finish."""
        state = self._states[key]
        state.leave(client)
        if state.clients:
            return
        if not state.in_flight:
            del self._states[key]
        elif not state.keep_without_callers and not state.runs_to_end:
            self._drop(key, state)

    def join_or_start(
        self, key: K, *, keep_without_callers: bool = False, requirement: Any = None
    ) -> asyncio.Future[T]:
        """Return the request in flight for the key, or start one. Await it through `asyncio.shield`.

        `keep_without_callers`: the request is not dropped when no caller waits. `requirement` applies only to
        a request that starts now. After `aclose` the future is cancelled, and no request starts.
        """
        state = self.query_state(key)
        if state.in_flight:
            state.keep_without_callers |= keep_without_callers
            return self._in_flight.join_or_start(key, partial(self._run, key, state, requirement))
        state.begin(keep_without_callers=keep_without_callers, on_unwanted=partial(self._drop, key))
        request = self._in_flight.join_or_start(key, partial(self._run, key, state, requirement))
        if request.done():  # closed, or it ended in this iteration of the event loop
            self._end(key, state)
        return request

    async def aclose(self) -> None:
        """Cancel every request, and start no more."""
        await self._in_flight.aclose()

    async def _run(self, key: K, state: QueryState, requirement: Any) -> T:
        try:
            return await self._fetch(key, state, requirement)
        finally:
            self._end(key, state)

    def _drop(self, key: K, state: QueryState) -> None:
        state.dropped = True
        self._end(key, state)
        self._in_flight.drop(key)

    def _end(self, key: K, state: QueryState) -> None:
        state.in_flight = False
        # After a drop the key may have a new query state, which belongs to another request.
        if not state.clients and self._states.get(key) is state:
            del self._states[key]
