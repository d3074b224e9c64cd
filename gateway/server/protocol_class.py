"""Creates the protocol class that uvicorn instantiates for each connection."""

from __future__ import annotations

from starlette.types import ASGIApp

from gateway.api.cached_responses import CachedResponses
from gateway.domain.paced_callbacks import PacedCallbacks
from gateway.server.connection import Connection
from gateway.server.connection_limits import ConnectionLimits
from gateway.server.fast_path import FastPathConnection, HeadRenderer
from gateway.server.turn_taking import RequestTurns

# Requests that start in one iteration of the event loop. With 2, a gateway without its fast path serves 0.88
# times the requests per CPU-second. With more, a burst of requests delays other clients for longer.
_STARTS_PER_ITERATION = 8


def make_protocol_class(
    limits: ConnectionLimits, *, hits: CachedResponses | None = None, application: ASGIApp | None = None
) -> type[Connection]:
    """Return the protocol class for uvicorn, which creates an instance of it for each connection.

    `hits`: cached responses, which are served without the application; None disables this. `application`: an
    application that replaces the one of uvicorn's configuration.
    """
    attributes: dict[str, object] = {
        "limits": limits,
        "request_turns": RequestTurns(),
        "request_starts": PacedCallbacks(per_iteration=_STARTS_PER_ITERATION),
        "heavy_work": PacedCallbacks(),
        "application": application,
    }
    if hits is None:
        return type("BoundedConnection", (Connection,), attributes)
    return type(
        "HitsConnection",
        (FastPathConnection,),
        attributes | {"hits": hits, "heads": HeadRenderer(hits.names)},
    )
