"""What surrounds every request, in pure ASGI.

Outermost first:

- Telemetry: request id, metrics, one log line, and the answer to every exception
- Admission: the prefix an ingress serves us under, and the allowed Host values
- Cors: browsers of other origins, on the /v1 paths only
- RateLimit (ratelimit.py): so many requests a second of each client

They stand in the place of Starlette's own stack, whose two exception layers would each keep a
frame, a closure and a Request alive for as long as a stream is open. Who has nothing to do once the request
is passed on hands the inner application's awaitable out, and keeps no frame either.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Sequence

import structlog
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api import ops
from gateway.api.problems import Problems
from gateway.api.requestlog import RequestLog, trace_fields
from gateway.api.requests import Headers, given_request_id, new_request_id
from gateway.exceptions import GatewayError, InvalidParameter, Overloaded
from gateway.metrics import Metrics
from gateway.sampling import Sampler

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_HUNG_UP = 499  # nginx's word for a caller that left before its answer

log = structlog.get_logger(__name__)


class Telemetry:
    """Gives every request an id, counts and times its answer, and answers for bugs."""

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, problems: Problems, sampler: Sampler | None = None
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._problems = problems
        self._sampler = sampler or Sampler()
        self._request_log = RequestLog(self._sampler)
        self._bound: dict[tuple[str, str, int], tuple[Callable[[], None], Callable[[float], None]]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and see its answer through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = given_request_id(scope["headers"]) or new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id.decode()
        status = 0

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
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
        if (suppressed := self._sampler.take(type(exc).__name__)) is not None:
            log.error(
                "bug",
                exc_info=exc,
                request_id=scope["state"]["request_id"],
                path=scope["path"],
                suppressed=suppressed,
                **trace_fields(scope),
            )


class TrustedHosts:
    """Knows which values of Host are ours; `*` is any, `*.example.com` all below it."""

    def __init__(self, trusted_hosts: Sequence[str]) -> None:
        self._any = "*" in trusted_hosts
        self._exact = {host.lower() for host in trusted_hosts}
        self._suffixes = tuple(host[1:].lower() for host in trusted_hosts if host.startswith("*."))

    def trust(self, headers: Headers) -> bool:
        """Tell whether a request with these headers is for one of ours."""
        if self._any:
            return True
        host = next((value for name, value in headers if name == b"host"), b"").decode("latin-1").lower()
        name = re.sub(r":[0-9]+\Z", "", host)
        return name in self._exact or name.endswith(self._suffixes)


class Admission:
    """Sets the root path, and refuses requests for a Host that is not ours."""

    def __init__(self, app: ASGIApp, *, root_path: str, trusted_hosts: Sequence[str]) -> None:
        self._app = app
        self._root_path = root_path
        self._hosts = TrustedHosts(trusted_hosts)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass the request on. Raises: InvalidParameter, before anything is awaited."""
        if scope["type"] == "http":
            # With the prefix in the path or stripped from it by the ingress: Starlette takes either.
            scope["root_path"] = self._root_path
            if not self._hosts.trust(scope["headers"]):
                path = scope["path"].removeprefix(self._root_path)
                if path not in ops.PROBES:
                    raise InvalidParameter("header 'Host' names a host that is not served here")
        return self._app(scope, receive, send)


class Cors:
    """Lets browsers of the named origins read the /v1 paths."""

    def __init__(self, app: ASGIApp, *, origins: Sequence[str], problems: Problems) -> None:
        self._app = app
        self._with_cors = CORSMiddleware(
            _answering(app, problems),
            allow_origins=origins,
            allow_methods=["GET", "HEAD"],
            allow_headers=["If-None-Match", "Last-Event-ID", "Prefer", "X-Request-Id"],
            expose_headers=["Age", "Cache-Status", "ETag", "Retry-After", "X-Request-Id"],
        )

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass the request on, through CORS when it is for /v1."""
        path = scope["path"].removeprefix(scope["root_path"]) if scope["type"] == "http" else ""
        return (self._with_cors if path.startswith("/v1/") else self._app)(scope, receive, send)


def _answering(app: ASGIApp, problems: Problems) -> ASGIApp:
    """Answer errors inside, so that what stands around sees an answer: a browser may read problems too."""

    async def answering(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except (GatewayError, HTTPException) as exc:
            await problems.answer(scope, exc)(scope, receive, send)

    return answering
