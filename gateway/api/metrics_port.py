"""The application of the separate metrics port: /metrics and nothing else."""

from __future__ import annotations

from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api import operator_endpoints
from gateway.api.middleware.telemetry import assign_request_id, with_common_headers
from gateway.api.problems import Problems
from gateway.domain.errors import GatewayError


def metrics_application(registry: CollectorRegistry, *, problems: Problems) -> ASGIApp:
    """Return an ASGI application that serves GET and HEAD /metrics, and responds with problems otherwise.

    Its requests are neither counted nor logged: a scrape must not change the values that it reads.
    """
    app = Starlette(routes=[Route("/metrics", operator_endpoints.metrics(registry))])
    app.router.redirect_slashes = False
    app.middleware_stack = _ErrorHandling(app.router, problems=problems)
    return app


class _ErrorHandling:
    """Assigns request IDs and turns errors into problems. The server logs unexpected exceptions."""

    def __init__(self, app: ASGIApp, *, problems: Problems) -> None:
        self._app = app
        self._problems = problems

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        send_with_headers = _with_headers(send, assign_request_id(scope))
        try:
            await self._app(scope, receive, send_with_headers)
        except (GatewayError, HTTPException) as exc:
            await self._problems.response(scope, exc)(scope, receive, send_with_headers)


def _with_headers(send: Send, request_id: bytes) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = with_common_headers(message.get("headers", ()), request_id)
        await send(message)

    return send_with_headers
