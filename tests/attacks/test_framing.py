"""Message framing: only Content-Length and Transfer-Encoding determine where a message ends (RFC 9112, 6)."""

import pytest

from tests.attacks.wire import Answer, Line, Target, chunked, query, request
from tests.support.harness import Gateway, Simulator

OWN, OTHER = "own-task", "other-task"
INNER = b"\r\n\r\n" + request(f"/v1/progress/{OTHER}")
UPGRADES = [
    ("Connection: Upgrade", "Upgrade: x"),
    ("Connection: upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAA"),
    ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__"),
    ("Connection: keep-alive, Upgrade", "Upgrade: TLS/1.0"),
]
REFUSALS = {400, 501}


def task_in(answer: Answer) -> str | None:
    """Return the task of a vendor-compatible response, if any."""
    return (answer.json.get("data") or {}).get("taskId")


def only_refusal(line: Line, *, statuses: set[int] = REFUSALS) -> Answer:
    """Read to the end: one refusal that announces the close of the connection."""
    answers = line.rest()
    assert [answer.status in statuses for answer in answers] == [True], answers
    assert answers[0].closes
    assert answers[0].code == "invalid-parameter"
    return answers[0]


@pytest.fixture
def gate(target: Target, simulator: Simulator) -> Gateway:
    """Return a gateway with two tasks."""
    for task in (OWN, OTHER):
        simulator.task(task)
    return target()


# Upgrade and CONNECT


@pytest.mark.parametrize("fields", UPGRADES, ids=lambda fields: fields[1])
def test_framing_of_a_request_that_wants_an_upgrade(gate: Gateway, fields: tuple[str, ...]) -> None:
    """A body that arrives later is read as the body, and the next request as the next one."""
    with Line(gate) as line:
        head, _, body = query(OWN, *fields).partition(b"\r\n\r\n")
        line.send(head + b"\r\n\r\n", body)
        first = line.answer()
        assert (first.status, task_in(first)) == (200, OWN)
        line.send(request(f"/v1/progress/{OTHER}"))
        assert line.answer().json["taskId"] == OTHER


@pytest.mark.parametrize("fields", UPGRADES, ids=lambda fields: fields[1])
@pytest.mark.parametrize("body", [b'{"taskId": "own-task"}', INNER], ids=["json", "request"])
def test_framing_of_an_upgrade_with_chunks(gate: Gateway, fields: tuple[str, ...], body: bytes) -> None:
    """A chunked body is framed by its chunks, in spite of Upgrade."""
    with Line(gate) as line:
        head = query("", "Transfer-Encoding: chunked", *fields, body=b"", framed=False)
        line.send(head, chunked(body[:5]).removesuffix(b"0\r\n\r\n"), chunked(body[5:]))
        first = line.answer()
        assert (first.status, task_in(first)) == ((200, OWN) if body[:1] == b"{" else (400, None))
        line.send(request())
        assert line.answer().json == {"status": "ok"}


@pytest.mark.parametrize("method", ["POST", "GET", "PUT", "OPTIONS"])
@pytest.mark.parametrize("path", ["/scc/sd_get_progress", f"/v1/progress/{OWN}", "/nothing"])
def test_framing_smuggles_nothing_through_an_upgrade(gate: Gateway, method: str, path: str) -> None:
    """A request inside a body is never answered, for any method and path."""
    fields = "Connection: Upgrade", "Upgrade: x", f"Content-Length: {len(INNER)}"
    with Line(gate) as line:
        line.send(request(path, *fields, method=method), INNER)
        answers = line.rest(method)
        assert len(answers) == 1, answers
        assert OTHER.encode() not in answers[0].body


