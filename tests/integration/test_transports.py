"""The transports, direct and through a SOCKS proxy: framing, connection reuse, timeouts, unexpected bytes."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest

from gateway.upstream.direct_transport import DirectTransport
from gateway.upstream.http_connection import HttpConnection
from gateway.upstream.proxy_transport import ProxyTransport
from gateway.upstream.transport import HttpResponse, Transport
from tests.support.egress import Proxy, socks_proxy
from tests.support.harness import (
    PATIENCE_SECONDS,
    RawUpstream,
    Request,
    answer,
    drained,
    eventually,
    framed,
    free_port,
)

BODY = b'{"taskId": "A"}'


@pytest.fixture(scope="module")
def socks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """Run a SOCKS proxy: it passes on every byte as it is."""
    with socks_proxy(tmp_path_factory.mktemp("socks")) as proxy:
        yield proxy


@pytest.fixture(params=["direct", "socks"])
def through(request: pytest.FixtureRequest) -> str | None:
    """Return the URL of a proxy, or None."""
    return request.getfixturevalue("socks").url if request.param == "socks" else None


@asynccontextmanager
async def transport(
    url: str,
    *,
    max_body_bytes: int = 1000,
    keep_alive_seconds: float = 60.0,
    max_age_seconds: float = 60.0,
) -> AsyncIterator[DirectTransport]:
    """Open a direct transport, and close it at the end."""
    opened = DirectTransport(
        httpx.URL(url),
        tls=lambda: httpx.create_ssl_context(trust_env=False),
        max_body_bytes=max_body_bytes,
        keep_alive_seconds=keep_alive_seconds,
        max_age_seconds=max_age_seconds,
    )
    try:
        yield opened
    finally:
        await opened.aclose()


@asynccontextmanager
async def any_transport(url: str, proxy: str | None, **bounds: Any) -> AsyncIterator[Transport]:
    """Open a transport through this proxy, or a direct one, and close it at the end."""
    if proxy is None:
        async with transport(url, **bounds) as direct:
            yield direct
        return
    opened = ProxyTransport(
        httpx.URL(url),
        proxy=httpx.URL(proxy),
        tls=lambda: httpx.create_ssl_context(trust_env=False),
        **{"max_body_bytes": 1000, **bounds},
    )
    try:
        yield opened
    finally:
        await opened.aclose()


async def ask(over: Transport, *, seconds: float = PATIENCE_SECONDS, **options: Any) -> HttpResponse:
    """Send a request, and release its connection for the next one."""
    response = await ask_and_hold(over, seconds=seconds, **options)
    over.release_connection(response, reuse=True)
    return response


async def ask_and_hold(over: Transport, *, seconds: float = PATIENCE_SECONDS, **options: Any) -> HttpResponse:
    """Send a request, and do not release its connection."""
    headers = {"host": "upstream.example", "x-ca-key": "k"}
    return await over.send("/scc/x", headers, BODY, timeout_seconds=seconds, **options)


def idle(over: DirectTransport) -> list[HttpConnection]:
    """Return the idle connections."""
    return list(over._idle)  # private: callers of a transport do not see its connections


def once(url: str, proxy: str | None = None, **bounds: int) -> HttpResponse:
    """Send one request over a new transport."""

    async def run() -> HttpResponse:
        async with any_transport(url, proxy, **bounds) as over:
            return await ask(over)

    return asyncio.run(run())


@contextmanager
def silent() -> Iterator[str]:
    """Listen without accepting connections."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def framed_only(connection: socket.socket, _: Request) -> None:
    """Send the same response to any request."""
    connection.sendall(framed(b"{}"))


def open_sockets() -> int:
    """Count the sockets that this process has open."""
    links = Path("/proc/self/fd").iterdir()
    return sum(link.is_symlink() and link.readlink().name.startswith("socket:") for link in links)


