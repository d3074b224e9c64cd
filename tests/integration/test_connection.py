"""The connection class, over real sockets: refusals, limits and timeouts before the application is called."""

import json
import re
import socket
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from gateway.server.connection_limits import RESERVED_CONNECTIONS
from tests.support.harness import Gateway, Simulator, drained, until

Launch = Callable[..., Gateway]

REQUEST = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
LAST = b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
POST = b"POST /scc/sd_get_progress HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def refused(received: bytes, status: str = "400 bad request", code: str = "invalid-parameter") -> str:
    """Check that the only response is a complete problem that closes the connection; return its detail."""
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    assert lines[0] == f"http/1.1 {status}"
    assert "content-type: application/problem+json" in lines
    assert "connection: close" in lines
    assert "cache-control: no-store" in lines
    assert f"content-length: {len(body)}" in lines
    told = json.loads(body)
    assert (str(told["status"]), told["code"]) == (status[:3], code)
    assert "x-content-type-options: nosniff" in lines
    assert f"x-request-id: {told['requestId']}" in lines
    detail: str = told["detail"]
    return detail


def answered(connection: socket.socket) -> bytes:
    """Read the response to a valid request."""
    received = b""
    while b'{"status":"ok"}' not in received:
        part = connection.recv(65536)
        assert part, received
        received += part
    return received


@pytest.mark.parametrize(
    "junk",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"GET /healthz HTTP/9.9\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nna me: x\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nx: a\x00b\r\n\r\n",
        b"GET /health z HTTP/1.1\r\n\r\n",
        b"BREW /healthz HTTP/1.1\r\nhost: x\r\n\r\n",
        POST + b"content-length: -1\r\n\r\n{}",
        POST + b"content-length: ten\r\n\r\n{}",
        POST + b"content-length: 99999999999999999999999999\r\n\r\n{}",
        POST + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        POST + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    ],
)
def test_edge_refuses_junk_with_a_problem(simulator: Simulator, launch: Launch, junk: bytes) -> None:
    """Input that is not HTTP gets a problem and a closed connection, without an upstream call."""
    gate = launch(simulator.url)
    assert refused(gate.raw(junk)) == "the request is not valid HTTP/1.1"
    assert gate.client.get("/healthz").status_code == 200
    assert simulator.requests() == []


@pytest.mark.parametrize(
    "body",
    [
        b"transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        b"transfer-encoding: chunked\r\n\r\n-1\r\n{}\r\n",
        b"transfer-encoding: chunked\r\n\r\n2\r\n{}{}\r\n0\r\n\r\n",
        b"transfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
    ],
)
def test_edge_refuses_malformed_chunks(simulator: Simulator, launch: Launch, body: bytes) -> None:
    """A malformed chunk ends the connection with an error, without an upstream call."""
    gate = launch(simulator.url)
    received = gate.raw(POST + body)
    assert received.startswith(b"HTTP/1.1 400 ")
    assert received.count(b"HTTP/1.1 ") == 1
    assert b"Traceback" not in received
    assert simulator.requests() == []


@pytest.mark.parametrize("sent", [b"", b'{"taskId": "a"', b'{"taskId": "a"}'])
def test_edge_ignores_an_incomplete_body(simulator: Simulator, launch: Launch, sent: bytes) -> None:
    """A client that disconnects before its body is complete has sent no request."""
    gate = launch(simulator.url)
    gate.raw(POST + b"content-length: 50\r\n\r\n" + sent, disconnect=True)
    assert gate.client.get("/healthz").status_code == 200
    assert simulator.requests() == []


def test_edge_times_out_a_slow_body(simulator: Simulator, launch: Launch) -> None:
    """A slow body is answered with an error after server.header_seconds."""
    gate = launch(simulator.url, server={"header_seconds": 0.2})
    with gate.connect() as connection:
        connection.sendall(POST + b'connection: close\r\ncontent-length: 50\r\n\r\n{"taskId"')
        received = drained(connection)
    assert received.startswith(b"HTTP/1.1 400 ")
    assert b"did not arrive within 0.2 seconds" in received
    assert simulator.requests() == []


def test_edge_body_longer_than_its_length_is_the_next_request(simulator: Simulator, launch: Launch) -> None:
    """Bytes after a body are the next request, and refused if they are malformed."""
    gate = launch(simulator.url)
    with gate.connect() as connection:
        connection.sendall(POST + b'content-length: 14\r\n\r\n{"taskId":"a"}rubbish\r\n\r\n')
        received = drained(connection)
    assert received.count(b"HTTP/1.1 ") == 2
    assert b"HTTP/1.1 400 " in received


