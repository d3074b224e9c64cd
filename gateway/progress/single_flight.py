"""One call in the air per key, however many wait for it.

A flight is a task of its own. Nobody who waits for it owns it: a caller that hangs up, the
first one included, changes nothing for the others. The module knows nothing of caches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from contextvars import Context
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class SingleFlight(Generic[K, T]):
    """Runs `fn` at most once at a time per key and shares what it returns or raises."""

    def __init__(self) -> None:
        self._in_flight: dict[K, asyncio.Task[T]] = {}
        self._dropped: set[asyncio.Task[T]] = set()
        self.closed = False

    def __len__(self) -> int:
        """Return the number of flights in the air."""
        return len(self._in_flight)

    def __contains__(self, key: K) -> bool:
        """Tell whether a flight for this key is in progress."""
        return key in self._in_flight

    def start(self, key: K, fn: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Future[T]:
        """Return the key's flight, begun now unless one is in progress. Await it through `shield`.

        After `aclose` it is cancelled before it begins, like those that were in the air then.
        """
        if self.closed:
            grounded: asyncio.Future[T] = asyncio.get_running_loop().create_future()
            grounded.cancel()
            return grounded
        flight = self._in_flight.get(key)
        if flight is None:
            # An empty context: what the first caller's request carries (its trace, say) is not the others'.
            flight = asyncio.get_running_loop().create_task(fn(), context=Context())
            self._in_flight[key] = flight
            flight.add_done_callback(lambda done: self._land(key, done))
        return flight

    async def do(self, key: K, fn: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Wait for the key's flight and return its result, or raise what it raised."""
        return await asyncio.shield(self.start(key, fn))

    def drop(self, key: K) -> None:
        """Cancel the key's flight, which must have no waiters. At once the next caller begins a new one."""
        flight = self._in_flight.pop(key, None)
        if flight is not None and flight.cancel():
            self._dropped.add(flight)
            flight.add_done_callback(self._dropped.discard)

    async def aclose(self) -> None:
        """Cancel every flight, wait until all have ended, and let none begin any more."""
        self.closed = True
        in_flight = [*self._in_flight.values(), *self._dropped]
        for flight in in_flight:
            flight.cancel()
        await asyncio.gather(*in_flight, return_exceptions=True)

    def _land(self, key: K, flight: asyncio.Task[T]) -> None:
        if self._in_flight.get(key) is flight:  # else it was dropped, and the key may have a new one
            del self._in_flight[key]
        # When every caller has hung up nobody else looks at the exception, and asyncio complains.
        if not flight.cancelled():
            flight.exception()
