"""The interface between the composition root and the server."""

from __future__ import annotations

from typing import NamedTuple

from starlette.applications import Starlette
from starlette.types import ASGIApp

from gateway.api.cached_responses import CachedResponses
from gateway.server.graceful_shutdown import GracefulShutdown
from gateway.telemetry.metrics import Metrics


class Application(NamedTuple):
    """The application, for any ASGI server, and what ours needs besides.

    `metrics_asgi` serves /metrics alone, for a port of its own. `hits` are what may be answered before the
    application; None: nothing. `drain` tells when the process has been told to stop.
    """

    asgi: Starlette
    metrics_asgi: ASGIApp
    metrics: Metrics
    hits: CachedResponses | None
    drain: GracefulShutdown
