"""The connection to the store: kept open, monitored, and abandoned when it fails.

    connect -> subscribe to all channels -> probe with a write -> up -> lost -> pause -> connect ...

While the connection is up, every operation has a timeout of `store.timeout_seconds`; after a few consecutive
failures the connection is down. Then no operation is tried until a new connection has succeeded with a
subscription and a write. So no request is used as a probe.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
import zlib
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any, NamedTuple

import structlog

from gateway.domain.task import TaskKey
from gateway.settings.model import Store
from gateway.stores.valkey.backends import CONNECTIONS, ERRORS, SLOTS, RedisBackends, connected
from gateway.stores.valkey.clock_sync import ServerClock
from gateway.stores.valkey.scripts import PROBE, Script
from gateway.stores.valkey.subscription import Subscriptions
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.redaction import Redactor

_FAILURES = 3  # consecutive failures after which the connection is down
_CONNECT_SECONDS = 2.0  # timeout of all steps until the connection is up
_END = 2**53  # microseconds, in the year 2255: the numbers of a script are exact up to here
_MAX_TIME_DIGITS = 16  # as in the head of a snapshot
_PAUSE_SECONDS = 0.5  # average pause between two attempts to connect

log = structlog.get_logger(__name__)


class StoreUnavailable(Exception):
    """The store is down, too slow, or has refused. `asked`: the operation may have succeeded all the same."""

    def __init__(self, reason: str, *, asked: bool = False) -> None:
        super().__init__(reason)
        self.asked = asked


class _Operation(NamedTuple):
    """A script to run in a slot."""

    script: Script
    slot: int
    keys: list[str]
    args: list[Any]


class StoreConnection:
    """Runs scripts while it is up. `follow` keeps it open.

    `on_message` receives published messages. `on_gap` receives the slots whose messages may have been
    missed: all of them when the connection comes up. `on_down` is called when it goes down. `clock` is the
    clock of the snapshots; the read barrier uses the monotonic clock.
    """

    def __init__(
        self,
        settings: Store,
        *,
        redactor: Redactor,
        metrics: Metrics,
        on_message: Callable[[bytes], None],
        on_gap: Callable[[Collection[int]], None],
        on_down: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # The read barrier: until this moment, every message that must be visible has been read.
        self.sure_until = -math.inf
        self.trouble: str | None = "not reached yet"
        self._down_logged = False
        self._settings = settings
        self._redactor = redactor
        self._metrics = metrics
        self._on_message = on_message
        self._on_gap = on_gap
        self._on_down = on_down
        self._clock = clock
        # Each server of a cluster has its own clock, and each slot one server.
        clocks = SLOTS if settings.cluster else 1
        self._clocks = [ServerClock(ahead_seconds=clock() - time.time()) for _ in range(clocks)]
        self._servers: RedisBackends | None = None
        self._slots = asyncio.Semaphore(CONNECTIONS)
        self._failures = 0
        self._failed_at = -math.inf
        self._lost: asyncio.Future[None] | None = None
        self._barrier_moved = asyncio.Event()
        metrics.store_up.set(0)

    @property
    def up(self) -> bool:
        """Whether operations are possible."""
        return self._servers is not None

    def clock(self, key: TaskKey) -> ServerClock:
        """Return the clock of a task's server."""
        return self._clock_of(slot_of(key))

    def channel(self, slot: int) -> str:
        """Return a slot's channel. Raises: StoreUnavailable."""
        return self._up().channel(slot)

    @property
    def publish(self) -> str:
        """The command that a script publishes with. Raises: StoreUnavailable."""
        return self._up().publish

    async def run(self, script: Script, key: TaskKey, args: list[Any]) -> list[Any]:
        """Run a script on the keys of a task; return its reply without the time. Raises: StoreUnavailable."""
        slot = slot_of(key)
        root = f"{self.channel(slot)}:{key.operation}:{key.task_id}"
        return await self._run(_Operation(script, slot, [f"{root}:s", f"{root}:f", f"{root}:l"], args))

    async def run_for_all(self, script: Script, name: str, args: list[Any]) -> list[Any]:
        """Run a script on a key that belongs to no task; return as `run` does. Raises: StoreUnavailable."""
        return await self._run(_Operation(script, 0, [f"{self.channel(0)}:{name}"], args))

    async def sync(self) -> bool:
        """Wait for the read barrier; return whether it was behind and has been restored."""
        if not self.up or time.monotonic() < self.sure_until:
            return False
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.timeout_seconds):
                while time.monotonic() >= self.sure_until and self.up:
                    self._barrier_moved.clear()
                    await self._barrier_moved.wait()
                return True
        return False

    async def follow(self) -> None:
        """Keep the connection open until cancelled."""
        while True:
            was_up = False
            try:
                async with connected(self._settings, redactor=self._redactor) as servers:
                    was_up = await self._use(servers)
            except ERRORS as exc:
                self._down(_reason(exc))
            except Exception as exc:
                log.exception("store_connection_bug")
                self._down(_reason(exc))
            # After a failover, another server may be ready immediately; otherwise pause.
            if not was_up:
                await asyncio.sleep(_PAUSE_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311  # spreads load

    async def _use(self, servers: RedisBackends) -> bool:
        subscriptions = Subscriptions(
            servers,
            timeout_seconds=self._settings.timeout_seconds,
            on_message=self._on_message,
            on_sure=self._extend_barrier,
            on_gap=self._on_gap,
        )
        async with asyncio.timeout(_CONNECT_SECONDS) as connecting, subscriptions:
            await servers.warm_up()
            await self._ask(servers, _Operation(PROBE, 0, *servers.probe()), _CONNECT_SECONDS)
            connecting.reschedule(None)
            self._come_up(servers)
            self._lost = subscriptions.lost
            try:
                await subscriptions.lost
            except ERRORS as exc:
                self._metrics.store_errors.labels("subscribe").inc()
                self._down(_reason(exc))
            finally:
                self._servers = None
                self._extend_barrier(-math.inf)
                await self._idle()
        return True

    async def _idle(self) -> None:
        """Wait for running operations: one that connects after the close would leak its connection."""
        for _ in range(CONNECTIONS):
            await self._slots.acquire()
        for _ in range(CONNECTIONS):
            self._slots.release()

    async def _run(self, operation: _Operation) -> list[Any]:
        async with self._slots:  # outside of the timeout: waiting here is no failure of the server
            servers, started = self._up(), time.monotonic()
            try:
                answer = await self._ask(servers, operation, self._settings.timeout_seconds)
            except Exception as exc:  # an invalid reply may cause any exception in redis-py
                if started >= self._failed_at:  # concurrent failures count as one
                    self._failures += 1
                    self._failed_at = time.monotonic()
                if self._failures >= _FAILURES:
                    self._abandon(servers, _reason(exc))
                raise StoreUnavailable(_reason(exc), asked=True) from exc
            self._failures = 0
            return answer

    async def _ask(self, servers: RedisBackends, operation: _Operation, seconds: float) -> list[Any]:
        script, slot, keys, args = operation
        sent = self._clock()
        try:
            async with asyncio.timeout(seconds):
                now, *answer = _checked(await servers.run(script, keys, args))
        except Exception:
            self._metrics.store_errors.labels(script.name).inc()
            raise
        finally:
            received = self._clock()
            self._metrics.store_operation_duration.labels(script.name).observe(received - sent)
        self._clock_of(slot).observe(now, sent=sent, received=received)
        return answer

    def _clock_of(self, slot: int) -> ServerClock:
        return self._clocks[slot % len(self._clocks)]

    def _up(self) -> RedisBackends:
        if self._servers is None:
            raise StoreUnavailable(self.trouble or "")
        return self._servers

    def _extend_barrier(self, until: float) -> None:
        # The read barrier is valid only while the connection is up.
        self.sure_until = until if self.up else -math.inf
        if not self.up or until > time.monotonic():
            self._barrier_moved.set()

    def _come_up(self, servers: RedisBackends) -> None:
        self._servers = servers
        self._failures = 0
        self.trouble = None
        self._down_logged = False
        self._metrics.store_up.set(1)
        self._on_gap(range(SLOTS))
        log.info("store_up")

    def _abandon(self, servers: RedisBackends, reason: str) -> None:
        if self._servers is servers:
            self._down(reason)
            if self._lost is not None and not self._lost.done():
                self._lost.set_result(None)

    def _down(self, reason: str) -> None:
        self._servers = None
        self.trouble = reason
        self._extend_barrier(-math.inf)
        if self._down_logged:
            return
        self._down_logged = True
        self._metrics.store_up.set(0)
        log.warning("store_down", reason=reason)
        self._on_down()


def slot_of(key: TaskKey) -> int:
    """Return the slot of a task. Not Python's hash(): all replicas must compute the same slot."""
    return zlib.crc32(f"{key.operation}:{key.task_id}".encode()) % SLOTS


def moment(answer: bytes) -> int:
    """Return the time in a reply. Raises: StoreUnavailable."""
    if not answer.isdigit() or len(answer) > _MAX_TIME_DIGITS:
        raise StoreUnavailable("invalid reply of a script")
    return int(answer)


def shaped(answer: list[Any], *kinds: type) -> list[Any]:
    """Check the types of a reply, and return it. Raises: StoreUnavailable."""
    if [type(part) for part in answer] != list(kinds):
        raise StoreUnavailable("invalid reply of a script")
    return answer


async def ended(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait for them."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _checked(answer: Any) -> list[Any]:
    if not isinstance(answer, list) or not answer or type(answer[0]) is not int or not 0 < answer[0] < _END:
        raise ValueError("invalid reply of a script")
    return answer


def _reason(exc: BaseException) -> str:
    # The server's message may contain keys or addresses. The type is sufficient, and bounded.
    return type(exc).__name__
