"""A connection is a state machine: every state has a timeout and a size limit, and ends."""

import gc
import inspect
import json

import pytest

from tests.attacks.wire import Line, Target, chunked, lines, query, request, settle
from tests.support.harness import Gateway, HeldUpstream, Simulator, until

SOON = {"header_seconds": 0.3, "keep_alive_seconds": 0.3}
MEGABYTE = 1_048_576
CHUNKED_POST = request("/scc/sd_get_progress", "Transfer-Encoding: chunked", method="POST")
EARLY = request("/nothing", "Transfer-Encoding: chunked", method="POST")
EARLY_LENGTH = request("/nothing", "Content-Length: 1000000", method="POST")
BATCH = 64 * 1024


@pytest.fixture
def gate(target: Target, simulator: Simulator) -> Gateway:
    """Return a gateway with short timeouts."""
    simulator.task("own-task")
    return target(server=SOON)


@pytest.mark.parametrize(
    "waiting",
    [
        request("/v1/events?taskId=own-task", "Last-Event-ID: " + "a" * 31_000),
        request("/v1/events?taskId=own-task&lastEventId=" + "a" * 31_000),
        request("/v1/progress/own-task?wait=60", "If-None-Match: " + "a" * 31_000),
        request("/v1/progress?wait=60&taskId=own-task", "If-None-Match: " + "a" * 31_000),
    ],
    ids=["event ID", "event ID in the query", "tag", "tag of a batch"],
)
def test_connections_that_wait_keep_nothing_large_of_their_request(
    target: Target, simulator: Simulator, waiting: bytes
) -> None:
    """A stream or a long poll may last for a minute or for days."""
    simulator.task("own-task", data={"status": "waiting"})
    gate = target()
    path = "/v1/progress?taskId=own-task" if b"&taskId" in waiting else "/v1/progress/own-task"
    tag = gate.client.get(path).raise_for_status().headers["etag"]
    with Line(gate) as line:
        line.send(waiting.replace(b"If-None-Match: ", f"If-None-Match: {tag}, ".encode()))
        until(lambda: gate.metric("watchers") == 1, "the request waits")
        settle(gate)
        frames = [each.cr_frame for each in gc.get_objects() if inspect.iscoroutine(each)]
        kept = [
            (frame.f_code.co_qualname, name)
            for frame in frames
            if frame is not None  # its coroutine has ended meanwhile
            for name, value in frame.f_locals.items()
            if "a" * 1000 in repr(value)
        ]
        assert kept == []


# Silence


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\r\n",
        b"\r\n\r\n\r\n",
        b"G",
        b"GET /healthz HTTP/1.1",
        b"GET /healthz HTTP/1.1\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r",
        b"\xff",
        query("own-task")[:-1],
        query("own-task", "Connection: Upgrade", "Upgrade: x")[:-1],
        CHUNKED_POST,
        CHUNKED_POST + b"5",
        CHUNKED_POST + b"5\r\n",
        CHUNKED_POST + b"5\r\nhell",
        CHUNKED_POST + b"5\r\nhello",
        CHUNKED_POST + b"5\r\nhello\r\n0\r\n",
        CHUNKED_POST + b"5\r\nhello\r\n0\r\nX: y\r\n",
        CHUNKED_POST + b"5;ext",
    ],
)
@pytest.mark.parametrize("before", [0, 1, 2], ids=["first", "second", "third"])
def test_connections_of_a_silent_client_end(gate: Gateway, sent: bytes, before: int) -> None:
    """A silent client is disconnected: before a request, within its head and within its body."""
    with Line(gate) as line:
        for _ in range(before):
            line.send(request())
            assert line.answer().status == 200
        line.send(sent)
        assert {answer.status for answer in line.rest()} <= {400, 408}