@pytest.mark.parametrize("length", [b"70000", b"9223372036854775807"])
def test_edge_refuses_a_large_content_length_early(
    simulator: Simulator, launch: Launch, length: bytes
) -> None:
    """A Content-Length over limits.max_body_bytes is refused before the body arrives."""
    gate = launch(simulator.url)
    with gate.connect() as connection:
        connection.sendall(POST + b"connection: close\r\ncontent-length: %s\r\n\r\n" % length)
        received = drained(connection)
    assert received.startswith(b"HTTP/1.1 413 ")
    assert b'"errCode":"body-too-large"' in received
    assert simulator.requests() == []


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"http://evil.invalid/v1/progress/abc", None),
        (b"http://x/healthz", 200),
        (b"*", 400),
        (b"/../../etc/passwd", 404),
        (b"/v1/progress/%", 400),
        (b"/v1/progress/a#b", None),
        (b"/" + b"a" * 20_000, 404),
    ],
)
def test_edge_odd_targets_are_answered(
    simulator: Simulator, launch: Launch, target: bytes, status: int | None
) -> None:
    """Unusual forms of targets are handled correctly, and no other host is contacted."""
    gate = launch(simulator.url)
    received = gate.raw(b"GET %s HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" % target)
    match = re.match(rb"HTTP/1\.1 (\d+) ", received)
    assert match, received
    assert int(match[1]) == status if status else int(match[1]) < 503
    assert b"Traceback" not in received
    assert {request["headers"]["host"] for request in simulator.requests()} <= {simulator.url[7:]}


# --- time and size of headers -----------------------------------------------------------------------------


