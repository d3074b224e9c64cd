"""Request ID, metrics and log line of every request, and a response for every exception."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

import structlog
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api.problems import Problems
from gateway.api.request_log import RequestLog, trace_fields
from gateway.api.requests import (
    LONG_POLL,
    SECURITY_HEADERS,
    WAITED_SECONDS,
    Headers,
    client_request_id,
    new_request_id,
)
from gateway.domain.errors import GatewayError, Overloaded
from gateway.telemetry.log_sampling import LogSampler
from gateway.telemetry.metrics import Metrics

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
CLIENT_CLOSED_REQUEST = 499  # nginx's code for a client that disconnects before its response

log = structlog.get_logger(__name__)


class RequestTelemetry:
    """Middleware for request IDs, metrics, log lines and unexpected exceptions."""

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, problems: Problems, log_sampler: LogSampler | None = None
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._problems = problems
        self._log_sampler = log_sampler or LogSampler()
        self._request_log = RequestLog(self._log_sampler)
        self._recorders: dict[tuple[str, str, int], tuple[Callable[[], None], Callable[[float], None]]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and record its response."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = assign_request_id(scope)
        started = time.perf_counter() - scope["state"].get(WAITED_SECONDS, 0.0)
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = with_common_headers(message.get("headers", ()), request_id)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            status = status or CLIENT_CLOSED_REQUEST
        except asyncio.CancelledError:
            # Cancelled by our server at the end of the shutdown grace period: the client can retry elsewhere.
            if not status:
                shutdown = Overloaded("the gateway is shutting down and cannot complete the request")
                await self._problems.response(scope, shutdown)(scope, receive, send_with_headers)
            raise
        except Exception as exc:
            if not isinstance(exc, GatewayError | HTTPException):
                self._log_bug(scope, exc)
            if status:
                raise  # the response has begun: only closing the connection reports the error
            await self._problems.response(scope, exc)(scope, receive, send_with_headers)
        finally:
            self._record(scope, status, time.perf_counter() - started)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        # The number of route templates is bounded, that of paths is not.
        route = scope["route"].path_format if "route" in scope else "other"
        if LONG_POLL in scope["state"]:
            route += "?wait"  # separate, because its duration is mostly the wait
        method = scope["method"] if scope["method"] in METHODS else "other"
        recorders = self._recorders.get((route, method, status))
        if recorders is None:  # looking up labels costs more than counting; all three labels have few values
            recorders = (
                self._metrics.http_requests.labels(route, method, status).inc,
                self._metrics.http_request_duration.labels(route).observe,
            )
            self._recorders[route, method, status] = recorders
        count_request, observe_duration = recorders
        count_request()
        observe_duration(seconds)
        self._request_log.log(scope, method=method, route=route, status=status, seconds=seconds)

    def _log_bug(self, scope: Scope, exc: Exception) -> None:
        if (suppressed := self._log_sampler.take(type(exc).__name__)) is not None:
            log.error(
                "bug_in_request",
                exc_info=exc,
                request_id=scope["state"]["request_id"],
                path=scope["path"],
                suppressed=suppressed,
                **trace_fields(scope),
            )


def assign_request_id(scope: Scope) -> bytes:
    """Assign a request ID: the client's X-Request-Id if it is valid, else a new one."""
    request_id = client_request_id(scope["headers"]) or new_request_id()
    scope.setdefault("state", {})["request_id"] = request_id.decode()
    return request_id


def with_common_headers(headers: Iterable[tuple[bytes, bytes]], request_id: bytes) -> Headers:
    """Return response headers with the common ones added; the response's own values take precedence."""
    own_headers = list(headers)
    names = {name for name, _ in own_headers}
    added = [pair for pair in SECURITY_HEADERS if pair[0] not in names]
    return [*own_headers, *added, (b"x-request-id", request_id)]
