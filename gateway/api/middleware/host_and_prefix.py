"""Checks every request: the allowed Host values, and the path prefix of an ingress."""

from __future__ import annotations

from collections.abc import Awaitable

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.api import operator_endpoints
from gateway.api.trusted_hosts import TrustedHosts
from gateway.domain.errors import InvalidParameter


class HostAndPrefix:
    """Middleware that sets the root path, and refuses requests with another Host than the allowed ones.

    The root path itself is redirected to the page, whose address ends with a slash: relative URLs in the page
    depend on it.
    """

    def __init__(self, app: ASGIApp, *, root_path: str, hosts: TrustedHosts) -> None:
        self._app = app
        self._root_path = root_path
        self._hosts = hosts

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass the request on. Raises: InvalidParameter before anything is awaited."""
        if scope["type"] == "http":
            # Starlette accepts the path with the prefix, and without it if the ingress has stripped it.
            scope["root_path"] = self._root_path
            if not self._hosts.trust(scope["headers"]) and not operator_endpoints.is_probe(scope):
                raise InvalidParameter("header 'Host' is not an allowed host; see server.trusted_hosts")
            if self._root_path and scope["path"] == self._root_path and scope["method"] in {"GET", "HEAD"}:
                return self._redirect(scope["query_string"])(scope, receive, send)
        return self._app(scope, receive, send)

    def _redirect(self, query: bytes) -> Response:
        # Relative to the request's own address, because another ingress may have removed a prefix from it.
        location = f"./{self._root_path.rpartition('/')[2]}/"
        if query:
            location += f"?{query.decode('latin-1')}"
        return Response(status_code=307, headers={"location": location})
