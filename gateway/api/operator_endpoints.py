"""What operators and their tools ask: alive, ready, how is it going, what is there."""

from __future__ import annotations

import gzip
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import Scope

from gateway.api.requests import accepts_gzip, route_path

# Asked by machines, as often as they are set to, and by address alone: a kubelet asks for the pod's IP.
PROBES = frozenset({"/healthz", "/readyz", "/metrics"})

# What load balancers ask with OPTIONS: the server as a whole (RFC 9110, 7.1), or its root.
_ALLOWED = {"*": "GET, HEAD, OPTIONS, POST", "/": "GET, HEAD, OPTIONS"}
_GZIP_LEVEL = 1  # a fifth of the text; 9 would make it a sixth, in five times the time

Endpoint = Callable[[Request], Awaitable[Response]]


def is_probe(scope: Scope) -> bool:
    """Tell whether a request is one of those that machines make by address, as often as they are set to."""
    path = route_path(scope)
    return path in PROBES or (path in _ALLOWED and scope["method"] == "OPTIONS")


class OptionsRoute(Route):
    """`OPTIONS *` and `OPTIONS /`: 204 with `Allow`."""

    def __init__(self) -> None:
        async def endpoint(request: Request) -> Response:
            return Response(status_code=204, headers={"Allow": _ALLOWED[route_path(request.scope)]})

        super().__init__("/", endpoint, methods=["OPTIONS"])

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """See `Route.matches`; a path of "*" is no pattern that Starlette knows."""
        if scope["type"] == "http" and scope["method"] == "OPTIONS" and route_path(scope) in _ALLOWED:
            return Match.FULL, {"endpoint": self.endpoint, "path_params": {}}
        return Match.NONE, {}


async def healthz(_: Request) -> Response:
    """Answer 200: the process can answer."""
    return JSONResponse({"status": "ok"})


def readyz(
    reasons: Callable[[], list[str]],
    degraded: Callable[[], list[str]],
    credentials: Callable[[], dict[str, Any] | None],
) -> Endpoint:
    """Return an endpoint that answers 200 when traffic should come, else 503 with the reasons.

    `credentials` tells which pair signs, by its slot and generation.
    """

    async def endpoint(_: Request) -> Response:
        why_not = reasons()
        body = {
            "ready": not why_not,
            "reasons": why_not,
            "degraded": degraded(),
            "credentials": credentials(),
        }
        return JSONResponse(body, 503 if why_not else 200, {"Cache-Control": "no-store"})

    return endpoint


def metrics(registry: CollectorRegistry) -> Endpoint:
    """Return an endpoint that answers in Prometheus text or, if asked for, OpenMetrics; gzip if accepted."""

    async def endpoint(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        body = encode(registry)
        headers = {"Content-Type": content_type, "Vary": "Accept, Accept-Encoding"}
        if accepts_gzip(request.scope["headers"]):
            headers["Content-Encoding"] = "gzip"
            body = gzip.compress(body, _GZIP_LEVEL, mtime=0)
        return Response(body, headers=headers)

    return endpoint


def openapi() -> Endpoint:
    """Return an endpoint that answers with the OpenAPI document."""
    document = files("gateway.api").joinpath("openapi.json").read_bytes()

    async def endpoint(_: Request) -> Response:
        return Response(document, media_type="application/json")

    return endpoint
