"""Checks every request: the allowed Host values, and the path prefix of an ingress."""

from __future__ import annotations

from collections.abc import Awaitable

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.api import operator_endpoints
from gateway.api.trusted_hosts import TrustedHosts
from gateway.domain.errors import InvalidParameter


class HostAndPrefix:
    """Middleware that sets the root path, and refuses requests with another Host than the allowed ones."""

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
        return self._app(scope, receive, send)
