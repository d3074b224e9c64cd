"""The shared store of several replicas: each has a local cache, and a server has the shared data.

    hit     -> read the local cache; no operation on the server
    acquire -> one operation: returns a fresh snapshot, a failure, the lease, or "held" with the time left
    held    -> another replica has the lease: wait for its message or the end of the lease, then acquire again
    commit  -> one operation: stores and announces the snapshot, ends the lease

Every stored snapshot is announced with a small message. A replica with an older snapshot of the task loads
the new one at once if the task is read or watched there, otherwise when it is next needed. An unchanged body
is not loaded again.

A replica that may have missed messages does not use its cache until it has read them, or has asked the server
about the task. While the server is not available, each replica uses its local cache only.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Self

import structlog

from gateway.domain.entity_tag import EntityTags
from gateway.domain.errors import GatewayError, UpstreamTimeout
from gateway.domain.permits import Permits
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import Status, TaskKey
from gateway.settings.model import Store as StoreSettings
from gateway.stores.base import ANY, CacheEntry, Lease, Wanted
from gateway.stores.memory import MemoryStore
from gateway.stores.valkey.announcements import Announcement, Throttled, Waiters, parse
from gateway.stores.valkey.codec import (
    MICROSECONDS,
    InvalidStoredValue,
    StoredSnapshot,
    decode_failure,
    decode_snapshot,
    encode_failure,
)
from gateway.stores.valkey.connection import StoreConnection, StoreUnavailable
from gateway.stores.valkey.leases import Leases
from gateway.stores.valkey.operations import LEASE_SECONDS, Reply, StoreOperations
from gateway.telemetry.log_sampling import LogSampler
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.redaction import Redactor

_MARGIN_SECONDS = 0.01  # wait so much longer than the lease, so that it has expired on the server
_MAX_ATTEMPTS = 5  # of one operation, if other replicas change the task or a stored value is invalid
_MAX_UNSYNCED = 10_000  # tasks to store when the server is available again; the others are not stored

log = structlog.get_logger(__name__)


class ValkeyStore(MemoryStore):
    """A memory store that shares its snapshots, failures and permits with other replicas.

    `lifetimes`: how long snapshots are fresh here, in seconds, by status; results are under None.
    `error_seconds`: how long failures are cached here. `identity` names the endpoint and account. The limits
    are those of `MemoryStore`.
    """

    def __init__(
        self,
        settings: StoreSettings,
        *,
        tags: EntityTags,
        lifetimes: Mapping[Status | None, float],
        error_seconds: float,
        identity: Callable[[], str],
        redactor: Redactor,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        **limits: Any,
    ) -> None:
        super().__init__(clock=clock, **limits)
        self._tags = tags
        self._lifetimes = lifetimes
        self._error_seconds = error_seconds
        self._metrics = metrics
        self._log_sampler = LogSampler(clock=clock)
        self._connection = StoreConnection(
            settings,
            identity=identity,
            redactor=redactor,
            metrics=metrics,
            on_message=self._receive,
            on_change=self._on_connection_change,
            on_usable=self._store_unsynced,
            on_current=self._set_current,
        )
        self._operations = StoreOperations(self._connection)
        self._leases = Leases(self._operations)
        self._current_until = math.inf  # on the monotonic clock: no message is unread until then
        self._replica = uuid.uuid4().hex
        self._waiters = Waiters()
        self._unsynced: set[TaskKey] = set()
        self._announced: dict[TaskKey, int] = {}  # by others, while this replica holds the lease
        self._committing: set[tuple[TaskKey, int]] = set()
        self._throttled: list[Callable[[float | None], None]] = []
        self._wanted: list[Callable[[TaskKey], bool]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def trouble(self) -> str | None:
        """See `Store`."""
        return self._connection.trouble

    async def __aenter__(self) -> Self:
        """Start to connect in the background."""
        self._start(self._connection.keep_open())
        self._start(self._leases.run())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close every connection."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def peek(self, key: TaskKey) -> CacheEntry | None:
        """See `Store.peek`."""
        entry = self.entry(key)
        return entry if entry is not None and self.is_current(entry) else None

    def is_current(self, entry: CacheEntry) -> bool:
        """See `Store.is_current`."""
        return entry.current and time.monotonic() < self._current_until

    async def sync(self) -> bool:
        """See `Store.sync`."""
        return await self._connection.catch_up()

    def on_change(
        self, listener: Callable[[Snapshot], None], *, wanted: Callable[[TaskKey], bool] = lambda _: False
    ) -> None:
        """See `Store.on_change`."""
        super().on_change(listener)
        self._wanted.append(wanted)

    def on_throttled(self, listener: Callable[[float | None], None]) -> None:
        """See `Store.on_throttled`."""
        self._throttled.append(listener)

    async def acquire(
        self, key: TaskKey, wanted: Wanted = ANY, *, timeout_seconds: float = math.inf
    ) -> Snapshot | GatewayError | Lease:
        """See `Store.acquire`."""
        deadline = self._clock() + timeout_seconds
        attempts = 0
        while True:
            # Registered before the operation: a message between the operation and its reply must not be
            # missed.
            with self._waiters.message_about(key) as message:
                token = uuid.uuid4().hex
                try:
                    outcome = await self._ask(key, wanted, token)
                except (StoreUnavailable, asyncio.CancelledError) as exc:
                    if self._connection.up:  # the server may have granted the lease
                        self._leases.release(Lease(key, 0, token))
                    if isinstance(exc, asyncio.CancelledError):
                        raise
                    return self._local_result(key, wanted)
                except InvalidStoredValue as exc:
                    await self._discard(key, exc)
                    outcome, attempts = 0.0, attempts + 1
                if not isinstance(outcome, float):
                    return outcome
                left = deadline - self._clock()
                if left <= 0:
                    return UpstreamTimeout("another replica's query did not end in time")
                if attempts == _MAX_ATTEMPTS:
                    return self._local_result(key, wanted)
                if outcome:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(min(outcome, left)):
                            await message

    async def commit(self, lease: Lease, build: Callable[[Snapshot | None], Snapshot]) -> Snapshot | None:
        """See `Store.commit`."""
        previous = self.peek_any(lease.key)
        snapshot = build(previous)
        for _ in range(_MAX_ATTEMPTS):
            try:
                reply = await self._commit(lease.token, snapshot, follows=previous)
                if reply.kind == b"stored":
                    self._leases.drop(lease)
                    return self._unless_superseded(self.keep(snapshot), lease)
                self._apply(lease.key, reply)
            except StoreUnavailable:
                if lease.token and self._connection.up:
                    self._leases.release(lease)
                if len(self._unsynced) < _MAX_UNSYNCED:
                    self._unsynced.add(lease.key)
                break
            except InvalidStoredValue as exc:
                await self._discard(lease.key, exc)
                continue
            previous = self.peek_any(lease.key)
            if reply.kind == b"refused":
                self._announced.pop(lease.key, None)
                self._leases.drop(lease)
                return previous if previous is not None and previous.fresh(self._clock()) else None
            snapshot = build(previous)
        else:
            self._leases.release(lease)
        self._announced.pop(lease.key, None)
        self._leases.drop(lease)
        return self.keep(snapshot)

    def _unless_superseded(self, snapshot: Snapshot, lease: Lease) -> Snapshot | None:
        """Return None if another replica has announced a newer snapshot while this one was fetched.

        That happens if the server has evicted the task, and its lease with it.
        """
        entry = self.entry(lease.key)
        announced = max(self._announced.pop(lease.key, 0), 0 if entry is None else entry.superseded_by)
        return snapshot if snapshot.terminal or announced <= snapshot.version else None

    async def fail(self, lease: Lease, error: GatewayError, *, seconds: float) -> None:
        """See `Store.fail`."""
        self.keep_failure(lease.key, error, seconds=seconds)
        await self._end(lease, encode_failure(lease.key, error), seconds)

    async def abandon(self, lease: Lease) -> None:
        """See `Store.abandon`."""
        await self._end(lease)

    def release(self, lease: Lease) -> None:
        """See `Store.release`."""
        if self._leases.drop(lease):
            self._leases.release(lease)

    async def take_permits(
        self, per_second: float, *, burst: float, renewals: int, first_queries: int
    ) -> Permits | None:
        """See `Store.take_permits`."""
        with suppress(StoreUnavailable):
            return await self._operations.take_permits(
                self._replica, per_second, burst=burst, renewals=renewals, first_queries=first_queries
            )
        return None

    async def announce_throttling(self, retry_after: float | None) -> None:
        """See `Store.announce_throttling`."""
        with suppress(StoreUnavailable):
            await self._operations.announce_throttling(
                None if retry_after is None else math.ceil(retry_after)
            )

    async def _ask(self, key: TaskKey, wanted: Wanted, token: str) -> Snapshot | GatewayError | Lease | float:
        """Run `acquire.lua`. If the result is a number, acquire again after so many seconds or a message.

        Raises: StoreUnavailable, InvalidStoredValue.
        """
        local = self._local_result(key, wanted)
        if not isinstance(local, Lease):
            return local
        entry = self.entry(key)
        known = 0 if entry is None else entry.snapshot.version
        least = wanted.newer_than + 1
        if entry is not None:
            # If this replica's snapshot is stale by its own clock, only a newer one is a result.
            stale = not entry.snapshot.fresh(self._clock())
            least = max(least, entry.superseded_by, known + 1 if stale else known)
        next_version = max(local.version, least)
        reply = await self._operations.acquire(
            key,
            token,
            known=known,
            least=least,
            seen_revision=wanted.seen_revision,
            next_version=next_version,
            error_seconds=self._error_seconds,
        )
        snapshot = self._apply(key, reply)
        match reply.kind:
            case b"fresh" if snapshot is not None:
                if snapshot.fresh(self._clock()) or snapshot.terminal:
                    return snapshot
                # It is stale here: its lifetime is shorter on this replica, or has ended on the way.
                return await self._ask(key, wanted._replace(newer_than=reply.stored.version), token)
            case b"failure":
                failure = decode_failure(reply.failure, key)
                seconds = min(reply.number / MICROSECONDS, self._error_seconds)
                self.keep_failure(key, failure, seconds=seconds)
                return failure
            case b"held":
                return min(reply.number / MICROSECONDS, LEASE_SECONDS) + _MARGIN_SECONDS
            case b"lease" if reply.number > 0:
                self._announced[key] = 0
                return self._leases.hold(Lease(key, reply.number, token))
        raise StoreUnavailable("invalid reply of a script")

    async def _commit(self, token: str, snapshot: Snapshot, *, follows: Snapshot | None) -> Reply:
        committing = snapshot.key, snapshot.version  # its own message may arrive before the reply
        self._committing.add(committing)
        try:
            return await self._operations.commit(
                token,
                snapshot,
                follows=0 if follows is None else follows.version,
                age=self._clock() - snapshot.fetched_at,
                keep_seconds=self.keep_seconds(snapshot),
            )
        finally:
            self._committing.discard(committing)

    async def _end(self, lease: Lease, failure: bytes = b"", seconds: float = 0.0) -> None:
        self._announced.pop(lease.key, None)
        if self._leases.drop(lease):
            try:
                await self._operations.finish(lease, failure, seconds)
            except StoreUnavailable:
                if self._connection.up:
                    self._leases.release(lease)

    def _local_result(self, key: TaskKey, wanted: Wanted) -> Snapshot | GatewayError | Lease:
        """Return a result from the local cache, or else a lease that the server does not know."""
        entry = self.peek(key)
        cached = None if entry is None else entry.snapshot
        if cached is not None and cached.fresh(self._clock()) and wanted.is_met_by(cached):
            return cached
        version = self.next_version(self.peek_any(key), wanted)
        superseded = self.entry(key)
        announced = 0 if superseded is None else superseded.superseded_by
        return self.failure(key) or Lease(key, max(version, announced))

    def _apply(self, key: TaskKey, reply: Reply) -> Snapshot | None:
        """Store the snapshot of a reply in the local cache, unless it has a newer one; return the newer.

        Raises: InvalidStoredValue.
        """
        entry, stored = self.entry(key), reply.stored
        if entry is not None and not _replaces(stored, entry.snapshot):
            # The server has no newer snapshot. The entry is current unless a newer one was announced and
            # lost.
            entry.current = entry.superseded_by <= entry.snapshot.version
            return entry.snapshot
        if not reply.value:
            return None if entry is None else entry.snapshot
        # The age was computed on the server. Meanwhile up to a whole round trip has passed.
        fetched_at = stored.fetched_at(self._clock()) - self._connection.delay
        snapshot = decode_snapshot(
            reply.value, key, stored, fetched_at=fetched_at, lifetimes=self._lifetimes, tags=self._tags
        )
        return self.keep(snapshot, fetched_here=False)

    async def _discard(self, key: TaskKey, reason: InvalidStoredValue) -> None:
        """Delete everything stored about a task, because a value is invalid."""
        self._metrics.store_errors.labels("read").inc()
        if (suppressed := self._log_sampler.take("read")) is not None:
            log.warning("invalid_stored_value", reason=str(reason), suppressed=suppressed)
        with suppress(StoreUnavailable):
            await self._operations.discard(key)

    def _receive(self, message: bytes) -> None:
        """Apply a message that a replica, possibly this one, has published."""
        match parse(message):
            case Throttled(retry_after):
                for listener in self._throttled:
                    listener(retry_after)
            case Announcement(kind=b"Q", key=key):
                if not key.operation.is_result and self.entry(key) is not None:
                    self._start(self._restore(key))
            case Announcement(_, key, stored, revision):
                if stored is not None and (key, stored.version) not in self._committing:
                    self._follow(key, stored, revision)
                self._waiters.wake(key)

    def _follow(self, key: TaskKey, stored: StoredSnapshot, revision: int) -> None:
        """Apply the message that a snapshot is stored: renew, load or invalidate the entry."""
        if key in self._announced:
            self._announced[key] = max(self._announced[key], stored.version)
        entry = self.entry(key)
        is_wanted = any(wanted(key) for wanted in self._wanted)
        if entry is None:
            if is_wanted and key not in self._waiters:
                self._start(self._load(key))
            return
        snapshot = entry.snapshot
        if not _replaces(stored, snapshot):
            return
        entry.superseded_by = max(entry.superseded_by, stored.version)
        if revision == snapshot.revision and bool(stored.terminal) is snapshot.terminal:
            lifetime = min(self._lifetimes[snapshot.status], stored.lifetime / MICROSECONDS)
            fetched_at = stored.fetched_at(self._clock()) - self._connection.delay
            renewed = replace(snapshot, fetched_at=fetched_at, lifetime=lifetime, version=stored.version)
            self.keep(renewed, fetched_here=False)
            return
        # If this process was paused, the message may be old: then the present snapshot is not served
        # meanwhile.
        entry.current = entry.current and time.monotonic() < self._current_until
        if key in self._waiters:
            return  # a request that waits for the lease will load it
        if entry.reads or is_wanted:
            self._start(self._load(key))
        else:
            entry.current = False

    async def _load(self, key: TaskKey) -> None:
        """Load a newer snapshot into the local cache. The present one, if any, is served until then."""
        entry = self.entry(key)
        try:
            known = 0 if entry is None else entry.snapshot.version
            reply = await self._operations.acquire(
                key, "", known=known, least=0, seen_revision=0, next_version=0, error_seconds=0.0
            )
            self._apply(key, reply)
        except (InvalidStoredValue, StoreUnavailable) as exc:
            if entry is not None and self._connection.up:
                entry.current = False
            if isinstance(exc, InvalidStoredValue):
                await self._discard(key, exc)

    async def _restore(self, key: TaskKey) -> None:
        """Store a snapshot that the server does not have, so that the task's next snapshot follows it."""
        snapshot = self.peek_any(key)
        if snapshot is None:
            return
        try:
            self._apply(key, await self._commit("restore", snapshot, follows=snapshot))
        except StoreUnavailable:
            self._unsynced.add(key)
        except InvalidStoredValue as exc:
            await self._discard(key, exc)

    def _on_connection_change(self) -> None:
        up = self._connection.up
        for entry in self.entries():
            # After a reconnect, messages may have been missed. Without a connection, there are none to miss.
            entry.current = not up
            if not up:
                entry.superseded_by = 0
        self._waiters.wake_all()

    def _set_current(self, until: float) -> None:
        self._current_until = until

    def _store_unsynced(self) -> None:
        while self._unsynced:
            self._start(self._restore(self._unsynced.pop()))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _replaces(stored: StoredSnapshot, snapshot: Snapshot) -> bool:
    """Tell whether a stored snapshot replaces one in memory: it is newer, or only it is terminal."""
    if bool(stored.terminal) is not snapshot.terminal:
        return bool(stored.terminal)
    return stored.version > snapshot.version
