"""The store of a single process: two LRU caches with a common limit in bytes.

Entries are kept beyond their freshness: a stale snapshot is served when the upstream fails (stale-if-error),
keeps the high-water mark of a running task's progress, and records that a task has ended. Each snapshot
determines its own freshness. Use it on the event-loop thread only: cachetools takes no locks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import astuple
from typing import Any, Self

from cachetools import Cache, TLRUCache

from gateway.domain.errors import GatewayError, UpstreamError, UpstreamRejected
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import TaskKey
from gateway.stores.base import Lease

# How long the last progress snapshot of a task is kept after its freshness. Within this hour, clients never
# see progress that falls, or a finished task that runs again.
MEMORY_SECONDS = 3600.0


# Memory of an entry besides its bodies: objects, keys and cache slots, rounded up (measured with tracemalloc
# under Python 3.11: 0.7 KB for a snapshot, 0.9 KB for a failure).
ENTRY_BYTES = 1024
_EXPIRE_SECONDS = 1.0  # interval between removals of expired entries while nothing is stored


class _ByteSizedCache(TLRUCache[TaskKey, Any]):
    """A cache with sizes in bytes. `entries` and `bytes` are read-only and safe in any thread."""

    def entries(self) -> int:
        """Return the number of entries, including those that have expired since the last change."""
        return Cache.__len__(self)

    def bytes(self) -> int:
        """Return the size of all entries."""
        size: int = Cache.currsize.fget(self)  # type: ignore[attr-defined]  # a property
        return size


class _SnapshotCache(_ByteSizedCache):
    """Marks evicted snapshots as no longer current."""

    def untouched(self) -> list[Snapshot]:
        """Return all snapshots without marking them as used."""
        return [Cache.__getitem__(self, key) for key in self]

    def popitem(self) -> tuple[TaskKey, Snapshot]:
        """Remove the least recently used snapshot."""
        key, snapshot = super().popitem()
        snapshot.current_until = -math.inf
        return key, snapshot


class MemoryStore:
    """Keeps up to `max_tasks` snapshots, each as long as it may be served stale, and as many failures.

    `max_bytes` limits the sum of all bodies and envelopes plus `ENTRY_BYTES` for each entry. Failures are
    short-lived and evicted first. An entry that is larger than the limit is not kept. `stale_seconds`: how
    long a snapshot may be served after its freshness.
    """

    def __init__(
        self,
        *,
        max_tasks: int,
        max_bytes: int = 67_108_864,
        stale_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.trouble: str | None = None
        self._max_tasks = max_tasks
        self._max_bytes = max_bytes
        self._stale_seconds = stale_seconds
        self._clock = clock
        self._listeners: list[Callable[[Snapshot], None]] = []
        self._snapshots = _SnapshotCache(max_bytes, self._expires_at, timer=clock, getsizeof=_snapshot_bytes)
        self._failures = _ByteSizedCache(
            max_bytes,
            lambda _key, failure, now: now + failure[1],
            timer=clock,
            getsizeof=lambda failure: _failure_bytes(failure[0]),
        )
        self._failures_until = -math.inf  # no failure is cached after this moment
        self._expire_at = -math.inf

    async def __aenter__(self) -> Self:
        """See `Store`: there is nothing to open."""
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """See `Store`: there is nothing to close."""

    def peek(self, key: TaskKey) -> Snapshot | None:
        """See `Store.peek`: no other process stores snapshots, so none can be missed."""
        try:
            snapshot: Snapshot = self._snapshots[key]
        except KeyError:
            now = self._clock()
            if now >= self._expire_at:  # each check for expired entries takes a microsecond
                self._expire_at = now + _EXPIRE_SECONDS
                self._snapshots.expire()
            return None
        return snapshot

    def is_current(self, snapshot: Snapshot, now: float) -> bool:
        """See `Store.is_current`."""
        return now < snapshot.current_until

    def peek_stale(self, key: TaskKey) -> Snapshot | None:
        """See `Store.peek_stale`."""
        return self.peek(key)

    def latest(self, key: TaskKey) -> Snapshot | None:
        """See `Store.latest`."""
        return self.peek(key)

    def failure(self, key: TaskKey) -> GatewayError | None:
        """See `Store.failure`."""
        if self._clock() >= self._failures_until:  # the common case, at a tenth of the cost
            return None
        failure = self._failures.get(key)
        return None if failure is None else failure[0]

    async def sync(self) -> bool:
        """See `Store.sync`: memory is never behind."""
        return False

    async def acquire(
        self, key: TaskKey, *, after: int | None = None, timeout_seconds: float = math.inf
    ) -> Snapshot | GatewayError | Lease:
        """See `Store.acquire`: the lease is always available, since a task has one in-flight request."""
        snapshot = self.peek(key)
        if (
            snapshot is not None
            and snapshot.fresh(self._clock())
            and (after is None or snapshot.version > after)
        ):
            return snapshot
        return self.failure(key) or Lease(key, 1 if snapshot is None else snapshot.version + 1)

    async def commit(self, lease: Lease, snapshot: Snapshot) -> Snapshot | None:
        """See `Store.commit`."""
        return self.keep(snapshot)

    async def fail(self, lease: Lease, error: GatewayError, *, seconds: float) -> None:
        """See `Store.fail`."""
        self.keep_failure(lease.key, error, seconds=seconds)

    async def abandon(self, lease: Lease) -> None:
        """See `Store.abandon`: no other process waits for the lease."""

    async def token(self, per_second: float, *, saved: float, timeout_seconds: float) -> float:
        """See `Store.token`: there is no shared rate limiter."""
        return 0.0

    async def announce_throttling(self, retry_after: float | None) -> None:
        """See `Store.announce_throttling`: there are no other replicas."""

    def on_throttled(self, listener: Callable[[float | None], None]) -> None:
        """See `Store.on_throttled`: there are no other replicas."""

    def on_change(self, listener: Callable[[Snapshot], None]) -> None:
        """See `Store.on_change`."""
        self._listeners.append(listener)

    def keep(self, snapshot: Snapshot) -> Snapshot:
        """Store a snapshot as `commit` does, without a lease."""
        kept = self.peek(snapshot.key)
        if kept is not None and (
            kept.version > snapshot.version or (kept.terminal and not snapshot.terminal)
        ):
            return kept
        if kept is not None:
            kept.current_until = -math.inf
            del self._snapshots[snapshot.key]
        if self._make_room(self._snapshots, _snapshot_bytes(snapshot)):
            self._snapshots[snapshot.key] = snapshot
        if self._clock() < self._failures_until:
            self._failures.pop(snapshot.key, None)
        for listener in self._listeners:
            listener(snapshot)
        return snapshot

    def keep_failure(self, key: TaskKey, error: GatewayError, *, seconds: float) -> None:
        """Cache a failure as `fail` does, without a lease."""
        self._failures.pop(key, None)
        if self._make_room(self._failures, _failure_bytes(error)):
            self._failures[key] = (error, seconds)
        self._failures_until = max(self._failures_until, self._clock() + seconds)

    def snapshots(self) -> list[Snapshot]:
        """Return all snapshots without marking them as used."""
        return self._snapshots.untouched()

    def keep_seconds(self, snapshot: Snapshot) -> float:
        """Return how long a snapshot is kept after it was fetched, in seconds."""
        # A result may have a megabyte, and has no progress to remember.
        result = snapshot.key.operation.is_result
        return snapshot.lifetime + (
            self._stale_seconds if result else max(self._stale_seconds, MEMORY_SECONDS)
        )

    def __len__(self) -> int:
        """See `Store.__len__`."""
        return self._snapshots.entries()

    def size(self) -> int:
        """See `Store.size`."""
        return self._snapshots.bytes() + self._failures.bytes()

    def _make_room(self, cache: _ByteSizedCache, size: int) -> bool:
        """Evict entries until one more of this size fits; return whether it can fit."""
        if size > self._max_bytes:
            return False
        self._failures.expire()
        self._snapshots.expire()
        while cache.entries() >= self._max_tasks:
            cache.popitem()
        while self.size() + size > self._max_bytes:
            (self._failures if self._failures.entries() else self._snapshots).popitem()
        return True

    def _expires_at(self, _key: TaskKey, snapshot: Snapshot, _now: float) -> float:
        return snapshot.fetched_at + self.keep_seconds(snapshot)


def _snapshot_bytes(snapshot: Snapshot) -> int:
    return len(snapshot.envelope) + len(snapshot.body) + ENTRY_BYTES


def _failure_bytes(error: GatewayError) -> int:
    detail = error.detail if isinstance(error, UpstreamError) else None
    texts = 0 if detail is None else sum(len(text) for text in astuple(detail) if text is not None)
    envelope = error.envelope if isinstance(error, UpstreamRejected) else b""
    return len(envelope) + texts + ENTRY_BYTES