@pytest.mark.parametrize(
    ("sent", "after"),
    [
        (request(), b"\r\n"),
        (request(), b"\n"),
        (request(), b"G"),
        (request(), b"\r\nGET"),
        (request("/v1/progress/own-task"), b"\r\n"),
        (request("/nothing", "Content-Length: 10", method="POST"), b"x"),
        (EARLY, b"5"),
        (EARLY, b"5\r\nhel"),
        (request("/healthz", "Content-Length: 10"), b"x"),
        (request("/healthz", "Transfer-Encoding: chunked"), b"5\r\n"),
        (request("/v1/progress/own-task", "Content-Length: 10"), b"x"),
        (request("/", "Content-Length: 3", method="HEAD"), b"x"),
    ],
)
def test_connections_with_a_byte_after_the_answer_end(gate: Gateway, sent: bytes, after: bytes) -> None:
    """Bytes after a response, followed by silence, do not keep the connection open."""
    method = sent.partition(b" ")[0].decode()
    with Line(gate) as line:
        line.send(sent, after)
        assert len(line.rest(method)) <= 2


@pytest.mark.parametrize(
    "sent", [request(), request("/v1/progress/own-task"), query("own-task"), request("/nothing")]
)
def test_connections_that_idle_end(gate: Gateway, sent: bytes) -> None:
    """An idle connection is closed after server.keep_alive_seconds."""
    with Line(gate) as line:
        for _ in range(3):
            line.send(sent)
            line.answer()
        assert line.rest() == []


def test_connections_that_drip_empty_lines_end(gate: Gateway) -> None:
    """Empty lines start no request, and extend no timeout."""
    with Line(gate) as line, Line(gate) as witness:
        until(lambda: _dripped(line, witness, b"\r\n"), "the connection is closed")


@pytest.mark.parametrize(
    "start",
    [
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: ",
        CHUNKED_POST + b"10000\r\n",
        EARLY_LENGTH,
        CHUNKED_POST + b"1;",
    ],
)
def test_connections_that_drip_end(gate: Gateway, start: bytes) -> None:
    """Bytes that arrive one by one extend neither the timeout of a head nor of a body."""
    with Line(gate) as line:
        line.send(start)
        until(lambda: _dripped(line, None, b"x"), "the connection is closed")


def _dripped(line: Line, witness: Line | None, drop: bytes) -> bool:
    """Send one byte; return whether the connection has been closed."""
    try:
        line.socket.sendall(drop)
    except ConnectionError:
        return True
    if witness is not None and witness.held():
        witness.send(request("/healthz", "X: witness"))
    return not line.held()


# Early responses


@pytest.mark.parametrize(
    "head",
    [
        request("/nothing", "Content-Length: 1000000", method="POST"),
        request("/nothing", "Transfer-Encoding: chunked", method="POST"),
        request("/scc/other", "Content-Length: 1000", method="POST"),
        request("/v1/progress/own-task", "Content-Length: 1000", method="PUT"),
        request("/scc/sd_get_progress", "Content-Length: 70000", method="POST"),
        request("/scc/sd_get_progress", "Content-Length: 70000", "Expect: 100-continue", method="POST"),
    ],
)
def test_connections_of_early_answers_end(gate: Gateway, head: bytes) -> None:
    """A response before the end of the body announces the close, and the connection is closed."""
    with Line(gate) as line:
        line.send(head)
        answer = line.answer()
        assert answer.status in {404, 405, 413}
        assert answer.closes
        assert line.rest() == []


def test_connections_of_early_answers_do_not_take_a_request_for_a_body(gate: Gateway) -> None:
    """After a refusal before its body, the client's next request is not swallowed as the body."""
    head = request("/scc/sd_get_progress", "Content-Length: 70000", "Expect: 100-continue", method="POST")
    with Line(gate) as line:
        line.send(head)
        refused = line.answer()
        assert refused.status == 413
        line.send(request("/v1/progress/own-task"))
        answers = line.rest()
    # Either the response announced the close, or the next request is answered.
    assert refused.closes or [answer.status for answer in answers] == [200]


def test_connections_of_clients_that_expect_to_be_told_to_go_on(gate: Gateway) -> None:
    """`100 Continue` is sent for a body that the application wants."""
    head, _, body = query("own-task", "Expect: 100-continue").partition(b"\r\n\r\n")
    with Line(gate) as line:
        line.send(head + b"\r\n\r\n")
        assert line.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        line.send(body)
        assert line.answer().json["data"]["taskId"] == "own-task"
        line.send(request())
        assert line.answer().status == 200


