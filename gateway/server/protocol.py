"""The protocol class that uvicorn makes one instance of for each connection."""

from __future__ import annotations

from starlette.types import ASGIApp

from gateway.api.cached_responses import CachedResponses
from gateway.server.connection import Connection
from gateway.server.connection_limits import ConnectionLimits
from gateway.server.fast_path import FastPathConnection, HeadRenderer


def http_protocol(
    policy: ConnectionLimits, *, hits: CachedResponses | None = None, application: ASGIApp | None = None
) -> type[Connection]:
    """Return the protocol class to give to uvicorn, which makes one for each connection.

    `hits`: what is answered without the application; None: nothing. `application`: served in place of the one
    that uvicorn is configured with.
    """
    attributes: dict[str, object] = {"policy": policy, "application": application}
    if hits is None:
        return type("BoundedConnection", (Connection,), attributes)
    return type(
        "HitsConnection",
        (FastPathConnection,),
        attributes | {"hits": hits, "heads": HeadRenderer(hits.names)},
    )
