"""A client connection: a state machine with one request at a time. Each state has a timeout and a size limit.

    state      ends with                 time limit              size limit
    waiting    the first byte            header_seconds          nothing buffered
    head       its empty line            header_seconds          max_header_bytes, max_header_count
    body       its end                   header_seconds + 2 s    64 KiB that the application has not received
    answering  the response's end        set by the application  64 KiB of later requests
    ... while all 64 KiB are in use      header_seconds
    ... while the client does not read   60 s, or less           16 KiB, and one chunk of a body
    idle       the next byte             keep_alive_seconds      nothing buffered
    closing    the client closes         LINGER_SECONDS          LINGER_BYTES, read and dropped

While a response is being sent, later requests stay unparsed. Reading pauses when too many bytes of them are
buffered, or when the client does not read. If a response begins before the request body has arrived, it has
`Connection: close` and is the last one. `client_transport.py` writes, and closes the connection.

`Connection` is the value of uvicorn's `http` option, and uses uvicorn's application, state and headers.
"""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.utils import get_local_addr, get_remote_addr
from uvicorn.server import ServerState

from gateway.api.problems import INTERNAL_ERROR, status_and_title
from gateway.api.server_extensions import CONNECTION, ON_DISCONNECT
from gateway.domain.errors import GatewayError, InvalidParameter, Overloaded
from gateway.domain.paced_callbacks import PacedCallbacks
from gateway.server.error_response import render_closing_response
from gateway.server.exchange import Exchange, MakeExchange, make_scope
from gateway.server.framing import (
    BadRequest,
    BodyDecoder,
    DiscardedBody,
    Head,
    find_end_of_head,
    make_body_decoder,
    parse_head,
    remove_empty_lines,
)
from gateway.server.turn_taking import MAX_IN_A_ROW, TurnTaking

_BODY_GRACE_SECONDS = 2.0  # lets an application with its own body timeout answer first
_LAST_REQUEST_SECONDS = 0.5  # longer than a round trip, and short compared with a grace period
_MAX_READ_AHEAD = 32_768  # bytes of later requests after which reading pauses; one more read may double them