@pytest.mark.parametrize("size", [100_000, 250_000])
def test_connections_of_early_answers_let_the_answer_arrive(gate: Gateway, size: int) -> None:
    """A client that sends its whole body before it reads receives the response: no reset destroys it."""
    with Line(gate) as line:
        line.send(request("/nothing", f"Content-Length: {size}", method="POST"), bytes(size))
        assert [answer.status for answer in line.rest()] == [404]


def test_connections_of_early_answers_are_not_fed_for_ever(gate: Gateway) -> None:
    """A client that never stops sending an unwanted body is disconnected."""
    with Line(gate) as line:
        line.send(request("/nothing", f"Content-Length: {10**15}", method="POST"))
        until(lambda: line.offer(bytes(BATCH)) == 0 and not line.held(), "the connection is given up")


# Size


@pytest.mark.parametrize(
    ("fields", "bounds"),
    [
        ([b"a:"] * 6_500, {}),
        ([b"a:"] * 150, {}),
        ([b"X: " + b"a" * 40_000], {}),
        ([b"a" * 40_000 + b": x"], {}),
        ([b"X: " + b"a" * 2_000], {"max_header_bytes": 1024}),
        ([b"a:"] * 20, {"max_header_count": 15}),
    ],
    ids=["6500", "150", "value", "name", "bytes", "count"],
)
@pytest.mark.parametrize("path", ["/v1/events?taskId=own-task", "/v1/progress/own-task", "/healthz"])
def test_connections_with_large_heads_are_refused(
    target: Target, simulator: Simulator, fields: list[bytes], bounds: dict[str, int], path: str
) -> None:
    """A head over the limits of size or number gets 431 with a problem, and the connection is closed."""
    simulator.task("own-task")
    gate = target(server=bounds)
    with Line(gate) as line:
        line.send(request())
        assert line.answer().status == 200
        line.send(request(path, *fields))
        answers = line.rest()
    assert [(answer.status, answer.code, answer.closes) for answer in answers] == [
        (431, "headers-too-large", True)
    ]
    assert answers[0].header("content-type") == "application/problem+json"


