"""Runs applications under uvicorn: the gateway as it needs to be run, and whatever else serves."""

from __future__ import annotations

import asyncio
import gc
import math
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from ipaddress import IPv4Network
from types import FrameType
from typing import NamedTuple

import structlog
import uvicorn

from gateway.server import file_descriptors as descriptors
from gateway.server.application import Application
from gateway.server.connection import Connection
from gateway.server.connection_limits import bound_buffers, connection_limits
from gateway.server.heap import HeapTrim
from gateway.server.protocol import http_protocol
from gateway.settings.model import Settings

_BACKLOG = 8192

log = structlog.get_logger(__name__)


class CannotListen(Exception):
    """An address is taken, or not ours; the text names it, and says why."""

    def __init__(self, host: str, port: int, reason: str | None) -> None:
        super().__init__(f"cannot listen on {url_of(host, port)}: {reason}")
        self.host, self.port, self.reason = host, port, reason


def run(app: Application, settings: Settings, *, announce: Callable[[str], None] = lambda _: None) -> None:
    """Run the gateway, as `create_app` makes it, until SIGTERM or SIGINT.

    `announce` is told the URL once it takes connections. Raises: SystemExit, as `serve` does; status 1
    also where it cannot listen, which the log tells.
    """
    _collect_rarely()
    server = settings.server
    limit = descriptors.raise_limit()
    max_connections = limit.connections(server.max_connections, outgoing=settings.upstream.max_in_flight)
    policy = connection_limits(server, app.metrics, max_connections=max_connections)
    app.drain.on_begin(policy.drain)
    config = uvicorn.Config(
        app.asgi,
        host=server.host,
        port=server.port,
        http=http_protocol(policy, hits=app.hits),
        loop="uvloop",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        forwarded_allow_ips=forwarders(server.trusted_proxies),
        timeout_graceful_shutdown=math.ceil(server.drain_seconds),
        backlog=_BACKLOG,
    )

    def tell(url: str) -> None:
        log.info("listening", url=url)
        if limit.now != limit.before:
            log.info("limit of open files raised", before=limit.before, limit=limit.now)
        if max_connections < server.max_connections:
            log.warning(
                "the limit of open files allows fewer connections than server.max_connections",
                limit=limit.now,
                max_connections=max_connections,
            )
        announce(url)

    try:
        metrics = None
        if server.metrics_port:
            listener = _listening(server.host, server.metrics_port, backlog=_BACKLOG)
            metrics = MetricsListener(listener, http_protocol(policy, application=app.metrics_asgi))
        serve(config, announce=tell, metrics=metrics)
    except CannotListen as exc:
        log.error("cannot listen", host=exc.host, port=exc.port, reason=exc.reason)  # noqa: TRY400 - no bug
        sys.exit(1)


class MetricsListener(NamedTuple):
    """A listening socket for /metrics alone, and the protocol of its connections."""

    socket: socket.socket
    protocol: type[Connection]


def serve(
    config: uvicorn.Config, *, announce: Callable[[str], None], metrics: MetricsListener | None = None
) -> None:
    """Serve until SIGTERM or SIGINT; `announce` is told the URL once it takes connections.

    Raises: CannotListen; SystemExit: 0 when told to stop, 1 when the application does not start.
    """
    exit_well_when_told()
    listener = _listening(config.host, config.port, backlog=config.backlog)
    announce(url_of(*listener.getsockname()[:2]))  # a client may connect from now on, and waits for the start
    try:
        _Server(config, metrics).run(sockets=[listener])
    except SystemExit as exc:
        sys.exit(1 if exc.code else 0)  # uvicorn's word for a failed start is 3


class _Server(uvicorn.Server):
    """uvicorn's server, with a second listener for metrics.

    It looks around once a second and when a signal comes, not ten times a second: each look may wake a
    process that has nothing else to do. Ten cost an idle gateway 1.9 ms of CPU a second, one costs 0.3.
    """

    _wake: Callable[[], object] = staticmethod(lambda: None)

    def __init__(self, config: uvicorn.Config, metrics: MetricsListener | None = None) -> None:
        super().__init__(config)
        self._metrics = metrics
        self._watch_descriptors = descriptors.Exhaustion().look
        self._trim_heap = HeapTrim().look

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to serve, on the second listener, too."""
        await super().startup(sockets)
        if self._metrics is None:
            return
        loop = asyncio.get_running_loop()
        protocol = partial(self._metrics.protocol, self.config, self.server_state, {}, loop)
        server = await loop.create_server(protocol, sock=self._metrics.socket, backlog=_BACKLOG)
        self.servers.append(server)  # uvicorn closes it with its own

    async def main_loop(self) -> None:
        """Tick until it is time to stop. Tick 0 is uvicorn's for what is due each second, the Date header."""
        told = asyncio.Event()
        self._wake = partial(asyncio.get_running_loop().call_soon_threadsafe, told.set)
        while not await self.on_tick(0):
            self._watch_descriptors()
            self._trim_heap(len(self.server_state.connections))
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await told.wait()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note a signal, at whatever point it interrupts us."""
        super().handle_exit(sig, frame)
        self._wake()


def url_of(host: str, port: int) -> str:
    """Return the URL of an address."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _listening(host: str, port: int, *, backlog: int) -> socket.socket:
    # uvicorn's own bind_socket would tell the reason without the address, and end the process.
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound_buffers(listener)
        listener.bind((host, port))
        listener.listen(backlog)
    except (OSError, TypeError, ValueError) as exc:  # the latter two for what no name can be
        listener.close()
        reason = exc.strerror if isinstance(exc, OSError) else "not an address"
        raise CannotListen(host, port, reason) from exc
    return listener


def forwarders(trusted_proxies: Sequence[str]) -> list[str]:
    """Return whose X-Forwarded-For counts, in uvicorn's terms.

    A listener on `::` names IPv4 peers as `::ffff:a.b.c.d` (RFC 4291, 2.5.5.2), which uvicorn takes
    for other addresses: each one of IPv4 stands there in both forms.
    """
    hosts = list(trusted_proxies)
    for host in trusted_proxies:
        with suppress(ValueError):  # IPv6, or "*"
            network = IPv4Network(host)
            hosts.append(f"::ffff:{network.network_address}/{96 + network.prefixlen}")
    return hosts


def _collect_rarely() -> None:
    # A full collection walks all that lives, 140 ms of CPU with 5,000 streams open, and everybody waits. The
    # gateway leaves no circles behind, of errors neither (tests/test_garbage.py): what there is to find is a
    # library's, and may lie until there are 600,000 objects more. The middle generation is kept small: when
    # thousands of streams are opened its collections walk them, 5 ms at a time; ten times the size takes 36.
    gc.freeze()
    gc.set_threshold(2_000, 5, 50)


def exit_well_when_told() -> None:
    """Let SIGTERM and SIGINT end the process by SystemExit, with status 0: stopping when told is success.

    uvicorn raises the signal that stopped it once more when it is done, to die of it.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
