"""The edge: what the HTTP server does itself, before any application runs.

It finds where messages end, bounds what a connection may take, and answers hits.

uvicorn's `http=` setting takes a protocol class, so this is one.
"""

from __future__ import annotations

from starlette.types import ASGIApp

from gateway.api.hits import Hits
from gateway.edge.answering import AnsweringConnection, Heads
from gateway.edge.connection import Connection
from gateway.edge.policy import Policy


def edge_protocol(
    policy: Policy, *, hits: Hits | None = None, application: ASGIApp | None = None
) -> type[Connection]:
    """Return the protocol class to give to uvicorn, which makes one for each connection.

    `hits`: what is answered without the application; None: nothing. `application`: served in place of the one
    that uvicorn is configured with.
    """
    attributes: dict[str, object] = {"policy": policy, "application": application}
    if hits is None:
        return type("BoundedConnection", (Connection,), attributes)
    return type(
        "HitsConnection", (AnsweringConnection,), attributes | {"hits": hits, "heads": Heads(hits.names)}
    )
