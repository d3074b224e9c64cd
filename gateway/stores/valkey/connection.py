"""The way to the servers: kept open, watched, and given up as soon as it is no good.

    connect -> subscribe to everything -> try a write -> up -> lost -> wait a little -> connect ...

While it is up every operation has `store.timeout_seconds`, and a few that fail in a row mean
that it is down: then nothing is asked at all, until a connection made anew, with a subscription
and a write, has shown that it works. No request is ever the one to find out.
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

_FAILURES = 3  # one after the other
_CONNECT_SECONDS = 2.0  # for all it takes to be up
_END = 2**53  # microseconds, in the year 2255: a script's numbers are exact up to here
_LONGEST_MOMENT = 16  # digits, as a snapshot's head has it
_PAUSE_SECONDS = 0.5  # between two tries to connect, on average

log = structlog.get_logger(__name__)


class StoreUnavailable(Exception):
    """The store did not do it: it is down, was too slow, or refused. `asked`: it may have done it unheard."""

    def __init__(self, reason: str, *, asked: bool = False) -> None:
        super().__init__(reason)
        self.asked = asked


class _Question(NamedTuple):
    """A script to be run in a slot."""

    script: Script
    slot: int
    keys: list[str]
    args: list[Any]


class StoreConnection:
    """Runs scripts while it is up. `follow` keeps it; the callbacks are told what comes and changes.

    `on_gap` is told the slots of which something may have been missed; when it comes up, all. `clock` is
    that of the moments to be converted; what was missed is a matter of the monotonic one.
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
        self.sure_until = (
            -math.inf
        )  # while it is up: all that was published has been read, but what is not due
        self.trouble: str | None = "not reached yet"
        self._told = False  # that it is down
        self._settings = settings
        self._redactor = redactor
        self._metrics = metrics
        self._on_message = on_message
        self._on_gap = on_gap
        self._on_down = on_down
        self._clock = clock
        # The servers of a cluster have a clock each, and a slot has one server.
        clocks = SLOTS if settings.cluster else 1
        self._clocks = [ServerClock(ahead_seconds=clock() - time.time()) for _ in range(clocks)]
        self._servers: RedisBackends | None = None
        self._turns = asyncio.Semaphore(CONNECTIONS)
        self._failures = 0
        self._failed_at = -math.inf
        self._lost: asyncio.Future[None] | None = None
        self._sure = asyncio.Event()
        metrics.store_up.set(0)

    @property
    def up(self) -> bool:
        """Tell whether it may be used."""
        return self._servers is not None

    def clock(self, key: TaskKey) -> ServerClock:
        """Return the clock of the server that has a task."""
        return self._clock_of(slot_of(key))

    def channel(self, slot: int) -> str:
        """Return a slot's channel. Raises: StoreDown."""
        return self._up().channel(slot)

    @property
    def publish(self) -> str:
        """The command that a script publishes with. Raises: StoreDown."""
        return self._up().publish

    async def run(self, script: Script, key: TaskKey, args: list[Any]) -> list[Any]:
        """Run a script on a task's keys; return what it says, but for the time. Raises: StoreDown."""
        slot = slot_of(key)
        root = f"{self.channel(slot)}:{key.operation}:{key.task_id}"
        return await self._run(_Question(script, slot, [f"{root}:s", f"{root}:f", f"{root}:l"], args))

    async def run_for_all(self, script: Script, name: str, args: list[Any]) -> list[Any]:
        """Run a script on a key that is no task's; return as `run` does. Raises: StoreDown."""
        return await self._run(_Question(script, 0, [f"{self.channel(0)}:{name}"], args))

    async def sync(self) -> bool:
        """Wait until what was published is read; tell whether there was anything to wait for, and it is."""
        if not self.up or time.monotonic() < self.sure_until:
            return False
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.timeout_seconds):
                while time.monotonic() >= self.sure_until and self.up:
                    self._sure.clear()
                    await self._sure.wait()
                return True
        return False

    async def follow(self) -> None:
        """Keep the link for ever."""
        while True:
            was_up = False
            try:
                async with connected(self._settings, redactor=self._redactor) as servers:
                    was_up = await self._use(servers)
            except ERRORS as exc:
                self._down(_reason(exc))
            except Exception as exc:
                log.exception("bug in the link to the store")
                self._down(_reason(exc))
            # After a server has gone the next one is there at once, maybe; else there is time.
            if not was_up:
                await asyncio.sleep(_PAUSE_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311  # spreads load

    async def _use(self, servers: RedisBackends) -> bool:
        subscriptions = Subscriptions(
            servers,
            timeout_seconds=self._settings.timeout_seconds,
            on_message=self._on_message,
            on_sure=self._be_sure,
            on_gap=self._on_gap,
        )
        async with asyncio.timeout(_CONNECT_SECONDS) as connecting, subscriptions:
            await servers.warm_up()
            await self._ask(servers, _Question(PROBE, 0, *servers.probe()), _CONNECT_SECONDS)
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
                self._be_sure(-math.inf)
                await self._idle()
        return True

    async def _idle(self) -> None:
        """Wait for the questions under way: who connects when all is closed leaves a connection open."""
        for _ in range(CONNECTIONS):
            await self._turns.acquire()
        for _ in range(CONNECTIONS):
            self._turns.release()

    async def _run(self, question: _Question) -> list[Any]:
        async with self._turns:  # not within the deadline: who waits here waits for us, not for the server
            servers, asked = self._up(), time.monotonic()
            try:
                answer = await self._ask(servers, question, self._settings.timeout_seconds)
            except Exception as exc:  # a server that lies may make its client stumble over anything
                if asked >= self._failed_at:  # else it is of the same moment as the last one: one failure
                    self._failures += 1
                    self._failed_at = time.monotonic()
                if self._failures >= _FAILURES:
                    self._give_up(servers, _reason(exc))
                raise StoreUnavailable(_reason(exc), asked=True) from exc
            self._failures = 0
            return answer

    async def _ask(self, servers: RedisBackends, question: _Question, seconds: float) -> list[Any]:
        script, slot, keys, args = question
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

    def _be_sure(self, until: float) -> None:
        # Before it is up nothing is asked of it, and once it is down each replica is on its own.
        self.sure_until = until if self.up else -math.inf
        if not self.up or until > time.monotonic():
            self._sure.set()

    def _come_up(self, servers: RedisBackends) -> None:
        self._servers = servers
        self._failures = 0
        self.trouble = None
        self._told = False
        self._metrics.store_up.set(1)
        self._on_gap(range(SLOTS))
        log.info("store up: snapshots are shared")

    def _give_up(self, servers: RedisBackends, reason: str) -> None:
        if self._servers is servers:
            self._down(reason)
            if self._lost is not None and not self._lost.done():
                self._lost.set_result(None)

    def _down(self, reason: str) -> None:
        self._servers = None
        self.trouble = reason
        self._be_sure(-math.inf)
        if self._told:
            return
        self._told = True
        self._metrics.store_up.set(0)
        log.warning("store down: each replica goes on alone", reason=reason)
        self._on_down()


def slot_of(key: TaskKey) -> int:
    """Return the slot of a task: by no hash of Python's, for every replica must find the same."""
    return zlib.crc32(f"{key.operation}:{key.task_id}".encode()) % SLOTS


def moment(answer: bytes) -> int:
    """Return a moment that an answer has. Raises: StoreDown."""
    if not answer.isdigit() or len(answer) > _LONGEST_MOMENT:
        raise StoreUnavailable("an answer that no script of ours gives")
    return int(answer)


def shaped(answer: list[Any], *kinds: type) -> list[Any]:
    """Return an answer that has this shape. Raises: StoreDown."""
    if [type(part) for part in answer] != list(kinds):
        raise StoreUnavailable("an answer that no script of ours gives")
    return answer


async def ended(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks, and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _checked(answer: Any) -> list[Any]:
    if not isinstance(answer, list) or not answer or type(answer[0]) is not int or not 0 < answer[0] < _END:
        raise ValueError("no answer of a script of ours")
    return answer


def _reason(exc: BaseException) -> str:
    # The server's own words may hold keys or addresses; the kind says enough, and is bounded.
    return type(exc).__name__
