"""The application of the metrics port: /metrics, as on the callers' port, and nothing else."""

from __future__ import annotations

from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api import operator_endpoints
from gateway.api.middleware.telemetry import completed, identify
from gateway.api.problems import Problems
from gateway.domain.errors import GatewayError


def metrics_application(registry: CollectorRegistry, *, problems: Problems) -> ASGIApp:
    """Return an ASGI application that answers GET and HEAD /metrics, and problems to all else.

    Its requests are neither counted nor logged: a scrape is not to show in what it reads.
    """
    app = Starlette(routes=[Route("/metrics", operator_endpoints.metrics(registry))])
    app.router.redirect_slashes = False
    app.middleware_stack = _Surroundings(app.router, problems=problems)
    return app


class _Surroundings:
    """Gives every request an id, and answers errors; a bug is the server's to log."""

    def __init__(self, app: ASGIApp, *, problems: Problems) -> None:
        self._app = app
        self._problems = problems

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sending = _completing(send, identify(scope))
        try:
            await self._app(scope, receive, sending)
        except (GatewayError, HTTPException) as exc:
            await self._problems.answer(scope, exc)(scope, receive, sending)


def _completing(send: Send, request_id: bytes) -> Send:
    async def completing(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = completed(message.get("headers", ()), request_id)
        await send(message)

    return completing
