"""A client connection: a state machine with one request at a time, and a timer and a bound in every state.

    state      until                     bound in time           bound in bytes
    waiting    the first byte            header_seconds          nothing buffered
    head       its empty line            header_seconds          max_header_bytes, max_header_count
    body       its end                   header_seconds + 2 s    64 KiB that the application has not taken
    answering  the response's end        the application's       64 KiB of later requests
    ... while the client does not read   60 s, or less           16 KiB, and one part of a body
    idle       the next byte             keep_alive_seconds      nothing buffered
    closing    the client has closed     LINGER_SECONDS          LINGER_BYTES, read and dropped

While a response is under way, or the client does not read, later requests stay unparsed and reading pauses. A
request whose body has not arrived when its response begins is the connection's last one: `Connection: close`.

This class is uvicorn's `http=` setting. Of uvicorn it needs the configuration's application, the set of
connections, the set of tasks and the default headers, which every one of its own protocols shares.
"""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.utils import get_local_addr, get_remote_addr
from uvicorn.server import ServerState

from gateway.api.problems import INTERNAL, lookup
from gateway.api.server_extensions import DIRECT_TRANSPORT, DISCONNECTED, ON_DISCONNECT
from gateway.domain.errors import GatewayError, InvalidParameter, Overloaded
from gateway.server.connection_limits import ConnectionLimits
from gateway.server.deadline import Deadline
from gateway.server.error_response import last_response
from gateway.server.exchange import Exchange, scope_of
from gateway.server.framing import (
    BadRequest,
    BodyDecoder,
    DiscardedBody,
    Head,
    body_of,
    end_of_head,
    parse_head,
)

LINGER_SECONDS = 2.0  # for which a client may go on sending after the last response
LINGER_BYTES = 262_144
_BODY_GRACE_SECONDS = 2.0  # an application that times the body itself answers first
_PIPELINED = 32_768  # bytes of later requests, after which reading pauses; one read brings as many at most
_WRITE_BUFFER = 16_384  # bytes of responses that may wait for a reader before the writer has to


