"""What the composition root (`app.py`) passes to the server."""

from __future__ import annotations

from typing import NamedTuple

from starlette.applications import Starlette
from starlette.types import ASGIApp

from gateway.api.cached_responses import CachedResponses
from gateway.server.graceful_shutdown import GracefulShutdown
from gateway.telemetry.metrics import Metrics


class Application(NamedTuple):
    """The ASGI application, and the parts that the gateway's own server needs besides.

    `metrics_asgi` serves only /metrics, on its own port. `hits` serves cached responses before the
    application is called (the setting `server.edge`); None disables this. `shutdown` starts the graceful
    shutdown.
    """

    asgi: Starlette
    metrics_asgi: ASGIApp
    metrics: Metrics
    hits: CachedResponses | None
    shutdown: GracefulShutdown
