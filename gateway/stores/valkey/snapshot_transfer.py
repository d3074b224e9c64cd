"""Reads and writes snapshots on the server, and puts the server's newer snapshots into memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import structlog
from msgspec.structs import replace

from gateway.domain.entity_tag import EntityTags
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import Status, TaskKey
from gateway.stores.base import CacheEntry
from gateway.stores.memory import MemoryStore
from gateway.stores.valkey.codec import (
    MICROS_PER_SECOND,
    InvalidStoredValue,
    StoredMetadata,
    decode_snapshot,
)
from gateway.stores.valkey.connection import StoreConnection, StoreUnavailable
from gateway.stores.valkey.metric_labels import StoreOperationLabel
from gateway.stores.valkey.operations import Reply, StoreOperations
from gateway.telemetry.log_sampling import LogSampler
from gateway.telemetry.metrics import Metrics

log = structlog.get_logger(__name__)


class SnapshotTransfer:
    """Moves snapshots between the server and this process.

    `memory`: the cache of this process. `ValkeyStore` is a subclass of `MemoryStore`, and passes itself.

    `lifetimes`: how long snapshots are fresh here, in seconds, by status; the key None is for results.
    """

    def __init__(
        self,
        memory: MemoryStore,
        *,
        connection: StoreConnection,
        operations: StoreOperations,
        tags: EntityTags,
        lifetimes: Mapping[Status | None, float],
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._memory = memory
        self._connection = connection
        self._operations = operations
        self._tags = tags
        self._lifetimes = lifetimes
        self._metrics = metrics
        self._clock = clock
        self._log_sampler = LogSampler(clock=clock)
        self._being_written: set[tuple[TaskKey, int]] = set()

    async def load(self, key: TaskKey) -> None:
        """Read the snapshot of a task into memory. Raises: StoreUnavailable, InvalidStoredValue."""
        entry = self._memory.entry(key)
        known_version = 0 if entry is None else entry.snapshot.version
        self.merge_reply(key, await self._operations.read(key, known_version=known_version))

    async def write(self, lease_token: str, snapshot: Snapshot, *, known_version: int) -> Reply:
        """Run `commit.lua`; it announces the snapshot. Raises: StoreUnavailable, InvalidStoredValue.

        `known_version`: the newest version that was known when the snapshot was built.
        """
        written = snapshot.key, snapshot.version
        self._being_written.add(written)
        try:
            return await self._operations.commit(
                lease_token,
                snapshot,
                known_version=known_version,
                age=self._clock() - snapshot.fetched_at,
                keep_seconds=self._memory.keep_seconds(snapshot),
            )
        finally:
            self._being_written.discard(written)

    def is_being_written(self, key: TaskKey, version: int) -> bool:
        """Tell whether this replica writes the snapshot now: its announcement may arrive before the reply."""
        return (key, version) in self._being_written

    def merge_reply(self, key: TaskKey, reply: Reply) -> Snapshot | None:
        """Store the snapshot of a reply in memory if it `supersedes` the present one.

        If the reply's snapshot is not terminal, and it is unknown which of the two is newer, keep the present
        one and require a new query. In all cases, return the snapshot that is in memory at the end; None if
        there is none. Raises: InvalidStoredValue.
        """
        entry, metadata = self._memory.entry(key), reply.metadata
        if entry is not None and not supersedes(metadata, entry.snapshot):
            # The server has nothing newer than the present snapshot. It is outdated if it needs a newer
            # one (`required_version`), for example one that the server has lost.
            entry.outdated = entry.required_version > entry.snapshot.version
            return entry.snapshot
        if not reply.value:  # the server has no snapshot, or the same one as this process
            return None if entry is None else entry.snapshot
        snapshot = decode_snapshot(
            reply.value,
            key,
            metadata,
            fetched_at=self._fetched_at(metadata),
            lifetimes=self._lifetimes,
            tags=self._tags,
        )
        if (
            entry is not None
            and not snapshot.terminal
            and is_order_unknown(entry.snapshot, snapshot.version, snapshot.revision)
        ):
            mark_outdated(entry)
            return entry.snapshot
        return self._memory.put(snapshot, fetched_here=False)

    def put_with_same_body(self, known: Snapshot, metadata: StoredMetadata) -> None:
        """Store an announced snapshot that has the body of a known one, without reading it again."""
        announced = replace(
            known,
            fetched_at=self._fetched_at(metadata),
            lifetime=min(self._lifetimes[known.status], metadata.lifetime / MICROS_PER_SECOND),
            version=metadata.version,
        )
        self._memory.put(announced, fetched_here=False)

    async def delete_invalid(self, key: TaskKey, reason: InvalidStoredValue) -> None:
        """Log that a value is invalid, and delete everything that the server has about its task."""
        self._metrics.store_errors.labels(StoreOperationLabel.READ).inc()
        if (suppressed := self._log_sampler.take("read")) is not None:
            log.warning("invalid_stored_value", reason=str(reason), suppressed=suppressed)
        with suppress(StoreUnavailable):
            await self._operations.delete(key)

    def _fetched_at(self, metadata: StoredMetadata) -> float:
        # The age was computed on the server. Since then, up to a whole round trip has passed.
        return metadata.fetched_at(self._clock()) - self._connection.round_trip_seconds


def supersedes(metadata: StoredMetadata, snapshot: Snapshot) -> bool:
    """Tell whether a stored snapshot supersedes one in memory.

    If only one of the two is terminal, that one supersedes the other. Otherwise the newer one does.
    """
    if bool(metadata.terminal) is not snapshot.terminal:
        return bool(metadata.terminal)
    return metadata.version > snapshot.version


def is_order_unknown(known: Snapshot, version: int, revision: int) -> bool:
    """Tell whether it is unknown which of two snapshots has the newer body.

    `version` and `revision` are those of the other snapshot; its version is the larger one. Its body is newer
    if its query began after the known body had arrived (`version` is larger than `known.revision`).
    Otherwise the two queries may have overlapped: leases prevent this, unless the server has lost a lease or
    cannot be reached. If the bodies are equal, neither is newer.
    """
    return revision != known.revision and version <= known.revision


def mark_outdated(entry: CacheEntry) -> None:
    """Mark an entry as outdated, and accept only snapshots of queries that began after its body had arrived.

    The revision of a body is the time at which it arrived. The version of a snapshot is the time at which its
    lease was requested, just before the query.
    """
    entry.outdated = True
    entry.required_version = max(entry.required_version, entry.snapshot.revision + 1)
