"""The shared store of several replicas: each has a local cache, and a server has the shared data.

    hit     -> read the local cache; no operation on the server
    acquire -> one operation: returns a fresh snapshot, a failure, the lease, or "held" with the time left
    held    -> another replica has the lease: wait for its message or the end of the lease, then acquire again
    commit  -> one operation: stores and announces the snapshot, ends the lease

Every stored snapshot is announced with a small message (`message_handler.py`). A replica with an older
snapshot of the task reads the new one at once if the task is read or watched there, otherwise when it is next
needed. A snapshot with an unchanged body is not read again.

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
from typing import Any, Self

from gateway.domain.entity_tag import EntityTags
from gateway.domain.errors import GatewayError, UpstreamTimeout
from gateway.domain.permits_reply import PermitsReply
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import Status, TaskKey
from gateway.settings.store_section import Store as StoreSettings
from gateway.stores.base import ANY_FRESH, CacheEntry, Lease, Requirement
from gateway.stores.memory import MemoryStore
from gateway.stores.valkey.codec import MICROS_PER_SECOND, InvalidStoredValue, decode_failure, encode_failure
from gateway.stores.valkey.connection import StoreConnection, StoreUnavailable
from gateway.stores.valkey.lease_waiters import LeaseWaiters
from gateway.stores.valkey.leases import LEASE_SECONDS, Leases
from gateway.stores.valkey.message_handler import MessageHandler
from gateway.stores.valkey.operations import StoreOperations
from gateway.stores.valkey.snapshot_transfer import SnapshotTransfer, is_order_unknown, mark_outdated
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.redaction import Redactor

_MARGIN_SECONDS = 0.01  # wait so much longer than the lease, so that it has expired on the server
_MAX_ATTEMPTS = 5  # of one operation, if other replicas change the task or a stored value is invalid


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
        self._error_seconds = error_seconds
        self._replica = uuid.uuid4().hex
        self._up_to_date_until = math.inf  # until then, on the monotonic clock, all messages have been read
        self._tasks: set[asyncio.Task[None]] = set()
        self._connection = StoreConnection(
            settings,
            identity=identity,
            redactor=redactor,
            metrics=metrics,
            on_up_to_date=self._set_up_to_date_until,
        )
        self._operations = StoreOperations(self._connection, lease_seconds=LEASE_SECONDS)
        self._leases = Leases(self._operations)
        self._waiters = LeaseWaiters()
        self._shared_snapshots = SnapshotTransfer(
            self,
            connection=self._connection,
            operations=self._operations,
            tags=tags,
            lifetimes=lifetimes,
            metrics=metrics,
            clock=clock,
        )
        self._messages = MessageHandler(
            self,
            connection=self._connection,
            snapshots=self._shared_snapshots,
            leases=self._leases,
            waiters=self._waiters,
            start=self._start,
        )

    @property
    def trouble(self) -> str | None:
        """See `Store`."""
        return self._connection.trouble

    @property
    def starting(self) -> bool:
        """See `Store`."""
        return self._connection.starting

    async def __aenter__(self) -> Self:
        """Start to connect in the background."""
        self._start(self._connection.keep_open(self._messages))
        self._start(self._leases.run())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close every connection."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def current_entry(self, key: TaskKey) -> CacheEntry | None:
        """See `Store.current_entry`."""
        entry = self.entry(key)
        return entry if entry is not None and self.is_current(entry) else None

    def is_current(self, entry: CacheEntry) -> bool:
        """See `Store.is_current`."""
        return not entry.outdated and time.monotonic() < self._up_to_date_until

    async def read_arrived_messages(self) -> bool:
        """See `Store.read_arrived_messages`."""
        return await self._connection.read_arrived_messages()

    async def load_announced_snapshot(self, key: TaskKey) -> bool:
        """See `Store.load_announced_snapshot`."""
        return await self._messages.load_announced_snapshot(key)

    def add_snapshot_listener(
        self, listener: Callable[[Snapshot], None], *, is_watched: Callable[[TaskKey], bool] = lambda _: False
    ) -> None:
        """See `Store.add_snapshot_listener`."""
        super().add_snapshot_listener(listener)
        self._messages.add_watch_check(is_watched)

    def add_throttling_listener(self, listener: Callable[[float | None], None]) -> None:
        """See `Store.add_throttling_listener`."""
        self._messages.add_throttling_listener(listener)

    async def acquire(
        self, key: TaskKey, requirement: Requirement = ANY_FRESH, *, timeout_seconds: float = math.inf
    ) -> Snapshot | GatewayError | Lease:
        """See `Store.acquire`."""
        deadline = self._clock() + timeout_seconds
        invalid_values = 0
        while True:
            # Registered before the operation, so that a message between the operation and its reply is not
            # missed.
            with self._waiters.next_message(key) as message:
                token = uuid.uuid4().hex
                try:
                    outcome = await self._acquire_once(key, requirement, token)
                except (StoreUnavailable, asyncio.CancelledError) as exc:
                    if self._connection.up:  # the server may have granted the lease
                        self._leases.end_in_background(Lease(key, 0, token))
                    if isinstance(exc, asyncio.CancelledError):
                        raise
                    return self._acquire_locally(key, requirement)
                except InvalidStoredValue as exc:
                    await self._shared_snapshots.delete_invalid(key, exc)
                    invalid_values += 1
                    outcome = 0.0
                if not isinstance(outcome, float):
                    return outcome
                left = deadline - self._clock()
                if left <= 0:
                    return UpstreamTimeout("another replica's query did not end in time")
                if invalid_values == _MAX_ATTEMPTS:
                    return self._acquire_locally(key, requirement)
                if outcome:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(min(outcome, left)):
                            await message

    async def commit(self, lease: Lease, build: Callable[[Snapshot | None], Snapshot]) -> Snapshot | None:
        """See `Store.commit`."""
        previous = self.last_known(lease.key)
        snapshot = build(previous)
        known_version = 0 if previous is None else previous.version
        for _ in range(_MAX_ATTEMPTS):
            try:
                reply = await self._shared_snapshots.write(lease.token, snapshot, known_version=known_version)
                if reply.kind == b"stored":
                    return self._put_fetched(lease, snapshot)
                self._shared_snapshots.merge_reply(lease.key, reply)
            except StoreUnavailable:
                if lease.token and self._connection.up:
                    self._leases.end_in_background(lease)
                self._messages.restore_later(lease.key)
                break
            except InvalidStoredValue as exc:
                await self._shared_snapshots.delete_invalid(lease.key, exc)
                continue
            previous = self.last_known(lease.key)
            if reply.kind == b"refused":
                self._leases.forget(lease)
                return previous if previous is not None and previous.fresh(self._clock()) else None
            # The reply is "follow": the server has a newer snapshot. Build this one again as its successor.
            snapshot = build(previous)
            known_version = max(known_version, reply.metadata.version)
        else:
            self._leases.end_in_background(lease)
        return self._put_fetched(lease, snapshot)

    async def store_failure(self, lease: Lease, error: GatewayError, *, seconds: float) -> None:
        """See `Store.store_failure`."""
        self.put_failure(lease.key, error, seconds=seconds)
        await self._end_lease(lease, encode_failure(lease.key, error), seconds)

    async def release_lease(self, lease: Lease) -> None:
        """See `Store.release_lease`."""
        await self._end_lease(lease)

    def release_lease_early(self, lease: Lease) -> None:
        """See `Store.release_lease_early`."""
        if self._leases.stop_renewing(lease):
            self._leases.end_in_background(lease)

    async def take_permits(
        self, per_second: float, *, burst: float, refreshes: int, first_queries: int
    ) -> PermitsReply | None:
        """See `Store.take_permits`."""
        with suppress(StoreUnavailable):
            return await self._operations.take_permits(
                self._replica, per_second, burst=burst, refreshes=refreshes, first_queries=first_queries
            )
        return None

    async def announce_throttling(self, retry_after: float | None) -> None:
        """See `Store.announce_throttling`."""
        with suppress(StoreUnavailable):
            await self._operations.announce_throttling(
                None if retry_after is None else math.ceil(retry_after)
            )

    async def _acquire_once(
        self, key: TaskKey, requirement: Requirement, token: str
    ) -> Snapshot | GatewayError | Lease | float:
        """Run `acquire.lua`. If the result is a number, acquire again after so many seconds or a message.

        Raises: StoreUnavailable, InvalidStoredValue.
        """
        local = self._acquire_locally(key, requirement)
        if not isinstance(local, Lease):
            return local
        entry = self.entry(key)
        known_version = 0 if entry is None else entry.snapshot.version
        min_version = requirement.newer_than + 1
        if entry is not None:
            # If this replica's snapshot is stale by the clock of the replica, a newer one is required.
            stale = not entry.snapshot.fresh(self._clock())
            min_version = max(
                min_version, entry.required_version, known_version + 1 if stale else known_version
            )
        reply = await self._operations.acquire(
            key,
            token,
            known_version=known_version,
            min_version=min_version,
            seen_revision=requirement.seen_revision,
            next_version=max(local.version, min_version),
            error_seconds=self._error_seconds,
        )
        snapshot = self._shared_snapshots.merge_reply(key, reply)
        match reply.kind:
            case b"fresh" if snapshot is not None:
                entry = self.entry(key)
                overlapped = entry is not None and entry.required_version > snapshot.version
                if snapshot.terminal or (snapshot.fresh(self._clock()) and not overlapped):
                    return snapshot
                # The task must be queried, because the stored snapshot is no longer fresh on this replica, or
                # because the queries for it and for this replica's snapshot have overlapped.
                newer = requirement._replace(newer_than=reply.metadata.version)
                return await self._acquire_once(key, newer, token)
            case b"failure":
                failure = decode_failure(reply.failure, key)
                seconds = min(reply.number / MICROS_PER_SECOND, self._error_seconds)
                self.put_failure(key, failure, seconds=seconds)
                return failure
            case b"held":
                return min(reply.number / MICROS_PER_SECOND, LEASE_SECONDS) + _MARGIN_SECONDS
            case b"lease" if reply.number > 0:
                return self._leases.hold(Lease(key, reply.number, token))
        raise StoreUnavailable("invalid reply of a script")

    def _acquire_locally(self, key: TaskKey, requirement: Requirement) -> Snapshot | GatewayError | Lease:
        """Return a result from the local cache, or a lease that exists in this process only."""
        current = self.current_entry(key)
        if current is not None:
            snapshot = current.snapshot
            if snapshot.fresh(self._clock()) and requirement.is_met_by(snapshot):
                return snapshot
        entry = self.entry(key)
        required = 0 if entry is None else entry.required_version
        version = max(self.next_version(self.last_known(key), requirement), required)
        return self.cached_failure(key) or Lease(key, version)

    def _put_fetched(self, lease: Lease, snapshot: Snapshot) -> Snapshot | None:
        """Put a fetched snapshot into memory; return None if another replica's may be newer.

        That happens if the server was not available, or has evicted the task and its lease, during the query.
        """
        required = self._leases.newest_announcement(lease)
        self._leases.forget(lease)
        entry = self.entry(lease.key)
        if (
            entry is not None
            and not entry.fetched_here  # this replica's own queries do not overlap
            and not snapshot.terminal
            and is_order_unknown(entry.snapshot, snapshot.version, snapshot.revision)
        ):
            mark_outdated(entry)
            return None
        kept = self.put(snapshot)
        entry = self.entry(lease.key)
        if entry is not None:
            required = max(required, entry.required_version)
        return kept if kept.terminal or required <= kept.version else None

    async def _end_lease(self, lease: Lease, failure: bytes = b"", seconds: float = 0.0) -> None:
        if self._leases.forget(lease):
            try:
                await self._operations.end_lease(lease, failure, seconds)
            except StoreUnavailable:
                if self._connection.up:
                    self._leases.end_in_background(lease)

    def _set_up_to_date_until(self, moment: float) -> None:
        self._up_to_date_until = moment

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
