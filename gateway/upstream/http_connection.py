"""One connection to the upstream. It parses responses with httptools, and bounds their size.

The parser runs in its strict mode, and checks the framing of messages (RFC 9112, 6).
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from http import HTTPStatus

import httpx
from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from gateway.upstream.transport import HttpResponse

_FRAMING_HEADERS = frozenset({"content-length", "transfer-encoding"})
_MAX_OVERHEAD = 262_144  # bytes of a response outside its body: headers, chunk sizes, trailers


class HttpConnection(asyncio.Protocol):
    """One connection, with one call at a time.

    `idle_since` is the loop's time at which the last response was complete, or None while the connection is
    not reusable: after a cancelled call, it is not. `on_call_end` is called at the end of each call, even if
    the call was cancelled. `on_upstream_done` is the callback of the present call (see `Transport.send`). The
    transport calls it.
    """

    def __init__(self, max_body_bytes: int, on_call_end: Callable[[HttpConnection], None]) -> None:
        self.idle_since: float | None = None
        self.on_upstream_done: Callable[[], None] = lambda: None
        self.max_age_seconds = 0.0
        self._max_body_bytes = max_body_bytes
        self._on_call_end = on_call_end
        self._loop = asyncio.get_running_loop()
        self._opened_at = self._loop.time()
        self._parser: HttpResponseParser | None = HttpResponseParser(self)
        self._waiter: asyncio.Future[HttpResponse] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._response = HttpResponse()
        self._is_used = False
        self._overhead = 0
        self._poll = select.poll()

    def send(self, request: bytes, deadline: float) -> asyncio.Future[HttpResponse]:
        """Send a request; the future receives the response, an httpx.TransportError or a TimeoutError.

        Cancelling the future has no effect on the call: the connection reads the response or times out.
        """
        self.idle_since = None
        self._response = HttpResponse(connection_id=id(self), reused=self._is_used)
        self._is_used = True
        self._overhead = 0
        self._waiter = self._loop.create_future()
        self._timer = self._loop.call_at(deadline, self.time_out)  # much cheaper than asyncio.timeout
        self._transport.write(request)
        return self._waiter

    def is_too_old(self, now: float) -> bool:
        """Tell whether the connection has reached its maximum age."""
        return now - self._opened_at >= self.max_age_seconds

    def is_reusable(self, now: float) -> bool:
        """Tell whether a call may use the connection: it is open, not too old, and has no unread bytes.

        `poll` also finds bytes that the event loop has not read yet. They would be parsed as the start of the
        next response.
        """
        return self.idle_since is not None and not self.is_too_old(now) and not self._poll.poll(0)

    def time_out(self) -> None:
        """Fail the call in flight, if there is one, with a TimeoutError."""
        if self._waiter is not None:
            self._fail(TimeoutError())

    def close(self) -> None:
        """Close the connection at once and discard its buffers."""
        self.idle_since = None
        self._transport.abort()

    # Called by the event loop.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # it is one
        """Keep the transport, and watch its socket for bytes that arrive without a call."""
        self._transport = transport
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def data_received(self, data: bytes) -> None:
        """Parse bytes of the response; fail the call if they are malformed or too many."""
        if self._parser is None or self._waiter is None:
            # Without a call in flight, these bytes could be parsed as the response to the call for the next
            # task.
            self.idle_since = None
            self._transport.abort()
            return
        self._overhead += len(data)
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as exc:
            self._fail(httpx.RemoteProtocolError(type(exc).__name__))
            return
        if self._overhead > _MAX_OVERHEAD:
            self._fail(httpx.RemoteProtocolError("the response headers are too large"))
        elif self._response.complete:  # the parser would have refused bytes behind the response
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the call in flight: with its response if the closure ends it, otherwise with an error."""
        self.idle_since = None
        self._parser = None  # breaks the reference cycle
        response = self._response
        if exc is not None:
            error = httpx.ReadError(type(exc).__name__)
            error.__cause__ = exc  # with TLS 1.3, the server's alert about a client certificate arrives here
            self._fail(error)
        elif response.status and not _FRAMING_HEADERS & response.headers.keys():
            self._finish()  # the end of the connection ends the response (RFC 9112, 6.3)
        else:
            self._fail(httpx.RemoteProtocolError("the connection was closed before the end of the response"))

    # Called by the parser.

    def on_message_begin(self) -> None:
        """Refuse a second response to one request."""
        if self._response.complete:
            raise ValueError("bytes after the end of the response")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; ignore a trailer."""
        if not self._response.status:  # else it is a trailer, which is ignored
            self._response.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """Keep the status of the final response, and drop an interim one."""
        assert self._parser is not None  # noqa: S101  # the parser makes this call
        status = self._parser.get_status_code()
        if status >= HTTPStatus.OK:
            self._response.status = status
            self._response.keep_alive = self._parser.should_keep_alive()
        else:
            self._response.headers.clear()  # of an interim response; the final one follows (RFC 9110, 15.2)

    def on_body(self, part: bytes) -> None:
        """Keep a part of the body, up to the bound."""
        response = self._response
        self._overhead -= len(part)
        response.body += part
        if len(response.body) > self._max_body_bytes:
            response.keep_alive = False
            self._finish()

    def on_message_complete(self) -> None:
        """Mark the final response as complete."""
        self._response.complete = self._response.status != 0

    def _finish(self) -> None:
        waiter = self._waiter
        if waiter is None:
            return
        if not waiter.done():  # else the call was cancelled, and `release_connection` is not called
            if self._response.keep_alive and self._parser is not None:
                self.idle_since = self._loop.time()
            waiter.set_result(self._response)
        self._end_call()

    def _fail(self, error: httpx.TransportError | TimeoutError) -> None:
        waiter = self._waiter
        if waiter is not None:
            if not waiter.done():
                waiter.set_exception(error)
            self._end_call()
        self._transport.abort()

    def _end_call(self) -> None:
        self._waiter = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._on_call_end(self)
