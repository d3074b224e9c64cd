"""Browser requests from pages of other sites: CORS for allowed origins, a refusal for the others."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.api.problems import Problems
from gateway.api.requests import header, is_cross_site, route_path
from gateway.domain.errors import CrossSiteRequest, GatewayError

_API = ("/v1/", "/scc/")  # the paths that cost upstream calls


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
        path = route_path(scope) if scope["type"] == "http" else ""
        return (self._with_cors if path.startswith("/v1/") else self._app)(scope, receive, send)


def _answering(app: ASGIApp, problems: Problems) -> ASGIApp:
    """Answer errors inside, so that what stands around sees an answer: a browser may read problems too."""

    async def answering(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except (GatewayError, HTTPException) as exc:
            await problems.answer(scope, exc)(scope, receive, send)

    return answering


class SameSite:
    """Refuses what browsers ask on behalf of another site's page, unless its origin is one of `origins`.

    A page may make its reader's browser ask, though it may not read the answer; what the browser then says of
    the request (Fetch Metadata, Sec-Fetch-Site) no page can change. Other callers send no such header.
    """

    def __init__(self, app: ASGIApp, *, origins: Sequence[str]) -> None:
        self._app = app
        self._any = "*" in origins
        self._origins = frozenset(origins)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass the request on. Raises: CrossSiteRequest, before anything is awaited."""
        if scope["type"] == "http" and not self._any and is_cross_site(scope["headers"]):
            asked = route_path(scope).startswith(_API)
            if asked and header(scope["headers"], b"origin") not in self._origins:
                raise CrossSiteRequest("a page of another site may not ask; see server.cors_origins")
        return self._app(scope, receive, send)
