"""The interface between the composition root and the server."""

from __future__ import annotations

from typing import NamedTuple

from starlette.applications import Starlette
from starlette.types import ASGIApp

from gateway.api.cached_responses import CachedResponses
from gateway.server.graceful_shutdown import GracefulShutdown
from gateway.telemetry.metrics import Metrics


class Application(NamedTuple):
    """The ASGI application, and the parts that the gateway's own server needs besides.

    `metrics_asgi` serves /metrics alone, on its own port. The server answers `hits` before the application
    is called; None disables this. `shutdown` starts the graceful shutdown.
    """

    asgi: Starlette
    metrics_asgi: ASGIApp
    metrics: Metrics
    hits: CachedResponses | None
    shutdown: GracefulShutdown