def test_transport_adds_no_headers(through: str | None) -> None:
    """The transport adds no user agent, cookie or encoding of its own."""
    seen: list[Request] = []

    def remembers(connection: socket.socket, received: Request) -> None:
        seen.append(received)
        connection.sendall(framed(b"{}", "set-cookie: a=b"))

    with RawUpstream(remembers) as upstream:
        once(upstream.url, through)
    first, *headers = seen[0].head.split(b"\r\n")
    assert first == b"POST /scc/x HTTP/1.1"
    names = {header.partition(b":")[0].lower() for header in headers}
    assert names == {b"host", b"x-ca-key", b"content-length"}
    assert seen[0].body == BODY


def test_transport_keeps_connections_and_no_cookies(through: str | None) -> None:
    """A second request uses the first one's connection, without the cookie of the response."""
    connections: list[socket.socket] = []
    heads: list[bytes] = []

    def sets_a_cookie(connection: socket.socket, received: Request) -> None:
        connections.append(connection)
        heads.append(received.head)
        connection.sendall(framed(b"{}", "set-cookie: a=b"))

    async def twice(url: str) -> None:
        async with any_transport(url, through) as over:
            await ask(over)
            await ask(over)

    with RawUpstream(sets_a_cookie) as upstream:
        asyncio.run(twice(upstream.url))
    assert connections == [connections[0]] * 2
    assert not any(b"cookie" in head.lower() for head in heads)


def test_transport_follows_no_redirect_and_decodes_nothing(through: str | None) -> None:
    """A response is returned as received, even if it is a redirect."""

    def redirects(connection: socket.socket, _: Request) -> None:
        head = ("location: http://127.0.0.1:1/", "content-encoding: gzip")
        connection.sendall(framed(b"not gzip", *head, status="HTTP/1.1 302 Found"))

    with RawUpstream(redirects) as upstream:
        got = once(upstream.url, through)
    assert (got.status, got.body) == (302, b"not gzip")
    assert got.headers["location"] == "http://127.0.0.1:1/"


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"", httpx.RemoteProtocolError),
        (b"garbage\r\n\r\n", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc", httpx.RemoteProtocolError),
        (framed(b"{}") + b"garbage", httpx.RemoteProtocolError),
        # Two valid responses in one segment: the second one has no request.
        (framed(b"{}") + framed(b"[]"), httpx.RemoteProtocolError),
        (framed(b"{}") + framed(b""), httpx.RemoteProtocolError),
        (framed(b"{}") + b"HTTP/1.1 103 Early Hints\r\n\r\n", httpx.RemoteProtocolError),
        (
            b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}garbage",
            httpx.RemoteProtocolError,
        ),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\ngarbage\r\n", httpx.RemoteProtocolError),
        (b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\n" + b"x: garbage\r\n" * 100_000, httpx.RemoteProtocolError),
    ],
)
def test_transport_failure_is_an_httpx_exception(raw: bytes, error: type[httpx.TransportError]) -> None:
    """The text of the exception contains nothing that was received: that may be anything."""

    def sends(connection: socket.socket, _: Request) -> None:
        connection.sendall(raw)
        connection.close()

    with RawUpstream(sends) as upstream, pytest.raises(error) as told:
        once(upstream.url)
    assert "garbage" not in str(told.value)


@pytest.mark.parametrize(
    ("raw", "body"),
    [
        (framed(b"{}"), b"{}"),
        (framed(b""), b""),
        (answer(b"until the end"), b"until the end"),
        (answer(b"until the end", status="HTTP/1.0 200 OK"), b"until the end"),
        (b"HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\n" + framed(b"{}"), b"{}"),
        (answer(b"1\r\n{\r\n1;a=b\r\n}\r\n0\r\nx-trailer: a\r\n\r\n", "transfer-encoding: chunked"), b"{}"),
    ],
)
def test_transport_framing_is_that_of_http(through: str | None, raw: bytes, body: bytes) -> None:
    """Each way to end a body is supported, and headers do not leak between responses."""

    def sends(connection: socket.socket, _: Request) -> None:
        for byte in range(len(raw)):  # the parser meets every split
            connection.sendall(raw[byte : byte + 1])
        connection.close()

    with RawUpstream(sends) as upstream:
        got = once(upstream.url, through)
    assert (got.status, got.body) == (200, body)
    assert not {"link", "x-trailer"} & set(got.headers)