@pytest.mark.parametrize("start", [b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nhost: x\r\nx: y"])
def test_edge_slow_headers_are_closed(simulator: Simulator, launch: Launch, start: bytes) -> None:
    """A connection whose head is incomplete after server.header_seconds is closed without a response."""
    gate = launch(simulator.url, server={"header_seconds": 0.2})
    with gate.connect() as connection:
        connection.sendall(start)
        assert drained(connection) == b""
    assert gate.client.get("/healthz").status_code == 200


def test_edge_slow_headers_are_closed_on_a_kept_connection(simulator: Simulator, launch: Launch) -> None:
    """The timeout applies to every request of a connection; an idle connection is not affected."""
    gate = launch(simulator.url, server={"header_seconds": 0.3})
    with gate.connect() as connection, gate.connect() as witness:
        for _ in range(3):
            connection.sendall(REQUEST)
            answered(connection)
        assert drained(witness) == b""  # a whole header_seconds has passed
        connection.sendall(REQUEST)
        answered(connection)
        connection.sendall(REQUEST[:20])
        assert drained(connection) == b""


def test_edge_dripping_headers_are_closed(simulator: Simulator, launch: Launch) -> None:
    """Bytes that keep arriving do not extend the timeout of a head."""
    gate = launch(simulator.url, server={"header_seconds": 0.3})
    with gate.connect() as connection:
        connection.sendall(REQUEST[:-2])
        connection.settimeout(0.02)
        for _ in range(1000):
            try:
                connection.sendall(b"x: y\r\n")
                if connection.recv(100) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            pytest.fail("the connection was never closed")


@pytest.mark.parametrize(
    "headers",
    [
        b"x: " + b"a" * 5000,
        b"".join(b"x%d: a\r\n" % number for number in range(1000)),
        b"x" * 5000 + b": a",
    ],
    ids=["endless-value", "many", "endless-name"],
)
@pytest.mark.parametrize("finished", [True, False])
def test_edge_large_headers_are_refused(
    simulator: Simulator,
    launch: Launch,
    headers: bytes,
    finished: bool,  # noqa: FBT001 - pytest passes by name
) -> None:
    """A head over server.max_header_bytes is refused, complete or not, and the connection is closed."""
    gate = launch(simulator.url, server={"max_header_bytes": 2048})
    with gate.connect() as connection:
        connection.sendall(REQUEST)
        answered(connection)
        connection.sendall(REQUEST[:-2] + headers + (b"\r\n\r\n" if finished else b""))
        received = drained(connection)
    detail = refused(received, "431 request header fields too large", "headers-too-large")
    assert detail in {
        "the request's headers are larger than 2048 bytes",
        "the request has more than 100 header fields",
    }


def test_edge_headers_within_bounds_are_taken(simulator: Simulator, launch: Launch) -> None:
    """The limit applies to each request: several requests on a connection may exceed it together."""
    gate = launch(simulator.url, server={"max_header_bytes": 2048})
    with gate.connect() as connection:
        for _ in range(5):
            connection.sendall(REQUEST[:-2] + b"x: " + b"a" * 1800 + b"\r\n\r\n")
            answered(connection)


def test_edge_body_does_not_count_as_headers(simulator: Simulator, launch: Launch) -> None:
    """A body larger than server.max_header_bytes is accepted."""
    gate = launch(simulator.url, server={"max_header_bytes": 2048})
    task = simulator.task()
    body = json.dumps({"taskId": task}).encode().ljust(60_000)
    assert gate.client.post("/scc/sd_get_progress", content=body).status_code == 200
    assert gate.client.post("/scc/sd_get_progress", content=iter([body])).status_code == 200


# --- ordinary talk, in unusual pieces ---------------------------------------------------------------------


def test_edge_requests_may_be_pipelined(simulator: Simulator, launch: Launch) -> None:
    """Pipelined requests are answered in order."""
    gate = launch(simulator.url)
    paths = [b"/healthz", b"/v1/progress/no!", b"/readyz", b"/nothing"] * 5
    together = b"".join(b"GET %s HTTP/1.1\r\nhost: x\r\n\r\n" % path for path in paths)
    received = gate.raw(together + LAST)
    statuses = re.findall(rb"HTTP/1\.1 (\d+) ", received)
    assert statuses == [b"200", b"400", b"200", b"404"] * 5 + [b"200"]


def test_edge_request_may_come_byte_by_byte(simulator: Simulator, launch: Launch) -> None:
    """A request is the same in any segmentation."""
    gate = launch(simulator.url)
    task = simulator.task()
    body = json.dumps({"taskId": task}).encode()
    whole = POST + b"connection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
    with gate.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for value in whole:
            connection.sendall(bytes((value,)))
        received = drained(connection)
    assert received.startswith(b"HTTP/1.1 200 ")
    assert task.encode() in received


def test_edge_old_http_is_answered(simulator: Simulator, launch: Launch) -> None:
    """HTTP/1.0 gets its response, and the connection is closed."""
    received = launch(simulator.url).raw(b"GET /healthz HTTP/1.0\r\n\r\n")
    assert re.match(rb"HTTP/1\.[01] 200 ", received)
    assert received.endswith(b'{"status":"ok"}')


# --- clients that leave, go on sending, or are too many ---------------------------------------------------


def test_edge_client_that_leaves_behind_another_request_is_noticed(
    simulator: Simulator, launch: Launch
) -> None:
    """Bytes of a further request do not hide a disconnect: the stream before them ends."""
    gate = launch(simulator.url)
    stream = b"GET /v1/progress/%s/events HTTP/1.1\r\nhost: x\r\n\r\n" % simulator.task().encode()
    with gate.connect() as connection:
        connection.sendall(stream + b"G")
        until(lambda: gate.metric("watchers") == 1, "the stream is open")
    until(lambda: gate.metric("watchers") == 0, "the client is gone")


@pytest.mark.parametrize("version", [b"HTTP/1.1\r\nconnection: close", b"HTTP/1.0"])
def test_edge_client_that_goes_on_sending_gets_its_answer(
    simulator: Simulator, launch: Launch, version: bytes
) -> None:
    """A refused body is read for a while, so that a reset does not destroy the response."""
    gate = launch(simulator.url)
    with gate.connect() as connection:
        connection.sendall(
            b"POST /scc/sd_get_progress %s\r\nhost: x\r\ncontent-length: 150000\r\n\r\n" % version
        )
        first = connection.recv(12)
        for _ in range(10):
            connection.sendall(b"x" * 15_000)
        received = first + drained(connection)
    assert received.startswith(b"HTTP/1.1 413 ")
    assert b"body-too-large" in received


def test_edge_probes_beyond_the_limit_are_bounded(simulator: Simulator, launch: Launch) -> None:
    """Probes that never read or close are replaced by later probes, which are answered."""
    gate = launch(simulator.url, server={"max_connections": 1})
    with ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(gate.connect()).sendall(REQUEST)
        with gate.connect() as probe:
            probe.sendall(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
            received = drained(probe).decode()
    match = re.search(r"^sd_gateway_http_connections (\S+)$", received, re.MULTILINE)
    assert match, received[:200]
    assert float(match[1]) <= 2 + RESERVED_CONNECTIONS
