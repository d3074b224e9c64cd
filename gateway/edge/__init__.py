"""The edge: what the HTTP server does itself, before any application runs. It refuses, and it answers hits.

uvicorn's `http=` setting takes a protocol class, so this is one: its own, with bounds on headers and, where
it may, with hits answered.
"""

from __future__ import annotations

import structlog
import uvicorn

from gateway.api.hits import Hits
from gateway.edge.answering import TESTED, AnsweringProtocol, Heads
from gateway.edge.bounds import BoundedProtocol

log = structlog.get_logger(__name__)


def edge_protocol(
    *,
    header_seconds: float,
    max_header_bytes: int,
    hits: Hits | None,
    server_version: str = uvicorn.__version__,
) -> type[BoundedProtocol]:
    """Return the protocol class to give to uvicorn, which makes one for each connection."""
    bounds = {"header_seconds": header_seconds, "max_header_bytes": max_header_bytes}
    if hits is None:
        return type("Bounded", (BoundedProtocol,), bounds)
    if server_version.rpartition(".")[0] not in TESTED:
        log.warning(
            "the edge answers no hits: it was not tested with this uvicorn",
            uvicorn=server_version,
            tested=sorted(TESTED),
        )
        return type("Bounded", (BoundedProtocol,), bounds)
    return type("Answering", (AnsweringProtocol,), bounds | {"hits": hits, "heads": Heads(hits.names)})
