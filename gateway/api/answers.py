"""What a task's progress is answered with: the one place that decides, for the application and for the edge.

An answer is a status, the values of its headers and a body. The application sends headers as pairs, the
edge as lines on the wire: both take the names from one table, so they cannot differ.
"""

from __future__ import annotations

from collections.abc import Mapping

from gateway.api.caching import CACHE_NAMES, cache_values, matches
from gateway.readings import Reading

_OK, _NOT_MODIFIED = 200, 304
_NAMES = (*CACHE_NAMES, b"etag")
HEADER_NAMES: Mapping[int, tuple[bytes, ...]] = {
    _OK: (*_NAMES, b"content-type", b"content-length"),
    _NOT_MODIFIED: _NAMES,
}


def answer(reading: Reading, known: str | None) -> tuple[int, tuple[bytes, ...], bytes]:
    """Answer 200 with the task's progress, or 304 when `known`, which is If-None-Match, has it already.

    Return the status, the values of its `HEADER_NAMES`, and the body.
    """
    snapshot = reading.snapshot
    etag, body = snapshot.etag, snapshot.body
    values = (*cache_values(reading), etag.encode())
    if known is not None and matches(known, etag):
        return _NOT_MODIFIED, values, b""
    return _OK, (*values, b"application/json", b"%d" % len(body)), body
