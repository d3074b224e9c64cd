"""The flights of tasks, and who wants them: single flight (`singleflight.py`) with a count of demand.

    join -> start -> the flight -> leave
    the last caller leaves -> still queued: dropped, at once   on the wire: completed

A dropped flight is out of the way before it has ended: the next caller begins a new one, and is never told of
the other's end.
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
    """Flies once at a time per key, for as long as anything wants the answer.

    `fly` is the flight; its `after` is that of `start`.
    """

    def __init__(self, fly: Callable[[K, Demand, int | None], Coroutine[Any, Any, T]]) -> None:
        self._fly = fly
        self._in_flight: SingleFlight[K, T] = SingleFlight()
        self._demands: dict[K, Demand] = {}  # of keys that have callers, subscribers or a flight

    def __contains__(self, key: K) -> bool:
        """Tell whether a flight for this key is in progress."""
        return key in self._in_flight

    @property
    def closed(self) -> bool:
        """Tell whether no flight can begin any more."""
        return self._in_flight.closed

    def demand(self, key: K) -> Demand:
        """Return the key's demand, new if there is none."""
        demand = self._demands.get(key)
        if demand is None:
            demand = self._demands[key] = Demand()
        return demand

    def join(self, key: K, client: bytes) -> None:
        """Count in a caller or subscriber of this client: until it leaves, flights are for it, too."""
        self.demand(key).join(client)

    def leave(self, key: K, client: bytes) -> None:
        """Count out what joined. Without demand a flight is dropped, unless it is committed to its end."""
        demand = self._demands[key]
        demand.leave(client)
        if demand.clients:
            return
        if not demand.flying:
            del self._demands[key]
        elif not demand.background and not demand.committed:
            self._drop(key, demand)

    def start(self, key: K, *, background: bool = False, after: int | None = None) -> asyncio.Future[T]:
        """Return the key's flight, begun now unless one is in progress. Await it through `shield`.

        `background`: it is wanted even without callers. After `aclose` it is cancelled before it begins.
        """
        demand = self.demand(key)
        if demand.flying:
            demand.background |= background
            return self._in_flight.start(key, partial(self._run, key, demand, after))
        demand.begin(background=background, drop=partial(self._drop, key))
        flight = self._in_flight.start(key, partial(self._run, key, demand, after))
        if flight.done():  # in this very turn of the loop, or it is closed
            self._end(key, demand)
        return flight

    async def aclose(self) -> None:
        """End every flight, and begin none any more."""
        await self._in_flight.aclose()

    async def _run(self, key: K, demand: Demand, after: int | None) -> T:
        try:
            return await self._fly(key, demand, after)
        finally:
            self._end(key, demand)

    def _drop(self, key: K, demand: Demand) -> None:
        demand.dropped = True
        self._end(key, demand)
        self._in_flight.drop(key)

    def _end(self, key: K, demand: Demand) -> None:
        demand.flying = False
        # After a drop the key's demand, if there is one, is another flight's.
        if not demand.clients and self._demands.get(key) is demand:
            del self._demands[key]