def test_framing_of_an_upgrade_at_every_cut(gate: Gateway) -> None:
    """In any segmentation, the bytes of the attack are one request."""
    fields = "Connection: Upgrade", "Upgrade: x", "X-Request-Id: same"
    whole = query("", *fields, body=INNER)
    told = set()
    with Line(gate) as witness:
        for cut in range(1, len(whole)):
            with Line(gate) as line:
                line.socket.sendall(whole[:cut])
                witness.ping()
                line.send(whole[cut:] + request("/nothing", "Connection: close"))
                answers = line.rest()
            told.add(
                tuple(
                    (answer.status, task_in(answer) if answer.body[:1] == b"{" else "") for answer in answers
                )
            )
    assert told == {((400, None), (404, None))}


def test_framing_of_connect(gate: Gateway) -> None:
    """CONNECT opens no tunnel: it is refused, and its body is not parsed as a request."""
    with Line(gate) as line:
        line.send(request("x:80", f"Content-Length: {len(INNER)}", method="CONNECT"), INNER)
        answers = line.rest()
    assert [400 <= answer.status < 502 for answer in answers] == [True], answers


def test_framing_of_http2s_preface(gate: Gateway) -> None:
    """A client that starts with HTTP/2 is refused once."""
    with Line(gate) as line:
        line.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
        assert [answer.status for answer in line.rest()] in ([400], [505])


@pytest.mark.parametrize(
    "line", [b"GET /healthz\r\n\r\n", b"GET /healthz\r\n", b"GET /healthz HTTP/0.9\r\n\r\n"]
)
def test_framing_of_http09(gate: Gateway, line: bytes) -> None:
    """A request without headers gets no response without headers."""
    with Line(gate) as connection:
        connection.send(line)
        assert {answer.status for answer in connection.rest()} <= {400, 505}


# Content-Length and Transfer-Encoding


@pytest.mark.parametrize(
    "length",
    [
        "+N",
        "-N",
        "0xN",
        "N, M",
        "N,M",
        "N N",
        "N;",
        "N.0",
        "1eN",
        "",
        "NNNNNNNNNNNNNNNNNNNNN",
        "N\x0b",
        "'N'",
    ],
)
def test_framing_by_an_odd_length_is_refused(gate: Gateway, length: str) -> None:
    """A length that is not digits only ends the connection with one refusal."""
    value = length.replace("N", str(len(INNER))).replace("M", "0")
    with Line(gate) as line:
        line.send(request("/scc/sd_get_progress", f"Content-Length: {value}", method="POST"), INNER)
        only_refusal(line)


@pytest.mark.parametrize("value", ["٥", "²", "５", "5\u00a0"])  # noqa: RUF001 - digits of others are the point
def test_framing_by_digits_beyond_ascii_is_refused(gate: Gateway, value: str) -> None:
    """Digits of Unicode outside of ASCII are refused."""
    with Line(gate) as line:
        line.send(request("/scc/sd_get_progress", f"Content-Length: {value}", method="POST"), INNER)
        only_refusal(line)


@pytest.mark.parametrize(
    "fields", [("Content-Length: {n}", "Content-Length: 0"), ("Content-Length: 0", "Content-Length: {n}")]
)
def test_framing_by_two_lengths_is_refused(gate: Gateway, fields: tuple[str, str]) -> None:
    """Two different lengths are refused."""
    told = [field.format(n=len(INNER)) for field in fields]
    with Line(gate) as line:
        line.send(request("/scc/sd_get_progress", *told, method="POST"), INNER)
        only_refusal(line)


@pytest.mark.parametrize(
    "fields", [("Content-Length: {n}", "Content-Length: {n}"), ("Content-Length: {n}, {n}",)]
)
def test_framing_by_the_same_length_twice(gate: Gateway, fields: tuple[str, ...]) -> None:
    """The same length twice may be refused or accepted (RFC 9112, 6.3); the body is never a request."""
    told = [field.format(n=len(INNER)) for field in fields]
    with Line(gate) as line:
        line.send(request("/scc/sd_get_progress", *told, method="POST"), INNER)
        assert [answer.status for answer in line.rest()] == [400]


