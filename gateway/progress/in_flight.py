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
from gateway.upstream.demand import Demand

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class InFlightRequests(Generic[K, T]):
    """Runs one request at a time per key, for as long as its response is wanted.

    `fetch` makes a request. Its arguments are the key, the demand of the key, and the requirement of `start`.
    """

    def __init__(self, fetch: Callable[[K, Demand, Any], Coroutine[Any, Any, T]]) -> None:
        self._fetch = fetch
        self._in_flight: SingleFlight[K, T] = SingleFlight()
        self._demands: dict[K, Demand] = {}  # of keys with callers, subscribers or a request in flight

    def __contains__(self, key: K) -> bool:
        """Tell whether a request for this key is in flight."""
        return key in self._in_flight

    @property
    def closed(self) -> bool:
        """Tell whether `aclose` was called: no request can start any more."""
        return self._in_flight.closed

    def demand(self, key: K) -> Demand:
        """Return the demand of a key; create it if there is none."""
        demand = self._demands.get(key)
        if demand is None:
            demand = self._demands[key] = Demand()
        return demand

    def add_waiter(self, key: K, client: bytes) -> None:
        """Add a caller or subscriber of this client. Until it leaves, it waits for each request."""
        self.demand(key).join(client)

    def remove_waiter(self, key: K, client: bytes) -> None:
        """Remove a caller or subscriber. An unwanted request is dropped unless it must finish."""
        demand = self._demands[key]
        demand.leave(client)
        if demand.clients:
            return
        if not demand.in_flight:
            del self._demands[key]
        elif not demand.keep_without_callers and not demand.must_finish:
            self._drop(key, demand)

    def start(
        self, key: K, *, keep_without_callers: bool = False, requirement: Any = None
    ) -> asyncio.Future[T]:
        """Return the request in flight for the key, or start one. Await it through `asyncio.shield`.

        `keep_without_callers`: the request is not dropped when no caller waits. `requirement` applies only to
        a request that starts now. After `aclose` the future is cancelled, and no request starts.
        """
        demand = self.demand(key)
        if demand.in_flight:
            demand.keep_without_callers |= keep_without_callers
            return self._in_flight.start(key, partial(self._run, key, demand, requirement))
        demand.begin(keep_without_callers=keep_without_callers, on_unwanted=partial(self._drop, key))
        request = self._in_flight.start(key, partial(self._run, key, demand, requirement))
        if request.done():  # closed, or it ended in this iteration of the event loop
            self._end(key, demand)
        return request

    async def aclose(self) -> None:
        """Cancel every request, and start no more."""
        await self._in_flight.aclose()

    async def _run(self, key: K, demand: Demand, requirement: Any) -> T:
        try:
            return await self._fetch(key, demand, requirement)
        finally:
            self._end(key, demand)

    def _drop(self, key: K, demand: Demand) -> None:
        demand.dropped = True
        self._end(key, demand)
        self._in_flight.drop(key)

    def _end(self, key: K, demand: Demand) -> None:
        demand.in_flight = False
        # After a drop the key may have a new demand, which belongs to another request.
        if not demand.clients and self._demands.get(key) is demand:
            del self._demands[key]
