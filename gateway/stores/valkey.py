"""The store of many replicas: a server shares what each of them holds in its memory.

    hit    -> the copy held here: no question asked
    miss   -> one question: a fresh snapshot, a failure, the lease, or for how long another has it
    landed -> one more: the snapshot stored, published, the lease ended
    taken  -> wait for what its holder publishes, or for the lease's end; then ask again

What is published reaches every replica; those that hold the task, or wait for it, take it up. So
answers asked from replicas in turn do not go back. That ends with a lost subscription: from then
on each replica is alone, a MemoryStore and no more, until the link is up again. What it held by
then may be behind, and is shown again only after the server was asked.

Moments travel in the server's time and are converted to the safe side: to look older, never fresher.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from typing import Any, NamedTuple, Self

import structlog

from gateway.exceptions import BudgetSpent, GatewayError, UpstreamTimeout
from gateway.metrics import Metrics
from gateway.models import Operation, Snapshot, TaskKey
from gateway.redaction import Redactor
from gateway.settings import Store as StoreSettings
from gateway.stores import Lease
from gateway.stores.encoding import (
    Undecodable,
    decode_failure,
    decode_snapshot,
    encode_failure,
    encode_snapshot,
)
from gateway.stores.link import Link, StoreDown, ended
from gateway.stores.memory import MemoryStore
from gateway.stores.scripts import DISCARD, FAIL, LAND, RENEW, TAKE_OFF, TOKEN, Script
from gateway.stores.serverclock import MICROSECONDS

# A holder that dies is replaced after so long. Those alive renew, however long their query takes.
LEASE_SECONDS = 3.0
_RENEW_SECONDS = LEASE_SECONDS / 3
_LEASE_MARGIN_SECONDS = 0.01  # the server counts in milliseconds, and its answer was under way

# The head of a stored snapshot; `scripts.py` writes it.
_HEAD = re.compile(rb"sdg1 (\d{1,16}) (\d{1,16}) (\d{1,16}) [01]\n")
_SUBJECT = re.compile(rb"([SFR])([a-z_]+)/([A-Za-z0-9_-]{1,64})\n")

log = structlog.get_logger(__name__)


class _Answer(NamedTuple):
    """What the server says to a flight that wants to take off."""

    kind: bytes
    number: int
    newer: bytes
    failure: bytes


class ValkeyStore:
    """Shares what `memory` holds. `patience_seconds`: how long a flight waits for another replica's."""

    def __init__(
        self,
        settings: StoreSettings,
        *,
        memory: MemoryStore,
        redactor: Redactor,
        metrics: Metrics,
        patience_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._memory = memory
        self._metrics = metrics
        self._patience_seconds = patience_seconds
        self._clock = clock
        self._link = Link(
            settings,
            redactor=redactor,
            metrics=metrics,
            on_message=self._on_message,
            on_up=self._on_up,
            on_down=self._on_down,
            clock=clock,
        )
        self._unconfirmed: dict[TaskKey, Snapshot] = {}  # held here since before the link was up
        self._waiting: dict[TaskKey, asyncio.Future[None]] = {}  # for another replica to land
        self._leases: set[Lease] = set()
        self._tasks = AsyncExitStack()

    @property
    def trouble(self) -> str | None:
        """See `Store`."""
        return self._link.trouble

    async def __aenter__(self) -> Self:
        """Begin to connect."""
        for work in (self._link.follow(), self._renew()):
            task = asyncio.create_task(work)
            self._tasks.push_async_callback(ended, task)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close every connection."""
        await self._tasks.aclose()

    def peek(self, key: TaskKey) -> Snapshot | None:
        """See `Store.peek`."""
        snapshot = self._memory.peek(key)
        if self._unconfirmed and snapshot is not None and self._unconfirmed.get(key) is snapshot:
            return None if self._link.up else snapshot
        return snapshot

    def recall(self, key: TaskKey) -> Snapshot | None:
        """See `Store.recall`."""
        return self._memory.peek(key)

    def failure(self, key: TaskKey) -> GatewayError | None:
        """See `Store.failure`."""
        return self._memory.failure(key)

    def on_change(self, listener: Callable[[Snapshot], None]) -> None:
        """See `Store.on_change`."""
        self._memory.on_change(listener)

    def __len__(self) -> int:
        """See `Store.__len__`."""
        return len(self._memory)

    async def take_off(self, key: TaskKey, *, after: int | None = None) -> Snapshot | GatewayError | Lease:
        """See `Store.take_off`."""
        deadline = self._clock() + self._patience_seconds
        while True:
            # Before the question: what is published between it and its answer must not be missed.
            with self._change(key) as changed:
                known = self._known(key, after)
                if known is not None:
                    return known
                try:
                    outcome = await self._ask(key, after)
                except StoreDown:
                    return self._alone(key)
                if not isinstance(outcome, float):
                    return outcome
                left = deadline - self._clock()
                if left <= 0:
                    return UpstreamTimeout("another replica's query did not end in time")
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(outcome, left)):
                        await changed

    async def land(self, lease: Lease, snapshot: Snapshot) -> Snapshot | None:
        """See `Store.land`."""
        self._leases.discard(lease)
        key = lease.key
        args = [
            lease.token,
            lease.stamp,
            max(self._link.servers_clock.servers(snapshot.fetched_at), 0),
            int(snapshot.lifetime * MICROSECONDS),
            int(snapshot.terminal),
            encode_snapshot(snapshot),
            max(int(self._memory.keep_seconds(snapshot) * 1000), 1),
        ]
        try:
            accepted, other = _shaped(await self._run(LAND, key, args, told=True), int, bytes)
            if accepted == 1:
                return self._take_up(snapshot)
            kept = self._decode(key, other) if other else None
        except StoreDown:
            return self._take_up(snapshot)
        except Undecodable:
            await self._discard(key)
            return self._take_up(snapshot)
        if kept is not None:
            kept = self._take_up(kept)
        return kept if kept is not None and kept.fresh(self._clock()) else None

    async def fail(self, lease: Lease, error: GatewayError, *, seconds: float) -> None:
        """See `Store.fail`."""
        self._leases.discard(lease)
        self._memory.keep_failure(lease.key, error, seconds=seconds)
        milliseconds = int(seconds * 1000)
        encoded = encode_failure(lease.key, error) if milliseconds else b""
        await self._end(lease, milliseconds, encoded)

    async def abandon(self, lease: Lease) -> None:
        """See `Store.abandon`."""
        self._leases.discard(lease)
        await self._end(lease, 0, b"")

    async def token(self, per_second: float, *, saved: float, patience_seconds: float) -> float:
        """See `Store.token`."""
        interval = MICROSECONDS / per_second
        args = [
            math.ceil(interval),
            int((saved - 1) * interval),
            int(max(patience_seconds, 0) * MICROSECONDS),
        ]
        try:
            taken, wait = _shaped(await self._link.run_for_all(TOKEN, "budget", args), int, int)
        except StoreDown:
            return 0.0
        seconds: float = wait / MICROSECONDS
        if not taken:
            raise BudgetSpent("the budget of upstream calls is spent for now", retry_after=seconds)
        return seconds

    async def _end(self, lease: Lease, milliseconds: int, encoded: bytes) -> None:
        if lease.token:
            with suppress(StoreDown):
                await self._run(FAIL, lease.key, [lease.token, milliseconds, encoded], told=True)

    def _known(self, key: TaskKey, after: int | None) -> Snapshot | GatewayError | None:
        """Return what is known here and ends a flight."""
        held = self.peek(key)
        if held is not None and held.fresh(self._clock()) and (after is None or held.stamp > after):
            return held
        return self._memory.failure(key)

    def _alone(self, key: TaskKey) -> Lease:
        """Return a lease that nobody has given: each replica for itself."""
        held = self._memory.peek(key)
        now = self._link.servers_clock.servers(self._clock())
        return Lease(key, max(now, 0 if held is None else held.stamp + 1))

    async def _ask(self, key: TaskKey, after: int | None) -> Snapshot | GatewayError | Lease | float:
        """Ask the server; a number is the seconds that another replica's lease lasts.

        Raises: StoreDown.
        """
        held = self._memory.peek(key)
        token = uuid.uuid4().hex
        args = [
            0 if held is None else held.stamp,
            self._least(key, held, after),
            token,
            int(LEASE_SECONDS * 1000),
        ]
        answer = _Answer(*_shaped(await self._run(TAKE_OFF, key, args), bytes, int, bytes, bytes))
        try:
            newer = self._decode(key, answer.newer) if answer.newer else None
            failure = decode_failure(answer.failure, key) if answer.failure else None
        except Undecodable:
            await self._discard(key)
            return (
                self._alone(key) if answer.kind != b"lease" else self._hold(Lease(key, answer.number, token))
            )
        if newer is not None:
            held = self._take_up(newer)
        match answer.kind:
            case b"fresh" if held is not None:
                self._unconfirmed.pop(key, None)
                # It may have gone stale on its way: then the next question is about a newer one.
                return held if held.terminal or held.fresh(self._clock()) else 0.0
            case b"failure" if failure is not None:
                self._memory.keep_failure(key, failure, seconds=answer.number / 1000)
                return failure
            case b"taken":
                return max(answer.number, 0) / 1000 + _LEASE_MARGIN_SECONDS
            case b"lease":
                self._unconfirmed.pop(key, None)
                return self._hold(Lease(key, answer.number, token))
        raise StoreDown("an answer that makes no sense")

    def _least(self, key: TaskKey, held: Snapshot | None, after: int | None) -> int:
        """Return the stamp from which on a fresh snapshot of the server's is an answer."""
        least = 0 if after is None else after + 1
        if held is None:
            return least
        # What is held here was found stale, whatever the server's clock says; or it only wants confirming.
        return max(least, held.stamp if key in self._unconfirmed else held.stamp + 1)

    def _hold(self, lease: Lease) -> Lease:
        self._leases.add(lease)
        return lease

    async def _run(self, script: Script, key: TaskKey, args: list[Any], *, told: bool = False) -> list[Any]:
        """Run a script; `told`: it publishes."""
        if told:
            subject = f"{key.operation}/{key.task_id}\n"
            args = [*args, self._link.publish, self._link.channel(key), subject]
        return await self._link.run(script, key, args)

    async def _discard(self, key: TaskKey) -> None:
        """Remove what makes no sense, so that something sensible takes its place."""
        self._metrics.store_errors.labels("read").inc()
        with suppress(StoreDown):
            await self._run(DISCARD, key, [])

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(_RENEW_SECONDS)
            for lease in list(self._leases):
                with suppress(StoreDown):
                    await self._run(RENEW, lease.key, [lease.token, int(LEASE_SECONDS * 1000)])

    def _decode(self, key: TaskKey, value: bytes) -> Snapshot:
        """Decode a stored snapshot. Raises: Undecodable."""
        head = _HEAD.match(value)
        if head is None:
            raise Undecodable("no head")
        stamp, fetched = int(head[1]), int(head[2])
        # Never from our future: there it would be fresh for longer than its lifetime.
        fetched_at = min(self._link.servers_clock.ours(fetched), self._clock())
        return decode_snapshot(value[head.end() :], key, fetched_at=fetched_at, stamp=stamp)

    def _take_up(self, snapshot: Snapshot) -> Snapshot:
        """Hold a snapshot here, unless this one or a newer one is; return the one that is."""
        held = self._memory.peek(snapshot.key)
        if held is not None and held.stamp == snapshot.stamp:
            self._unconfirmed.pop(snapshot.key, None)
            return held
        kept = self._memory.keep(snapshot)
        if kept is snapshot:
            self._unconfirmed.pop(snapshot.key, None)
        return kept

    def _on_message(self, message: bytes) -> None:
        """Take up what a replica, perhaps this one, has published."""
        subject = _SUBJECT.match(message)
        if subject is None:
            return  # a probe, or nothing of ours
        try:
            key = TaskKey(Operation(subject[2].decode()), subject[3].decode())
        except ValueError:  # an operation of a later version
            return
        if key not in self._waiting and self._memory.peek(key) is None:
            return
        rest = message[subject.end() :]
        try:
            if subject[1] == b"S":
                self._take_up(self._decode(key, rest))
            elif subject[1] == b"F":
                milliseconds, _, encoded = rest.partition(b"\n")
                failure = decode_failure(encoded, key)
                self._memory.keep_failure(key, failure, seconds=int(milliseconds) / 1000)
        except ValueError:
            self._metrics.store_errors.labels("read").inc()
        self._wake(key)

    def _on_up(self) -> None:
        self._unconfirmed = {snapshot.key: snapshot for snapshot in self._memory.snapshots()}

    def _on_down(self) -> None:
        for key in list(self._waiting):
            self._wake(key)

    @contextmanager
    def _change(self, key: TaskKey) -> Iterator[asyncio.Future[None]]:
        """Give a future that is done as soon as there is news of a task; it has one flight at a time."""
        changed = self._waiting[key] = asyncio.get_running_loop().create_future()
        try:
            yield changed
        finally:
            del self._waiting[key]

    def _wake(self, key: TaskKey) -> None:
        changed = self._waiting.get(key)
        if changed is not None and not changed.done():
            changed.set_result(None)


def _shaped(answer: list[Any], *kinds: type) -> list[Any]:
    """Return an answer that has this shape. Raises: StoreDown."""
    if [type(part) for part in answer] != list(kinds):
        raise StoreDown("an answer that no script of ours gives")
    return answer
