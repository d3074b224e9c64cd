"""The trace context of a client's request (W3C Trace Context, level 1).

It is added to log lines and, with tracing on, to spans. It is not sent to the upstream.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from starlette.types import Scope

# Section 3.2: version ff is invalid, and so are IDs that are all zeros.
_TRACEPARENT = re.compile(
    rb"(?!ff)(?P<version>[0-9a-f]{2})-(?!0{32})(?P<trace>[0-9a-f]{32})-(?!0{16})(?P<span>[0-9a-f]{16})"
    rb"-[0-9a-f]{2}(?P<more>-.*)?"
)


class TraceParent(NamedTuple):
    """The client's span: trace ID and span ID, in lower-case hex."""

    trace_id: str
    span_id: str

    @property
    def header(self) -> tuple[bytes, bytes]:
        """The `traceparent` header of this span, version 00, not sampled."""
        return b"traceparent", f"00-{self.trace_id}-{self.span_id}-00".encode()


def trace_parent(scope: Scope) -> TraceParent | None:
    """Return the client's span, or None if the header is absent, repeated or invalid."""
    values = [value for name, value in scope["headers"] if name == b"traceparent"]
    match = _TRACEPARENT.fullmatch(values[0]) if len(values) == 1 else None
    if match is None or (match["version"] == b"00" and match["more"] is not None):
        return None  # only later versions may have more fields
    return TraceParent(match["trace"].decode(), match["span"].decode())