@pytest.mark.parametrize("value", ["{n} ", "\t{n}\t", "{n}", "0{n}"])
def test_framing_by_a_length_in_white_space(gate: Gateway, value: str) -> None:
    """White space around a length and leading zeros are ignored."""
    body = b'{"taskId": "own-task"}'
    with Line(gate) as line:
        field = f"Content-Length:{value.format(n=len(body))}"
        line.send(request("/scc/sd_get_progress", field, method="POST"), body)
        assert task_in(line.answer()) == OWN
        line.send(request())
        assert line.answer().status == 200


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("first", ["length", "coding"])
def test_framing_by_length_and_chunks_is_refused(gate: Gateway, version: str, first: str) -> None:
    """A request with both could end at two places."""
    inner = chunked(b"", end=b"") + INNER
    fields = [f"Content-Length: {len(inner)}", "Transfer-Encoding: chunked"]
    if first == "coding":
        fields.reverse()
    with Line(gate) as line:
        line.send(request("/scc/sd_get_progress", *fields, method="POST", version=version), inner)
        only_refusal(line)


@pytest.mark.parametrize(
    "coding",
    [
        "xchunked",
        "chunkedx",
        "chunked, chunked",
        "chunked, gzip",
        "chunked, identity",
        "identity",
        "gzip",
        '"chunked"',
        "chunked;q=1",
        "chun ked",
        "\x0bchunked",
        "chunked\x0b",
        "\xa0chunked",
        ", ",
        "",
    ],
)
@pytest.mark.parametrize("length", [True, False], ids=["with-length", "alone"])
def test_framing_by_another_coding_is_refused(gate: Gateway, coding: str, length: bool) -> None:  # noqa: FBT001
    """Only `chunked`, once and as the last coding, frames the body of a request."""
    fields = [b"Transfer-Encoding: " + coding.encode("latin-1")]
    fields += [b"Content-Length: %d" % len(INNER)] if length else []
    with Line(gate) as line:
        line.send(request("/scc/sd_get_progress", *fields, method="POST"), INNER)
        only_refusal(line)


def test_framing_by_a_coding_before_chunks_is_refused(gate: Gateway) -> None:
    """The end of a body in `gzip, chunked` is known, but the body cannot be read."""
    body = chunked(b'{"taskId": "own-task"}')
    with Line(gate) as line:
        line.send(request("/scc/sd_get_progress", "Transfer-Encoding: gzip, chunked", method="POST"), body)
        answers = line.rest()
        assert [answer.status in {400, 415, 501} for answer in answers] == [True], answers


def test_framing_by_chunks_among_tabs(gate: Gateway) -> None:
    """A tab around the coding may be skipped or refused; the body is never a request."""
    with Line(gate) as line:
        head = request("/scc/sd_get_progress", "Transfer-Encoding:\tchunked\t", method="POST")
        line.send(head, chunked(INNER))
        assert [answer.status for answer in line.rest()] == [400]


