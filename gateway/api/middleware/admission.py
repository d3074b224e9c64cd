"""Which requests are served at all: those for an allowed host, below the configured path prefix."""

from __future__ import annotations

from collections.abc import Awaitable

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.api import operator_endpoints
from gateway.api.trusted_hosts import TrustedHosts
from gateway.domain.errors import InvalidParameter


class Admission:
    """Sets the root path, and refuses requests for a Host that is not ours."""

    def __init__(self, app: ASGIApp, *, root_path: str, hosts: TrustedHosts) -> None:
        self._app = app
        self._root_path = root_path
        self._hosts = hosts

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass the request on. Raises: InvalidParameter, before anything is awaited."""
        if scope["type"] == "http":
            # With the prefix in the path or stripped from it by the ingress: Starlette takes either.
            scope["root_path"] = self._root_path
            if not self._hosts.trust(scope["headers"]) and not operator_endpoints.is_probe(scope):
                raise InvalidParameter("header 'Host' names a host that is not served here")
        return self._app(scope, receive, send)
