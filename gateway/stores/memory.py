"""The store of a single process: two caches, bounded together in bytes; least recently used go first.

Items outlive their freshness on purpose: a stale snapshot covers upstream failures, keeps the
high-water mark of a running task's progress, and remembers that a task has ended. Freshness
is the snapshot's own business. Event-loop thread only: cachetools takes no locks.
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

# For this long after its freshness a task's story is remembered: a caller who comes back within
# the hour sees progress that fell, or a finished task that runs, never.
MEMORY_SECONDS = 3600.0


# What an entry costs beside its bodies: its objects, keys and places in the caches, rounded up (tracemalloc
# says 0.7 KB of a snapshot and 0.9 KB of a failure, under Python 3.11).
ENTRY_BYTES = 1024
_EXPIRE_SECONDS = 1.0  # between two removals of what has expired, unless something is stored


class _Kept(TLRUCache[TaskKey, Any]):
    """Entries whose sizes are in bytes. `entries` and `bytes` change nothing: any thread may ask."""

    def entries(self) -> int:
        """Return the number of entries, those included that have expired since the last change."""
        return Cache.__len__(self)

    def bytes(self) -> int:
        """Return the size of all entries."""
        size: int = Cache.currsize.fget(self)  # type: ignore[attr-defined]  # a property
        return size


class _Snapshots(_Kept):
    """Notes on a snapshot that has to make room that it is shown no more."""

    def untouched(self) -> list[Snapshot]:
        """Return all, none of which is the more recently used for it."""
        return [Cache.__getitem__(self, key) for key in self]

    def popitem(self) -> tuple[TaskKey, Snapshot]:
        """Remove the least recently used one."""
        key, snapshot = super().popitem()
        snapshot.shown_until = -math.inf
        return key, snapshot


class MemoryStore:
    """Keeps up to `max_tasks` snapshots, each until its staleness is of no more use, and as many failures.

    `max_bytes` bounds bodies and envelopes of all together, and `ENTRY_BYTES` for each; failures, which are
    remembered for a moment, make room first. What is larger by itself is not kept. `stale_seconds`: how long
    after its freshness a snapshot may still be shown.
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
        self._snapshots = _Snapshots(max_bytes, self._forget_at, timer=clock, getsizeof=_snapshot_bytes)
        self._failures = _Kept(
            max_bytes,
            lambda _key, failure, now: now + failure[1],
            timer=clock,
            getsizeof=lambda failure: _failure_bytes(failure[0]),
        )
        self._failures_end = -math.inf  # from when on none is remembered
        self._expire_at = -math.inf

    async def __aenter__(self) -> Self:
        """See `Store`: nothing is to be opened."""
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """See `Store`: nothing is open."""

    def peek(self, key: TaskKey) -> Snapshot | None:
        """See `Store.peek`: nobody else stores anything, so there is none to miss."""
        try:
            snapshot: Snapshot = self._snapshots[key]
        except KeyError:
            now = self._clock()
            if now >= self._expire_at:  # each look at what is first to expire takes a microsecond
                self._expire_at = now + _EXPIRE_SECONDS
                self._snapshots.expire()
            return None
        return snapshot

    def is_current(self, snapshot: Snapshot, now: float) -> bool:
        """See `Store.is_current`."""
        return now < snapshot.shown_until

    def peek_stale(self, key: TaskKey) -> Snapshot | None:
        """See `Store.peek_stale`."""
        return self.peek(key)

    def latest(self, key: TaskKey) -> Snapshot | None:
        """See `Store.latest`."""
        return self.peek(key)

    def failure(self, key: TaskKey) -> GatewayError | None:
        """See `Store.failure`."""
        if self._clock() >= self._failures_end:  # the rule, at a tenth of the cost
            return None
        failure = self._failures.get(key)
        return None if failure is None else failure[0]

    async def sync(self) -> bool:
        """See `Store.sync`: it is never behind."""
        return False

    async def acquire(
        self, key: TaskKey, *, after: int | None = None, timeout_seconds: float = math.inf
    ) -> Snapshot | GatewayError | Lease:
        """See `Store.acquire`: the lease is always ours, for a task has one flight at a time."""
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
        """See `Store.abandon`: there is nobody who would wait for it."""

    async def token(self, per_second: float, *, saved: float, timeout_seconds: float) -> float:
        """See `Store.token`: nobody else takes any."""
        return 0.0

    async def announce_throttling(self, retry_after: float | None) -> None:
        """See `Store.announce_throttling`: there is nobody to tell."""

    def on_throttled(self, listener: Callable[[float | None], None]) -> None:
        """See `Store.on_throttled`: there is nobody who would tell."""

    def on_change(self, listener: Callable[[Snapshot], None]) -> None:
        """See `Store.on_change`."""
        self._listeners.append(listener)

    def keep(self, snapshot: Snapshot) -> Snapshot:
        """Keep a snapshot as `commit` does, without a lease."""
        kept = self.peek(snapshot.key)
        if kept is not None and (
            kept.version > snapshot.version or (kept.terminal and not snapshot.terminal)
        ):
            return kept
        if kept is not None:
            kept.shown_until = -math.inf
            del self._snapshots[snapshot.key]
        if self._make_room(self._snapshots, _snapshot_bytes(snapshot)):
            self._snapshots[snapshot.key] = snapshot
        if self._clock() < self._failures_end:
            self._failures.pop(snapshot.key, None)
        for listener in self._listeners:
            listener(snapshot)
        return snapshot

    def keep_failure(self, key: TaskKey, error: GatewayError, *, seconds: float) -> None:
        """Remember a failure as `fail` does, without a lease."""
        self._failures.pop(key, None)
        if self._make_room(self._failures, _failure_bytes(error)):
            self._failures[key] = (error, seconds)
        self._failures_end = max(self._failures_end, self._clock() + seconds)

    def snapshots(self) -> list[Snapshot]:
        """Return all snapshots; which of them are used is not touched."""
        return self._snapshots.untouched()

    def keep_seconds(self, snapshot: Snapshot) -> float:
        """Return for how long after its fetching a snapshot is kept."""
        # A result may be a megabyte and has no story to remember.
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

    def _make_room(self, cache: _Kept, size: int) -> bool:
        """Remove what is in the way of one more entry; tell whether there is room for it."""
        if size > self._max_bytes:
            return False
        self._failures.expire()
        self._snapshots.expire()
        while cache.entries() >= self._max_tasks:
            cache.popitem()
        while self.size() + size > self._max_bytes:
            (self._failures if self._failures.entries() else self._snapshots).popitem()
        return True

    def _forget_at(self, _key: TaskKey, snapshot: Snapshot, _now: float) -> float:
        return snapshot.fetched_at + self.keep_seconds(snapshot)


def _snapshot_bytes(snapshot: Snapshot) -> int:
    return len(snapshot.envelope) + len(snapshot.body) + ENTRY_BYTES


def _failure_bytes(error: GatewayError) -> int:
    said = error.detail if isinstance(error, UpstreamError) else None
    texts = 0 if said is None else sum(len(text) for text in astuple(said) if text is not None)
    envelope = error.envelope if isinstance(error, UpstreamRejected) else b""
    return len(envelope) + texts + ENTRY_BYTES
