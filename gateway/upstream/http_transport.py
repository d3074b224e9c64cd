"""The HTTP transport: connections to the upstream, with httptools' parser and httpx's exceptions.

    encode_request -> send: take an idle connection or open one -> write -> read the whole response, bounded

At the start and end of each call, httpx's pool iterates over all connections once per connection: the cost
of a call grows with the square of the concurrent calls. aiohttp's pool does not, but a call passes through
so many objects of its client that this costs more than the rest of a query. Here a connection is one
asyncio protocol with one call at a time, and a call awaits nothing but its response.

The upstream keeps working on a call that is cancelled. So the connection waits for the response and
discards it, until the timeout of the call. `on_complete` is called when the upstream does not work on the
call any more.

By design this client follows no redirects, keeps no cookies, reads no proxy or netrc from the environment,
decodes no bodies, calls a single host, and sends only the headers that it was given. The parser checks
message framing, in its strict mode (RFC 9112, 6).
"""

from __future__ import annotations

import asyncio
import select
import socket
import ssl
from collections import deque
from collections.abc import Callable, Mapping
from http import HTTPStatus

import httpx
from aiohappyeyeballs import start_connection
from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

_HAPPY_EYEBALLS_SECONDS = 0.25  # delay before the next address of a host is tried in parallel (RFC 8305, 8)
_FRAMING_HEADERS = frozenset({"content-length", "transfer-encoding"})
_MAX_OVERHEAD = 262_144  # bytes of a response outside its body: headers, chunk sizes, trailers


class HttpResponse:
    """A response as far as it is read. Header names are lower case; the last of repeated headers counts."""

    __slots__ = ("body", "complete", "headers", "keep_alive", "status")

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self.keep_alive = False
        self.complete = False


class HttpTransport:
    """Sends requests to one origin over HTTP/1.1, with one connection per concurrent call.

    It reads only as much of a body as shows that the body exceeds `max_body_bytes`. It does not reuse a
    connection that was idle for `keep_alive_seconds`, because the upstream or a proxy may have closed it,
    nor one that is `max_age_seconds` old, because the host name may resolve to another address by now.
    """

    def __init__(
        self,
        origin: httpx.URL,
        *,
        verify: ssl.SSLContext,
        max_body_bytes: int,
        keep_alive_seconds: float = 15.0,
        max_age_seconds: float = 300.0,
    ) -> None:
        self._host = origin.raw_host.decode("ascii")
        self._tls = verify if origin.scheme == "https" else None
        self._port = origin.port or (443 if self._tls else 80)
        self._max_body_bytes = max_body_bytes
        self._keep_alive_seconds = keep_alive_seconds
        self._max_age_seconds = max_age_seconds
        # Used from the right end: under low load the connections at the left end stay unused and are closed.
        self._idle: deque[_Connection] = deque()
        self._busy: set[_Connection] = set()
        self._sweep_timer: asyncio.TimerHandle | None = None
        self.in_flight = 0  # calls that the upstream may still work on

    async def send(
        self,
        request: bytes,
        *,
        timeout_seconds: float,
        new_connection: bool = False,
        on_complete: Callable[[], None] = lambda: None,
    ) -> HttpResponse:
        """Send a request, and return the response when it is complete.

        Args:
            request: The request, as made by `encode_request`.
            timeout_seconds: Limit for the whole call, with connecting.
            new_connection: Open a new connection, and close it after the call.
            on_complete: Called once, when the upstream does not work on the call any more: usually before
                this returns. After a cancellation, when the response has arrived or the timeout has passed.

        Raises:
            httpx.TransportError: There is no valid response.
            TimeoutError: The timeout has passed.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        connection = None if new_connection else self._take_idle(now)
        self.in_flight += 1
        if connection is None:
            try:
                async with asyncio.timeout_at(now + timeout_seconds):
                    connection = await self._connect()
            except BaseException:
                self.in_flight -= 1
                on_complete()
                raise
        connection.on_complete = on_complete
        connection.max_age_seconds = 0.0 if new_connection else self._max_age_seconds
        self._busy.add(connection)
        return await connection.send(request, now + timeout_seconds)

    async def aclose(self) -> None:
        """Close every connection and fail the calls in flight."""
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
            self._sweep_timer = None
        while self._idle:
            self._idle.pop().close()
        for connection in tuple(self._busy):
            connection.time_out()

    def _take_idle(self, now: float) -> _Connection | None:
        self._close_expired(now)
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable(now):
                return connection
            connection.close()
        return None

    def _on_call_end(self, connection: _Connection) -> None:
        """Keep the connection of a completed call if it is reusable, else close it."""
        self._busy.discard(connection)
        self.in_flight -= 1
        now = asyncio.get_running_loop().time()
        if connection.idle_since is None or connection.too_old(now):
            connection.close()
        else:
            self._idle.append(connection)
            if self._sweep_timer is None:
                self._schedule_sweep()
        connection.on_complete()

    def _close_expired(self, now: float) -> None:
        """Close connections that were idle for too long, and remove those that were lost."""
        oldest = now - self._keep_alive_seconds
        while self._idle and (self._idle[0].idle_since or 0.0) < oldest:
            self._idle.popleft().close()

    def _schedule_sweep(self) -> None:
        seconds = min(self._keep_alive_seconds, self._max_age_seconds)
        self._sweep_timer = asyncio.get_running_loop().call_later(seconds, self._sweep)

    def _sweep(self) -> None:
        """Close expired connections, also without new calls."""
        self._sweep_timer = None
        now = asyncio.get_running_loop().time()
        self._close_expired(now)
        for connection in tuple(self._idle):
            if connection.too_old(now):
                self._idle.remove(connection)
                connection.close()
        if self._idle:
            self._schedule_sweep()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            addresses = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
            sock = await start_connection(addresses, happy_eyeballs_delay=_HAPPY_EYEBALLS_SECONDS)
            try:
                _, connection = await loop.create_connection(
                    lambda: _Connection(self._max_body_bytes, self._on_call_end),
                    sock=sock,
                    ssl=self._tls,
                    server_hostname=self._host if self._tls else None,
                )
            except BaseException:
                sock.close()
                raise
        except (OSError, UnicodeError) as exc:  # DNS, connect or TLS; UnicodeError: IDNA refuses the name
            raise httpx.ConnectError(type(exc).__name__) from exc
        return connection


def encode_request(target: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """Return a POST request in wire format. Raises: httpx.LocalProtocolError for a line break in a header."""
    lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
    head = "".join(lines)
    if not head.count("\r") == head.count("\n") == len(lines):
        raise httpx.LocalProtocolError("a header contains a line break")
    return f"POST {target} HTTP/1.1\r\n{head}content-length: {len(body)}\r\n\r\n".encode("ascii") + body


def is_certificate_error(error: httpx.TransportError) -> bool:
    """Tell whether a call failed because the upstream's certificate could not be verified."""
    return isinstance(error.__cause__, ssl.SSLCertVerificationError)


