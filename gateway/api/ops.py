"""What operators and their tools ask: alive, ready, how is it going, what is there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

# Asked by machines, as often as they are set to, and by address alone: a kubelet asks for the pod's IP.
PROBES = frozenset({"/healthz", "/readyz", "/metrics"})

Endpoint = Callable[[Request], Awaitable[Response]]


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
    """Return an endpoint that answers in Prometheus text, or in OpenMetrics when asked for."""

    async def endpoint(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"Content-Type": content_type})

    return endpoint


def openapi() -> Endpoint:
    """Return an endpoint that answers with the OpenAPI document."""
    document = files("gateway.api").joinpath("openapi.json").read_bytes()

    async def endpoint(_: Request) -> Response:
        return Response(document, media_type="application/json")

    return endpoint
