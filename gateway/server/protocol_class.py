"""Creates the protocol class that uvicorn instantiates for each connection."""

from __future__ import annotations

from starlette.types import ASGIApp

from gateway.api.cached_responses import CachedResponses
from gateway.server.connection import Connection
from gateway.server.connection_limits import ConnectionLimits
from gateway.server.fast_path import FastPathConnection, HeadRenderer


def make_protocol_class(
    limits: ConnectionLimits, *, hits: CachedResponses | None = None, application: ASGIApp | None = None
) -> type[Connection]:
    """Return the protocol class for uvicorn, which instantiates it for each connection.

    `hits`: responses that are served without the application; None disables this. `application`: replaces
    the one that uvicorn is configured with.
    """
    attributes: dict[str, object] = {"limits": limits, "application": application}
    if hits is None:
        return type("BoundedConnection", (Connection,), attributes)
    return type(
        "HitsConnection",
        (FastPathConnection,),
        attributes | {"hits": hits, "heads": HeadRenderer(hits.names)},
    )