def test_connections_with_large_targets_are_refused(gate: Gateway) -> None:
    """The request line counts towards the limit."""
    with Line(gate) as line:
        line.send(request("/" + "a" * 40_000))
        assert [answer.status in {414, 431} for answer in line.rest()] == [True]


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"", b"\r\n" * (BATCH // 2)),
        (b"", b"\n" * BATCH),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: ", b"a" * BATCH),
        (b"GET /", b"a" * BATCH),
        (b"", b"G" * BATCH),
        (CHUNKED_POST + b"1;", b"a" * BATCH),
        (CHUNKED_POST, b"1;a=b\r\n{\r\n" * (BATCH // 10)),
        (CHUNKED_POST, b"0" * BATCH),
        (CHUNKED_POST + b"0\r\n", b"a: b\r\n" * (BATCH // 6)),
        (CHUNKED_POST + b"0\r\n", b"a" * BATCH),
        (CHUNKED_POST + b"0\r\na: ", b"b" * BATCH),
        (EARLY + b"0\r\n", b"a: b\r\n" * (BATCH // 6)),
        (EARLY + b"0\r\na: ", b"b" * BATCH),
        (EARLY + b"1;", b"a" * BATCH),
    ],
)
def test_connections_that_never_end_anything_are_given_up(target: Target, start: bytes, more: bytes) -> None:
    """Endless lines, heads, chunk sizes, extensions and trailers: at most a few hundred KB are read."""
    gate = target()  # with timeouts of at least ten seconds: the size limits must end it
    taken = 0
    with Line(gate) as line:
        line.send(start)

        def given_up() -> bool:
            nonlocal taken
            taken += line.offer(more)
            assert taken < 64 * MEGABYTE, "all is taken"
            return not line.held()

        until(given_up, "the connection is given up")


def test_connections_take_trailers_within_bounds(gate: Gateway) -> None:
    """A few trailers are accepted and ignored."""
    with Line(gate) as line:
        line.send(
            CHUNKED_POST + chunked(b'{"taskId": "own-task"}', end=b"0\r\nHost: y\r\nX-Trailer: z\r\n\r\n")
        )
        assert line.answer().json["data"]["taskId"] == "own-task"
        line.send(request())
        assert line.answer().status == 200


# Clients that do not read, and those that leave


@pytest.mark.parametrize("path", ["/openapi.json", "/v1/progress/own-task", "/healthz"])
def test_connections_of_clients_that_do_not_read_end(gate: Gateway, path: str) -> None:
    """A client that sends requests and never reads is disconnected."""
    asked = request(path) * 400
    with Line(gate, receive_buffer=4096) as line:
        until(lambda: line.offer(asked) < len(asked), "the gateway takes no more requests")
        until(lambda: not line.held(), "the connection is given up")


def test_connections_of_streams_that_are_not_read_end(target: Target, simulator: Simulator) -> None:
    """A client that does not read its stream is disconnected as well."""
    task = simulator.task("own-task")
    gate = target(server=SOON, watch={"heartbeat_seconds": 0.1}, cache={"running_seconds": 0.05})
    with Line(gate, receive_buffer=2048) as line:
        line.send(request(f"/v1/events?taskId={task}"))
        line.until(b"event: progress")
        until(lambda: not line.held(), "the stream is given up")
    until(lambda: gate.metric("watchers") == 0, "no subscriber is left")


def test_connections_that_end_before_their_stream_leave_no_subscriber(
    target: Target, simulator: Simulator
) -> None:
    """A client that disconnects before the head of its stream leaves no subscriber behind."""
    simulator.task("own-task")
    gate = target()
    stream = request("/v1/events?taskId=own-task")
    for _ in range(3):
        # The response before the stream fills the kernel's buffers; how many it takes depends on the machine.
        with lines(gate, 60, receive_buffer=4096) as leaving:
            for before, line in enumerate(leaving):
                line.offer(request("/openapi.json") * before + stream)
            comes_to_rest(gate)
        comes_to_rest(gate)
    until(lambda: gate.metric("watchers") == 0, "no subscriber is left")
    simulator.control("DELETE", "/stats")
    settle(gate)
    until(lambda: gate.metric("watched_tasks") == 0, "no task is watched")


@pytest.mark.parametrize("path", ["/v1/events?taskId=own-task", "/v1/progress/own-task?wait=60"])
def test_connections_that_end_at_any_moment_leave_no_subscriber(
    target: Target, simulator: Simulator, path: str
) -> None:
    """A client that disconnects right after its request leaves no subscriber behind."""
    simulator.task("own-task")
    gate = target()
    for _ in range(50):
        with Line(gate) as line:
            line.send(request(path))
    settle(gate)
    until(lambda: gate.metric("watchers") == 0, "no subscriber is left")


def test_connections_answer_one_request_at_a_time(gate: Gateway) -> None:
    """Requests pipelined behind a stream are neither answered nor read without limit."""
    behind = request("/openapi.json") * 40_000  # 1.7 MB
    with Line(gate) as line:
        line.send(request("/v1/events?taskId=own-task"))
        line.until(b"event: progress")
        line.offer(behind)
        settle(gate)
        assert line.offer(behind * 4) < 4 * len(behind)  # the kernel's buffers stay full
        received = line.until(b"event: progress")
    assert received.count(b"HTTP/1.1 200 OK") == 1
    until(lambda: gate.metric("watchers") == 0, "the stream has ended with its connection")


@pytest.mark.parametrize("first", [b"", request("/v1/progress/a-miss"), request("/v1/progress/own-task") * 8])
def test_connections_of_streams_with_too_many_later_requests_end(target: Target, first: bytes) -> None:
    """More than 32 KB behind a stream: it ends after header_seconds, also behind other requests."""
    with HeldUpstream() as upstream:
        gate = target(upstream.url, server=SOON | {"keep_alive_seconds": 60})
        upstream.released.set()
        gate.get("own-task")
        upstream.released.clear()
        with Line(gate) as line:
            line.send(first + request("/v1/events?taskId=own-task") + request("/openapi.json") * 2000)
            settle(gate)
            upstream.released.set()
            until(lambda: gate.metric("watchers") == 1, "the stream is open")
            until(lambda: gate.metric("watchers") == 0, "the stream has ended")


def test_connections_of_streams_read_bounded_bodies(target: Target, simulator: Simulator) -> None:
    """The body of a stream's request is dropped, and read no further than 64 KB and the kernel's buffers."""
    simulator.task("own-task")
    gate = target(server={"header_seconds": 60})
    with Line(gate) as line:
        line.send(request("/v1/events?taskId=own-task", "Transfer-Encoding: chunked"))
        line.until(b"event: progress")
        taken = 0
        for _ in range(50):
            taken += line.offer(chunked(b"x" * 16, end=b"") * 10_000)
            settle(gate)
    assert taken < 8 * MEGABYTE


# HTTP/1.0


@pytest.mark.parametrize("fields", [(), ("Connection: keep-alive",)])
def test_connections_of_http10_get_streams_without_chunks(
    gate: Gateway, simulator: Simulator, fields: tuple[str, ...]
) -> None:
    """A stream to an HTTP/1.0 client has no chunks, and ends with its connection."""
    with Line(gate) as line:
        line.send(request(f"/v1/events?taskId={simulator.finished()}", *fields, version="1.0"))
        (answer,) = line.rest()
    assert answer.framing == "close"
    assert answer.header("transfer-encoding") is None
    assert answer.body.startswith(b"retry: ")
    assert b"event: progress\n" in answer.body
    assert answer.body.endswith(b"\n\n")


def test_connections_of_http10_follow_a_stream(gate: Gateway, simulator: Simulator) -> None:
    """An HTTP/1.0 client receives changes and the end like any other."""
    with Line(gate) as line:
        line.send(request("/v1/events?taskId=own-task", version="1.0"))
        line.until(b"event: progress")
        simulator.script("own-task", status="running", progress=0.375)
        line.until(b'"progress":0.375')  # written directly, because the stream is idle
        simulator.script("own-task", status="succeeded", progress=1)
        (answer,) = line.rest()
    assert answer.framing == "close"
    events = answer.body.split(b"\n\n")
    data = [json.loads(event.partition(b"data: ")[2]) for event in events if b"event: progress" in event]
    assert [event["status"] for event in data][-1] == "succeeded"
    assert any(b"event: end" in event for event in events)
    assert b"\r\n" not in answer.body


@pytest.mark.parametrize("path", ["/healthz", "/v1/progress/own-task", "/nothing"])
def test_connections_of_http10_end_unless_told_otherwise(gate: Gateway, path: str) -> None:
    """HTTP/1.0 connections are closed by default."""
    with Line(gate) as line:
        line.send(request(path, version="1.0"))
        (answer,) = line.rest()
    assert answer.framing == "length"


# Number


def test_connections_beyond_the_bound_are_refused(target: Target, simulator: Simulator) -> None:
    """A connection over the limit gets 503 and is closed; probes are answered; the gateway recovers."""
    task = simulator.task()
    gate = target(server={"max_connections": 8})
    gate.client.close()
    with lines(gate, 8) as held:
        for line in held:
            line.ping()
        for _ in range(3):
            with Line(gate) as line:
                line.send(request(f"/v1/progress/{task}"))
                answers = line.rest()
            assert [(answer.status, answer.code, answer.closes) for answer in answers] == [
                (503, "overloaded", True)
            ]
            assert answers[0].header("retry-after") is not None
            with Line(gate) as line:
                line.send(request("/healthz"))
                assert [answer.status for answer in line.rest()] == [200]
        held[0].send(request("/metrics"))
        metrics = held[0].answer().body.decode()
        assert "sd_gateway_http_connections 8.0" in metrics
        assert "sd_gateway_http_connections_refused_total 3.0" in metrics
    until(lambda: _answered(gate, f"/v1/progress/{task}") == 200, "connections are taken again")


def comes_to_rest(gate: Gateway) -> None:
    """Wait until the gateway answers no more of the pending requests."""
    counts = [-1.0]

    def rests() -> bool:
        settle(gate)
        counts.append(gate.metric("http_requests_total", route="/openapi.json"))
        return len(counts) > 10 and len(set(counts[-10:])) == 1

    until(rests, "the gateway comes to rest")


def _answered(gate: Gateway, path: str) -> int:
    with Line(gate) as line:
        line.send(request(path))
        return line.answer().status
