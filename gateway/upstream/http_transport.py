"""The connections to the upstream, over httptools' parser; what goes wrong is told in httpx's terms.

    encode -> exchange: an idle connection, or a new one -> written at once -> the whole answer, bounded

httpx's own pool looks through all of its connections, for each of them, at every call's start and end:
what a call costs grows with the square of the calls in the air. aiohttp's does not, but a call passes
through so many objects of its client that this costs more than all the rest of a query. Here a connection
is one protocol with one call at a time, and nothing is awaited but its answer.

A call that is cancelled under way stays under way for the upstream: its connection waits for the answer and
throws it away, until the call's time is over. `over` tells when nothing of a call is under way any more.

What the gateway must never do, this cannot do: it follows no redirect, keeps no cookie, reads no proxy
or netrc from the environment, decodes no body, calls no host but one, and sends no header that it was
not given. Message framing is the parser's affair, in its strict mode (RFC 9112, 6).
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

_OTHER_ADDRESS_SECONDS = 0.25  # before the next one of a host's addresses is tried beside (RFC 8305, 8)
_FRAMING = frozenset({"content-length", "transfer-encoding"})
_MOST_OVERHEAD = 262_144  # bytes of an answer that are not its body: headers, chunk sizes, trailers


class HttpResponse:
    """An answer, as far as it has come. Headers have lower-case names; of a repeated one the last counts."""

    __slots__ = ("body", "headers", "keep_alive", "status", "whole")

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self.keep_alive = False
        self.whole = False


class HttpTransport:
    """Carries requests to one origin over HTTP/1.1, on as many connections as there are calls.

    Of a body longer than `max_body_bytes` it reads no more than shows that it is. A connection that was
    idle for `keep_alive_seconds` is used no more: an upstream, or what lies between, may have forgotten it.
    Nor is one that was made `max_age_seconds` ago: the host's name may lead elsewhere by now.
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
        # The one used last lies on top: in quiet times those below go unused, and are let go.
        self._idle: deque[_Connection] = deque()
        self._asking: set[_Connection] = set()
        self._sweeping: asyncio.TimerHandle | None = None
        self.under_way = 0  # calls whose answer the upstream may still be working on

    async def exchange(
        self, message: bytes, *, seconds: float, fresh: bool = False, over: Callable[[], None] = lambda: None
    ) -> HttpResponse:
        """Send a request, and return the answer when all of it has come.

        Args:
            message: The request, as `encode` makes it.
            seconds: The longest time for all of it, connecting included.
            fresh: Use a new connection, and use it for nothing else.
            over: Called once, when nothing of the call is under way any more: usually before this returns.
                When it is cancelled, that is when the answer has come or the time has passed.

        Raises:
            httpx.TransportError: The answer cannot be had.
            TimeoutError: It took too long.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        connection = None if fresh else self._take_idle(now)
        self.under_way += 1
        if connection is None:
            try:
                async with asyncio.timeout_at(now + seconds):
                    connection = await self._connect()
            except BaseException:
                self.under_way -= 1
                over()
                raise
        connection.over = over
        connection.max_age_seconds = 0.0 if fresh else self._max_age_seconds
        self._asking.add(connection)
        return await connection.ask(message, now + seconds)

    async def aclose(self) -> None:
        """Close every connection, with whatever is under way on it."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None
        while self._idle:
            self._idle.pop().close()
        for connection in tuple(self._asking):
            connection.give_up()

    def _take_idle(self, now: float) -> _Connection | None:
        self._let_go(now)
        while self._idle:
            connection = self._idle.pop()
            if connection.usable(now):
                return connection
            connection.close()
        return None

    def _take_back(self, connection: _Connection) -> None:
        """Keep a connection whose call is over, if it may be used again."""
        self._asking.discard(connection)
        self.under_way -= 1
        now = asyncio.get_running_loop().time()
        if connection.idle_since is None or connection.old(now):
            connection.close()
        else:
            self._idle.append(connection)
            if self._sweeping is None:
                self._sweep_later()
        connection.over()

    def _let_go(self, now: float) -> None:
        """Close what has been idle for long, and forget what was lost meanwhile."""
        oldest = now - self._keep_alive_seconds
        while self._idle and (self._idle[0].idle_since or 0.0) < oldest:
            self._idle.popleft().close()

    def _sweep_later(self) -> None:
        seconds = min(self._keep_alive_seconds, self._max_age_seconds)
        self._sweeping = asyncio.get_running_loop().call_later(seconds, self._sweep)

    def _sweep(self) -> None:
        """Close idle connections that no call has looked at."""
        self._sweeping = None
        now = asyncio.get_running_loop().time()
        self._let_go(now)
        for connection in tuple(self._idle):
            if connection.old(now):
                self._idle.remove(connection)
                connection.close()
        if self._idle:
            self._sweep_later()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            addresses = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
            sock = await start_connection(addresses, happy_eyeballs_delay=_OTHER_ADDRESS_SECONDS)
            try:
                _, connection = await loop.create_connection(
                    lambda: _Connection(self._max_body_bytes, self._take_back),
                    sock=sock,
                    ssl=self._tls,
                    server_hostname=self._host if self._tls else None,
                )
            except BaseException:
                sock.close()
                raise
        except (OSError, UnicodeError) as exc:  # DNS, connect, TLS; a name that IDNA refuses
            raise httpx.ConnectError(type(exc).__name__) from exc
        return connection


