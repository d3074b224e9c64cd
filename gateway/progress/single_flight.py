"""Single flight: at most one call in flight per key, shared by all callers that wait for it.

Each call runs in a task of its own, which no caller owns: a caller that disconnects, even the first one,
does not affect the others. This module does not depend on caches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from contextvars import Context
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class SingleFlight(Generic[K, T]):
    """Runs at most one call per key at a time, and shares its result or exception."""

    def __init__(self) -> None:
        self._in_flight: dict[K, asyncio.Task[T]] = {}
        self._dropped: set[asyncio.Task[T]] = set()
        self.closed = False

    def __len__(self) -> int:
        """Return the number of calls in flight."""
        return len(self._in_flight)

    def __contains__(self, key: K) -> bool:
        """Tell whether a call for this key is in flight."""
        return key in self._in_flight

    def join_or_start(self, key: K, fn: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Future[T]:
        """Return the call in flight for the key, or start one. Await it through `asyncio.shield`.

        After `aclose` the returned future is cancelled, and no call starts.
        """
        if self.closed:
            cancelled: asyncio.Future[T] = asyncio.get_running_loop().create_future()
            cancelled.cancel()
            return cancelled
        task = self._in_flight.get(key)
        if task is None:
            # An empty context: the first caller's context, with its trace, does not belong to the others.
            task = asyncio.get_running_loop().create_task(fn(), context=Context())
            self._in_flight[key] = task
            task.add_done_callback(lambda done: self._on_done(key, done))
        return task

    async def do(self, key: K, fn: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Wait for the key's call and return its result, or raise its exception."""
        return await asyncio.shield(self.join_or_start(key, fn))

    def drop(self, key: K) -> None:
        """Cancel the key's call, which must have no waiters. The next caller starts a new one at once."""
        task = self._in_flight.pop(key, None)
        if task is not None and task.cancel():
            self._dropped.add(task)
            task.add_done_callback(self._dropped.discard)

    async def aclose(self) -> None:
        """Cancel every call, wait until all have ended, and start no more."""
        self.closed = True
        tasks = [*self._in_flight.values(), *self._dropped]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _on_done(self, key: K, task: asyncio.Task[T]) -> None:
        if self._in_flight.get(key) is task:  # else it was dropped, and the key may have a new call
            del self._in_flight[key]
        # Retrieve the exception: asyncio logs an error if no caller is left to do so.
        if not task.cancelled():
            task.exception()
