"""Runs an application under uvicorn, as the gateway needs it run."""

from __future__ import annotations

import math
import signal
import sys

import structlog
import uvicorn
from starlette.types import ASGIApp

from gateway.edge import edge_protocol
from gateway.settings import Server

# Longer than the idle time-outs of common proxies, so that it is never us who hang up first
# while the next request is on its way.
_KEEP_ALIVE_SECONDS = 75
_BACKLOG = 8192

log = structlog.get_logger(__name__)


def run(app: ASGIApp, settings: Server) -> None:
    """Serve until SIGTERM or SIGINT; then the process may exit with status 0.

    Raises: SystemExit (1) when the address cannot be bound or the application does not start.
    """
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=edge_protocol(
            header_seconds=settings.header_seconds, max_header_bytes=settings.max_header_bytes
        ),
        loop="uvloop",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        forwarded_allow_ips=settings.trusted_proxies,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds),
        backlog=_BACKLOG,
    )
    listener = config.bind_socket()
    listener.listen(_BACKLOG)  # whoever reads the line below may connect, and waits for the start
    host, port = listener.getsockname()[:2]
    log.info("listening", url=f"http://{f'[{host}]' if ':' in host else host}:{port}")
    # uvicorn raises the signal that stopped it once more when it is done, to die of it. Stopping
    # when told to is success: exit status 0.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    uvicorn.Server(config).run(sockets=[listener])
