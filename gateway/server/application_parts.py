"""What the composition root (`app.py`) passes to the server."""

from __future__ import annotations

from typing import NamedTuple

from starlette.applications import Starlette
from starlette.types import ASGIApp

from gateway.api.cached_responses import CachedResponses
from gateway.server.graceful_shutdown import GracefulShutdown
from gateway.telemetry.metrics import Metrics


class FastPath(NamedTuple):
    """The parts of the fast path of the gateway's own server (the setting `server.edge`).

    `hits` serves cached responses before the application is called. `asgi` is the application for all other
    requests. It does not search for a cached response again.
    """

    hits: CachedResponses
    asgi: Starlette


class Application(NamedTuple):
    """The ASGI application, and the parts that the gateway's own server needs besides.

    `asgi` serves all requests, under any server. `metrics_asgi` serves only /metrics, on its own port.
    `shutdown` starts the graceful shutdown. `fast_path` is None if it is off.
    """

    asgi: Starlette
    metrics_asgi: ASGIApp
    metrics: Metrics
    shutdown: GracefulShutdown
    fast_path: FastPath | None = None
