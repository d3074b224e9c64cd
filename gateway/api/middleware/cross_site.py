"""Cross-site browser requests: CORS for allowed origins, refusal of all others."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Sequence

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.api.problems import Problems
from gateway.api.requests import header, is_cross_site, route_path
from gateway.domain.errors import CrossSiteRequest, GatewayError
from gateway.settings.model import Server

_API = ("/v1/", "/scc/")  # paths that can cause upstream calls
_REQUEST_HEADERS = ("If-None-Match", "Last-Event-ID", "Prefer", "X-Request-Id")
_RESPONSE_HEADERS = ("Age", "Cache-Status", "ETag", "Preference-Applied", "Retry-After", "X-Request-Id")
# Headers that scripts of a page add to all requests. A preflight without them fails, and with it the request.
# The gateway ignores them, or only logs them.
_COMMON_HEADERS = (
    # Trace context: W3C, B3, Jaeger, AWS, Sentry, Datadog, Elastic, New Relic, Azure Application Insights.
    "traceparent",
    "tracestate",
    "baggage",
    "b3",
    "X-B3-TraceId",
    "X-B3-SpanId",
    "X-B3-ParentSpanId",
    "X-B3-Sampled",
    "X-B3-Flags",
    "uber-trace-id",
    "X-Amzn-Trace-Id",
    "sentry-trace",
    "x-datadog-origin",
    "x-datadog-parent-id",
    "x-datadog-sampling-priority",
    "x-datadog-tags",
    "x-datadog-trace-id",
    "elastic-apm-traceparent",
    "newrelic",
    "Request-Context",
    "Request-Id",
    # HTTP clients and EventSource polyfills.
    "Cache-Control",
    "Pragma",
    "X-Requested-With",
)


class AllowedOrigins:
    """The origins of `server.cors_origins`. A final dot of a host name is ignored, as in `TrustedHosts`."""

    def __init__(self, origins: Sequence[str]) -> None:
        self.any = "*" in origins
        self.pattern = (
            "|".join(_pattern(origin) for origin in origins) or r"(?!)"
        )  # without origins: no match
        self._match = re.compile(self.pattern).fullmatch

    def allow(self, origin: str | None) -> bool:
        """Tell whether pages of this origin are allowed."""
        return self.any or (origin is not None and self._match(origin) is not None)


def _pattern(origin: str) -> str:
    """Return a regular expression: `*.` stands for one or more labels, and `:*` for any port or none."""
    scheme, separator, authority = origin.partition("://")
    if not separator:
        return re.escape(origin)
    host, colon, port = authority.rpartition(":")
    if not colon or not (port == "*" or port.isdigit()):  # without a port; an IPv6 address has colons
        host, port = authority, ""
    subdomains = r"(?:[a-z0-9_-]+\.)+" if host.startswith("*.") else ""
    name = re.escape(host.removeprefix("*.").removesuffix("."))
    ports = r"(?::[0-9]{1,5})?" if port == "*" else f":{port}" if port else ""
    return rf"{re.escape(scheme)}://{subdomains}{name}\.?{ports}"


class Cors:
    """Middleware that lets pages of the allowed origins read the /v1 paths."""

    def __init__(self, app: ASGIApp, *, server: Server, problems: Problems) -> None:
        self._app = app
        origins = AllowedOrigins(server.cors_origins)
        with_login = ("Authorization",) if server.cors_credentials else ()
        self._with_cors = CORSMiddleware(
            _handling_errors(app, problems),
            allow_origins=["*"] if origins.any else [],
            allow_origin_regex=origins.pattern,
            allow_methods=["GET", "HEAD"],
            allow_headers=[*_REQUEST_HEADERS, *_COMMON_HEADERS, *with_login, *server.cors_headers],
            allow_credentials=server.cors_credentials,
            allow_private_network=server.cors_private_network,
            expose_headers=[*_RESPONSE_HEADERS, *server.cors_expose_headers],
            max_age=server.cors_max_age_seconds,
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
        self._origins = AllowedOrigins(origins)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass the request on. Raises: CrossSiteRequest before anything is awaited."""
        if scope["type"] == "http" and is_cross_site(scope["headers"]):
            protected = route_path(scope).startswith(_API)
            if protected and not self._origins.allow(header(scope["headers"], b"origin")):
                raise CrossSiteRequest("request of another site's page refused; see server.cors_origins")
        return self._app(scope, receive, send)
