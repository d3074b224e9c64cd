"""The connections to the upstream: framing, reuse, deadlines, and what may be taken for an answer."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import pytest

from gateway.upstream.http_transport import HttpResponse, HttpTransport, encode_request
from tests.harness import PATIENCE_SECONDS, RawUpstream, Request, answer, drained, framed, free_port

BODY = b'{"taskId": "A"}'


@asynccontextmanager
async def transport(
    url: str,
    *,
    max_body_bytes: int = 1000,
    keep_alive_seconds: float = 60.0,
    max_age_seconds: float = 60.0,
) -> AsyncIterator[HttpTransport]:
    """Open a transport, and close it when done with."""
    opened = HttpTransport(
        httpx.URL(url),
        verify=httpx.create_ssl_context(trust_env=False),
        max_body_bytes=max_body_bytes,
        keep_alive_seconds=keep_alive_seconds,
        max_age_seconds=max_age_seconds,
    )
    try:
        yield opened
    finally:
        await opened.aclose()


async def ask(over: HttpTransport, *, seconds: float = PATIENCE_SECONDS, fresh: bool = False) -> HttpResponse:
    """Send a request."""
    headers = {"host": "upstream.example", "x-ca-key": "k"}
    request = encode_request("/scc/x", headers, BODY)
    return await over.send(request, timeout_seconds=seconds, new_connection=fresh)


def once(url: str, **bounds: int) -> HttpResponse:
    """Ask over a transport of its own."""

    async def run() -> HttpResponse:
        async with transport(url, **bounds) as over:
            return await ask(over)

    return asyncio.run(run())


@contextmanager
def silent() -> Iterator[str]:
    """Listen, and let nobody's connection be accepted."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def framed_only(connection: socket.socket, _: Request) -> None:
    """Reply, whatever was asked."""
    connection.sendall(framed(b"{}"))


def open_sockets() -> int:
    """Count the sockets that this process has open."""
    links = Path("/proc/self/fd").iterdir()
    return sum(link.is_symlink() and link.readlink().name.startswith("socket:") for link in links)


def test_transport_sends_what_it_was_given_and_no_more() -> None:
    """No user agent, cookie or encoding of the client's own goes out."""
    seen: list[Request] = []

    def remembers(connection: socket.socket, received: Request) -> None:
        seen.append(received)
        connection.sendall(framed(b"{}", "set-cookie: a=b"))

    with RawUpstream(remembers) as upstream:
        once(upstream.url)
    first, *headers = seen[0].head.split(b"\r\n")
    assert first == b"POST /scc/x HTTP/1.1"
    names = {header.partition(b":")[0].lower() for header in headers}
    assert names == {b"host", b"x-ca-key", b"content-length"}
    assert seen[0].body == BODY


def test_transport_keeps_connections_and_no_cookies() -> None:
    """A second request goes over the first one's connection, without the cookie that came with it."""
    connections: list[socket.socket] = []
    heads: list[bytes] = []

    def sets_a_cookie(connection: socket.socket, received: Request) -> None:
        connections.append(connection)
        heads.append(received.head)
        connection.sendall(framed(b"{}", "set-cookie: a=b"))

    async def twice(url: str) -> None:
        async with transport(url) as over:
            await ask(over)
            await ask(over)

    with RawUpstream(sets_a_cookie) as upstream:
        asyncio.run(twice(upstream.url))
    assert connections == [connections[0]] * 2
    assert not any(b"cookie" in head.lower() for head in heads)


