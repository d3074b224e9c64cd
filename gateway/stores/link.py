"""The way to the servers: kept open, watched, and given up as soon as it is no good.

    connect -> subscribe to everything -> try a write -> up -> lost -> wait a little -> connect ...

While it is up every operation has `store.timeout_seconds`, and a few that fail in a row mean
that it is down: then nothing is asked at all, until a connection made anew, with a subscription
and a write, has shown that it works. No request is ever the one to find out.
"""

from __future__ import annotations

import asyncio
import random
import time
import zlib
from collections.abc import Callable
from typing import Any

import structlog
from redis.asyncio.client import PubSub

from gateway.metrics import Metrics
from gateway.models import TaskKey
from gateway.redaction import Redactor
from gateway.settings import Store
from gateway.stores.scripts import PROBE, Script
from gateway.stores.serverclock import ServerClock
from gateway.stores.servers import CONNECTIONS, ERRORS, SLOTS, Servers, connected

_FAILURES = 3  # in a row
_CONNECT_SECONDS = 2.0  # for all it takes to be up
_SILENCE_SECONDS = 1.0  # then the subscription's connection is pinged, and given up after as much again
_PAUSE_SECONDS = 0.5  # between two tries to connect, on average

log = structlog.get_logger(__name__)


class StoreDown(Exception):
    """The store did not do it: it is down, was too slow, or refused."""


class Link:
    """Runs scripts while it is up. `follow` keeps it; the callbacks are told what comes and changes."""

    def __init__(
        self,
        settings: Store,
        *,
        redactor: Redactor,
        metrics: Metrics,
        on_message: Callable[[bytes], None],
        on_up: Callable[[], None],
        on_down: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.servers_clock = ServerClock(ahead_seconds=clock() - time.time())
        self.trouble: str | None = "not reached yet"
        self._told = False  # that it is down
        self._settings = settings
        self._redactor = redactor
        self._metrics = metrics
        self._on_message = on_message
        self._on_up = on_up
        self._on_down = on_down
        self._clock = clock
        self._servers: Servers | None = None
        self._turns = asyncio.Semaphore(CONNECTIONS)
        self._failures = 0
        self._given_up = asyncio.Event()
        metrics.store_up.set(0)

    @property
    def up(self) -> bool:
        """Tell whether it may be used."""
        return self._servers is not None

    def channel(self, key: TaskKey) -> str:
        """Return the channel of a task's slot. Raises: StoreDown."""
        return self._up().channel(_slot(key))

    @property
    def publish(self) -> str:
        """The command that a script publishes with. Raises: StoreDown."""
        return self._up().publish

    async def run(self, script: Script, key: TaskKey, args: list[Any]) -> list[Any]:
        """Run a script on a task's keys; return what it says, but for the time. Raises: StoreDown."""
        root = f"{self.channel(key)}:{key.operation}:{key.task_id}"
        return await self._run_on(script, [f"{root}:s", f"{root}:f", f"{root}:l"], args)

    async def run_for_all(self, script: Script, name: str, args: list[Any]) -> list[Any]:
        """Run a script on a key that is no task's; return as `run` does. Raises: StoreDown."""
        return await self._run_on(script, [f"{self._up().channel(0)}:{name}"], args)

    async def _run_on(self, script: Script, keys: list[str], args: list[Any]) -> list[Any]:
        async with self._turns:  # not within the deadline: who waits here waits for us, not for the server
            servers = self._up()
            try:
                answer = await self._run(servers, script, keys, args, self._settings.timeout_seconds)
            except Exception as exc:  # a server that lies may make its client stumble over anything
                self._failures += 1
                if self._failures >= _FAILURES:
                    self._give_up(servers, _reason(exc))
                raise StoreDown(_reason(exc)) from exc
            self._failures = 0
            return answer

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
            # After a slot has moved, or a server, the next one is there at once; else there is time.
            if not was_up:
                await asyncio.sleep(_PAUSE_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311  # spreads load

    async def _use(self, servers: Servers) -> bool:
        async with asyncio.timeout(_CONNECT_SECONDS) as connecting, servers.subscribed() as subscriptions:
            probed = [f"{servers.channel(0)}:probe"]
            await self._run(servers, PROBE, probed, [servers.publish, servers.channel(0)], _CONNECT_SECONDS)
            connecting.reschedule(None)
            self._come_up(servers)
            readers = [asyncio.create_task(self._read(subscription)) for subscription in subscriptions]
            given_up = asyncio.create_task(self._given_up.wait())
            try:
                await asyncio.wait([*readers, given_up], return_when=asyncio.FIRST_COMPLETED)
                for reader in readers:
                    if reader.done():
                        reader.result()
            except ERRORS as exc:
                self._down(_reason(exc))
            finally:
                self._servers = None
                await ended(*readers, given_up)
        return True

    async def _run(
        self, servers: Servers, script: Script, keys: list[str], args: list[Any], seconds: float
    ) -> list[Any]:
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
        self.servers_clock.observe(now, sent=sent, received=received)
        return answer

    async def _read(self, subscription: PubSub) -> None:
        pinged = False
        while True:
            message = await subscription.get_message(timeout=_SILENCE_SECONDS)
            if message is None:
                if pinged:
                    raise TimeoutError("the subscription's connection is dead")
                pinged = True
                await subscription.ping()
                continue
            pinged = False
            if message["type"] == "sunsubscribe":
                raise ConnectionError("a slot has moved to another server")
            if message["type"] in {"message", "smessage"}:
                self._on_message(message["data"])

    def _up(self) -> Servers:
        if self._servers is None:
            raise StoreDown(self.trouble or "")
        return self._servers

    def _come_up(self, servers: Servers) -> None:
        self._servers = servers
        self._failures = 0
        self._given_up.clear()
        self.trouble = None
        self._told = False
        self._metrics.store_up.set(1)
        self._on_up()
        log.info("store up: snapshots are shared")

    def _give_up(self, servers: Servers, reason: str) -> None:
        if self._servers is servers:
            self._given_up.set()
            self._down(reason)

    def _down(self, reason: str) -> None:
        self._servers = None
        self.trouble = reason
        if self._told:
            return
        self._told = True
        self._metrics.store_up.set(0)
        log.warning("store down: each replica goes on alone", reason=reason)
        self._on_down()


async def ended(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks, again and again, until they have ended.

    Once is not enough: a cancellation that comes just as redis-py's own time-out strikes is taken
    for that, and whoever reads in a loop reads on.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_SILENCE_SECONDS)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # looked at, or asyncio complains


def _slot(key: TaskKey) -> int:
    # The same on every replica, of whatever version: never Python's own hash.
    return zlib.crc32(f"{key.operation}:{key.task_id}".encode()) % SLOTS


def _checked(answer: Any) -> list[Any]:
    if not isinstance(answer, list) or not answer or type(answer[0]) is not int:
        raise ValueError("no answer of a script of ours")
    return answer


def _reason(exc: BaseException) -> str:
    # The server's own words may hold keys or addresses; the kind says enough, and is bounded.
    return type(exc).__name__