@pytest.mark.parametrize("encoding", ["content-length: 5000", "transfer-encoding: chunked"])
def test_transport_stops_reading_oversized_bodies(through: str | None, encoding: str) -> None:
    """A body over the limit is cut above the limit, and its connection is closed."""
    closed = threading.Event()

    def sends(connection: socket.socket, _: Request) -> None:
        body = b"x" * 5000 if "length" in encoding else b"1388\r\n" + b"x" * 5000
        connection.sendall(answer(body, encoding))
        drained(connection)
        closed.set()

    with RawUpstream(sends) as upstream:
        got = once(upstream.url, through, max_body_bytes=1000)
        assert closed.wait(PATIENCE_SECONDS)
    assert len(got.body) > 1000


def test_transport_reuses_no_expired_connection(through: str | None) -> None:
    """The upstream or a proxy may have closed it."""
    connections: list[socket.socket] = []

    def answers(connection: socket.socket, _: Request) -> None:
        connections.append(connection)
        connection.sendall(framed(b"{}"))

    async def twice(url: str) -> None:
        async with any_transport(url, through, keep_alive_seconds=0.0) as over:
            await ask(over)
            await ask(over)

    with RawUpstream(answers) as upstream:
        asyncio.run(twice(upstream.url))
    assert len(set(connections)) == 2


@pytest.mark.parametrize("surplus", [b"", framed(b"[]")])
def test_transport_reuses_no_connection_with_unexpected_bytes(surplus: bytes) -> None:
    """Unexpected bytes could answer the next task's call; a lost connection is not used either."""
    read = threading.Event()
    connections: list[socket.socket] = []

    def answers(connection: socket.socket, _: Request) -> None:
        connections.append(connection)
        connection.sendall(framed(b"{}"))
        if len(connections) == 1:
            read.wait(PATIENCE_SECONDS)
            if surplus:
                connection.sendall(surplus)
                drained(connection)
            connection.close()

    async def twice(url: str) -> list[bytearray]:
        async with transport(url) as over:
            before = open_sockets()
            first = await ask(over)
            read.set()
            while open_sockets() > before:  # noqa: ASYNC110  # nothing else tells of a socket's end
                await asyncio.sleep(0)
            second = await ask(over)
            return [first.body, second.body]

    with RawUpstream(answers) as upstream:
        assert asyncio.run(asyncio.wait_for(twice(upstream.url), PATIENCE_SECONDS)) == [b"{}", b"{}"]


def test_transport_refuses_line_breaks_in_headers(through: str | None) -> None:
    """A line break in a header could inject another header."""
    for line_break in ("\r\n", "\n", "\r"):
        headers = {"x-ca-key": f"a{line_break}b: c"}

        async def run() -> None:
            async with any_transport(url, through) as over:
                await over.send("/scc/x", headers, BODY, timeout_seconds=PATIENCE_SECONDS)  # noqa: B023

        with silent() as url, pytest.raises(httpx.LocalProtocolError):
            asyncio.run(run())


def test_transport_refused_connection_is_a_connect_error() -> None:
    """A refused connection raises httpx.ConnectError."""
    with pytest.raises(httpx.ConnectError):
        once(f"http://127.0.0.1:{free_port()}")