def test_transport_follows_no_redirect_and_decodes_nothing() -> None:
    """An answer is handed on as it came off the wire, wherever it points to."""

    def redirects(connection: socket.socket, _: Request) -> None:
        head = ("location: http://127.0.0.1:1/", "content-encoding: gzip")
        connection.sendall(framed(b"not gzip", *head, status="HTTP/1.1 302 Found"))

    with RawUpstream(redirects) as upstream:
        got = once(upstream.url)
    assert (got.status, got.body) == (302, b"not gzip")
    assert got.headers["location"] == "http://127.0.0.1:1/"


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"", httpx.RemoteProtocolError),
        (b"garbage\r\n\r\n", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc", httpx.RemoteProtocolError),
        (framed(b"{}") + b"garbage", httpx.RemoteProtocolError),
        # Two well-formed answers in one segment: the second one is nobody's.
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
def test_transport_failure_is_told_in_httpx_terms(raw: bytes, error: type[httpx.TransportError]) -> None:
    """What was received is no part of the text: it might hold anything."""

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
def test_transport_framing_is_that_of_http(raw: bytes, body: bytes) -> None:
    """Whatever ends a body, it comes whole, with its own headers alone."""

    def sends(connection: socket.socket, _: Request) -> None:
        for byte in range(len(raw)):  # the parser meets every seam
            connection.sendall(raw[byte : byte + 1])
        connection.close()

    with RawUpstream(sends) as upstream:
        got = once(upstream.url)
    assert (got.status, got.body) == (200, body)
    assert not {"link", "x-trailer"} & set(got.headers)


@pytest.mark.parametrize("encoding", ["content-length: 5000", "transfer-encoding: chunked"])
def test_transport_reads_no_more_than_shows_that_it_is_too_much(encoding: str) -> None:
    """What is longer than it may be is cut, but not to where it would pass, and its connection closed."""
    closed = threading.Event()

    def sends(connection: socket.socket, _: Request) -> None:
        body = b"x" * 5000 if "length" in encoding else b"1388\r\n" + b"x" * 5000
        connection.sendall(answer(body, encoding))
        drained(connection)
        closed.set()

    with RawUpstream(sends) as upstream:
        got = once(upstream.url, max_body_bytes=1000)
        assert closed.wait(PATIENCE_SECONDS)
    assert len(got.body) > 1000


def test_transport_uses_no_connection_that_was_idle_for_long() -> None:
    """Somebody on the way may have forgotten it."""
    connections: list[socket.socket] = []

    def answers(connection: socket.socket, _: Request) -> None:
        connections.append(connection)
        connection.sendall(framed(b"{}"))

    async def twice(url: str) -> None:
        async with transport(url, keep_alive_seconds=0.0) as over:
            await ask(over)
            await ask(over)

    with RawUpstream(answers) as upstream:
        asyncio.run(twice(upstream.url))
    assert len(set(connections)) == 2


@pytest.mark.parametrize("surplus", [b"", framed(b"[]")])
def test_transport_uses_no_connection_on_which_something_came_unasked(surplus: bytes) -> None:
    """Bytes nobody asked for would answer the next task's call; a lost connection is no use either."""
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


def test_transport_sends_no_line_that_it_was_not_given() -> None:
    """A line break within a header would be a header of somebody else's making."""
    for line_break in ("\r\n", "\n", "\r"):
        with pytest.raises(httpx.LocalProtocolError):
            encode_request("/scc/x", {"x-ca-key": f"a{line_break}b: c"}, BODY)


def test_transport_refused_connection_is_a_connect_error() -> None:
    """Nobody listens: the kind tells it."""
    with pytest.raises(httpx.ConnectError):
        once(f"http://127.0.0.1:{free_port()}")


def test_transport_deadline_holds_while_it_connects_and_while_it_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever takes too long, the call ends in time, and its connection with it."""

    async def run(url: str) -> None:
        async with transport(url) as over:
            before = open_sockets()
            with pytest.raises(TimeoutError):
                await ask(over, seconds=0.05)
            while open_sockets() > before:  # noqa: ASYNC110  # nothing else tells of a socket's end
                await asyncio.sleep(0)
            never = asyncio.get_running_loop().create_future()
            monkeypatch.setattr("gateway.upstream.http_transport.start_connection", lambda *_, **__: never)
            with pytest.raises(TimeoutError):
                await ask(over, seconds=0.05)
            assert never.cancelled()

    with silent() as url:
        asyncio.run(asyncio.wait_for(run(url), PATIENCE_SECONDS))


def test_transport_deadline_that_strikes_too_late_harms_nobody() -> None:
    """Once an answer is whole the deadline has nothing to say, though the caller has not run yet."""

    async def run(url: str) -> None:
        async with transport(url) as over:
            await ask(over)
            [connection] = over._idle
            message = encode_request("/scc/x", {"host": "x"}, BODY)
            await over.send(message, timeout_seconds=PATIENCE_SECONDS, on_complete=connection.time_out)
            await asyncio.sleep(0)
            await ask(over)
            assert list(over._idle) == [connection], "it was not aborted"

    with RawUpstream(framed_only) as upstream:
        asyncio.run(asyncio.wait_for(run(upstream.url), PATIENCE_SECONDS))
        assert len(upstream.requests) == 3


def test_transport_cancelled_call_leaves_no_socket() -> None:
    """A call may be cancelled while it connects, sends or waits: its connection ends with its time."""

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
    """Closing ends calls that were cancelled and those that were not; nothing is left open."""

    async def run(url: str) -> None:
        async with transport(url) as over:
            before = open_sockets()
            cancelled, waiting = (asyncio.create_task(ask(over)) for _ in range(2))
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
def test_transport_cancelled_call_is_over_when_upstream_has_done_with_it(end: str) -> None:
    """A call that was sent stays under way until its answer has come, or its time has passed."""
    released = threading.Event()

    def answers_late(connection: socket.socket, _: Request) -> None:
        released.wait(PATIENCE_SECONDS)
        connection.sendall(framed(b"late"))

    async def run(upstream: RawUpstream) -> None:
        async with transport(upstream.url) as over:
            ended = asyncio.Event()
            message = encode_request("/scc/x", {"host": "x"}, BODY)
            seconds = PATIENCE_SECONDS if end == "answer" else 0.5
            call = asyncio.create_task(over.send(message, timeout_seconds=seconds, on_complete=ended.set))
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
            assert len(over._idle) == (end == "answer"), "an answer that was read leaves a clean connection"
            released.set()
            assert (await ask(over)).body == b"late"

    with RawUpstream(answers_late) as upstream:
        asyncio.run(asyncio.wait_for(run(upstream), PATIENCE_SECONDS))


def test_transport_takes_no_late_answer_for_the_next_one() -> None:
    """A repeated answer that lies in the socket, unread, when the next call begins, is not that one's."""
    answers = iter([b"first", b"second"])
    connections: list[socket.socket] = []

    def repeats(connection: socket.socket, _: Request) -> None:
        connections.append(connection)
        connection.sendall(framed(next(answers)))

    async def run(url: str) -> list[bytearray]:
        async with transport(url) as over:
            first = await ask(over)
            # Between two turns of the event loop, which reads nothing meanwhile: the bytes lie in our socket.
            [connection] = over._idle
            connections[0].sendall(framed(b"first"))
            while not connection._readable.poll(1000):
                pass
            second = await ask(over)
            return [first.body, second.body]

    with RawUpstream(repeats) as upstream:
        assert asyncio.run(asyncio.wait_for(run(upstream.url), PATIENCE_SECONDS)) == [b"first", b"second"]
    assert connections[0] is not connections[1]


def test_transport_fresh_call_has_a_connection_of_its_own() -> None:
    """It takes none that was used, and none is left for the next call."""
    connections: list[socket.socket] = []
    closed = threading.Event()

    def answers(connection: socket.socket, _: Request) -> None:
        connections.append(connection)
        second = len(connections) == 2  # the third may come as soon as this is answered
        connection.sendall(framed(b"{}"))
        if second:
            drained(connection)
            closed.set()

    async def run(url: str) -> None:
        async with transport(url) as over:
            for fresh in (False, True, False):
                await ask(over, new_connection=fresh)

    with RawUpstream(answers) as upstream:
        asyncio.run(run(upstream.url))
        assert closed.wait(PATIENCE_SECONDS)
    first, second, third = connections
    assert first is third
    assert second is not first


def test_transport_uses_no_connection_for_longer_than_its_age() -> None:
    """However busy it is, a connection that is too old is closed after its call."""
    connections: list[socket.socket] = []

    def answers(connection: socket.socket, _: Request) -> None:
        connections.append(connection)
        connection.sendall(framed(b"{}"))

    async def run(url: str) -> None:
        async with transport(url, max_age_seconds=60.0) as over:
            await ask(over)
            await ask(over)
            [connection] = over._idle
            connection._made_at -= 61.0  # a minute passes
            await ask(over)
            [young] = over._idle
            assert young is not connection
            ending = asyncio.create_task(ask(over))
            await asyncio.sleep(0)
            young._made_at -= 61.0  # while its call is under way
            await ending
            assert not over._idle

    with RawUpstream(answers) as upstream:
        asyncio.run(asyncio.wait_for(run(upstream.url), PATIENCE_SECONDS))
    first, again, other, _ = connections
    assert first is again
    assert other is not first


@pytest.mark.parametrize("bound", ["keep_alive_seconds", "max_age_seconds"])
def test_transport_closes_idle_connections_by_itself(bound: str) -> None:
    """A connection that no call looks at any more is closed when it has been idle, or open, for too long."""

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
            assert over._sweep_timer is None

    with RawUpstream(answers) as upstream:
        asyncio.run(asyncio.wait_for(run(upstream.url), PATIENCE_SECONDS))