def encode(target: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """Return a POST as it stands on the wire. Raises: httpx.LocalProtocolError, for a break in a header."""
    lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
    head = "".join(lines)
    if not head.count("\r") == head.count("\n") == len(lines):
        raise httpx.LocalProtocolError("a header with a line break")
    return f"POST {target} HTTP/1.1\r\n{head}content-length: {len(body)}\r\n\r\n".encode("ascii") + body


def untrusted(error: httpx.TransportError) -> bool:
    """Tell whether a call failed because nobody known vouches for the upstream's certificate."""
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

    `idle_since` is the loop's time at which its last answer was whole; None while it cannot be used. `done`
    is called at the end of each call, even if its caller has left; `over` is the present call's.
    """

    def __init__(self, max_body_bytes: int, done: Callable[[_Connection], None]) -> None:
        self.idle_since: float | None = None
        self.over: Callable[[], None] = lambda: None
        self.max_age_seconds = 0.0
        self._max_body_bytes = max_body_bytes
        self._done = done
        self._loop = asyncio.get_running_loop()
        self._made_at = self._loop.time()
        self._parser: HttpResponseParser | None = HttpResponseParser(self)
        self._waiter: asyncio.Future[HttpResponse] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._answer = HttpResponse()
        self._overhead = 0
        self._readable = select.poll()

    def ask(self, message: bytes, deadline: float) -> asyncio.Future[HttpResponse]:
        """Send a request; the future gets the answer, an httpx.TransportError or a TimeoutError.

        A future that is cancelled changes nothing: the answer is read, or its deadline awaited.
        """
        self.idle_since = None
        self._answer = HttpResponse()
        self._overhead = 0
        self._waiter = self._loop.create_future()
        self._timer = self._loop.call_at(deadline, self.give_up)  # a fraction of what asyncio.timeout costs
        self._transport.write(message)
        return self._waiter

    def old(self, now: float) -> bool:
        """Tell whether it was made too long ago to be used again."""
        return now - self._made_at >= self.max_age_seconds

    def usable(self, now: float) -> bool:
        """Tell whether a call may be made on it: alive, not old, and nothing came that was not asked for.

        The last is asked of the system: bytes may have arrived that the event loop has not read yet, and
        would be taken for the start of the next answer.
        """
        return self.idle_since is not None and not self.old(now) and not self._readable.poll(0)

    def give_up(self) -> None:
        """Tell who waits for an answer, if a call is under way, that it comes too late."""
        if self._waiter is not None:
            self._fail(TimeoutError())

    def close(self) -> None:
        """Let go of the connection at once; whatever was to be sent or read is lost."""
        self.idle_since = None
        self._transport.abort()

    # Called by the event loop.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # it is one
        self._transport = transport
        self._readable.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self._waiter is None:
            # Nobody asked: kept, it might be read as the answer to the next task's call.
            self.idle_since = None
            self._transport.abort()
            return
        self._overhead += len(data)
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as exc:
            self._fail(httpx.RemoteProtocolError(type(exc).__name__))
            return
        if self._overhead > _MOST_OVERHEAD:
            self._fail(httpx.RemoteProtocolError("headers without end"))
        elif self._answer.whole:  # and nothing came behind it, which the parser would have refused
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        self.idle_since = None
        self._parser = None  # it knows us, as we know it
        answer = self._answer
        if exc is not None:
            self._fail(httpx.ReadError(type(exc).__name__))
        elif answer.status and not _FRAMING & answer.headers.keys():
            self._finish()  # the connection's end is the answer's (RFC 9112, 6.3)
        else:
            self._fail(httpx.RemoteProtocolError("the connection was closed before the answer's end"))

    # Called by the parser.

    def on_message_begin(self) -> None:
        if self._answer.whole:
            raise ValueError("bytes beyond the answer's end")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._answer.status:  # else it is a trailer, which is nothing to us
            self._answer.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        assert self._parser is not None  # noqa: S101  # it calls
        status = self._parser.get_status_code()
        if status >= HTTPStatus.OK:
            self._answer.status = status
            self._answer.keep_alive = self._parser.should_keep_alive()
        else:
            self._answer.headers.clear()  # of an interim answer; the final one follows (RFC 9110, 15.2)

    def on_body(self, part: bytes) -> None:
        answer = self._answer
        self._overhead -= len(part)
        answer.body += part
        if len(answer.body) > self._max_body_bytes:
            answer.keep_alive = False
            self._finish()

    def on_message_complete(self) -> None:
        self._answer.whole = self._answer.status != 0

    def _finish(self) -> None:
        waiter = self._waiter
        if waiter is None:
            return
        if self._answer.keep_alive and self._parser is not None:
            self.idle_since = self._loop.time()
        if not waiter.done():
            waiter.set_result(self._answer)
        self._end()

    def _fail(self, error: httpx.TransportError | TimeoutError) -> None:
        waiter = self._waiter
        if waiter is not None:
            if not waiter.done():
                waiter.set_exception(error)
            self._end()
        self._transport.abort()

    def _end(self) -> None:
        self._waiter = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._done(self)
