"""The trace that a caller's request belongs to (W3C Trace Context, level 1).

It is taken over into log lines, and into spans when there are any; nothing of it goes upstream.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from starlette.types import Scope

# Section 3.2: ff is no version, and neither id is all zeros.
_TRACEPARENT = re.compile(
    rb"(?!ff)(?P<version>[0-9a-f]{2})-(?!0{32})(?P<trace>[0-9a-f]{32})-(?!0{16})(?P<span>[0-9a-f]{16})"
    rb"-[0-9a-f]{2}(?P<more>-.*)?"
)


class TraceParent(NamedTuple):
    """A caller's span: its trace and its own id, in lower-case hex."""

    trace_id: str
    span_id: str

    @property
    def header(self) -> tuple[bytes, bytes]:
        """The header that says so, in the version that is known; not sampled."""
        return b"traceparent", f"00-{self.trace_id}-{self.span_id}-00".encode()


def trace_parent(scope: Scope) -> TraceParent | None:
    """Return the caller's span, or None when the header is absent, given twice or not valid."""
    values = [value for name, value in scope["headers"] if name == b"traceparent"]
    match = _TRACEPARENT.fullmatch(values[0]) if len(values) == 1 else None
    if match is None or (match["version"] == b"00" and match["more"] is not None):
        return None  # only versions to come may say more
    return TraceParent(match["trace"].decode(), match["span"].decode())
