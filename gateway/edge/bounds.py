"""Bounds on the time and the size of a request's headers, in uvicorn's protocol.

uvicorn waits for ever for the end of a request's headers, and takes headers of any size. A
connection that takes longer than `header_seconds` over them, counted from its opening or from the
request's first byte, is closed; one that sends more than `max_header_bytes` is told, and closed. What is
not HTTP is told so in a problem document, where uvicorn answers in plain text.
"""

from __future__ import annotations

import asyncio
import os

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.api.connection import LOST, ON_HANG_UP, OUTLET
from gateway.api.problems import document, lookup
from gateway.cork import Cork
from gateway.exceptions import GatewayError, InvalidParameter
from gateway.models import render_json

_TOO_LARGE = "the request's headers are too large"
_WRITE_BUFFER = 16384  # bytes of answers that may wait for a reader before the writer has to
_PER_HEADER = 4  # ": " and the line's end


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with the bounds; what else is answered goes on to the application."""

    header_seconds: float
    max_header_bytes: int

    # Slots: so many attributes more would cost each connection a dictionary of 1.5 KB, for instances
    # share their keys only up to thirty, and uvicorn has used nearly all.
    __slots__ = (
        "_cork",
        "_fault",
        "_in_headers",
        "_on_hang_up",
        "_suspect",  # more bytes are at hand than headers may have
        "_timer",
        "_uncorked",
        "_unparsed",  # bytes since the last complete headers: an endless line never becomes a header
    )

    _timer: asyncio.TimerHandle | None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for a first request."""
        self._on_hang_up: dict[object, object] = {}
        self._unparsed = 0
        self._in_headers = self._suspect = False
        self._fault = "the request is not valid HTTP/1.1"
        self._uncorked: asyncio.Transport = transport  # type: ignore[assignment]  # as uvicorn narrows it
        super().connection_made(self._uncorked)
        # Each small write that waits costs some 1 KB: a reader that never reads shall not cost 64 of them.
        self.transport.set_write_buffer_limits(high=_WRITE_BUFFER)
        self._cork = Cork(self._uncorked, self.loop)
        self.transport = self._cork  # type: ignore[assignment]  # it has all of a transport's attributes
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_timer()
        super().connection_lost(exc)
        for notice in tuple(self._on_hang_up.values()):
            notice()  # type: ignore[operator]  # the scope's type knows extensions as plain dictionaries
        self._on_hang_up[LOST] = None
        # We hold the request's scope, and its way to our transport holds us: left so, only the garbage
        # collector could take the two apart, and its full round among thousands of streams stops everything.
        if self.scope is not None:
            self.scope.get("extensions", {}).pop(OUTLET, None)

    def data_received(self, data: bytes) -> None:
        """Parse, and refuse headers that grow without end."""
        self._unparsed += len(data)
        self._suspect = self._unparsed > self.max_header_bytes
        super().data_received(data)
        # Most headers come whole: a timer for each request would cost as much as parsing it.
        if self._in_headers and self._timer is None:
            self._start_timer()
        if self._timer is not None and self._unparsed > self.max_header_bytes:
            self._refuse(_TOO_LARGE)

    def on_message_begin(self) -> None:
        """Begin to wait for the end of a request's headers."""
        super().on_message_begin()
        self._in_headers = True

    def on_headers_complete(self) -> None:
        """Hand the request on, unless its headers are too large."""
        self._end_headers()
        self._hand_on()

    def on_message_complete(self) -> None:
        """End a request, whose body is no part of the next one's headers."""
        self._unparsed = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """End an answer of the application's; a head without a body may still be held back."""
        self._cork.flush()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP as every other error is told."""
        self._refuse(self._fault)

    def _end_headers(self) -> None:
        """Stop timing the headers. Raises: ValueError when they are too large."""
        self._stop_timer()
        self._in_headers = False
        self._unparsed = 0
        if self._suspect:
            size = sum(len(name) + len(value) + _PER_HEADER for name, value in self.headers)
            if len(self.url) + size > self.max_header_bytes:
                self._fault = _TOO_LARGE
                raise ValueError(_TOO_LARGE)  # httptools makes it the parser error that uvicorn answers

    def _hand_on(self) -> None:
        """Let uvicorn call the application."""
        self.scope["extensions"] = {
            ON_HANG_UP: self._on_hang_up,
            OUTLET: self._outlet,  # type: ignore[dict-item]  # the scope's type knows extensions as dictionaries
        }
        super().on_headers_complete()

    def _outlet(self) -> asyncio.WriteTransport | None:
        """See `connection.OUTLET`."""
        cycle = self.cycle  # another, not chunked yet, when a request was pipelined behind the stream
        return self._uncorked if cycle.chunked_encoding else None

    def _refuse(self, fault: str) -> None:
        self._stop_timer()
        self._in_headers = False
        self.transport.write(_last_answer(InvalidParameter(fault)))
        self.transport.close()

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.header_seconds, self._late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        self.transport.close()


def _last_answer(error: GatewayError) -> bytes:
    status, title = lookup(error)
    request_id = os.urandom(16).hex()
    body = render_json(document(error, status, title, request_id=request_id))
    head = (
        f"HTTP/1.1 {status} Bad Request\r\ncontent-type: application/problem+json\r\n"
        f"content-length: {len(body)}\r\nx-request-id: {request_id}\r\ncache-control: no-store\r\n"
        "connection: close\r\n\r\n"
    )
    return head.encode() + body
