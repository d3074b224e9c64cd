"""Runs applications under uvicorn: the gateway as it needs to be run, and whatever else serves."""

from __future__ import annotations

import gc
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from ipaddress import IPv4Network

import structlog
import uvicorn
from prometheus_client import CollectorRegistry, start_http_server

from gateway.app import Application
from gateway.edge import edge_protocol
from gateway.settings import Server

# Longer than the idle time-outs of common proxies, so that it is never us who hang up first
# while the next request is on its way.
_KEEP_ALIVE_SECONDS = 75
_BACKLOG = 8192

log = structlog.get_logger(__name__)


def run(app: Application, settings: Server) -> None:
    """Run the gateway, as `create_app` makes it, until SIGTERM or SIGINT. Raises: see `serve`."""
    _collect_rarely()
    config = uvicorn.Config(
        app.asgi,
        host=settings.host,
        port=settings.port,
        http=edge_protocol(
            header_seconds=settings.header_seconds,
            max_header_bytes=settings.max_header_bytes,
            hits=app.hits,
        ),
        loop="uvloop",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        forwarded_allow_ips=forwarders(settings.trusted_proxies),
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds),
        backlog=_BACKLOG,
    )
    with _metrics_served(app.registry, host=settings.host, port=settings.metrics_port):
        serve(config, announce=lambda url: log.info("listening", url=url))


def serve(config: uvicorn.Config, *, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; `announce` is told the URL once it takes connections.

    Raises: SystemExit: 0 when told to stop, 1 when the address cannot be bound or the application
    does not start.
    """
    exit_well_when_told()
    try:
        listener = config.bind_socket()
        listener.listen(config.backlog)  # whoever hears of it may connect, and waits for the start
        host, port = listener.getsockname()[:2]
        announce(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        uvicorn.Server(config).run(sockets=[listener])
    except SystemExit as exc:
        sys.exit(1 if exc.code else 0)  # uvicorn's word for a failed start is 3


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


@contextmanager
def _metrics_served(registry: CollectorRegistry, *, host: str, port: int) -> Iterator[None]:
    """Serve /metrics on a port of its own, by prometheus-client's own thread; port 0: on none.

    Raises: SystemExit, with status 1, when the address cannot be bound.
    """
    if not port:
        yield
        return
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as exc:
        log.error("cannot listen for metrics", host=host, port=port, reason=exc.strerror)  # noqa: TRY400 - no bug
        sys.exit(1)
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


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
