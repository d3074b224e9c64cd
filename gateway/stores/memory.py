"""The store in the memory of one process: two LRU caches with a common limit in bytes.

A snapshot is kept after it has become stale, for four reasons:

- It can be served while a query runs (stale-while-revalidate).
- It can be served when the upstream fails (stale-if-error).
- It has the highest progress of a running task. The progress of the next snapshot must not be lower.
- It shows that a task has ended.

Use the store on the thread of the event loop only, because cachetools takes no locks. Only `__len__` and
`size` may be called in any thread.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import astuple
from typing import Any, NamedTuple, Self

from cachetools import Cache, TLRUCache

from gateway.domain.errors import GatewayError, UpstreamError, UpstreamRejected
from gateway.domain.permits_reply import PermitsReply
from gateway.domain.snapshot import Snapshot, version_now
from gateway.domain.task import TaskKey
from gateway.stores.base import ANY_FRESH, CacheEntry, Lease, Requirement

# How long the latest progress snapshot of a task is kept after it has become stale. During this hour,
# progress does not fall, and an ended task is not reported as running, unless the snapshot is evicted.
REMEMBER_SECONDS = 3600.0

# Memory of an entry besides its bodies: objects, keys and cache slots, rounded up (measured with tracemalloc
# under Python 3.11: 0.7 KB for a snapshot, 0.9 KB for a failure).
ENTRY_OVERHEAD_BYTES = 1024
# Expired snapshots are removed whenever a snapshot is stored. Lookups that find no snapshot remove them, too,
# but at most once in this time.
_CLEANUP_INTERVAL_SECONDS = 1.0


class _ByteSizedCache(TLRUCache[TaskKey, Any]):
    """A cache that knows its size in bytes, and returns None for a key that it does not have.

    The methods `count` and `bytes` do not change the cache, so any thread may call them.
    """

    def __missing__(self, key: TaskKey) -> None:
        """Return None: a KeyError would take twice the time of the lookup."""

    def count(self) -> int:
        """Return the number of entries, including those that have expired since the last change."""
        return Cache.__len__(self)

    def bytes(self) -> int:
        """Return the size of all entries."""
        size: int = Cache.currsize.fget(self)  # type: ignore[attr-defined]  # a property
        return size


class _SnapshotCache(_ByteSizedCache):
    """Marks evicted entries as outdated."""

    def all_entries(self) -> list[CacheEntry]:
        """Return all entries without marking them as used."""
        return [Cache.__getitem__(self, key) for key in self]

    def popitem(self) -> tuple[TaskKey, CacheEntry]:
        """Remove the least recently used entry."""
        key, entry = super().popitem()
        entry.outdated = True
        return key, entry


class _CachedFailure(NamedTuple):
    """A failure, and for how many seconds it is cached."""

    error: GatewayError
    seconds: float


class MemoryStore:
    """Keeps up to `max_tasks` snapshots and up to `max_tasks` failures.

    `ValkeyStore` extends this class and shares the snapshots with other replicas. The methods that need other
    replicas do nothing in this class; `ValkeyStore` overrides them.

    `max_bytes` limits the sum of all bodies, envelopes and error texts, plus `ENTRY_OVERHEAD_BYTES` for each
    entry. At this limit, failures are evicted first, because they are short-lived. An entry that is larger
    than the limit is not kept. A snapshot is kept for at least `min_keep_stale_seconds` after it has become
    stale, unless it is evicted. This must cover the time for which the settings allow a stale snapshot to be
    served.
    """

    def __init__(
        self,
        *,
        max_tasks: int,
        max_bytes: int = 67_108_864,
        min_keep_stale_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_tasks = max_tasks
        self._max_bytes = max_bytes
        self._min_keep_stale_seconds = min_keep_stale_seconds
        self._clock = clock
        self._listeners: list[Callable[[Snapshot], None]] = []
        self._snapshots = _SnapshotCache(max_bytes, self._expires_at, timer=clock, getsizeof=_entry_bytes)
        self._failures = _ByteSizedCache(
            max_bytes,
            lambda _key, failure, now: now + failure.seconds,
            timer=clock,
            getsizeof=lambda failure: _failure_bytes(failure.error),
        )
        self._all_failures_expired_at = -math.inf
        self._next_cleanup_at = -math.inf

    @property
    def trouble(self) -> str | None:
        """See `Store`."""
        return None

    @property
    def starting(self) -> bool:
        """See `Store`."""
        return False

    async def __aenter__(self) -> Self:
        """See `Store`: there is nothing to open."""
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """See `Store`: there is nothing to close."""

    def current_entry(self, key: TaskKey) -> CacheEntry | None:
        """See `Store.current_entry`: none is outdated, because there are no other replicas."""
        return self.entry(key)

    def entry(self, key: TaskKey) -> CacheEntry | None:
        """See `Store.entry`."""
        entry: CacheEntry | None = self._snapshots[key]
        if entry is None:
            now = self._clock()
            if now >= self._next_cleanup_at:  # each check for expired entries takes a microsecond
                self._next_cleanup_at = now + _CLEANUP_INTERVAL_SECONDS
                self._snapshots.expire()
        return entry

    def entry_without_use(self, key: TaskKey) -> CacheEntry | None:
        """Return the entry of a task without marking it as used: for messages of replicas."""
        entry: CacheEntry | None = Cache.__getitem__(self._snapshots, key) if key in self._snapshots else None
        return entry

    def is_current(self, entry: CacheEntry) -> bool:
        """See `Store.is_current`."""
        return not entry.outdated

    def last_known(self, key: TaskKey) -> Snapshot | None:
        """See `Store.last_known`."""
        entry = self.entry(key)
        return None if entry is None else entry.snapshot

    def cached_failure(self, key: TaskKey) -> GatewayError | None:
        """See `Store.cached_failure`."""
        # Usually no failure is cached. This comparison takes a tenth of the time of a lookup.
        if self._clock() >= self._all_failures_expired_at:
            return None
        failure = self._failures.get(key)
        return None if failure is None else failure.error

    async def read_arrived_messages(self) -> bool:
        """See `Store.read_arrived_messages`: no messages arrive."""
        return False

    async def load_announced_snapshot(self, key: TaskKey) -> bool:
        """See `Store.load_announced_snapshot`: no snapshots are announced."""
        return False

    async def acquire(
        self, key: TaskKey, requirement: Requirement = ANY_FRESH, *, timeout_seconds: float = math.inf
    ) -> Snapshot | GatewayError | Lease:
        """See `Store.acquire`: the lease is always free, because no other replica shares this store."""
        snapshot = self.last_known(key)
        if snapshot is not None and snapshot.fresh(self._clock()) and requirement.is_met_by(snapshot):
            return snapshot
        return self.cached_failure(key) or Lease(key, self.next_version(snapshot, requirement))

    async def commit(self, lease: Lease, build: Callable[[Snapshot | None], Snapshot]) -> Snapshot | None:
        """See `Store.commit`."""
        entry = self.entry(lease.key)
        return self._put(build(None if entry is None else entry.snapshot), entry, fetched_here=True)

    async def store_failure(self, lease: Lease, error: GatewayError, *, seconds: float) -> None:
        """See `Store.store_failure`."""
        self.put_failure(lease.key, error, seconds=seconds)

    async def release_lease(self, lease: Lease) -> None:
        """See `Store.release_lease`: no other process waits for the lease."""

    def release_lease_early(self, lease: Lease) -> None:
        """See `Store.release_lease_early`: no other process waits for the lease."""

    async def take_permits(
        self, per_second: float, *, burst: float, refreshes: int, first_queries: int
    ) -> PermitsReply | None:
        """See `Store.take_permits`: there is no shared rate limiter."""
        return None

    async def announce_throttling(self, retry_after: float | None) -> None:
        """See `Store.announce_throttling`: there are no other replicas."""

    def add_throttling_listener(self, listener: Callable[[float | None], None]) -> None:
        """See `Store.add_throttling_listener`: without other replicas, there are no announcements."""

    def add_snapshot_listener(
        self, listener: Callable[[Snapshot], None], *, is_watched: Callable[[TaskKey], bool] = lambda _: False
    ) -> None:
        """See `Store.add_snapshot_listener`."""
        self._listeners.append(listener)

    def put(self, snapshot: Snapshot, *, fetched_here: bool = True) -> Snapshot:
        """Store a snapshot as `commit` does, but without a lease."""
        return self._put(snapshot, self.entry(snapshot.key), fetched_here=fetched_here)

    def _put(self, snapshot: Snapshot, entry: CacheEntry | None, *, fetched_here: bool) -> Snapshot:
        """Store a snapshot in place of `entry`, unless that one is kept; return the stored one."""
        current = None if entry is None else entry.snapshot
        # If both are terminal, or neither is, the present one is kept only if its version is larger. If only
        # one is terminal, it is kept or stored, even if its version is smaller: a replica that has no
        # connection to a shared store (`ValkeyStore`) does not know the versions of the other replicas.
        if current is not None:
            same_kind = current.terminal is snapshot.terminal
            if current.version > snapshot.version if same_kind else current.terminal:
                return current
        if entry is not None:
            entry.outdated = True
            del self._snapshots[snapshot.key]
        if self._make_room(self._snapshots, _snapshot_bytes(snapshot)):
            # Only the package `stores/valkey` sets `required_version`; in a plain `MemoryStore` it is 0.
            required = 0 if entry is None else entry.required_version
            outdated = required > snapshot.version and not snapshot.terminal
            self._snapshots[snapshot.key] = CacheEntry(
                snapshot, outdated=outdated, fetched_here=fetched_here, required_version=required
            )
        if self._clock() < self._all_failures_expired_at:
            self._failures.pop(snapshot.key, None)
        for listener in self._listeners:
            listener(snapshot)
        return snapshot

    def put_failure(self, key: TaskKey, error: GatewayError, *, seconds: float) -> None:
        """Cache a failure as `store_failure` does, but without a lease."""
        self._failures.pop(key, None)
        if self._make_room(self._failures, _failure_bytes(error)):
            self._failures[key] = _CachedFailure(error, seconds)
        self._all_failures_expired_at = max(self._all_failures_expired_at, self._clock() + seconds)

    def entries(self) -> list[CacheEntry]:
        """Return all entries without marking them as used."""
        return self._snapshots.all_entries()

    def next_version(self, latest: Snapshot | None, requirement: Requirement) -> int:
        """Return a version for the next snapshot: it is larger than `latest`, and meets the requirement."""
        latest_version = 0 if latest is None else max(latest.version, latest.revision)
        return max(version_now(), latest_version + 1, requirement.newer_than + 1, requirement.seen_revision)

    def keep_seconds(self, snapshot: Snapshot) -> float:
        """Return how long a snapshot is kept after it was fetched, in seconds."""
        if snapshot.key.operation.is_result:  # it may be large (1 MiB), and has no progress to remember
            return snapshot.lifetime + self._min_keep_stale_seconds
        return snapshot.lifetime + max(self._min_keep_stale_seconds, REMEMBER_SECONDS)

    def __len__(self) -> int:
        """See `Store.__len__`."""
        return self._snapshots.count()

    def size(self) -> int:
        """See `Store.size`."""
        return self._snapshots.bytes() + self._failures.bytes()

    def _make_room(self, cache: _ByteSizedCache, size: int) -> bool:
        """Evict entries until one more of this size fits; return whether it can fit."""
        if size > self._max_bytes:
            return False
        if cache.count() < self._max_tasks and self.size() + size <= self._max_bytes:
            return True
        self._failures.expire()
        self._snapshots.expire()
        while cache.count() >= self._max_tasks:
            cache.popitem()
        while self.size() + size > self._max_bytes:
            (self._failures if self._failures.count() else self._snapshots).popitem()
        return True

    def _expires_at(self, _key: TaskKey, entry: CacheEntry, _now: float) -> float:
        return entry.snapshot.fetched_at + self.keep_seconds(entry.snapshot)


def _entry_bytes(entry: CacheEntry) -> int:
    return _snapshot_bytes(entry.snapshot)


def _snapshot_bytes(snapshot: Snapshot) -> int:
    return len(snapshot.envelope) + len(snapshot.body) + ENTRY_OVERHEAD_BYTES


def _failure_bytes(error: GatewayError) -> int:
    detail = error.detail if isinstance(error, UpstreamError) else None
    texts = 0 if detail is None else sum(len(text) for text in astuple(detail) if text is not None)
    envelope = error.envelope if isinstance(error, UpstreamRejected) else b""
    return len(envelope) + texts + ENTRY_OVERHEAD_BYTES
