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
    SECURITY_HEADERS,
    Headers,
    given_request_id,
    new_request_id,
)
from gateway.domain.errors import GatewayError, Overloaded
from gateway.telemetry.log_sampling import LogSampler
from gateway.telemetry.metrics import Metrics

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_HUNG_UP = 499  # nginx's word for a caller that left before its answer

log = structlog.get_logger(__name__)


class RequestTelemetry:
    """Gives every request an id, counts and times its answer, and answers for bugs."""

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, problems: Problems, log_sampler: LogSampler | None = None
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._problems = problems
        self._log_sampler = log_sampler or LogSampler()
        self._request_log = RequestLog(self._log_sampler)
        self._bound: dict[tuple[str, str, int], tuple[Callable[[], None], Callable[[float], None]]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and see its answer through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = identify(scope)
        status = 0

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = completed(message.get("headers", ()), request_id)
            await send(message)

        try:
            await self._app(scope, receive, send_counted)
        except ClientDisconnect:
            status = status or _HUNG_UP
        except asyncio.CancelledError:
            # By our server, when its time to drain is over: the caller may find another that has time.
            if not status:
                late = Overloaded("the gateway is leaving, and cannot wait for the answer any longer")
                await self._problems.answer(scope, late)(scope, receive, send_counted)
            raise
        except Exception as exc:
            if not isinstance(exc, GatewayError | HTTPException):
                self._tell_of_bug(scope, exc)
            if status:
                raise  # half an answer is out: only closing the connection tells the caller
            await self._problems.answer(scope, exc)(scope, receive, send_counted)
        finally:
            self._record(scope, status, time.perf_counter() - started)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        # The route's template is bounded; a path is not.
        route = scope["route"].path_format if "route" in scope else "other"
        method = scope["method"] if scope["method"] in METHODS else "other"
        bound = self._bound.get((route, method, status))
        if bound is None:  # looking labels up costs more than counting; all three are bounded
            bound = (
                self._metrics.http_requests.labels(route, method, status).inc,
                self._metrics.http_request_duration.labels(route).observe,
            )
            self._bound[route, method, status] = bound
        count, observe = bound
        count()
        observe(seconds)
        self._request_log.tell(scope, method=method, route=route, status=status, seconds=seconds)

    def _tell_of_bug(self, scope: Scope, exc: Exception) -> None:
        if (suppressed := self._log_sampler.take(type(exc).__name__)) is not None:
            log.error(
                "bug",
                exc_info=exc,
                request_id=scope["state"]["request_id"],
                path=scope["path"],
                suppressed=suppressed,
                **trace_fields(scope),
            )


def identify(scope: Scope) -> bytes:
    """Give a request its id: its caller's, if that is sane, or a new one."""
    request_id = given_request_id(scope["headers"]) or new_request_id()
    scope.setdefault("state", {})["request_id"] = request_id.decode()
    return request_id


def completed(headers: Iterable[tuple[bytes, bytes]], request_id: bytes) -> Headers:
    """Return the headers of a response with those that each one has; its own security headers stay."""
    given = list(headers)
    names = {name for name, _ in given}
    added = [pair for pair in SECURITY_HEADERS if pair[0] not in names]
    return [*given, *added, (b"x-request-id", request_id)]
