import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import aiohttp
import httpx
import pytest

from gateway.transport import TRANSPORT_ERRORS, AiohttpTransport
from tests.harness import RawUpstream, Request, framed, free_port

BODY = b'{"taskId": "A"}'


@asynccontextmanager
async def transport() -> AsyncIterator[AiohttpTransport]:
    """Open a transport, and close it when done with."""
    opened = AiohttpTransport(verify=httpx.create_ssl_context(trust_env=False))
    try:
        yield opened
    finally:
        await opened.aclose()


def request(url: str) -> httpx.Request:
    """Make a request with one header more than it needs."""
    return httpx.Request("POST", f"{url}/scc/x", headers={"X-Ca-Key": "k"}, content=BODY)


async def ask(over: AiohttpTransport, url: str) -> tuple[httpx.Response, bytes]:
    """Send the request and read the answer to its end."""
    response = await over.handle_async_request(request(url))
    try:
        return response, b"".join([part async for part in response.aiter_raw()])
    finally:
        await response.aclose()


def once(url: str) -> tuple[httpx.Response, bytes]:
    """Ask over a transport of its own."""

    async def run() -> tuple[httpx.Response, bytes]:
        async with transport() as over:
            return await ask(over, url)

    return asyncio.run(run())


@contextmanager
def silent() -> Iterator[str]:
    """Listen, and let nobody's connection be accepted."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def open_sockets() -> int:
    """Count the sockets that this process has open."""
    links = Path("/proc/self/fd").iterdir()
    return sum(link.is_symlink() and link.readlink().name.startswith("socket:") for link in links)


def test_transport_errors_all_have_a_row() -> None:
    """Every client error of aiohttp is told as one of httpx, the most specific row first."""

    def descendants(kind: type[BaseException]) -> set[type[BaseException]]:
        return {kind}.union(*(descendants(child) for child in kind.__subclasses__()))

    rows = [kind for kind, _ in TRANSPORT_ERRORS]
    for error in descendants(aiohttp.ClientError):
        matching = [kind for kind in rows if issubclass(error, kind)]
        assert matching
        assert all(issubclass(matching[0], kind) for kind in matching)


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
        async with transport() as over:
            await ask(over, url)
            await ask(over, url)

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
        response, body = once(upstream.url)
    assert (response.status_code, body) == (302, b"not gzip")
    assert response.headers["location"] == "http://127.0.0.1:1/"


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"", httpx.RemoteProtocolError),
        (b"garbage\r\n\r\n", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc", httpx.RemoteProtocolError),
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


def test_transport_refused_connection_is_a_connect_error() -> None:
    """Nobody listens: the kind tells it."""
    with pytest.raises(httpx.ConnectError):
        once(f"http://127.0.0.1:{free_port()}")


def test_transport_cancelled_call_leaves_no_socket() -> None:
    """A deadline may strike while it connects, sends or waits: the connection goes with the call."""

    async def run(url: str) -> None:
        async with transport() as over:
            before = open_sockets()
            calls = [asyncio.create_task(over.handle_async_request(request(url))) for _ in range(20)]
            for steps, call in enumerate(calls):
                for _ in range(steps % 5):
                    await asyncio.sleep(0)
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            while open_sockets() > before:  # noqa: ASYNC110  # nothing else tells of a socket's end
                await asyncio.sleep(0)

    with silent() as url:
        asyncio.run(asyncio.wait_for(run(url), 30))
