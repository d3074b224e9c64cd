"""The shared store of several replicas: each keeps a local cache, and a server synchronises them.

    hit     -> the copy in the local cache: no operation
    acquire -> one operation: returns a fresh snapshot, a failure, the lease, or the rest of another's lease
    commit  -> one operation: stores and publishes the snapshot, ends the lease
    taken   -> another replica has the lease: wait for its message or the lease's expiry, then acquire again

Messages reach every replica; replicas with the task in their cache, or with a waiting request, apply them
(`subscription.py`, `invalidation.py`, `local_cache.py`). So progress never goes back between replicas.
Without a connection, this guarantee is suspended: each replica works like a MemoryStore until the
connection is up again. Its cache may then be behind, and is revalidated with the server before it is used.

Times are stored in the server's clock, and converted so that snapshots look older, never fresher.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Callable, Collection
from contextlib import AsyncExitStack, suppress
from typing import Any, NamedTuple, Self

from gateway.domain.errors import GatewayError, RateLimiterExhausted, UpstreamTimeout
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import TaskKey
from gateway.settings.model import Store as StoreSettings
from gateway.stores.base import Lease
from gateway.stores.memory import MemoryStore
from gateway.stores.valkey.clock_sync import MICROSECONDS, ServerClock
from gateway.stores.valkey.codec import (
    InvalidStoredValue,
    decode_failure,
    encode_failure,
    encode_snapshot,
    failure_seconds,
    lifetime_of,
)
from gateway.stores.valkey.connection import StoreConnection, StoreUnavailable, ended, moment, shaped, slot_of
from gateway.stores.valkey.invalidation import InvalidationMessages
from gateway.stores.valkey.leases import LEASE_SECONDS, Leases
from gateway.stores.valkey.local_cache import LocalCache
from gateway.stores.valkey.scripts import ACQUIRE, COMMIT, DISCARD, FAIL, PUBLISH, TOKEN, Script
from gateway.stores.valkey.subscription import NEWS_SECONDS
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.redaction import Redactor

_LONGEST_RETRY_SECONDS = 3600.0
_LEASE_MARGIN_SECONDS = 0.01  # the server counts in milliseconds, and its reply takes time


class _AcquireReply(NamedTuple):
    """The reply of `acquire.lua`."""

    kind: bytes
    number: int
    newer: bytes
    failure: bytes


class ValkeyStore:
    """Shares the entries of `memory` with other replicas.

    `stale_seconds`: how long a snapshot may be served after its lifetime while it is refreshed.
    `stale_if_error_seconds`: the same, instead of an error.
    """

    def __init__(
        self,
        settings: StoreSettings,
        *,
        memory: MemoryStore,
        redactor: Redactor,
        metrics: Metrics,
        stale_seconds: float,
        stale_if_error_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._memory = memory
        self._local_cache = LocalCache(memory, clock=clock)
        self._visibility = [
            int(seconds * MICROSECONDS)
            for seconds in (NEWS_SECONDS, stale_seconds, max(stale_seconds, stale_if_error_seconds))
        ]
        self._clock = clock
        self._messages = InvalidationMessages(
            self._local_cache,
            memory=memory,
            metrics=metrics,
            server=self._server,
            on_throttled=self._on_throttled,
            clock=clock,
        )
        self._connection = StoreConnection(
            settings,
            redactor=redactor,
            metrics=metrics,
            on_message=self._messages.receive,
            on_gap=self._on_gap,
            on_down=self._messages.wake_all,
            clock=clock,
        )
        self._leases = Leases(self._run)
        self._throttled: list[Callable[[float | None], None]] = []
        self._tasks = AsyncExitStack()

    @property
    def trouble(self) -> str | None:
        """See `Store`."""
        return self._connection.trouble

    async def __aenter__(self) -> Self:
        """Start to connect in the background."""
        self._tasks.callback(self._local_cache.close)
        for work in (self._connection.follow(), self._leases.follow()):
            self._tasks.push_async_callback(ended, asyncio.create_task(work))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close every connection."""
        await self._tasks.aclose()

    def peek(self, key: TaskKey) -> Snapshot | None:
        """See `Store.peek`."""
        if time.monotonic() < self._connection.sure_until:
            return self._local_cache.peek(key)
        return None if self._connection.up else self._local_cache.peek_stale(key)

    def is_current(self, snapshot: Snapshot, now: float) -> bool:
        """See `Store.is_current`."""
        return now < snapshot.current_until and (
            time.monotonic() < self._connection.sure_until or not self._connection.up
        )

    def peek_stale(self, key: TaskKey) -> Snapshot | None:
        """See `Store.peek_stale`."""
        return self._local_cache.peek_stale(key)

    def latest(self, key: TaskKey) -> Snapshot | None:
        """See `Store.latest`."""
        return self._local_cache.latest(key)

    def failure(self, key: TaskKey) -> GatewayError | None:
        """See `Store.failure`."""
        return self._memory.failure(key)

    def on_change(self, listener: Callable[[Snapshot], None]) -> None:
        """See `Store.on_change`."""
        self._memory.on_change(listener)

    def on_throttled(self, listener: Callable[[float | None], None]) -> None:
        """See `Store.on_throttled`."""
        self._throttled.append(listener)

    def __len__(self) -> int:
        """See `Store.__len__`."""
        return len(self._memory)

    def size(self) -> int:
        """See `Store.size`."""
        return self._memory.size()

    async def sync(self) -> bool:
        """See `Store.sync`."""
        return await self._connection.sync()

    async def acquire(
        self, key: TaskKey, *, after: int | None = None, timeout_seconds: float = math.inf
    ) -> Snapshot | GatewayError | Lease:
        """See `Store.acquire`."""
        deadline = self._clock() + timeout_seconds
        while True:
            await self._local_cache.activated(key)
            # Registered before the operation: a message between the operation and its reply must not be
            # missed.
            with self._messages.awaited(key) as message:
                known = self._known(key, after)
                if known is not None:
                    return known
                try:
                    outcome = await self._ask(key, after)
                except StoreUnavailable:
                    return self._local_lease(key)
                if not isinstance(outcome, float):
                    return outcome
                left = deadline - self._clock()
                if left <= 0:
                    return UpstreamTimeout("another replica's query did not end in time")
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(outcome, left)):
                        await message

    async def commit(self, lease: Lease, snapshot: Snapshot) -> Snapshot | None:
        """See `Store.commit`."""
        self._leases.drop(lease)
        key = lease.key
        args = [
            lease.token,
            lease.version,
            max(self._connection.clock(key).servers(snapshot.fetched_at), 0),
            lifetime_of(snapshot),
            int(snapshot.terminal),
            encode_snapshot(snapshot),
            max(int(self._memory.keep_seconds(snapshot) * 1000), 1),
            *self._visibility,
        ]
        try:
            accepted, other = shaped(await self._run(COMMIT, key, args, publish=True), int, bytes)
            if accepted == 1:
                self._local_cache.apply(snapshot, shown_at=self._messages.shown_at(key, moment(other)))
            elif other:
                self._messages.apply(key, other)
        except (StoreUnavailable, InvalidStoredValue) as exc:
            if isinstance(exc, InvalidStoredValue):
                await self._discard(key, exc)
            elif lease.token:
                self._leases.release(lease)
            accepted = 1
            self._local_cache.apply(snapshot, shown_at=-math.inf)
        await self._local_cache.activated(key)
        kept = self._local_cache.peek_stale(key)
        if accepted == 1:
            return kept or snapshot
        return kept if kept is not None and kept.fresh(self._clock()) else None

    async def fail(self, lease: Lease, error: GatewayError, *, seconds: float) -> None:
        """See `Store.fail`."""
        self._memory.keep_failure(lease.key, error, seconds=seconds)
        milliseconds = int(seconds * 1000)
        encoded = encode_failure(lease.key, error) if milliseconds else b""
        await self._end(lease, milliseconds, encoded)

    async def abandon(self, lease: Lease) -> None:
        """See `Store.abandon`."""
        await self._end(lease, 0, b"")

    async def token(self, per_second: float, *, saved: float, timeout_seconds: float) -> float:
        """See `Store.token`."""
        interval = MICROSECONDS / per_second
        args = [
            math.ceil(interval),
            int((saved - 1) * interval),
            int(max(timeout_seconds, 0) * MICROSECONDS),
        ]
        try:
            taken, wait = shaped(await self._connection.run_for_all(TOKEN, "budget", args), int, int)
        except StoreUnavailable:
            return 0.0
        seconds: float = wait / MICROSECONDS
        if not taken:
            retry_after = min(max(seconds, 0.0), _LONGEST_RETRY_SECONDS)
            raise RateLimiterExhausted(
                "the budget of upstream calls is spent for now", retry_after=retry_after
            )
        # The script gives none that is to be waited for any longer.
        return min(max(seconds, 0.0), max(timeout_seconds, 0.0))

    async def announce_throttling(self, retry_after: float | None) -> None:
        """See `Store.announce_throttling`."""
        seconds = "" if retry_after is None else math.ceil(retry_after)
        with suppress(StoreUnavailable):
            channel = self._connection.channel(0)
            await self._connection.run_for_all(
                PUBLISH, "told", [self._connection.publish, channel, f"T{seconds}"]
            )

    async def _end(self, lease: Lease, milliseconds: int, encoded: bytes) -> None:
        self._leases.drop(lease)
        if lease.token:
            try:
                await self._run(FAIL, lease.key, [lease.token, milliseconds, encoded], publish=True)
            except StoreUnavailable:
                self._leases.release(lease)

    def _known(self, key: TaskKey, after: int | None) -> Snapshot | GatewayError | None:
        """Return a result from the local cache that makes an upstream query unnecessary."""
        cached = self.peek(key)
        if cached is not None and cached.fresh(self._clock()) and (after is None or cached.version > after):
            return cached
        return self._memory.failure(key)

    def _local_lease(self, key: TaskKey) -> Lease:
        """Return a lease without a server: each replica queries for itself."""
        latest = self._local_cache.latest(key)
        now = self._connection.clock(key).servers(self._clock())
        return Lease(key, max(now, 0 if latest is None else latest.version + 1))

    async def _ask(self, key: TaskKey, after: int | None) -> Snapshot | GatewayError | Lease | float:
        """Run `acquire.lua`. A number: another replica has the lease, try again after so many seconds.

        Raises: StoreUnavailable.
        """
        latest = self._local_cache.latest(key)
        token = uuid.uuid4().hex
        args = [
            0 if latest is None else latest.version,
            self._min_version(key, latest, after),
            token,
            int(LEASE_SECONDS * 1000),
        ]
        try:
            answer = _AcquireReply(*shaped(await self._run(ACQUIRE, key, args), bytes, int, bytes, bytes))
        except StoreUnavailable as down:
            if down.asked:
                self._leases.release(Lease(key, 0, token))
            raise
        try:
            if answer.newer:
                self._messages.apply(key, answer.newer)
            failure = decode_failure(answer.failure, key) if answer.failure else None
            seconds = failure_seconds(answer.number) if answer.kind == b"failure" else 0.0
        except InvalidStoredValue as exc:
            await self._discard(key, exc)
            return (
                self._local_lease(key)
                if answer.kind != b"lease"
                else self._leases.hold(key, answer.number, token)
            )
        match answer.kind:
            case b"fresh":
                self._local_cache.revalidate(key)
                await self._local_cache.activated(key)
                cached = self._local_cache.peek_stale(key)
                if cached is not None and (cached.terminal or cached.fresh(self._clock())):
                    return cached
                return 0.0  # it became stale in transit: acquire a newer one
            case b"failure" if failure is not None:
                self._memory.keep_failure(key, failure, seconds=seconds)
                return failure
            case b"taken":
                return min(max(answer.number / 1000, 0.0), LEASE_SECONDS) + _LEASE_MARGIN_SECONDS
            case b"lease" if answer.number > 0:
                self._local_cache.revalidate(key)
                return self._leases.hold(key, answer.number, token)
        raise StoreUnavailable("invalid reply of a script")

    def _min_version(self, key: TaskKey, latest: Snapshot | None, after: int | None) -> int:
        """Return the smallest version of a fresh stored snapshot that is a result."""
        least = 0 if after is None else after + 1
        if latest is None:
            return least
        # The latest known snapshot is either invalidated, and only has to be confirmed, or stale by the local
        # clock, whatever the server's clock says.
        confirm = self._local_cache.invalidated(key) or latest.fresh(self._clock())
        return max(least, latest.version if confirm else latest.version + 1)

    async def _run(
        self, script: Script, key: TaskKey, args: list[Any], *, publish: bool = False
    ) -> list[Any]:
        """Run a script; with `publish`, pass the arguments that it publishes with."""
        if publish:
            subject = f"{key.operation}/{key.task_id}\n"
            args = [*args, self._connection.publish, self._connection.channel(slot_of(key)), subject]
        return await self._connection.run(script, key, args)

    async def _discard(self, key: TaskKey, reason: InvalidStoredValue) -> None:
        """Remove an invalid value, so that a valid one can be stored."""
        self._messages.record_invalid(reason)
        with suppress(StoreUnavailable):
            await self._run(DISCARD, key, [])

    def _server(self, key: TaskKey) -> ServerClock:
        return self._connection.clock(key)

    def _on_gap(self, slots: Collection[int]) -> None:
        self._local_cache.invalidate(lambda key: slot_of(key) in slots)

    def _on_throttled(self, retry_after: float | None) -> None:
        for listener in self._throttled:
            listener(retry_after)
