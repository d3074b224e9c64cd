"""The operations of the shared store: a method sends one command, mostly a script, and checks the reply."""

from __future__ import annotations

from typing import Any, NamedTuple

from gateway.domain.permits_reply import PermitsReply
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import TaskKey
from gateway.stores.base import Lease
from gateway.stores.valkey.codec import MICROS_PER_SECOND, StoredMetadata, encode_snapshot, lifetime_of
from gateway.stores.valkey.connection import StoreConnection, StoreUnavailable
from gateway.stores.valkey.scripts import ACQUIRE, COMMIT, END_LEASE, RENEW_LEASE, TAKE_PERMITS, Script


class Reply(NamedTuple):
    """The reply of `acquire.lua` or `commit.lua`; these files describe its parts."""

    kind: bytes
    metadata: StoredMetadata
    value: bytes
    number: int = 0
    failure: bytes = b""


class StoreOperations:
    """Runs the scripts through a connection. Every method may raise StoreUnavailable.

    `lease_seconds`: a lease expires after this time unless its holder renews it.
    """

    def __init__(self, connection: StoreConnection, *, lease_seconds: float) -> None:
        self._connection = connection
        self._lease_microseconds = int(lease_seconds * MICROS_PER_SECOND)

    async def acquire(
        self,
        key: TaskKey,
        token: str,
        *,
        known_version: int,
        min_version: int,
        seen_revision: int,
        next_version: int,
        error_seconds: float,
    ) -> Reply:
        """Run `acquire.lua`, which describes the arguments. Raises: InvalidStoredValue."""
        channel, error_time = self._connection.channel, int(error_seconds * MICROS_PER_SECOND)
        kind, number, *metadata, value, failure = await self._run(
            ACQUIRE,
            key,
            [
                known_version,
                min_version,
                seen_revision,
                token,
                channel,
                _name(key),
                next_version,
                self._lease_microseconds,
                error_time,
            ],
            [bytes, int, int, int, int, int, bytes, bytes],
        )
        return Reply(kind, StoredMetadata.checked(*metadata), value, number, failure)

    async def read(self, key: TaskKey, *, known_version: int) -> Reply:
        """Run `acquire.lua` without a token: it grants no lease, and returns an unknown snapshot.

        Raises: InvalidStoredValue.
        """
        return await self.acquire(
            key,
            "",
            known_version=known_version,
            min_version=0,
            seen_revision=0,
            next_version=0,
            error_seconds=0.0,
        )

    async def commit(
        self, token: str, snapshot: Snapshot, *, known_version: int, age: float, keep_seconds: float
    ) -> Reply:
        """Run `commit.lua`; `known_version`: see `SnapshotTransfer.write`. Raises: InvalidStoredValue."""
        kind, *metadata, value = await self._run(
            COMMIT,
            snapshot.key,
            [
                token,
                snapshot.version,
                known_version,
                snapshot.revision,
                max(int(age * MICROS_PER_SECOND), 0),
                lifetime_of(snapshot),
                int(snapshot.terminal),
                encode_snapshot(snapshot),
                max(int(keep_seconds * 1000), 1),
                self._connection.channel,
                _name(snapshot.key),
                self._lease_microseconds,
            ],
            [bytes, int, int, int, int, bytes],
        )
        return Reply(kind, StoredMetadata.checked(*metadata), value)

    async def end_lease(self, lease: Lease, failure: bytes = b"", seconds: float = 0.0) -> None:
        """Run `end_lease.lua`."""
        channel, duration = self._connection.channel, int(seconds * MICROS_PER_SECOND)
        args = [lease.token, failure if duration else b"", duration, channel, _name(lease.key)]
        await self._run(END_LEASE, lease.key, args, [])

    async def renew_lease(self, lease: Lease) -> None:
        """Run `renew_lease.lua`."""
        await self._run(RENEW_LEASE, lease.key, [lease.token, self._lease_microseconds], [])

    async def take_permits(
        self, replica: str, per_second: float, *, burst: float, refreshes: int, first_queries: int
    ) -> PermitsReply:
        """Run `take_permits.lua`."""
        args = [per_second, burst, replica, refreshes, first_queries]
        reply = await self._connection.run(TAKE_PERMITS, "permits", args)
        numbers = _checked(reply, [int] * len(PermitsReply._fields))
        granted, granted_first, pause, *elsewhere = (max(number, 0) for number in numbers)
        seconds = min(pause / MICROS_PER_SECOND, 1 / per_second)
        return PermitsReply(min(granted, refreshes), min(granted_first, first_queries), seconds, *elsewhere)

    async def delete(self, key: TaskKey) -> None:
        """Delete everything about a task."""
        await self._connection.delete(_name(key))

    async def announce_throttling(self, seconds: int | None) -> None:
        """Publish that the upstream throttles; `seconds`: its Retry-After, if any."""
        await self._connection.publish(f"T{'' if seconds is None else seconds}")

    async def _run(self, script: Script, key: TaskKey, args: list[Any], shape: list[type]) -> list[Any]:
        return _checked(await self._connection.run(script, _name(key), args), shape)


def _name(key: TaskKey) -> str:
    """Return the name of a task in keys and messages."""
    return f"{key.operation}/{key.task_id}"


def _checked(reply: list[Any], shape: list[type]) -> list[Any]:
    if [type(part) for part in reply] != shape:
        raise StoreUnavailable("invalid reply of a script")
    return reply
