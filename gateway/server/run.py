"""Runs the gateway under uvicorn, with the gateway's own connection class. `serve` runs any application."""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import structlog
import uvicorn

from gateway.server import file_descriptors as descriptors
from gateway.server import signals
from gateway.server.application_parts import Application
from gateway.server.connection import Connection
from gateway.server.connection_limits import bound_buffers, make_connection_limits
from gateway.server.drop_new_connections import HANDSHAKE_SECONDS, drop_new_connections
from gateway.server.graceful_shutdown import HANDOVER_SECONDS, GracefulShutdown
from gateway.server.listen_errors import CannotListen, settings_hint
from gateway.server.memory_trim import MemoryTrim
from gateway.server.protocol_class import make_protocol_class
from gateway.server.systemd import notify
from gateway.server.unix_socket import UnixSocket
from gateway.settings.model import Settings

INTERRUPTED = signals.INTERRUPTED
_BACKLOG = 8192
_ACCEPTS_PER_ITERATION = 16
_DESCRIPTORS_PER_HANDLE = 64  # fewer handles if the process may open less than a thousand files
_CANCEL_SECONDS = 0.5  # for the responses of cancelled requests

log = structlog.get_logger(__name__)


def run(
    app: Application,
    settings: Settings,
    *,
    announce: Callable[[str], None] = lambda _: None,
    report: Callable[[CannotListen, str], None] | None = None,
) -> None:
    """Run the gateway, as created by `create_app`, until a signal stops it.

    `announce` is called with the URL when connections are accepted. Raises: SystemExit as `serve` does, and
    with status 1 if the gateway cannot listen; the reason is logged, or passed to `report` with a hint.
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
        uds=server.uds or None,
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
            listener = listen(server.host, server.metrics_port, backlog=_BACKLOG)
            metrics = MetricsListener(listener, make_protocol_class(limits, application=app.metrics_asgi))
        serve(config, announce=log_start, metrics=metrics, shutdown=app.shutdown)
    except CannotListen as exc:
        hint = settings_hint(exc, server)
        if report is None:
            log.error("listen_failed", **exc.where, reason=exc.reason, hint=hint)  # noqa: TRY400 - no bug
        else:
            report(exc, hint)
        sys.exit(1)


class MetricsListener(NamedTuple):
    """A listening socket that serves only /metrics, and the protocol class of its connections."""

    socket: socket.socket
    protocol: type[Connection]


def serve(
    config: uvicorn.Config,
    *,
    announce: Callable[[str], None],
    metrics: MetricsListener | None = None,
    shutdown: GracefulShutdown | None = None,
) -> None:
    """Serve until a signal stops the server; `announce` is called with the URL when connections are accepted.

    `shutdown` begins before uvicorn closes the listeners; see `GracefulShutdown`.

    Raises: CannotListen; SystemExit with status 130 after SIGINT, and 1 if the application does not start.
    """
    server = _Server(config, metrics, shutdown)
    server.handle_signals()
    unix_socket = None
    if config.uds is None:
        listener = listen(config.host, config.port, backlog=config.backlog)
        url = url_of(*listener.getsockname()[:2])
    else:
        unix_socket = _listen_unix(config.uds, backlog=config.backlog)
        listener, url = unix_socket.socket, f"unix:{unix_socket.path}"
        server.before_close = unix_socket.remove
    try:
        # Clients can connect now, and wait until the start is complete.
        announce(url)
        server.run(sockets=handles_of(listener))
    except SystemExit as exc:
        sys.exit(1 if exc.code else 0)  # uvicorn's status for a failed start is 3
    finally:
        if unix_socket is not None:
            unix_socket.remove()
    if server.interrupted:
        sys.exit(INTERRUPTED)


class _Server(uvicorn.Server):
    """uvicorn's server, with a second listener for metrics, and its own main loop and handling of signals.

    uvicorn's main loop runs ten times a second, and each iteration wakes an otherwise idle process. This main
    loop runs once a second, and on a signal. In an idle gateway it takes 0.3 instead of 1.9 ms of CPU per
    second.

    uvicorn handles signals only while it runs. Here, the handlers are installed before the server listens,
    and stay until the process ends. They raise nothing, because Python loses exceptions that a handler raises
    within a finalizer.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        metrics: MetricsListener | None = None,
        shutdown: GracefulShutdown | None = None,
    ) -> None:
        super().__init__(config)
        self.before_close: Callable[[], None] = lambda: None  # called before the listeners are closed
        self._metrics = metrics
        self._shutdown = shutdown
        self._check_descriptors = descriptors.DescriptorCheck().check
        self._trim_heap = MemoryTrim().observe
        self._loop: asyncio.AbstractEventLoop | None = None
        self._signalled = asyncio.Event()
        self.interrupted = False  # SIGINT was the first signal
        self._stopping = self._handed_over = False
        self._accepting: set[asyncio.Task[None]] = set()

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
        """Call `on_tick` each second until a signal arrives, then begin the shutdown.

        Each call of `on_tick` with 0 also updates uvicorn's Date header.
        """
        self._loop = asyncio.get_running_loop()
        notify("READY=1")
        while not await self.on_tick(0) and not self._stopping:
            self._check_descriptors()
            self._trim_heap(len(self.server_state.connections))
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._signalled.wait()
        notify("STOPPING=1")
        if self._shutdown is not None:
            self._shutdown.begin()
            await asyncio.sleep(HANDOVER_SECONDS)
        self._handed_over = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the listeners, and wait for open connections."""
        self.before_close()
        filtered = [drop_new_connections(each) for each in sockets or []]
        if any(filtered):
            await asyncio.sleep(HANDSHAKE_SECONDS)
        self._accept_waiting(sockets or [])
        await super().shutdown(sockets)

    def _accept_waiting(self, listeners: Sequence[socket.socket]) -> None:
        """Accept the connections that wait in the kernel: it resets them when their listener is closed."""
        loop = asyncio.get_running_loop()
        for listener in listeners:
            listener.settimeout(0)
            with suppress(OSError):  # no more connections, or no more descriptors
                while True:
                    task = loop.create_task(self._serve_last_request(listener.accept()[0]))
                    self._accepting.add(task)
                    task.add_done_callback(self._accepting.discard)

    async def _serve_last_request(self, connection: socket.socket) -> None:
        protocol: Any = self.config.http_protocol_class
        state = self.lifespan.state
        make = partial(protocol, config=self.config, server_state=self.server_state, app_state=state)
        connection.settimeout(0)
        with suppress(OSError):  # the client has disconnected
            _, served = await asyncio.get_running_loop().connect_accepted_socket(make, connection)
            served.shutdown()

    # Signals. The handlers are called at an arbitrary point of the program.

    def handle_signals(self) -> None:
        """Install the handlers. Python handles signals in the main thread only."""
        if threading.current_thread() is threading.main_thread():
            for number in signals.STOP:
                signal.signal(number, self.handle_exit)
            for number in signals.IGNORED:
                signal.signal(number, self._handle_ignored)

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]  # a generator there
        """Leave the handlers as they are."""
        return nullcontext()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop. Later signals change nothing, except SIGINT after `HANDOVER_SECONDS`: it cancels requests."""
        if self._handed_over and sig == signal.SIGINT:
            self._call(self._cancel_requests)
        if self._stopping:
            return  # quickly, because each signal interrupts the handler of the signal before
        self._stopping = True
        self.interrupted = sig == signal.SIGINT
        self._call(self._signalled.set)

    def _handle_ignored(self, sig: int, _: FrameType | None) -> None:
        self._call(partial(_log_ignored, signal.Signals(sig).name))

    def _call(self, callback: Callable[[], object]) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(callback)

    def _cancel_requests(self) -> None:
        log.warning("requests_cancelled", signal="SIGINT", count=len(self.server_state.tasks))
        for task in self.server_state.tasks:
            task.cancel()
        asyncio.get_running_loop().call_later(_CANCEL_SECONDS, self._abort_connections)

    def _abort_connections(self) -> None:
        for connection in tuple(self.server_state.connections):
            connection.transport.abort()


