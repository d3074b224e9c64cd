"""Runs the gateway under uvicorn, with the gateway's own connection class. `serve` runs any application."""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import NamedTuple

import structlog
import uvicorn

from gateway.server import file_descriptors as descriptors
from gateway.server.application import Application
from gateway.server.connection import Connection
from gateway.server.connection_limits import bound_buffers, make_connection_limits
from gateway.server.graceful_shutdown import HANDOVER_SECONDS
from gateway.server.listen_errors import CannotListen, settings_hint
from gateway.server.memory_trim import MemoryTrim
from gateway.server.protocol_class import make_protocol_class
from gateway.settings.model import Settings

INTERRUPTED = 128 + signal.SIGINT  # exit status after Ctrl-C, as in a shell
_BACKLOG = 8192

log = structlog.get_logger(__name__)


def run(app: Application, settings: Settings, *, announce: Callable[[str], None] = lambda _: None) -> None:
    """Run the gateway, as created by `create_app`, until SIGTERM or SIGINT.

    `announce` is called with the URL when connections are accepted. Raises: SystemExit as `serve` does, and
    with status 1 if the gateway cannot listen; the reason is logged.
    """
    _configure_garbage_collection()
    server = settings.server
    limit = descriptors.raise_limit()
    max_connections = limit.max_client_connections(
        server.max_connections, outgoing=settings.upstream.max_in_flight
    )
    limits = make_connection_limits(server, app.metrics, max_connections=max_connections)
    app.shutdown.on_begin(limits.start_draining)
    hits, asgi = (None, app.asgi) if app.fast_path is None else app.fast_path
    config = uvicorn.Config(
        asgi,
        host=server.host,
        port=server.port,
        http=make_protocol_class(limits, hits=hits),
        loop="uvloop",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # `api/middleware/client_address.py` applies them
        # uvicorn types this as `int`, but only compares it with the clock. It starts after the handover.
        timeout_graceful_shutdown=max(server.drain_seconds - HANDOVER_SECONDS, 0.0),  # type: ignore[arg-type]
        backlog=_BACKLOG,
    )

    def log_start(url: str) -> None:
        log.info("listening", url=url)
        if limit.now != limit.before:
            log.info("open_file_limit_raised", before=limit.before, limit=limit.now)
        if max_connections < server.max_connections:
            log.warning(
                "max_connections_reduced_by_open_file_limit",
                limit=limit.now,
                max_connections=max_connections,
            )
        announce(url)

    try:
        metrics = None
        if server.metrics_port:
            listener = _listen(server.host, server.metrics_port, backlog=_BACKLOG)
            metrics = MetricsListener(listener, make_protocol_class(limits, application=app.metrics_asgi))
        serve(config, announce=log_start, metrics=metrics)
    except CannotListen as exc:
        hint = settings_hint(exc, server)
        log.error("listen_failed", host=exc.host, port=exc.port, reason=exc.reason, hint=hint)  # noqa: TRY400 - no bug
        sys.exit(1)


class MetricsListener(NamedTuple):
    """A listening socket that serves only /metrics, and the protocol class of its connections."""

    socket: socket.socket
    protocol: type[Connection]


def serve(
    config: uvicorn.Config, *, announce: Callable[[str], None], metrics: MetricsListener | None = None
) -> None:
    """Serve until SIGTERM or SIGINT; `announce` is called with the URL when connections are accepted.

    Raises: CannotListen; SystemExit with status 0 after SIGTERM, 130 after SIGINT, and 1 if the application
    does not start.
    """
    exit_cleanly_on_signals()
    listener = _listen(config.host, config.port, backlog=config.backlog)
    # Clients can connect now, and wait until the start is complete.
    announce(url_of(*listener.getsockname()[:2]))
    try:
        _Server(config, metrics).run(sockets=[listener])
    except SystemExit as exc:
        sys.exit(exc.code if exc.code in {0, INTERRUPTED} else 1)  # uvicorn's status for a failed start is 3


class _Server(uvicorn.Server):
    """uvicorn's server, with a second listener for metrics.

    uvicorn's main loop runs ten times a second, and each iteration wakes an otherwise idle process. This main
    loop runs once a second, and on a signal. In an idle gateway it takes 0.3 instead of 1.9 ms of CPU per
    second.
    """

    _wake: Callable[[], object] = staticmethod(lambda: None)

    def __init__(self, config: uvicorn.Config, metrics: MetricsListener | None = None) -> None:
        super().__init__(config)
        self._metrics = metrics
        self._check_descriptors = descriptors.DescriptorCheck().check
        self._trim_heap = MemoryTrim().observe

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to serve, also on the second listener."""
        await super().startup(sockets)
        if self._metrics is None:
            return
        loop = asyncio.get_running_loop()
        protocol = partial(self._metrics.protocol, self.config, self.server_state, {}, loop)
        server = await loop.create_server(protocol, sock=self._metrics.socket, backlog=_BACKLOG)
        self.servers.append(server)  # uvicorn closes it with its other listeners

    async def main_loop(self) -> None:
        """Call `on_tick` each second until a signal arrives. With 0, uvicorn updates the Date header."""
        signalled = asyncio.Event()
        self._wake = partial(asyncio.get_running_loop().call_soon_threadsafe, signalled.set)
        while not await self.on_tick(0):
            self._check_descriptors()
            self._trim_heap(len(self.server_state.connections))
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await signalled.wait()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Record a signal and wake the main loop. Called at an arbitrary point of the program."""
        super().handle_exit(sig, frame)
        self._wake()


def url_of(host: str, port: int) -> str:
    """Return the URL of an address."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _listen(host: str, port: int, *, backlog: int) -> socket.socket:
    # uvicorn's bind_socket would log the reason without the address, and exit.
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound_buffers(listener)
        listener.bind((host, port))
        listener.listen(backlog)
    except (OSError, TypeError, ValueError) as exc:  # the latter two for strings that cannot be host names
        listener.close()
        raise CannotListen(url_of(host, port), host, port, exc) from exc
    return listener


def _configure_garbage_collection() -> None:
    # A full collection visits every live object and blocks the event loop: 140 ms of CPU with 5,000 streams.
    # The gateway creates no reference cycles, not even with exceptions (tests/integration/test_garbage.py).
    # Only libraries create them, and these may be kept until 600,000 more objects exist. The threshold of the
    # middle generation is small: when thousands of streams open, each of its collections takes 5 ms. With a
    # threshold ten times as large, one takes 36 ms.
    gc.freeze()
    gc.set_threshold(2_000, 5, 50)


def exit_cleanly_on_signals() -> None:
    """Make SIGTERM raise SystemExit with status 0, because a requested stop is a success; SIGINT with 130.

    uvicorn sends the signal to the process again after its shutdown. By default this would kill the process.
    """
    for number, status in ((signal.SIGTERM, 0), (signal.SIGINT, INTERRUPTED)):
        signal.signal(number, lambda *_, status=status: sys.exit(status))