class Connection(TurnTaking):
    """One connection. All share the attributes below. `application` replaces uvicorn's, if it is set."""

    application: ASGIApp | None = None
    heavy_work: PacedCallbacks  # for many tasks

    __slots__ = (
        "_blank_bytes",  # bytes of empty lines before the request
        "_body",  # decoder of the body that is being received
        "_buffer",  # received bytes that are not parsed yet
        "_config",
        "_exchange",
        "_is_head_request",  # the method is HEAD: an error response has no body
        "_lifespan_state",  # of the ASGI lifespan, copied into each scope
        "_over_limit",  # beyond max_connections: serves probes only
        "_processing",  # `_process` is running
        "_receiving_head",  # a head has begun, and its timeout runs
        "_scanned",  # bytes of the buffer without the end of a head
        "_server",  # the local address
        "_shutting_down",
        "server_state",
    )

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(_loop or asyncio.get_event_loop(), self._on_timeout)
        self._config = config
        self.server_state = server_state
        self._lifespan_state = app_state
        self._buffer = bytearray()
        self._blank_bytes = self._scanned = 0
        self._body: BodyDecoder | None = None
        self._exchange: Exchange | None = None
        self._is_head_request = self._receiving_head = self._over_limit = False
        self._processing = self._shutting_down = False

    # Callbacks of the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the first request. A connection over the limit may only send a probe."""
        super().connection_made(transport)
        self.client = get_remote_addr(self.transport)
        self._server = get_local_addr(self.transport)
        self.server_state.connections.add(self)  # type: ignore[arg-type]  # typed for uvicorn's own protocols
        self._over_limit = not self.limits.on_connection_opened()
        self._deadline.set(self.limits.head_seconds(over_limit=self._over_limit))
        if self._over_limit:
            self.limits.reserve(self, self._leave_reserve)

    def connection_lost(self, exc: Exception | None) -> None:
        """Release the connection and drop its unanswered request."""
        super().connection_lost(exc)
        self.limits.on_connection_closed(self)
        self.server_state.connections.discard(self)
        self._drop_request()

    def eof_received(self) -> None:
        """Close once the client has read the write buffer: half-closed connections are not supported."""
        self._end_wait()
        if not self._closing:
            self._close_transport(linger=False)
            self._drop_request()

    def data_received(self, data: bytes) -> None:
        """Buffer and process received bytes."""
        if self._closing:
            self._drop(data)
        else:
            self._buffer += data
            self._in_a_row = MAX_IN_A_ROW
            self._process()

    def resume_writing(self) -> None:
        """Continue: the client has read enough."""
        super().resume_writing()
        if self._closing:
            return
        if self._exchange is None:
            self._process()
        elif self._body is None:
            self._set_answering_deadline()
        else:
            self._deadline.set(self.limits.header_seconds)

    def _drop_request(self) -> None:
        """Drop what is buffered, and tell the application that the client has left."""
        self._buffer.clear()
        self._body = None
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.disconnect()

    # Callbacks of uvicorn.

    def shutdown(self) -> None:
        """Close after the current response.

        Without one, a request may be on its way, because a load balancer does not know yet that the listener
        is closed. So the connection still serves a request that arrives within `_LAST_REQUEST_SECONDS`.
        """
        self._shutting_down = True
        if self._exchange is not None:
            self._exchange.keep_alive = False
        elif self.write_paused:
            self._close(linger=bool(self._buffer))
        elif not self._closing:
            self._deadline.set(_LAST_REQUEST_SECONDS)

    # Callbacks of the exchange (see `exchange.ClientConnection`).

    def body_consumed(self) -> None:
        """See `ClientConnection.body_consumed`."""
        if self._body is not None:
            self._process()

    def response_started(self) -> None:
        """See `ClientConnection.response_started`."""
        if self._exchange is not None and (self._shutting_down or self._over_limit or self.limits.draining):
            self._exchange.keep_alive = False

    def response_complete(self, *, failed: bool) -> None:
        """See `ClientConnection.response_complete`."""
        if (exchange := self._exchange) is None:
            return
        exchange.scope["extensions"].pop(CONNECTION, None)
        self._exchange = None
        self.server_state.total_requests += 1
        if failed and not exchange.started and not self.transport.is_closing():
            self._refuse(INTERNAL_ERROR)
        elif failed:
            self.transport.abort()  # a truncated body must not look complete
        elif not exchange.keep_alive or self._closing:
            may_send_more = exchange.client_may_send_more or self._body is not None or bool(self._buffer)
            self._close(linger=may_send_more and not self._over_limit)
        else:
            self._process()

    # Processing of received bytes.

    def _process(self) -> None:
        """Parse as much of the buffer as the state allows, then pause or resume reading."""
        if self._processing:  # a response that completes within the loop below re-enters here
            return
        self._processing = True
        try:
            while not self._closing and self._step():
                pass
        except BadRequest as exc:
            if self._exchange is None:
                self._refuse(exc.error)
            else:
                # The application may ignore the body. Its response must then not depend on when the invalid
                # part arrives. So only `receive` raises the error.
                self._body = DiscardedBody()
                self._exchange.body_failed(exc.error)
        finally:
            self._processing = False
        if not self._closing:
            self._update_reading()

    def _step(self) -> bool:
        """Parse one head or one part of a body; tell whether another step may follow."""
        if self._exchange is None:
            return not self.write_paused and not self._waits_for_turn and self._read_head()
        return self._body is not None and self._read_body(self._body, self._exchange)

    def _read_head(self) -> bool:
        buffer = self._buffer
        if buffer.startswith((b"\r", b"\n")):
            self._blank_bytes += remove_empty_lines(buffer)  # they count towards the size of the head
            if self._blank_bytes > self.limits.max_header_bytes:
                raise BadRequest(InvalidParameter("too many empty lines before the request"))
            self._start_head_timeout()
        if not buffer:
            if not self._receiving_head:
                self._deadline.set(self.limits.keep_alive_seconds)
            return False
        self._is_head_request = buffer.startswith(b"HEAD ")
        length = find_end_of_head(buffer, self._scanned, max_bytes=self.limits.max_header_bytes)
        if not length:
            self._scanned = len(buffer)
            self._start_head_timeout()
            return False
        if not self._take_turn(length):
            return False
        data = bytes(buffer[:length])
        del buffer[:length]
        self._scanned = self._blank_bytes = 0
        self._receiving_head = False
        self._start_request(data, parse_head(data, max_fields=self.limits.max_header_count))
        return True

    def _start_head_timeout(self) -> None:
        if not self._receiving_head:
            self._receiving_head = True
            if not self._shutting_down:  # else the deadline of `shutdown` stays
                self._deadline.set(self.limits.head_seconds(over_limit=self._over_limit))

    def _start_request(self, data: bytes, head: Head, make_exchange: MakeExchange = Exchange) -> None:
        """Start to serve the request with this head; `data` is the head as received."""
        if self._over_limit and head.target.partition(b"?")[0].decode("latin-1") not in self.limits.probes:
            self._refuse_connection()
            return
        self._body = make_body_decoder(head, max_overhead=self.limits.max_header_bytes)
        scope = make_scope(
            head,
            root_path=self._config.root_path,
            client=self.client,
            server=self._server,
            state=self._lifespan_state.copy(),
            extensions={ON_DISCONNECT: {}, CONNECTION: self},
        )
        exchange = self._exchange = make_exchange(self, head, scope, has_body=self._body is not None)
        if self._body is None:
            self._deadline.clear()
        else:
            self._deadline.set(self.limits.header_seconds + _BODY_GRACE_SECONDS)
        run = exchange.run(self.application or self._config.loaded_app)
        self._start_in_turn(run, self.server_state.tasks, len(data))

    def _read_body(self, body: BodyDecoder, exchange: Exchange) -> bool:
        if exchange.is_body_buffer_full:
            return False
        part = body.feed(self._buffer)
        if body.complete:
            self._body = None
            if not self.write_paused:
                self._deadline.clear()
        if part or body.complete:
            exchange.body_received(part, complete=body.complete)
        return body.complete

    def client_transport(self) -> asyncio.WriteTransport | None:
        """See `ServerConnection.client_transport`."""
        return self.transport if self._exchange is not None and self._exchange.streams_body else None

    def _update_reading(self) -> None:
        """Pause reading while the buffer holds bytes that cannot be processed yet; otherwise resume it."""
        if self._exchange is None:
            read = not self.write_paused and not self._waits_for_turn
        elif self._body is not None:
            read = not self._exchange.is_body_buffer_full
        else:
            # A disconnect is noticed only while the socket is read. So reading continues, up to a limit.
            read = len(self._buffer) < _MAX_READ_AHEAD
        if read:
            self._resume_reading()
        else:
            self._pause_reading()
            if self._exchange is not None and self._body is None and not self.write_paused:
                self._look_for_disconnect()

    def _leave_reserve(self) -> None:
        """Leave the reserve, which is full, so that a later connection has a place in it."""
        if self._closing or self._exchange is not None:
            self.transport.abort()
        else:
            self._refuse_connection()

    def _refuse_connection(self) -> None:
        self.limits.count_refused_connection()
        # No linger: file descriptors are the scarce resource here.
        self._refuse(Overloaded("the gateway has too many connections", retry_after=1.0), linger=False)

    def _refuse(self, error: GatewayError, *, linger: bool = True) -> None:
        """Send a problem document as the last response; without its body for HEAD."""
        self.limits.count_refused_request(status_and_title(error)[0])
        head, body = render_closing_response(error, self.server_state.default_headers)
        self.write(head if self._is_head_request else head + body)
        self._close(linger=linger)

    def _close(self, *, linger: bool) -> None:
        """Drop unparsed input, and close; see `_close_transport`."""
        if not self._closing:
            self._body = None
            self._buffer.clear()
            self._close_transport(linger=linger)

    def _on_timeout(self) -> None:
        """Handle the timeout of the current state."""
        if self.write_paused or self._closing:
            self._check_stall()
        elif self._exchange is not None and self._body is None:
            self._check_disconnect()
        elif self._exchange is not None:
            self.transport.abort()  # the body is late, and the application has no timeout for it
        elif self._over_limit:
            self._refuse_connection()
        else:
            self._close(linger=bool(self._buffer))
