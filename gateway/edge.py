"""What the HTTP server itself refuses, before any application runs.

uvicorn waits for ever for the end of a request's headers, and takes headers of any size. Its
`http=` setting takes a protocol class, so this is one: its own, with a timer over the headers
and a cap on their size, and with a problem document where it would answer in plain text.
"""

from __future__ import annotations

import asyncio
import os

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.api.connection import ON_HANG_UP, PUSH
from gateway.api.problems import document, lookup
from gateway.exceptions import GatewayError, InvalidParameter
from gateway.models import render_json

_TOO_LARGE = "the request's headers are too large"
_WRITE_BUFFER = 16384  # bytes of answers that may wait for a reader before the writer has to
_PER_HEADER = 4  # ": " and the line's end


class EdgeProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with bounds on the time and size of a request's headers.

    A connection that takes longer than `header_seconds` over them, counted from its opening or from
    the request's first byte, is closed; one that sends more than `max_header_bytes` is told, and closed.
    """

    header_seconds: float
    max_header_bytes: int

    # Slots: five attributes more would cost each connection a dictionary of 1.5 KB, for instances
    # share their keys only up to thirty, and uvicorn has used nearly all.
    __slots__ = ("_fault", "_on_hang_up", "_parsed", "_timer", "_unparsed")

    _timer: asyncio.TimerHandle | None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for a first request."""
        self._on_hang_up: dict[object, object] = {}
        self._unparsed = 0  # bytes since the last complete headers: one endless line never reaches on_header
        self._parsed = 0  # bytes of header lines of this request
        self._fault = "the request is not valid HTTP/1.1"
        super().connection_made(transport)  # type: ignore[arg-type]  # uvicorn narrows it likewise
        # Each small write that waits costs some 1 KB: a reader that never reads shall not cost 64 of them.
        self.transport.set_write_buffer_limits(high=_WRITE_BUFFER)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_timer()
        super().connection_lost(exc)
        for notice in tuple(self._on_hang_up.values()):
            notice()  # type: ignore[operator]  # the scope's type knows extensions as plain dictionaries
        # We hold the request's scope, and its way to push holds us: left so, only the garbage collector
        # could take the two apart, and a full collection among thousands of streams stops everything.
        if self.scope is not None:
            self.scope["extensions"].pop(PUSH, None)

    def data_received(self, data: bytes) -> None:
        """Parse, and refuse headers that grow without end."""
        self._unparsed += len(data)
        super().data_received(data)
        if self._timer is not None and self._unparsed > self.max_header_bytes:
            self._refuse(_TOO_LARGE)

    def on_message_begin(self) -> None:
        """Begin to time and to count a request's headers."""
        super().on_message_begin()
        self.scope["extensions"] = {
            ON_HANG_UP: self._on_hang_up,
            PUSH: self._push,  # type: ignore[dict-item]  # the scope's type knows extensions as dictionaries
        }
        self._parsed = 0
        if self._timer is None:
            self._start_timer()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header."""
        super().on_header(name, value)
        self._parsed += len(name) + len(value) + _PER_HEADER

    def on_headers_complete(self) -> None:
        """Hand the request on, unless its headers came all at once and are too large."""
        self._stop_timer()
        self._unparsed = 0
        if self._parsed + len(self.url) > self.max_header_bytes:
            self._fault = _TOO_LARGE
            raise ValueError(_TOO_LARGE)  # httptools makes it the parser error that uvicorn answers
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP as every other error is told."""
        self._refuse(self._fault)

    def _push(self, part: bytes) -> bool:
        """Send a part of a streamed body if nothing is in its way; see `connection.PUSH`."""
        cycle = self.cycle  # another, not chunked yet, when a request was pipelined behind the stream
        if self.flow.write_paused or cycle.disconnected or not cycle.chunked_encoding:
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(part), part))
        return True

    def _refuse(self, fault: str) -> None:
        self._stop_timer()
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


def edge_protocol(*, header_seconds: float, max_header_bytes: int) -> type[EdgeProtocol]:
    """Return the protocol class to give to uvicorn, which makes one for each connection."""
    bounds = {"header_seconds": header_seconds, "max_header_bytes": max_header_bytes}
    return type("BoundEdgeProtocol", (EdgeProtocol,), bounds)


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
