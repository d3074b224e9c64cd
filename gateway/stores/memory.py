"""The store of a single process: two bounded caches, least recently used go first.

Items outlive their freshness on purpose: a stale snapshot covers upstream failures, keeps the
high-water mark of a running task's progress, and remembers that a task has ended. Freshness
is the snapshot's own business. Event-loop thread only: cachetools takes no locks.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from cachetools import TLRUCache

from gateway.exceptions import GatewayError
from gateway.models import Snapshot, TaskKey

# For this long after its freshness a task's story is remembered: a caller who comes back within
# the hour sees progress that fell, or a finished task that runs, never.
MEMORY_SECONDS = 3600.0


class MemoryStore:
    """Keeps up to `max_tasks` snapshots, each until its staleness is of no more use.

    `stale_seconds`: how long after its freshness a snapshot may still be shown.
    """

    def __init__(
        self, *, max_tasks: int, stale_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stale_seconds = stale_seconds
        self._listeners: list[Callable[[Snapshot], None]] = []
        self._snapshots: TLRUCache[TaskKey, Snapshot] = TLRUCache(max_tasks, self._forget_at, timer=clock)
        self._failures: TLRUCache[TaskKey, tuple[GatewayError, float]] = TLRUCache(
            max_tasks, lambda _key, failure, now: now + failure[1], timer=clock
        )

    def peek(self, key: TaskKey) -> Snapshot | None:
        """See `Store.peek`."""
        try:
            return self._snapshots[key]
        except KeyError:
            return None

    async def load(self, key: TaskKey) -> Snapshot | None:
        """See `Store.load`: nobody else stores anything, so this is `peek`."""
        return self.peek(key)

    async def save(self, snapshot: Snapshot) -> Snapshot:
        """See `Store.save`."""
        kept = self.peek(snapshot.key)
        if kept is not None and kept.fetched_at > snapshot.fetched_at:
            return kept
        self._snapshots[snapshot.key] = snapshot
        self._failures.pop(snapshot.key, None)
        for listener in self._listeners:
            listener(snapshot)
        return snapshot

    def failure(self, key: TaskKey) -> GatewayError | None:
        """See `Store.failure`."""
        try:
            return self._failures[key][0]
        except KeyError:
            return None

    async def fail(self, key: TaskKey, error: GatewayError, *, seconds: float) -> None:
        """See `Store.fail`."""
        self._failures[key] = (error, seconds)

    def on_change(self, listener: Callable[[Snapshot], None]) -> None:
        """See `Store.on_change`."""
        self._listeners.append(listener)

    def __len__(self) -> int:
        """See `Store.__len__`."""
        return len(self._snapshots)

    def _forget_at(self, key: TaskKey, snapshot: Snapshot, _now: float) -> float:
        # A result may be a megabyte and has no story to remember.
        keep = self._stale_seconds if key.operation.is_result else max(self._stale_seconds, MEMORY_SECONDS)
        return snapshot.fetched_at + snapshot.lifetime + keep
