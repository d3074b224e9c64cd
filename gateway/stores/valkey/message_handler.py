"""Applies what arrives from the other replicas: messages, and changes of the connection.

    a snapshot was stored, body unchanged  -> set version, age and lifetime of the one in memory
                           body changed    -> read it now if the task is read or watched here
                                           -> else the one in memory is outdated; the next lookup reads it
                           queries overlap -> the next lookup queries the upstream again
    an older snapshot was stored, or the   -> write the one in memory to the server: it has lost it
    server needs a snapshot
    the connection has come up             -> all entries are outdated: messages may have been missed

The message that a snapshot was stored, or a lease ended, also wakes the in-flight request that waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from gateway.domain.task import TaskKey
from gateway.stores.memory import MemoryStore
from gateway.stores.valkey.codec import InvalidStoredValue, StoredMetadata
from gateway.stores.valkey.connection import StoreConnection, StoreUnavailable
from gateway.stores.valkey.lease_waiters import LeaseWaiters
from gateway.stores.valkey.leases import Leases
from gateway.stores.valkey.messages import (
    SNAPSHOT_MISSING,
    TaskMessage,
    ThrottlingMessage,
    parse_message,
)
from gateway.stores.valkey.snapshot_transfer import (
    SnapshotTransfer,
    is_order_unknown,
    mark_outdated,
    supersedes,
)

_MAX_TO_RESTORE = 10_000  # tasks; further ones are not stored when the server is available again


class MessageHandler:
    """Keeps the local cache, `memory`, up to date. `start` runs work in the background."""

    def __init__(
        self,
        memory: MemoryStore,
        *,
        connection: StoreConnection,
        snapshots: SnapshotTransfer,
        leases: Leases,
        waiters: LeaseWaiters,
        start: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._memory = memory
        self._connection = connection
        self._snapshots = snapshots
        self._leases = leases
        self._waiters = waiters
        self._start = start
        self._to_restore: set[TaskKey] = set()
        self._throttling_listeners: list[Callable[[float | None], None]] = []
        self._watch_checks: list[Callable[[TaskKey], bool]] = []

    def add_throttling_listener(self, listener: Callable[[float | None], None]) -> None:
        """See `Store.add_throttling_listener`."""
        self._throttling_listeners.append(listener)

    def add_watch_check(self, is_watched: Callable[[TaskKey], bool]) -> None:
        """Read announced snapshots of the tasks for which `is_watched` returns True, as soon as possible."""
        self._watch_checks.append(is_watched)

    def on_message(self, message: bytes) -> None:
        """Apply a message that a replica, possibly this one, has published."""
        content = parse_message(message)
        if isinstance(content, ThrottlingMessage):
            for listener in self._throttling_listeners:
                listener(content.retry_after)
        elif isinstance(content, TaskMessage):
            self._receive_task_message(content)

    def restore_later(self, key: TaskKey) -> None:
        """Write the snapshot of a task to the server when operations are possible again."""
        if len(self._to_restore) < _MAX_TO_RESTORE:
            self._to_restore.add(key)

    async def load_announced_snapshot(self, key: TaskKey) -> bool:
        """See `Store.load_announced_snapshot`."""
        entry = self._memory.entry(key)
        if entry is None or entry.required_version <= entry.snapshot.version or not self._connection.up:
            return False
        await self._read(key)
        latest = self._memory.last_known(key)
        return latest is not None and (latest.terminal or latest.version >= entry.required_version)

    def on_usable(self) -> None:
        """Write the snapshots that could not be written before."""
        while self._to_restore:
            self._start(self._restore(self._to_restore.pop()))

    def on_connection_change(self) -> None:
        """Mark all entries as outdated if the connection has come up, because messages may have been missed.

        Without a connection there are no messages to miss, so no entry is outdated.
        """
        up = self._connection.up
        for entry in self._memory.entries():
            entry.outdated = up
            if not up:
                entry.required_version = 0
        self._waiters.wake_all()

    def _receive_task_message(self, message: TaskMessage) -> None:
        key, metadata = message.key, message.metadata
        if message.kind == SNAPSHOT_MISSING:
            if not key.operation.is_result and self._memory.entry_without_use(key) is not None:
                self._start(self._restore(key))
            return
        if metadata is not None and not self._snapshots.is_being_written(key, metadata.version):
            self._apply_announcement(key, metadata, message.revision)
        self._waiters.wake(key)

    def _apply_announcement(self, key: TaskKey, metadata: StoredMetadata, revision: int) -> None:
        """Apply the message that another snapshot is stored: use it, read it, or mark the entry outdated."""
        self._leases.record_announcement(key, metadata.version)
        entry = self._memory.entry_without_use(key)
        watched = any(is_watched(key) for is_watched in self._watch_checks)
        if entry is None:
            if watched and key not in self._waiters:
                self._start(self._read(key))
            return
        snapshot = entry.snapshot
        if not supersedes(metadata, snapshot):
            if metadata.version < snapshot.version and not key.operation.is_result:
                self._start(self._restore(key))  # the server has lost this snapshot or a newer one
            return
        entry.required_version = max(entry.required_version, metadata.version)
        if revision == snapshot.revision and bool(metadata.terminal) is snapshot.terminal:
            self._snapshots.put_with_same_body(snapshot, metadata)
            return
        if not metadata.terminal and is_order_unknown(snapshot, metadata.version, revision):
            mark_outdated(entry)
            return
        if key in self._waiters or not (entry.reads or watched):
            # An in-flight request that waits for the lease reads the new snapshot; it must not find this one.
            entry.outdated = True
            return
        # The present snapshot is served until the new one is read. But after a pause of this process the
        # message may be old, and the present snapshot is not served any more.
        entry.outdated = not self._memory.is_current(entry)
        self._start(self._read(key))

    async def _read(self, key: TaskKey) -> None:
        """Read a newer snapshot into memory. The present one, if any, is served until then."""
        entry = self._memory.entry(key)
        try:
            await self._snapshots.load(key)
        except (InvalidStoredValue, StoreUnavailable) as exc:
            if entry is not None and self._connection.up:
                entry.outdated = True
            if isinstance(exc, InvalidStoredValue):
                await self._snapshots.delete_invalid(key, exc)

    async def _restore(self, key: TaskKey) -> None:
        """Write a snapshot that the server does not have, so that the task's next snapshot follows it."""
        snapshot = self._memory.last_known(key)
        if snapshot is None:
            return
        try:
            reply = await self._snapshots.write("restore", snapshot, known_version=snapshot.version)
            self._snapshots.merge_reply(key, reply)
            entry = self._memory.entry(key)
            if reply.kind == b"refused" and entry is not None and entry.snapshot is snapshot:
                # The queries have overlapped, and the other replicas serve the stored snapshot.
                mark_outdated(entry)
        except StoreUnavailable:
            self.restore_later(key)
        except InvalidStoredValue as exc:
            await self._snapshots.delete_invalid(key, exc)