def test_transport_times_out_while_connecting_and_while_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The call ends in time, whatever takes too long, and its connection is closed."""

    async def run(url: str) -> None:
        async with transport(url) as over:
            before = open_sockets()
            with pytest.raises(TimeoutError):
                await ask(over, seconds=0.05)
            while open_sockets() > before:  # noqa: ASYNC110  # nothing else tells of a socket's end
                await asyncio.sleep(0)
            never = asyncio.get_running_loop().create_future()
            start = Mock(return_value=never)
            monkeypatch.setattr("gateway.upstream.direct_transport.start_connection", start)
            while not start.called:  # on a busy machine, the time may be over before that
                with pytest.raises(TimeoutError):
                    await ask(over, seconds=0.05)
            assert never.cancelled()

    with silent() as url:
        asyncio.run(asyncio.wait_for(run(url), PATIENCE_SECONDS))


def test_transport_timeout_after_the_response_has_no_effect() -> None:
    """A timeout after a complete response has no effect, even before the caller has run."""

    async def run(url: str) -> None:
        async with transport(url) as over:
            await ask(over)
            [connection] = idle(over)
            await ask(over, on_upstream_done=connection.time_out)
            await asyncio.sleep(0)
            await ask(over)
            assert idle(over) == [connection], "it was not aborted"

    with RawUpstream(framed_only) as upstream:
        asyncio.run(asyncio.wait_for(run(upstream.url), PATIENCE_SECONDS))
        assert len(upstream.requests) == 3


def test_transport_cancelled_call_leaves_no_socket() -> None:
    """A call may be cancelled while it connects, sends or waits: its connection is closed by the timeout."""

    async def run(url: str) -> None:
        async with transport(url) as over:
            before = open_sockets()
            calls = [asyncio.create_task(ask(over, seconds=0.2)) for _ in range(20)]
            for steps, call in enumerate(calls):
                for _ in range(steps % 5):
                    await asyncio.sleep(0)
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            while open_sockets() > before:  # noqa: ASYNC110  # nothing else tells of a socket's end
                await asyncio.sleep(0)
            assert over.in_flight == 0

    with silent() as url:
        asyncio.run(asyncio.wait_for(run(url), PATIENCE_SECONDS))


def test_transport_closes_what_is_in_flight() -> None:
    """Closing ends all calls, cancelled or not, and leaves no socket open."""

    async def run(url: str) -> None:
        async with transport(url) as over:
            before = open_sockets()
            cancelled, waiting = (asyncio.create_task(ask(over)) for _ in range(2))
            # `in_flight` counts calls that still connect, so this is private.
            while len(over._busy) < 2:  # noqa: ASYNC110  # they connect
                await asyncio.sleep(0)
            cancelled.cancel()
            await asyncio.wait([cancelled])
            assert over.in_flight == 2
            await over.aclose()
            with pytest.raises(TimeoutError):
                await waiting
            assert over.in_flight == 0
            while open_sockets() > before:  # noqa: ASYNC110  # nothing else tells of a socket's end
                await asyncio.sleep(0)

    with silent() as url:
        asyncio.run(asyncio.wait_for(run(url), PATIENCE_SECONDS))


@pytest.mark.parametrize("end", ["answer", "time"])
def test_transport_cancelled_call_completes_with_the_response(through: str | None, end: str) -> None:
    """A call that was sent stays in flight until its response has arrived or its timeout has passed."""
    released = threading.Event()

    def answers_late(connection: socket.socket, _: Request) -> None:
        released.wait(PATIENCE_SECONDS)
        connection.sendall(framed(b"late"))

    async def run(upstream: RawUpstream) -> None:
        async with any_transport(upstream.url, through) as over:
            ended = asyncio.Event()
            seconds = PATIENCE_SECONDS if end == "answer" else 0.5
            call = asyncio.create_task(ask(over, seconds=seconds, on_upstream_done=ended.set))
            while not upstream.requests:  # noqa: ASYNC110  # another thread reads it
                await asyncio.sleep(0.001)
            call.cancel()
            await asyncio.wait([call])
            assert call.cancelled()
            assert (ended.is_set(), over.in_flight) == (False, 1)
            if end == "answer":
                released.set()
            await ended.wait()
            assert over.in_flight == 0
            assert not over._idle, "the answer was not read"
            released.set()
            assert (await ask(over)).body == b"late"

    with RawUpstream(answers_late) as upstream:
        asyncio.run(asyncio.wait_for(run(upstream), PATIENCE_SECONDS))


def test_transport_takes_no_late_response_for_the_next_one() -> None:
    """An unread repeated response in the socket is not taken for the response to the next call."""
    answers = iter([b"first", b"second"])
    connections: list[socket.socket] = []

    def repeats(connection: socket.socket, _: Request) -> None:
        connections.append(connection)
        connection.sendall(framed(next(answers)))

    async def run(url: str) -> list[bytearray]:
        async with transport(url) as over:
            first = await ask(over)
            # The event loop reads nothing between these calls: the bytes stay in the socket.
            [connection] = idle(over)
            connections[0].sendall(framed(b"first"))
            while connection.is_reusable(asyncio.get_running_loop().time()):
                pass  # until the bytes have arrived
            second = await ask(over)
            return [first.body, second.body]

    with RawUpstream(repeats) as upstream:
        assert asyncio.run(asyncio.wait_for(run(upstream.url), PATIENCE_SECONDS)) == [b"first", b"second"]
    assert connections[0] is not connections[1]


def test_transport_new_connection_is_not_shared(through: str | None) -> None:
    """It takes no idle connection, and leaves none for the next call."""
    connections: list[socket.socket] = []
    closed = threading.Event()

    def answers(connection: socket.socket, _: Request) -> None:
        connections.append(connection)
        second = len(connections) == 2  # the third request may arrive as soon as this one is answered
        connection.sendall(framed(b"{}"))
        if second:
            drained(connection)
            closed.set()

    async def run(url: str) -> None:
        async with any_transport(url, through) as over:
            for new_connection in (False, True, False):
                await ask(over, new_connection=new_connection)

    with RawUpstream(answers) as upstream:
        asyncio.run(run(upstream.url))
        assert closed.wait(PATIENCE_SECONDS)
    first, second, third = connections
    assert first is third
    assert second is not first


def test_transport_says_whether_a_connection_was_used_before(through: str | None) -> None:
    """The first response on a connection differs from all later ones, which may be those to earlier calls."""
    connections: list[socket.socket] = []

    def closes_the_first(connection: socket.socket, _: Request) -> None:
        connections.append(connection)
        connection.sendall(framed(b"{}"))
        if len(connections) == 2:
            connection.close()

    async def run(url: str) -> list[bool]:
        async with any_transport(url, through) as over:
            reused = [(await ask(over)).reused for _ in range(2)]
            while len(set(connections)) == 1:  # the lost connection may still look usable
                with suppress(httpx.TransportError):
                    reused.append((await ask(over)).reused)
            reused.append((await ask(over)).reused)
            return reused

    with RawUpstream(closes_the_first) as upstream:
        assert asyncio.run(run(upstream.url)) == [False, True, False, True]


def test_transport_holds_a_connection_until_it_is_released(through: str | None) -> None:
    """No other call uses it before, and none if it may not be reused."""
    connections: list[socket.socket] = []

    def answers(connection: socket.socket, _: Request) -> None:
        connections.append(connection)
        connection.sendall(framed(b"{}"))

    async def run(url: str) -> None:
        async with any_transport(url, through) as over:
            first = await ask_and_hold(over)
            second = await ask_and_hold(over)
            assert first.connection_id != second.connection_id
            over.release_connection(first, reuse=False)
            over.release_connection(first, reuse=True)  # it is closed: no effect
            third = await ask_and_hold(over)
            assert not third.reused
            over.release_connection(second, reuse=True)
            again = await ask_and_hold(over)
            assert (again.connection_id, again.reused) == (second.connection_id, True)

    with RawUpstream(answers) as upstream:
        asyncio.run(asyncio.wait_for(run(upstream.url), PATIENCE_SECONDS))
    assert [connections.index(each) for each in connections] == [0, 1, 2, 1]


def test_transport_closes_idle_connections_only(through: str | None) -> None:
    """A call in flight continues."""
    connections: list[socket.socket] = []
    released = threading.Event()

    def answers(connection: socket.socket, _: Request) -> None:
        connections.append(connection)
        if len(connections) == 2:
            released.wait(PATIENCE_SECONDS)
        connection.sendall(framed(b"{}"))

    async def run(url: str) -> None:
        async with any_transport(url, through) as over:
            await ask(over)
            busy = asyncio.create_task(ask(over))
            await eventually(lambda: len(connections) == 2, "the call is on the wire")
            over.close_idle_connections()
            released.set()
            assert (await busy).reused
            over.close_idle_connections()
            assert not (await ask(over)).reused

    with RawUpstream(answers) as upstream:
        asyncio.run(asyncio.wait_for(run(upstream.url), PATIENCE_SECONDS))


def test_transport_cancelled_as_the_response_arrives(through: str | None) -> None:
    """The response is not read, so the upstream may be out of step on this connection."""
    connections: list[socket.socket] = []
    closed = threading.Event()

    def answers(connection: socket.socket, _: Request) -> None:
        connections.append(connection)
        first = len(connections) == 1
        connection.sendall(framed(b"{}"))
        if first:
            drained(connection)
            closed.set()

    async def run(url: str) -> None:
        async with any_transport(url, through) as over:
            # The response has arrived by then, but it has not been returned yet.
            call = asyncio.create_task(ask(over, on_upstream_done=lambda: call.cancel()))  # noqa: PLW0108  # `call` is not set yet
            await asyncio.wait([call])
            assert call.cancelled()
            await eventually(closed.is_set, "its connection is closed")
            assert not (await ask(over)).reused

    with RawUpstream(answers) as upstream:
        asyncio.run(asyncio.wait_for(run(upstream.url), PATIENCE_SECONDS))


def test_transport_closes_connections_at_their_maximum_age() -> None:
    """However busy it is, a connection that is too old is closed after its call."""
    connections: list[socket.socket] = []

    def answers(connection: socket.socket, _: Request) -> None:
        connections.append(connection)
        connection.sendall(framed(b"{}"))

    async def run(url: str) -> None:
        async with transport(url, max_age_seconds=60.0) as over:
            await ask(over)
            await ask(over)
            [connection] = idle(over)
            connection.max_age_seconds = 0.0  # as if a minute had passed
            await ask(over)
            [young] = idle(over)
            assert young is not connection
            ending = asyncio.create_task(ask(over))
            await asyncio.sleep(0)
            young.max_age_seconds = 0.0  # the same, while its call is in flight
            await ending
            assert not idle(over)

    with RawUpstream(answers) as upstream:
        asyncio.run(asyncio.wait_for(run(upstream.url), PATIENCE_SECONDS))
    first, again, other, _ = connections
    assert first is again
    assert other is not first


@pytest.mark.parametrize("bound", ["keep_alive_seconds", "max_age_seconds"])
def test_transport_closes_idle_connections_without_new_calls(bound: str) -> None:
    """A connection is closed when it has been idle, or open, for too long, also without new calls."""

    def answers(connection: socket.socket, _: Request) -> None:
        connection.sendall(framed(b"{}"))
        drained(connection)
        connection.close()

    async def run(url: str) -> None:
        async with transport(url, **{bound: 0.05}) as over:
            before = open_sockets()
            await ask(over)
            while open_sockets() > before:  # noqa: ASYNC110  # nothing else tells of a socket's end
                await asyncio.sleep(0.001)
            assert over._sweep_timer is None  # private: a timer that still runs does nothing visible

    with RawUpstream(answers) as upstream:
        asyncio.run(asyncio.wait_for(run(upstream.url), PATIENCE_SECONDS))