@pytest.mark.parametrize(
    "fields",
    [
        ("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: chunked", "Transfer-Encoding: identity"),
        ("Transfer-Encoding: identity", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding : chunked",),
        ("Transfer-Encoding\t: chunked",),
        ("X: y", " Transfer-Encoding: chunked"),
        ("Transfer-Encoding:", " chunked"),
        ("Transfer-Encoding: chunked\rX: y",),
        ("X: y\nTransfer-Encoding: chunked",),
        ("X: y\rTransfer-Encoding: chunked",),
        ("Transfer-Encoding: chunked\x00",),
    ],
)
def test_framing_by_hidden_chunks_is_refused(gate: Gateway, fields: tuple[str, ...]) -> None:
    """A coding that two parsers may read differently is refused."""
    with Line(gate) as line:
        line.send(
            request("/scc/sd_get_progress", *fields, f"Content-Length: {len(INNER)}", method="POST"), INNER
        )
        only_refusal(line)


@pytest.mark.parametrize("name", ["Transfer_Encoding", "X-Transfer-Encoding", "Transfer-Encodin"])
def test_framing_by_a_name_that_only_looks_like_it(gate: Gateway, name: str) -> None:
    """A field with a similar name does not frame the body: the length does."""
    body = b'{"taskId": "own-task"}'
    with Line(gate) as line:
        head = request(
            "/scc/sd_get_progress", f"{name}: chunked", f"Content-Length: {len(body)}", method="POST"
        )
        line.send(head, body)
        assert task_in(line.answer()) == OWN
        line.send(request())
        assert line.answer().status == 200


@pytest.mark.parametrize("coding", ["chunked", "Chunked", "CHUNKED", " chunked "])
def test_framing_by_chunks(gate: Gateway, coding: str) -> None:
    """Chunks are accepted with any case and white space; extensions and trailers are ignored."""
    body = chunked(b'{"taskId"', b': "own-task"}', end=b"0;last=1\r\nX-Trailer: y\r\n\r\n")
    with Line(gate) as line:
        head = request("/scc/sd_get_progress", f"Transfer-Encoding:{coding}", method="POST")
        line.send(head, body.replace(b"\r\n", b";a=b\r\n", 1))
        assert task_in(line.answer()) == OWN
        line.send(request())
        assert line.answer().status == 200


def test_framing_of_chunks_in_http10_is_refused(gate: Gateway) -> None:
    """HTTP/1.0 has no chunks: such a request was changed by a proxy (RFC 9112, 6.1)."""
    with Line(gate) as line:
        fields = "Transfer-Encoding: chunked", "Connection: keep-alive"
        line.send(request("/scc/sd_get_progress", *fields, method="POST", version="1.0"), chunked(INNER))
        assert [answer.status for answer in line.rest()] == [400]


@pytest.mark.parametrize(
    "body",
    [
        b"fffffffffffffffff\r\n",
        b"10000000000000005\r\nhello\r\n",
        b"-5\r\nhello\r\n",
        b"+5\r\nhello\r\n",
        b"0x5\r\nhello\r\n",
        b"5 \r\nhello\r\n",
        b" 5\r\nhello\r\n",
        b"\r\nhello\r\n",
        b"5\nhello\r\n",
        b"5\r\nhello",
        b"5\r\nhello!\r\n",
        b"5\r\nhelloXX",
        b"5;a\nb\r\nhello\r\n",
        b"5\rX\r\nhello\r\n",
        b"g\r\n",
    ],
)
def test_framing_by_broken_chunks_is_refused(gate: Gateway, body: bytes) -> None:
    """A malformed chunk ends the connection; nothing after it is parsed as a request."""
    with Line(gate) as line:
        head = request("/scc/sd_get_progress", "Transfer-Encoding: chunked", method="POST")
        line.send(head, body + b"0\r\n\r\n" + request("/openapi.json") * 2)
        answers = line.rest()
        assert {answer.status for answer in answers} <= {400}, answers
        assert len(answers) <= 1


# Heads


@pytest.mark.parametrize(
    "head",
    [
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: a\r\n\tb\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n Host: x\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: a\rb\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX\x00: a\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX : a\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX\t: a\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n: a\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX\xe9: a\r\n\r\n",
        b"GET /healthz HTTP/1.1 \r\nHost: x\r\n\r\n",
        b"GET\t/healthz\tHTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health\x00z HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health\rz HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /healthz HTTP/1.2x\r\nHost: x\r\n\r\n",
        b"GET /healthz HTTP/11\r\nHost: x\r\n\r\n",
        b"GET /healthz http/1.1\r\nHost: x\r\n\r\n",
        b"get /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        b" GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x00GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_framing_of_a_broken_head_is_refused(gate: Gateway, head: bytes) -> None:
    """A head that violates RFC 9112 gets one refusal, and nothing after it is answered."""
    with Line(gate) as line:
        line.send(head + request("/openapi.json"))
        only_refusal(line)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /healthz HTTP/1.1\nHost: x\n\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n\n",
        b"GET /healthz HTTP/1.1\nHost: x\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\nX: y\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\n\nGET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_framing_by_bare_line_feeds_is_refused(gate: Gateway, head: bytes) -> None:
    """Lines end with CR and LF: a bare LF is refused, and the connection is closed."""
    with Line(gate) as line:
        line.send(head)
        assert {answer.status for answer in line.rest()} <= {400}


@pytest.mark.parametrize(
    ("fields", "version", "status"),
    [
        ((), "1.1", 400),
        (("Host: x", "Host: x"), "1.1", 400),
        (("Host: x", "hOST: y"), "1.1", 400),
        (("Host: x", "Host: x"), "1.0", 400),
        (("Host: x, y",), "1.1", 400),
        (("Host: x/y",), "1.1", 400),
        (("Host: a@x",), "1.1", 400),
        (("Host: x y",), "1.1", 400),
        (("Host: x",), "1.1", 200),
        ((), "1.0", 200),
    ],
)
def test_framing_needs_one_host(gate: Gateway, fields: tuple[str, ...], version: str, status: int) -> None:
    """HTTP/1.1 requires one Host, which is a host and an optional port (RFC 9112, 3.2)."""
    with Line(gate) as line:
        line.send(request("/openapi.json", *fields, "Connection: close", host=None, version=version))
        assert [answer.status for answer in line.rest()] == [status]


@pytest.mark.parametrize(
    ("target_form", "host", "status"),
    [
        (f"http://good.example/v1/progress/{OWN}", "good.example", 200),
        (f"http://evil.example/v1/progress/{OWN}", "good.example", 400),
        (f"http://evil.example/v1/progress/{OWN}", "evil.example", 400),
        (f"http://good.example/v1/progress/{OWN}", "evil.example", 400),
        (f"http://good.example@evil.example/v1/progress/{OWN}", "good.example", 400),
        (f"HTTP://EVIL.example:80/v1/progress/{OWN}", "good.example", 400),
        (f"/v1/progress/{OWN}", "evil.example", 400),
        (f"/v1/progress/{OWN}", "good.example", 200),
    ],
)
def test_framing_trusts_no_other_host_in_the_target(
    target: Target, simulator: Simulator, target_form: str, host: str, status: int
) -> None:
    """The host of an absolute-form target is checked like Host, and both must be equal."""
    simulator.task(OWN)
    gate = target(server={"trusted_hosts": ["good.example"]})
    with Line(gate) as line:
        for _ in range(2):  # the second one may be a hit
            line.send(request(target_form, host=host))
            assert line.answer().status == status
            if status != 200:
                break


# What stands around a request


@pytest.mark.parametrize(
    "behind", [b"garbage\r\n\r\n", b"\x00", b"GET / HTTP/9.9\r\n\r\n", b"\r\n\r\ngarbage \r\n\r\n"]
)
def test_framing_of_garbage_behind_a_hit(gate: Gateway, behind: bytes) -> None:
    """A hit is answered, and garbage after it in the same segment is refused."""
    hit = request(f"/v1/progress/{OWN}")
    with Line(gate) as line:
        for _ in range(3):
            line.send(hit)
            assert line.answer().status == 200
        line.send(hit + behind)
        answers = line.rest()
    assert [answer.status for answer in answers] in ([200, 400], [200])
    assert answers[0].json["taskId"] == OWN
    if b"\r\n\r\n" in behind.lstrip(b"\r\n"):  # it is complete, so it gets a response
        assert len(answers) == 2


def test_framing_of_requests_sent_together(gate: Gateway) -> None:
    """Pipelined requests are answered in order."""
    tasks = [OWN, OTHER, OTHER, OWN] * 10
    sent = [
        request(f"/v1/progress/{task}") if number % 3 else query(task) for number, task in enumerate(tasks)
    ]
    with Line(gate) as line:
        line.send(b"".join(sent))
        got = [line.answer().json for _ in tasks]
    assert [body.get("taskId") or body["data"]["taskId"] for body in got] == tasks


def test_framing_of_empty_lines_before_a_request(gate: Gateway) -> None:
    """A few empty lines before a request are skipped (RFC 9112, 2.2)."""
    with Line(gate) as line:
        for _ in range(2):
            line.send(b"\r\n\r\n" + request())
            assert line.answer().status == 200