def explain(error: httpx.TransportError) -> str:
    """Return why no connection could be made, for an operator; "" if the error came later."""
    if not isinstance(error, httpx.ConnectError):
        return ""
    match error.__cause__:
        case ssl.SSLCertVerificationError() as why:
            return f"the certificate could not be verified ({why.verify_message})"
        case ssl.SSLError():
            return "TLS handshake failed"
        case socket.gaierror() | UnicodeError():
            return "host name not found"
        case _:
            return "connection refused, or blocked by a firewall"


class _Connection(asyncio.Protocol):
    """One connection, with one call at a time.

    `idle_since` is the loop's time when the last response was complete, or None while the connection is not
    reusable. `on_call_end` is called at the end of each call, even if the call was cancelled. `on_complete`
    is that of the present call.
    """

    def __init__(self, max_body_bytes: int, on_call_end: Callable[[_Connection], None]) -> None:
        self.idle_since: float | None = None
        self.on_complete: Callable[[], None] = lambda: None
        self.max_age_seconds = 0.0
        self._max_body_bytes = max_body_bytes
        self._on_call_end = on_call_end
        self._loop = asyncio.get_running_loop()
        self._opened_at = self._loop.time()
        self._parser: HttpResponseParser | None = HttpResponseParser(self)
        self._waiter: asyncio.Future[HttpResponse] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._response = HttpResponse()
        self._overhead = 0
        self._readable = select.poll()

    def send(self, request: bytes, deadline: float) -> asyncio.Future[HttpResponse]:
        """Send a request; the future receives the response, an httpx.TransportError or a TimeoutError.

        Cancelling the future has no effect on the call: the connection reads the response or times out.
        """
        self.idle_since = None
        self._response = HttpResponse()
        self._overhead = 0
        self._waiter = self._loop.create_future()
        self._timer = self._loop.call_at(deadline, self.time_out)  # much cheaper than asyncio.timeout
        self._transport.write(request)
        return self._waiter

    def too_old(self, now: float) -> bool:
        """Tell whether the connection has reached its maximum age."""
        return now - self._opened_at >= self.max_age_seconds

    def reusable(self, now: float) -> bool:
        """Tell whether a call may use the connection: it is open, not too old, and has no unread bytes.

        `poll` asks the operating system for bytes that the event loop has not read yet. They would be taken
        for the start of the next response.
        """
        return self.idle_since is not None and not self.too_old(now) and not self._readable.poll(0)

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
        self._transport = transport
        self._readable.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self._waiter is None:
            # Bytes without a call in flight: they could be taken for the response to the next task's call.
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
        self.idle_since = None
        self._parser = None  # breaks the reference cycle
        response = self._response
        if exc is not None:
            self._fail(httpx.ReadError(type(exc).__name__))
        elif response.status and not _FRAMING_HEADERS & response.headers.keys():
            self._finish()  # the end of the connection ends the response (RFC 9112, 6.3)
        else:
            self._fail(httpx.RemoteProtocolError("the connection was closed before the end of the response"))

    # Called by the parser.

    def on_message_begin(self) -> None:
        if self._response.complete:
            raise ValueError("bytes after the end of the response")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._response.status:  # else it is a trailer, which is ignored
            self._response.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        assert self._parser is not None  # noqa: S101  # the parser makes this call
        status = self._parser.get_status_code()
        if status >= HTTPStatus.OK:
            self._response.status = status
            self._response.keep_alive = self._parser.should_keep_alive()
        else:
            self._response.headers.clear()  # of an interim response; the final one follows (RFC 9110, 15.2)

    def on_body(self, part: bytes) -> None:
        response = self._response
        self._overhead -= len(part)
        response.body += part
        if len(response.body) > self._max_body_bytes:
            response.keep_alive = False
            self._finish()

    def on_message_complete(self) -> None:
        self._response.complete = self._response.status != 0

    def _finish(self) -> None:
        waiter = self._waiter
        if waiter is None:
            return
        if self._response.keep_alive and self._parser is not None:
            self.idle_since = self._loop.time()
        if not waiter.done():
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