class Connection(asyncio.Protocol):
    """One connection. `policy` has the bounds; `application` replaces uvicorn's own when it is set."""

    policy: ConnectionLimits
    application: ASGIApp | None = None

    __slots__ = (
        "_blank",  # bytes of empty lines before the request
        "_bodiless",  # the request that is parsed is a HEAD
        "_body",  # the decoder of the body that is arriving
        "_buffer",  # received, and not parsed
        "_closing",
        "_config",
        "_deadline",  # of the current state
        "_drained",  # set while the client reads
        "_exchange",
        "_in_head",  # a head has begun, and its deadline runs
        "_lingered",  # bytes dropped while closing
        "_on_disconnect",
        "_over_limit",  # beyond max_connections: for probes only
        "_processing",
        "_reading",
        "_scanned",
        "_server",
        "_shutting_down",
        "_state",
        "_unsent",  # bytes that were not yet read by the client at the last look
        "client",
        "loop",
        "server_state",
        "transport",
        "write_paused",
    )

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._config = config
        self.server_state = server_state
        self._state = app_state
        self.loop = _loop or asyncio.get_event_loop()
        self._buffer = bytearray()
        self._blank = self._scanned = self._lingered = self._unsent = 0
        self._body: BodyDecoder | None = None
        self._exchange: Exchange | None = None
        self._on_disconnect: dict[object, Any] = {}  # callables, and LOST
        self._deadline = Deadline(self.loop, self._expired)
        self._drained: asyncio.Event | None = None
        self._reading = True
        self._bodiless = self._closing = self._in_head = self._over_limit = False
        self._processing = self._shutting_down = self.write_paused = False

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for a first request; beyond the limit, for a probe or to refuse."""
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]  # it is one
        self.transport.set_write_buffer_limits(high=_WRITE_BUFFER)
        self.policy.bound_socket(self.transport.get_extra_info("socket"))
        self.client: tuple[str, int] | None = get_remote_addr(self.transport)
        self._server = get_local_addr(self.transport)
        self.server_state.connections.add(self)  # type: ignore[arg-type]  # uvicorn names its own protocols
        self._over_limit = not self.policy.opened()
        self._deadline.set(self.policy.head_seconds(over_limit=self._over_limit))
        if self._over_limit:
            self.policy.reserve(self, self._make_room)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection; what was read and not answered goes with it."""
        self.policy.closed()
        self.policy.release(self)
        self.server_state.connections.discard(self)
        self._closing = True
        self._deadline.close()
        self._buffer.clear()
        self._body = None
        self.write_paused = False
        if self._drained is not None:
            self._drained.set()
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.disconnect()
            for notice in tuple(self._on_disconnect.values()):
                notice()
            self._on_disconnect[DISCONNECTED] = None
            # The scope's way to our transport leads back to us: a cycle that only the garbage collector could
            # open.
            exchange.scope["extensions"].pop(DIRECT_TRANSPORT, None)

    def eof_received(self) -> None:
        """Close: a client that has closed its side is gone."""

    def data_received(self, data: bytes) -> None:
        """Take what the client has sent."""
        if self._closing:
            self._lingered += len(data)
            if self._lingered > LINGER_BYTES:
                self.transport.abort()
            return
        self._buffer += data
        self._process()

    def pause_writing(self) -> None:
        """Note that the client does not read as fast as is written."""
        self.write_paused = True
        if self._drained is not None:
            self._drained.clear()
        self._unsent = self.transport.get_write_buffer_size()
        self._deadline.set(self.policy.stall_seconds)

    def resume_writing(self) -> None:
        """Go on: the client has read."""
        self.write_paused = False
        if self._drained is not None:
            self._drained.set()
        if self._closing:
            return
        if self._exchange is None:
            self._process()
        elif self._body is None:
            self._deadline.clear()
        else:
            self._deadline.set(self.policy.header_seconds)

    # Called by uvicorn.

    def shutdown(self) -> None:
        """Close once the response that is under way is complete; at once when there is none."""
        self._shutting_down = True
        if self._exchange is None:
            self._close(linger=bool(self._buffer))
        else:
            self._exchange.keep_alive = False

    # Called by the exchange (see `exchange.Peer`).

    def write(self, data: bytes) -> None:
        """See `Peer.write`."""
        if not self._closing and not self.transport.is_closing():
            self.transport.write(data)

    async def drain(self) -> None:
        """See `Peer.drain`."""
        while self.write_paused:
            if self._drained is None:
                self._drained = asyncio.Event()
            await self._drained.wait()

    def body_taken(self) -> None:
        """See `Peer.body_taken`."""
        if self._body is not None:
            self._process()

    def response_started(self) -> None:
        """See `Peer.response_started`."""
        if self._exchange is not None and (self._shutting_down or self._over_limit or self.policy.draining):
            self._exchange.keep_alive = False

    def response_complete(self, *, failed: bool) -> None:
        """See `Peer.response_complete`."""
        exchange = self._exchange
        if exchange is None:
            return
        exchange.scope["extensions"].pop(DIRECT_TRANSPORT, None)
        self._exchange = None
        self._on_disconnect = {}
        self.server_state.total_requests += 1
        if failed and not exchange.started:
            self._refuse(INTERNAL)
        elif failed:
            self.transport.abort()  # a body that breaks off must not look complete
        elif not exchange.keep_alive or self._closing:
            sending = exchange.client_goes_on or self._body is not None or bool(self._buffer)
            self._close(linger=sending and not self._over_limit)
        else:
            self._process()

    # What arrives.

    def _process(self) -> None:
        """Take from the buffer what the state allows, and see to reading and to the deadline."""
        if self._processing:  # a hit, or an application, that answers within the loop below
            return
        self._processing = True
        try:
            while not self._closing and self._take():
                pass
        except BadRequest as exc:
            if self._exchange is None:
                self._refuse(exc.error)
            else:
                # The application decides: one that does not want the body answers as if it were whole,
                # however the bytes were cut.
                self._body = DiscardedBody()
                self._exchange.body_failed(exc.error)
        finally:
            self._processing = False
        if not self._closing:
            self._see_to_reading()

    def _take(self) -> bool:
        """Take one step, and return whether there may be another."""
        if self._exchange is None:
            return not self.write_paused and self._take_head()
        return self._body is not None and self._take_body(self._body, self._exchange)

    def _take_head(self) -> bool:
        buffer = self._buffer
        if buffer.startswith((b"\r", b"\n")):
            # Empty lines before a request are passed over (RFC 9112, 2.2), within the bounds of its head.
            blank = len(buffer) - len(buffer.lstrip(b"\r\n"))
            del buffer[:blank]
            self._blank += blank
            if self._blank > self.policy.max_header_bytes:
                raise BadRequest(InvalidParameter("the request does not begin"))
            self._begin_head()
        if not buffer:
            if not self._in_head:
                self._deadline.set(self.policy.keep_alive_seconds)
            return False
        self._bodiless = buffer.startswith(b"HEAD ")
        length = end_of_head(buffer, self._scanned, max_bytes=self.policy.max_header_bytes)
        if not length:
            self._scanned = len(buffer)
            self._begin_head()
            return False
        data = bytes(buffer[:length])
        del buffer[:length]
        self._scanned = self._blank = 0
        self._in_head = False
        self._begin(data, parse_head(data, max_fields=self.policy.max_header_count))
        return True

    def _begin_head(self) -> None:
        if not self._in_head:
            self._in_head = True
            self._deadline.set(self.policy.head_seconds(over_limit=self._over_limit))

    def _begin(self, data: bytes, head: Head) -> None:
        """Answer a request, whose head stood in `data`."""
        if self._over_limit and head.target.partition(b"?")[0].decode("latin-1") not in self.policy.probes:
            self._refuse_connection()
            return
        self._body = body_of(head, max_overhead=self.policy.max_header_bytes)
        scope = scope_of(
            head,
            root_path=self._config.root_path,
            client=self.client,
            server=self._server,
            state=self._state.copy(),
            extensions={ON_DISCONNECT: self._on_disconnect, DIRECT_TRANSPORT: self._direct_transport},
        )
        exchange = Exchange(
            self,
            scope,
            keep_alive=head.keep_alive,
            has_body=self._body is not None,
            expects_continue=head.expects_continue,
            default_headers=self.server_state.default_headers,
        )
        self._exchange = exchange
        if self._body is None:
            self._deadline.clear()
        else:
            self._deadline.set(self.policy.header_seconds + _BODY_GRACE_SECONDS)
        application: ASGIApp = self.application or self._config.loaded_app
        task = self.loop.create_task(exchange.run(application))
        self.server_state.tasks.add(task)
        task.add_done_callback(self.server_state.tasks.discard)

    def _take_body(self, body: BodyDecoder, exchange: Exchange) -> bool:
        if exchange.body_full:
            return False
        part = body.feed(self._buffer)
        if body.complete:
            self._body = None
            if not self.write_paused:
                self._deadline.clear()
        if part or body.complete:
            exchange.body_received(part, complete=body.complete)
        return body.complete

    def _direct_transport(self) -> asyncio.WriteTransport | None:
        """See `gateway.api.server_extensions.DIRECT_TRANSPORT`."""
        return self.transport if self._exchange is not None and self._exchange.streams_chunks else None

    def _see_to_reading(self) -> None:
        """Read, unless something waits in the buffer that cannot be taken now."""
        if self._exchange is None:
            wanted = not self.write_paused
        elif self._body is not None:
            wanted = not self._exchange.body_full
        else:
            # Reading goes on for a while, for only so does a client that leaves show.
            wanted = len(self._buffer) < _PIPELINED
        if wanted != self._reading:
            self._reading = wanted
            if wanted:
                self.transport.resume_reading()
            else:
                self.transport.pause_reading()

    # Closing.

    def _make_room(self) -> None:
        """Leave the reserve to a later connection."""
        if self._closing or self._exchange is not None:
            self.transport.abort()
        else:
            self._refuse_connection()

    def _refuse_connection(self) -> None:
        self.policy.count_refused_connection()
        # Without lingering: descriptors are what there is too little of.
        self._refuse(
            Overloaded("the gateway has as many connections as it may", retry_after=1.0), linger=False
        )

    def _refuse(self, error: GatewayError, *, linger: bool = True) -> None:
        """Answer with a problem document, the connection's last response; to HEAD without its body."""
        self.policy.count_refused_request(lookup(error)[0])
        head, body = last_response(error, self.server_state.default_headers)
        self.write(head if self._bodiless else head + body)
        self._close(linger=linger)

    def _close(self, *, linger: bool) -> None:
        """Close once all is written; `linger`: read and drop for a moment what the client still sends.

        Closed with bytes unread, the kernel would reset the connection, and the client might lose the
        response (RFC 9112, 9.6).
        """
        if self._closing:
            return
        self._closing = True
        self._body = None
        self._buffer.clear()
        if self.transport.is_closing():
            return
        self._unsent = self.transport.get_write_buffer_size()
        self._deadline.set(self.policy.stall_seconds if self._unsent else LINGER_SECONDS)
        if not linger:
            self.transport.close()
            return
        if not self._reading:
            self._reading = True
            self.transport.resume_reading()
        self.transport.write_eof()

    def _expired(self) -> None:
        """End the state whose deadline has passed."""
        if self.write_paused or self._closing:
            self._check_stall()
        elif self._exchange is not None:
            self.transport.abort()  # the body has not arrived, and its application does not time it
        elif self._over_limit:
            self._refuse_connection()
        else:
            self._close(linger=bool(self._buffer))

    def _check_stall(self) -> None:
        """Let a slow reader go on for as long as it reads something."""
        unsent = self.transport.get_write_buffer_size()
        if not unsent or unsent >= self._unsent:
            self.transport.abort()
        else:
            self._unsent = unsent
            self._deadline.set(self.policy.stall_seconds)
