"""Cross-site browser requests: CORS for allowed origins, refusal of all others."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.api.problems import Problems
from gateway.api.requests import header, is_cross_site, route_path
from gateway.domain.errors import CrossSiteRequest, GatewayError

_API = ("/v1/", "/scc/")  # paths that can cause upstream calls


class Cors:
    """Middleware that lets pages of the allowed origins read the /v1 paths."""

    def __init__(self, app: ASGIApp, *, origins: Sequence[str], problems: Problems) -> None:
        self._app = app
        self._with_cors = CORSMiddleware(
            _handling_errors(app, problems),
            allow_origins=origins,
            allow_methods=["GET", "HEAD"],
            allow_headers=["If-None-Match", "Last-Event-ID", "Prefer", "X-Request-Id"],
            expose_headers=["Age", "Cache-Status", "ETag", "Retry-After", "X-Request-Id"],
        )

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass the request on, through CORS when it is for /v1."""
        path = route_path(scope) if scope["type"] == "http" else ""
        return (self._with_cors if path.startswith("/v1/") else self._app)(scope, receive, send)


def _handling_errors(app: ASGIApp, problems: Problems) -> ASGIApp:
    """Turn errors into responses inside the CORS middleware, so that a browser can read problems, too."""

    async def handle(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except (GatewayError, HTTPException) as exc:
            await problems.response(scope, exc)(scope, receive, send)

    return handle


class SameSite:
    """Middleware that refuses requests of other sites' pages, unless their origin is one of `origins`.

    A page can make a browser send requests although it cannot read the responses. The browser describes such
    requests in Sec-Fetch-Site (Fetch Metadata), which a page cannot change. Other clients do not send it.
    """

    def __init__(self, app: ASGIApp, *, origins: Sequence[str]) -> None:
        self._app = app
        self._any = "*" in origins
        self._origins = frozenset(origins)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass the request on. Raises: CrossSiteRequest before anything is awaited."""
        if scope["type"] == "http" and not self._any and is_cross_site(scope["headers"]):
            protected = route_path(scope).startswith(_API)
            if protected and header(scope["headers"], b"origin") not in self._origins:
                raise CrossSiteRequest("request of another site's page refused; see server.cors_origins")
        return self._app(scope, receive, send)
