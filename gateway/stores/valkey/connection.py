"""The connection to the store: it is kept open, monitored, and replaced when it fails.

    connect -> verify -> subscribe -> probe with a write -> up -> lost -> pause -> connect ...

A probe is a script that writes. It runs every half second while the connection is up, so that a store that is
down, slow, read-only or full is noticed even without requests. If an operation gets no reply within
`store.timeout_seconds`, the store is *suspect*: until a probe has succeeded, all other operations fail at
once, and the replica works alone.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable
from typing import Any, Protocol

import structlog

from gateway.settings.store_section import Store
from gateway.stores.valkey.batches import Batches, Command
from gateway.stores.valkey.diagnosis import explain
from gateway.stores.valkey.failure_reasons import ERRORS, reason_of
from gateway.stores.valkey.metric_labels import StoreOperationLabel
from gateway.stores.valkey.scripts import PROBE, Script
from gateway.stores.valkey.server_check import verify
from gateway.stores.valkey.servers import StoreServers, connect
from gateway.stores.valkey.subscription import Subscription
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.redaction import Redactor

_CONNECT_SECONDS = 2.0  # timeout of all steps until the connection is up
_START_SECONDS = 2.0  # a starting replica is not ready before, unless the connection is up earlier
_PROBE_SECONDS = 0.5  # interval of the probes
_PROBES = 2  # the store is down after so many consecutive failed probes
# Shortest and longest average pause between two attempts to connect, in seconds. The longest is so short that
# the page, which reads /readyz once a second, shows the end of an outage within 2 s.
_PAUSES = (0.25, 0.5)
_MOST_REASONS = 10  # reasons that are logged until the connection is up again
_STABLE_SECONDS = 10.0  # if a connection lasted longer, the next pause is the shortest again

log = structlog.get_logger(__name__)


class StoreUnavailable(Exception):
    """The store is down or slow, or has refused the operation. It may nevertheless have executed it."""


class ConnectionListener(Protocol):
    """Receives the messages and the changes of a connection."""

    def on_message(self, message: bytes) -> None:
        """Receive a published message."""

    def on_connection_change(self) -> None:
        """Note that the connection has come up or has gone down."""

    def on_usable(self) -> None:
        """Note that operations are possible again: the connection is up, and the store not suspect."""


class StoreConnection:
    """Runs scripts while it is up. `keep_open` connects, and reconnects after a failure.

    `identity` names the account whose data is shared. When it changes, a new connection is opened.
    `on_up_to_date` receives a moment of the monotonic clock: until then, no message is unread. Without a
    connection there are no messages, and the moment is `inf`.
    """

    _listener: ConnectionListener

    def __init__(
        self,
        settings: Store,
        *,
        identity: Callable[[], str],
        redactor: Redactor,
        metrics: Metrics,
        on_up_to_date: Callable[[float], None],
    ) -> None:
        self.trouble: str | None = "not reached yet"
        self._settings = settings
        self._identity = identity
        self._redactor = redactor
        self._metrics = metrics
        self._on_up_to_date = on_up_to_date
        self._servers: StoreServers | None = None
        self._batches: Batches | None = None
        self._subscription: Subscription | None = None
        self._suspect = asyncio.Event()
        self._failed: asyncio.Future[str] | None = None
        self._starting_until = math.inf
        self._logged_reasons: set[str] = set()  # since the connection was up
        metrics.store_up.set(0)

    @property
    def starting(self) -> bool:
        """Whether the first connection is awaited, for at most two seconds."""
        return time.monotonic() < self._starting_until

    @property
    def up(self) -> bool:
        """Whether there is a connection. While the store is suspect, operations fail nevertheless."""
        return self._servers is not None

    @property
    def round_trip_seconds(self) -> float:
        """The duration of the last measured round trip to the server; 0 before the first."""
        return 0.0 if self._subscription is None else self._subscription.round_trip_seconds

    async def read_arrived_messages(self) -> bool:
        """Read all messages that have reached this process; return whether some may have been unread."""
        return self._subscription is not None and await self._subscription.read_arrived_messages()

    @property
    def channel(self) -> str:
        """The channel for messages. Raises: StoreUnavailable."""
        return self._require_up().channel

    async def run(self, script: Script, name: str, args: list[Any]) -> list[Any]:
        """Run a script on a key, and return its reply. Raises: StoreUnavailable."""
        return await self._run(self._require_usable(), script, name, args)

    async def publish(self, message: str) -> None:
        """Publish a message. Raises: StoreUnavailable."""
        servers = self._require_usable()
        await self._send(servers, StoreOperationLabel.PUBLISH, Command(("PUBLISH", servers.channel, message)))

    async def delete(self, name: str) -> None:
        """Delete a key. Raises: StoreUnavailable."""
        servers = self._require_usable()
        await self._send(servers, StoreOperationLabel.DELETE, Command(("DEL", servers.key(name))))

    async def keep_open(self, listener: ConnectionListener) -> None:
        """Keep the connection open until cancelled."""
        self._listener = listener
        self._starting_until = time.monotonic() + _START_SECONDS
        pause = _PAUSES[0]
        while True:
            started, reason = time.monotonic(), ""
            try:
                identity = self._identity()
                async with connect(self._settings, identity=identity, redactor=self._redactor) as servers:
                    reason = await self._use(servers)
            except StoreUnavailable as exc:  # the probe has failed
                reason = str(exc)
            except ERRORS as exc:
                # Closing a broken connection may fail, too.
                reason = reason or await explain(self._settings, exc)
            except Exception as exc:
                log.exception("store_connection_bug")
                reason = reason_of(exc, key_prefix=self._settings.key_prefix)
            if time.monotonic() - started > _STABLE_SECONDS:
                pause = _PAUSES[0]
            self._go_down(reason)
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311  # spreads load
            pause = min(2 * pause, _PAUSES[1])

    async def _use(self, servers: StoreServers) -> str:
        """Use a connection until it fails; return the reason."""
        failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._failed = failed
        batches = Batches(servers.client, timeout_seconds=self._settings.timeout_seconds)
        subscription = Subscription(
            servers,
            timeout_seconds=self._settings.timeout_seconds,
            on_message=self._listener.on_message,
            on_up_to_date=self._extend_up_to_date,
        )
        self._batches = batches
        try:
            async with asyncio.timeout(_CONNECT_SECONDS) as connecting:
                await verify(servers)
                async with subscription:
                    await servers.warm_up()
                    await self._probe(servers)
                    connecting.reschedule(None)
                    self._come_up(servers, subscription)
                    return await self._wait_until_lost(servers, subscription, failed)
        finally:
            self._servers = self._subscription = None
            self._on_up_to_date(math.inf)
            await batches.aclose()

    async def _wait_until_lost(
        self, servers: StoreServers, subscription: Subscription, failed: asyncio.Future[str]
    ) -> str:
        probing = asyncio.create_task(self._keep_probing(servers))
        try:
            done, _ = await asyncio.wait(
                {probing, subscription.lost, failed}, return_when=asyncio.FIRST_COMPLETED
            )
            if subscription.lost in done:
                self._metrics.store_errors.labels(StoreOperationLabel.SUBSCRIBE).inc()
            reason = next(iter(done)).result()
            self._go_down(reason)  # now, because closing the connection may take seconds
            return reason
        finally:
            probing.cancel()
            await asyncio.gather(probing, return_exceptions=True)

    async def _keep_probing(self, servers: StoreServers) -> str:
        """Probe until a probe fails; return the reason."""
        while True:
            try:
                async with asyncio.timeout(_PROBE_SECONDS):
                    await self._suspect.wait()
            except TimeoutError:
                pass
            for attempt in range(_PROBES):
                try:
                    await self._probe(servers)
                    break
                except StoreUnavailable as exc:
                    if attempt == _PROBES - 1 or servers is not self._servers:
                        return str(exc)
            if self._suspect.is_set():
                self._suspect.clear()
                self._listener.on_usable()
            if servers.identity != self._identity():
                return "the access key has changed"

    async def _probe(self, servers: StoreServers) -> None:
        await self._run(servers, PROBE, "probe", [f"{servers.channel}:probe"])

    async def _run(self, servers: StoreServers, script: Script, name: str, args: list[Any]) -> list[Any]:
        parts = (1, servers.key(name), *args)
        command = Command(("EVALSHA", script.sha, *parts), with_script=("EVAL", script.text, *parts))
        reply = await self._send(servers, script.label, command)
        if not isinstance(reply, list):
            raise StoreUnavailable("invalid reply of a script")
        return reply

    async def _send(self, servers: StoreServers, label: StoreOperationLabel, command: Command) -> Any:
        assert self._batches is not None  # noqa: S101  # it exists for as long as `servers`
        started = time.monotonic()
        try:
            return await self._batches.send(command)
        except Exception as exc:  # an invalid reply may cause any exception in redis-py
            self._metrics.store_errors.labels(label).inc()
            reason = servers.reason_of(exc)
            if isinstance(exc, TimeoutError):
                self._suspect.set()
            elif servers.is_broken_by(exc):
                self._fail(servers, reason)
            raise StoreUnavailable(reason) from exc
        finally:
            self._metrics.store_operation_duration.labels(label).observe(time.monotonic() - started)

    def _extend_up_to_date(self, until: float) -> None:
        if self._subscription is not None:
            self._on_up_to_date(until)

    def _require_usable(self) -> StoreServers:
        servers = self._require_up()
        if self._suspect.is_set():
            raise StoreUnavailable("the store did not reply in time")
        return servers

    def _require_up(self) -> StoreServers:
        if self._servers is None:
            raise StoreUnavailable(self.trouble or "")
        return self._servers

    def _come_up(self, servers: StoreServers, subscription: Subscription) -> None:
        self._servers, self._subscription = servers, subscription
        self._on_up_to_date(-math.inf)  # until a reader catches up
        self._starting_until = -math.inf
        self._suspect.clear()
        self.trouble = None
        self._logged_reasons.clear()
        self._metrics.store_up.set(1)
        log.info("store_up")
        self._listener.on_connection_change()
        self._listener.on_usable()

    def _fail(self, servers: StoreServers, reason: str) -> None:
        if self._servers is servers and self._failed is not None and not self._failed.done():
            self._failed.set_result(reason)
            self._go_down(reason)

    def _go_down(self, reason: str) -> None:
        self._servers = self._subscription = None
        self._on_up_to_date(math.inf)
        self.trouble = reason
        if reason in self._logged_reasons or len(self._logged_reasons) == _MOST_REASONS:
            return
        went_down = not self._logged_reasons
        self._logged_reasons.add(reason)
        log.warning("store_down", reason=reason, effect="each replica works alone")
        if went_down:
            self._metrics.store_up.set(0)
            self._listener.on_connection_change()