def _log_ignored(name: str) -> None:
    log.info(
        "signal_ignored",
        signal=name,
        effect="none: changed secret files are read anyway, other settings at the start only",
    )


def url_of(host: str, port: int) -> str:
    """Return the URL of an address."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def handles_of(listener: socket.socket) -> list[socket.socket]:
    """Return this socket and duplicates of it, so that the event loop accepts many connections per iteration.

    libuv accepts one connection per handle and iteration. Measured with 1,000 connections that are opened at
    once, each with a batch of 100 unknown tasks: a new connection of another client waits up to 5.5 s with
    one handle, 1.6 s with 8, and 1.2 s with 16.
    """
    handles = min(_ACCEPTS_PER_ITERATION, descriptors.soft_limit() // _DESCRIPTORS_PER_HANDLE)
    return [listener, *(listener.dup() for _ in range(handles - 1))]


def listen(host: str, port: int, *, backlog: int) -> socket.socket:
    """Return a socket that listens on an address. Raises: CannotListen."""
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


def _listen_unix(path: str, *, backlog: int) -> UnixSocket:
    try:
        return UnixSocket(path, backlog=backlog)
    except OSError as exc:
        raise CannotListen(f"unix:{path}", path, None, exc) from exc


def _configure_garbage_collection() -> None:
    # A full collection visits every live object and blocks the event loop: 140 ms of CPU with 5,000 streams.
    # The gateway creates no reference cycles, not even with exceptions (tests/integration/test_garbage.py).
    # Only libraries create them, and these may be kept until 2,000,000 more objects exist. The threshold of
    # the middle generation is small: when thousands of streams open, each of its collections takes 5 ms. With
    # a threshold ten times as large, one takes 36 ms.
    gc.freeze()
    gc.set_threshold(2_000, 5, 200)
