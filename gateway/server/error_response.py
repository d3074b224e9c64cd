"""The response to a request that does not reach the application: a problem document, the last response."""

from __future__ import annotations

import math
import os

from gateway.api.problems import problem_document, status_and_title
from gateway.api.requests import SECURITY_HEADERS, Headers
from gateway.domain.errors import GatewayError
from gateway.domain.snapshot import render_json
from gateway.server.exchange import STATUS_LINES


def render_closing_response(error: GatewayError, default_headers: Headers) -> tuple[bytes, bytes]:
    """Return the head and the body of a problem document, with `Connection: close`."""
    status, title = status_and_title(error)
    request_id = os.urandom(16).hex()
    body = render_json(problem_document(error, status, title, request_id=request_id))
    retry = [] if error.retry_after is None else [(b"retry-after", b"%d" % math.ceil(error.retry_after))]
    headers = [
        *default_headers,
        (b"content-type", b"application/problem+json"),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
        *SECURITY_HEADERS,
        *retry,
        (b"x-request-id", request_id.encode()),
        (b"connection", b"close"),
    ]
    fields = b"".join(b"%b: %b\r\n" % header for header in headers)
    return b"%b%b\r\n" % (STATUS_LINES[status], fields), body
