"""Endpoints for operators: liveness, readiness, metrics and the OpenAPI document."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import Scope

from gateway.api.metrics_rendering import MetricsRenderer, choose_format
from gateway.api.requests import accepts_gzip, route_path

# Requested periodically by machines, with an IP address as Host: a kubelet uses the pod's address.
PROBES = frozenset({"/healthz", "/readyz", "/metrics"})

# Targets of OPTIONS requests by load balancers: the server as a whole (RFC 9110, 7.1), or its root.
_ALLOWED_METHODS = {"*": "GET, HEAD, OPTIONS, POST", "/": "GET, HEAD, OPTIONS"}

Endpoint = Callable[[Request], Awaitable[Response]]


def is_probe(scope: Scope) -> bool:
    """Tell whether a request is a periodic one of a load balancer, kubelet or Prometheus."""
    path = route_path(scope)
    return path in PROBES or (path in _ALLOWED_METHODS and scope["method"] == "OPTIONS")


class OptionsRoute(Route):
    """`OPTIONS *` and `OPTIONS /`: 204 with `Allow`."""

    def __init__(self) -> None:
        async def endpoint(request: Request) -> Response:
            return Response(status_code=204, headers={"Allow": _ALLOWED_METHODS[route_path(request.scope)]})

        super().__init__("/", endpoint, methods=["OPTIONS"])

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """See `Route.matches`. Starlette's path patterns cannot express "*"."""
        if scope["type"] == "http" and scope["method"] == "OPTIONS" and route_path(scope) in _ALLOWED_METHODS:
            return Match.FULL, {"endpoint": self.endpoint, "path_params": {}}
        return Match.NONE, {}


async def healthz(_: Request) -> Response:
    """Respond 200: the process is alive."""
    return JSONResponse({"status": "ok"})


def readyz(
    reasons: Callable[[], list[str]],
    degraded: Callable[[], list[str]],
    credentials: Callable[[], dict[str, Any] | None],
) -> Endpoint:
    """Return an endpoint that responds 200 when the gateway is ready for traffic, else 503 with the reasons.

    `credentials` returns the slot and generation of the key pair in use.
    """

    async def endpoint(_: Request) -> Response:
        unready_reasons = reasons()
        body = {
            "ready": not unready_reasons,
            "reasons": unready_reasons,
            "degraded": degraded(),
            "credentials": credentials(),
        }
        return JSONResponse(body, 503 if unready_reasons else 200, {"Cache-Control": "no-store"})

    return endpoint


def metrics(registry: CollectorRegistry) -> Endpoint:
    """Return an endpoint for the metrics: Prometheus text or OpenMetrics as requested, gzip if accepted."""
    renderer = MetricsRenderer(registry)

    async def endpoint(request: Request) -> Response:
        wanted = choose_format(request.scope["headers"])
        compress = accepts_gzip(request.scope["headers"])
        body = await renderer.render(wanted, compress=compress)
        headers = {"Content-Type": wanted.content_type, "Vary": "Accept, Accept-Encoding"}
        if compress:
            headers["Content-Encoding"] = "gzip"
        return Response(body, headers=headers)

    return endpoint


def openapi() -> Endpoint:
    """Return an endpoint that serves the OpenAPI document."""
    document = files("gateway.api").joinpath("openapi.json").read_bytes()

    async def endpoint(_: Request) -> Response:
        return Response(document, media_type="application/json")

    return endpoint
