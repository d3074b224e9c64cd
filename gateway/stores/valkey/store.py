"""The store of many replicas: a server shares what each of them holds in its memory.

    hit    -> the copy held here: no question asked
    miss   -> one question: a fresh snapshot, a failure, the lease, or for how long another has it
    landed -> one more: the snapshot stored, published, the lease ended
    taken  -> wait for what its holder publishes, or for the lease's end; then ask again

What is published reaches every replica; those that hold the task, or wait for it, take it up
(`subscription.py`, `invalidation.py`, `local_cache.py`). So answers asked from replicas in turn do not go
back. That ends with a lost link: from then on each replica is alone, a MemoryStore and no more, until the
link is up again. What it held by then may be behind, and is shown again only after the server was asked.

Moments travel in the server's time and are converted to the safe side: to look older, never fresher.
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
from gateway.stores.valkey.scripts import DISCARD, FAIL, LAND, TAKE_OFF, TELL, TOKEN, Script
from gateway.stores.valkey.subscription import NEWS_SECONDS
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.redaction import Redactor

_LONGEST_RETRY_SECONDS = 3600.0
_LEASE_MARGIN_SECONDS = 0.01  # the server counts in milliseconds, and its answer was under way


class _Answer(NamedTuple):
    """What the server says to a flight that wants to take off."""

    kind: bytes
    number: int
    newer: bytes
    failure: bytes


class ValkeyStore:
    """Shares what `memory` holds.

    `stale_seconds`: for how long after its lifetime a snapshot may be shown; `covering_seconds`: the same
    while it covers a failure.
    """

    def __init__(
        self,
        settings: StoreSettings,
        *,
        memory: MemoryStore,
        redactor: Redactor,
        metrics: Metrics,
        stale_seconds: float,
        covering_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._memory = memory
        self._local_cache = LocalCache(memory, clock=clock)
        self._showing = [
            int(seconds * MICROSECONDS)
            for seconds in (NEWS_SECONDS, stale_seconds, max(stale_seconds, covering_seconds))
        ]
        self._clock = clock
        self._news = InvalidationMessages(
            self._local_cache,
            memory=memory,
            metrics=metrics,
            server=self._server,
            on_throttled=self._on_slowed,
            clock=clock,
        )
        self._link = StoreConnection(
            settings,
            redactor=redactor,
            metrics=metrics,
            on_message=self._news.receive,
            on_gap=self._on_gap,
            on_down=self._news.wake_all,
            clock=clock,
        )
        self._leases = Leases(self._run)
        self._slowed: list[Callable[[float | None], None]] = []
        self._tasks = AsyncExitStack()

    @property
    def trouble(self) -> str | None:
        """See `Store`."""
        return self._link.trouble

    async def __aenter__(self) -> Self:
        """Begin to connect."""
        self._tasks.callback(self._local_cache.close)
        for work in (self._link.follow(), self._leases.follow()):
            self._tasks.push_async_callback(ended, asyncio.create_task(work))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close every connection."""
        await self._tasks.aclose()

    def peek(self, key: TaskKey) -> Snapshot | None:
        """See `Store.peek`."""
        if time.monotonic() < self._link.sure_until:
            return self._local_cache.peek(key)
        return None if self._link.up else self._local_cache.peek_stale(key)

    def is_current(self, snapshot: Snapshot, now: float) -> bool:
        """See `Store.is_current`."""
        return now < snapshot.shown_until and (time.monotonic() < self._link.sure_until or not self._link.up)

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
        self._slowed.append(listener)

    def __len__(self) -> int:
        """See `Store.__len__`."""
        return len(self._memory)

    def size(self) -> int:
        """See `Store.size`."""
        return self._memory.size()

    async def sync(self) -> bool:
        """See `Store.sync`."""
        return await self._link.sync()

    async def acquire(
        self, key: TaskKey, *, after: int | None = None, timeout_seconds: float = math.inf
    ) -> Snapshot | GatewayError | Lease:
        """See `Store.acquire`."""
        deadline = self._clock() + timeout_seconds
        while True:
            await self._local_cache.arrived(key)
            # Before the question: what is published between it and its answer must not be missed.
            with self._news.awaited(key) as news:
                known = self._known(key, after)
                if known is not None:
                    return known
                try:
                    outcome = await self._ask(key, after)
                except StoreUnavailable:
                    return self._alone(key)
                if not isinstance(outcome, float):
                    return outcome
                left = deadline - self._clock()
                if left <= 0:
                    return UpstreamTimeout("another replica's query did not end in time")
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(outcome, left)):
                        await news

    async def commit(self, lease: Lease, snapshot: Snapshot) -> Snapshot | None:
        """See `Store.commit`."""
        self._leases.drop(lease)
        key = lease.key
        args = [
            lease.token,
            lease.version,
            max(self._link.clock(key).servers(snapshot.fetched_at), 0),
            lifetime_of(snapshot),
            int(snapshot.terminal),
            encode_snapshot(snapshot),
            max(int(self._memory.keep_seconds(snapshot) * 1000), 1),
            *self._showing,
        ]
        try:
            accepted, other = shaped(await self._run(LAND, key, args, told=True), int, bytes)
            if accepted == 1:
                self._local_cache.take_up(snapshot, shown_at=self._news.shown_at(key, moment(other)))
            elif other:
                self._news.take_up(key, other)
        except (StoreUnavailable, InvalidStoredValue) as exc:
            if isinstance(exc, InvalidStoredValue):
                await self._discard(key, exc)
            elif lease.token:
                self._leases.doubt(lease)
            accepted = 1
            self._local_cache.take_up(snapshot, shown_at=-math.inf)
        await self._local_cache.arrived(key)
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
            taken, wait = shaped(await self._link.run_for_all(TOKEN, "budget", args), int, int)
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
            channel = self._link.channel(0)
            await self._link.run_for_all(TELL, "told", [self._link.publish, channel, f"T{seconds}"])

    async def _end(self, lease: Lease, milliseconds: int, encoded: bytes) -> None:
        self._leases.drop(lease)
        if lease.token:
            try:
                await self._run(FAIL, lease.key, [lease.token, milliseconds, encoded], told=True)
            except StoreUnavailable:
                self._leases.doubt(lease)

    def _known(self, key: TaskKey, after: int | None) -> Snapshot | GatewayError | None:
        """Return what is known here and ends a flight."""
        held = self.peek(key)
        if held is not None and held.fresh(self._clock()) and (after is None or held.version > after):
            return held
        return self._memory.failure(key)

    def _alone(self, key: TaskKey) -> Lease:
        """Return a lease that nobody has given: each replica for itself."""
        latest = self._local_cache.latest(key)
        now = self._link.clock(key).servers(self._clock())
        return Lease(key, max(now, 0 if latest is None else latest.version + 1))

    async def _ask(self, key: TaskKey, after: int | None) -> Snapshot | GatewayError | Lease | float:
        """Ask the server; a number is the seconds to wait before the next look: another has the lease.

        Raises: StoreDown.
        """
        latest = self._local_cache.latest(key)
        token = uuid.uuid4().hex
        args = [
            0 if latest is None else latest.version,
            self._least(key, latest, after),
            token,
            int(LEASE_SECONDS * 1000),
        ]
        try:
            answer = _Answer(*shaped(await self._run(TAKE_OFF, key, args), bytes, int, bytes, bytes))
        except StoreUnavailable as down:
            if down.asked:
                self._leases.doubt(Lease(key, 0, token))
            raise
        try:
            if answer.newer:
                self._news.take_up(key, answer.newer)
            failure = decode_failure(answer.failure, key) if answer.failure else None
            seconds = failure_seconds(answer.number) if answer.kind == b"failure" else 0.0
        except InvalidStoredValue as exc:
            await self._discard(key, exc)
            return (
                self._alone(key) if answer.kind != b"lease" else self._leases.hold(key, answer.number, token)
            )
        match answer.kind:
            case b"fresh":
                self._local_cache.confirm(key)
                await self._local_cache.arrived(key)
                held = self._local_cache.peek_stale(key)
                if held is not None and (held.terminal or held.fresh(self._clock())):
                    return held
                return 0.0  # it has gone stale on its way: the next question is about a newer one
            case b"failure" if failure is not None:
                self._memory.keep_failure(key, failure, seconds=seconds)
                return failure
            case b"taken":
                return min(max(answer.number / 1000, 0.0), LEASE_SECONDS) + _LEASE_MARGIN_SECONDS
            case b"lease" if answer.number > 0:
                self._local_cache.confirm(key)
                return self._leases.hold(key, answer.number, token)
        raise StoreUnavailable("an answer that makes no sense")

    def _least(self, key: TaskKey, latest: Snapshot | None, after: int | None) -> int:
        """Return the stamp from which on a fresh snapshot of the server's is an answer."""
        least = 0 if after is None else after + 1
        if latest is None:
            return least
        # What is known here was found stale, whatever the server's clock says; or it only wants confirming.
        confirming = self._local_cache.doubted(key) or latest.fresh(self._clock())
        return max(least, latest.version if confirming else latest.version + 1)

    async def _run(self, script: Script, key: TaskKey, args: list[Any], *, told: bool = False) -> list[Any]:
        """Run a script; `told`: it publishes."""
        if told:
            subject = f"{key.operation}/{key.task_id}\n"
            args = [*args, self._link.publish, self._link.channel(slot_of(key)), subject]
        return await self._link.run(script, key, args)

    async def _discard(self, key: TaskKey, why: InvalidStoredValue) -> None:
        """Remove what makes no sense, so that something sensible takes its place."""
        self._news.note_senseless(why)
        with suppress(StoreUnavailable):
            await self._run(DISCARD, key, [])

    def _server(self, key: TaskKey) -> ServerClock:
        return self._link.clock(key)

    def _on_gap(self, slots: Collection[int]) -> None:
        self._local_cache.doubt(lambda key: slot_of(key) in slots)

    def _on_slowed(self, retry_after: float | None) -> None:
        for listener in self._slowed:
            listener(retry_after)
