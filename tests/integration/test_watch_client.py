"""The event-stream reader, with recorded streams over a loopback socket."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.cli.watch.client import LONGEST_PAUSE_SECONDS, EventStream, Message, follow
from gateway.cli.watch.events import Event, Problem, Progress, StreamRefused
from gateway.cli.watch.polls import BUFFERED, Polls
from tests.support.harness import RawUpstream, Request, answer, framed, free_port

# --- the parser -------------------------------------------------------------------------------------------

# The messages of each stream, and the ID to reconnect with. The first five are from the standard.
STREAMS: dict[str, tuple[bytes, list[tuple[str, str]], str]] = {
    "several lines of data": (b"data: YHOO\ndata: +2\ndata: 10\n\n", [("message", "YHOO\n+2\n10")], ""),
    "comment, ids, and an end without a blank line": (
        b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event",
        [("message", "first event"), ("message", "second event")],
        "",
    ),
    "empty data": (b"data\n\ndata\ndata\n\ndata:", [("message", ""), ("message", "\n")], ""),
    "one space is dropped": (b"data:test\n\ndata: test\n\n", [("message", "test")] * 2, ""),
    "named events": (
        b"event: add\ndata: 73\n\nevent: remove\ndata: 2\n\n",
        [("add", "73"), ("remove", "2")],
        "",
    ),
    "a name lasts for one event": (b"event: a\n\ndata: x\n\n", [("message", "x")], ""),
    "CR": (b"id: 7\rdata: a\rdata: b\r\rdata: c\r\r", [("message", "a\nb"), ("message", "c")], "7"),
    "CRLF": (
        b"id: 7\r\ndata: a\r\ndata: b\r\n\r\ndata: c\r\n\r\n",
        [("message", "a\nb"), ("message", "c")],
        "7",
    ),
    "line ends mixed": (b"data: a\r\ndata: b\n\rdata: c\r\n\n", [("message", "a\nb"), ("message", "c")], ""),
    "byte order mark": (b"\xef\xbb\xbfdata: a\n\n", [("message", "a")], ""),
    "a second byte order mark is text": (
        b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\ndata: b\n\n",
        [("message", "b")],
        "",
    ),
    "other line separators are text": (
        "data: a\u2028b\u2029c\u0085d\x0be\x0cf\x1c\n\n".encode(),
        [("message", "a\u2028b\u2029c\u0085d\x0be\x0cf\x1c")],
        "",
    ),
    "UTF-8 of every length": ("data: é 画 🙂\n\n".encode(), [("message", "é 画 🙂")], ""),
    "not UTF-8": (b"data: \xff\xe7\x94\ndata: x\n\n", [("message", "\ufffd\ufffd\nx")], ""),
    "comments make no events": (b"id: 7\ndata: a\n\n: still here\n\n:\n\n", [("message", "a")], "7"),
    "an id alone is remembered": (b"id: 7\n\n", [], "7"),
    "an id that broke off was not heard": (b"id: 7\ndata: a\n\nid: 8\ndata: b\n", [("message", "a")], "7"),
    "an id with NUL is none": (b"id: 7\n\nid: 8\0\ndata: a\n\n", [("message", "a")], "7"),
    "an empty id resets": (b"id: 7\n\nid\ndata: a\n\n", [("message", "a")], ""),
    "unknown fields": (b"Data: a\n data: b\ndata : c\nfoo\ndata: d:e: f\n\n", [("message", "d:e: f")], ""),
}


def heard(pieces: list[bytes]) -> tuple[list[tuple[str, str]], str]:
    """Return the messages and the last event ID of a stream that arrives in these pieces."""
    stream = EventStream()
    messages = [(message.event, message.data) for piece in pieces for message in stream.feed(piece)]
    return messages, stream.last_event_id


@pytest.mark.parametrize("name", STREAMS)
def test_parser_follows_the_standard(name: str) -> None:
    """Every rule of the WHATWG's event-stream format holds, in any segmentation."""
    stream, messages, last_event_id = STREAMS[name]
    ways = [[stream], [bytes([byte]) for byte in stream]]
    ways += [[stream[:cut], b"", stream[cut:]] for cut in range(len(stream))]
    for way in ways:
        assert heard(way) == (messages, last_event_id), way


@given(
    st.lists(st.lists(st.sampled_from([b"data", b":", b" ", b"\r", b"\n", b"id", b"\xc3", b"\xa9", b"x"])))
)
def test_parser_accepts_any_segmentation(chunks: list[list[bytes]]) -> None:
    """Any stream gives the same messages in any segmentation."""
    pieces = [b"".join(chunk) for chunk in chunks]
    assert heard(pieces) == heard([b"".join(pieces)])


def test_parser_waits_for_nothing_after_a_cr() -> None:
    """An event that ends in CR is complete immediately, although an LF may follow."""
    stream = EventStream()
    assert stream.feed(b"data: a\r\r") == [Message("message", "a")]
    assert stream.feed(b"\ndata: b\r\r") == [Message("message", "b")]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("1500", 1.5), ("0", 0), ("9" * 5000, float("inf"))]
    + [(odd, None) for odd in ("", "-1", "+1", "1.5", "1_0", "1 ", "٣", "soon")],
)
def test_parser_accepts_a_retry_of_digits_only(value: str, seconds: float | None) -> None:
    """`retry` is a number of milliseconds in ASCII digits, or it is ignored."""
    stream = EventStream()
    stream.feed(f"retry:{value}\n".encode())
    assert stream.retry_seconds == seconds


def test_parser_limits_the_size_of_an_event() -> None:
    """An event that never ends is refused when it exceeds the limit."""
    for chunk in (b"x" * 2**20, b"data: " + b"x" * 2**20 + b"\n"):
        stream = EventStream()
        for _ in range(15):
            assert stream.feed(chunk) == []
        with pytest.raises(StreamRefused, match="larger"):
            stream.feed(chunk + chunk)


# --- following --------------------------------------------------------------------------------------------

HEAD = ("content-type: text/event-stream; charset=utf-8", "connection: close")
END = b"event: end\nid: end-1\ndata: {}\n\n"


def progress(task_id: str = "A", **more: Any) -> bytes:
    """Return a progress event."""
    body = {
        "taskId": task_id,
        "api": "sd",
        "status": "running",
        "progress": 0.25,
        "queueRemaining": None,
        "etaSeconds": None,
        "message": None,
        "terminal": False,
        "state": None,
    } | more
    return f"event: progress\nid: {task_id}-{body['progress']}\ndata: {json.dumps(body)}\n\n".encode()


def problem(**more: Any) -> bytes:
    """Return a problem event."""
    return b"event: problem\ndata: %s\n\n" % json.dumps({"taskId": "A", "detail": "no"} | more).encode()


def stream(*parts: bytes) -> bytes:
    """Return a response that streams these parts and ends."""
    return answer(b"".join(parts), *HEAD)


def closing(body: bytes, *headers: str, status: str = "HTTP/1.1 200 OK") -> bytes:
    """Return a complete response that closes the connection."""
    return framed(body, "connection: close", *headers, status=status)


@contextmanager
def playing(*answers: bytes, port: int = 0) -> Iterator[RawUpstream]:
    """Run a scripted gateway: each request gets the next response, then the connection closes."""
    left = iter(answers)

    def behave(connection: socket.socket, _: Request) -> None:
        connection.sendall(next(left, stream(END)))
        connection.shutdown(socket.SHUT_WR)

    with RawUpstream(behave, port=port) as upstream:
        yield upstream


class Pauses(list[tuple[float, str]]):
    """Replaces the wait, and records its duration and reason."""

    def __call__(self, seconds: float, reason: str) -> None:
        self.append((seconds, reason))

    @property
    def seconds(self) -> list[float]:
        return [seconds for seconds, _ in self]


def told(
    url: str, *task_ids: str, pause: Callable[[float, str], None], **more: Any
) -> list[tuple[str, float | str | None]]:
    """Follow to the end; return each event's name, and its progress or text."""

    def gist(event: Event) -> float | str | None:
        if isinstance(event.content, Problem):
            return event.content.text
        return event.content.progress if event.content else None

    events = follow(httpx.URL(url), task_ids or ["A"], api="sd", pause=pause, **more)
    return [(event.name, gist(event)) for event in events]


def test_follow_asks_for_the_tasks_and_stops_at_the_end() -> None:
    """One request names all tasks and the API; none follows after `end`."""
    pauses = Pauses()
    with playing(stream(progress("A"), progress("B"), END)) as upstream:
        events = told(f"{upstream.url}/behind/", "A", "B", pause=pauses)
    assert events == [("progress", 0.25), ("progress", 0.25), ("end", None)]
    (request,) = upstream.requests
    assert request.head.split(b"\r\n")[0] == b"GET /behind/v1/events?taskId=A&taskId=B&api=sd HTTP/1.1"
    assert request.headers["accept"] == "text/event-stream"
    assert "last-event-id" not in request.headers
    assert pauses == []


def test_follow_reads_a_stream_that_comes_byte_by_byte() -> None:
    """Chunks may end anywhere, also within a character."""
    told_all = b"\xef\xbb\xbf: hello\r\n\r\nretry: 100\n\n" + progress(message="画 🙂") + END
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in told_all) + b"0\r\n\r\n"
    with playing(answer(chunks, HEAD[0], "transfer-encoding: chunked")) as upstream:
        events = list(follow(httpx.URL(upstream.url), ["A"], api="sd", pause=Pauses()))
    assert [event.name for event in events] == ["progress", "end"]
    assert events[0].data["message"] == "画 🙂"


def test_follow_resumes_after_the_delay_the_gateway_asked_for() -> None:
    """A stream that ends is resumed after its last `retry:`, with its last ID; the delay stays in effect."""
    pauses = Pauses()
    with playing(
        stream(b"retry: 2000\n\n", progress(), b": the gateway restarts\nretry: 700\n\n"),
        stream(progress(progress=0.5)),
        stream(progress(progress=1, status="succeeded", terminal=True), END),
    ) as upstream:
        events = told(upstream.url, pause=pauses)
    assert events == [("progress", 0.25), ("progress", 0.5), ("progress", 1), ("end", None)]
    assert pauses == [(0.7, "stream ended")] * 2
    ids = [request.headers.get("last-event-id") for request in upstream.requests]
    assert ids == [None, "A-0.25", "A-0.5"]


def test_follow_stops_at_204() -> None:
    """Status 204 means that all tasks have ended."""
    pauses = Pauses()
    with playing(stream(progress()), answer(b"", HEAD[1], status="HTTP/1.1 204 No Content")) as upstream:
        assert told(upstream.url, pause=pauses) == [("progress", 0.25), ("end", None)]
    assert len(pauses) == 1


def test_follow_leaves_out_repetitions() -> None:
    """Repeated progress is left out, also the same problem with another request ID; changes are not."""
    with playing(
        stream(progress("A"), progress("B")),
        stream(progress("A"), progress("B", progress=0.5), problem(requestId="1")),
        stream(problem(requestId="2"), b"event: gossip\ndata: 1\n\n"),
        stream(progress("A"), END),
    ) as upstream:
        events = told(upstream.url, "A", "B", pause=Pauses())
    assert [gist for _, gist in events] == [0.25, 0.25, 0.5, "no", 0.25, None]


def stale(code: str | None) -> bytes:
    """Return the event for an update that is overdue, or no longer is."""
    data = {"taskId": "A", "api": "sd", "stale": code, "ageSeconds": 3, "title": "t"}
    return f"event: stale\ndata: {json.dumps(data)}\n\n".encode()


def test_follow_says_again_what_is_overdue_on_a_new_connection() -> None:
    """Each connection with data is reported; an overdue update is repeated on it, and not within it."""
    steps: list[str] = []
    with playing(
        stream(progress(), stale("x"), stale("x")),
        stream(b": only a heartbeat\n\n"),
        stream(progress(), stale("x"), stale(None), stale(None), END),
    ) as upstream:
        for event in follow(
            httpx.URL(upstream.url),
            ["A"],
            api="sd",
            pause=lambda *_: steps.append("pause"),
            connected=lambda: steps.append("connected"),
        ):
            overdue = f" {event.data['stale']}" if event.name == "stale" else ""
            steps.append(f"{event.name}{overdue}")
    assert steps == [
        *["connected", "progress", "stale x", "pause"],
        *["connected", "pause"],
        *["connected", "stale x", "stale None", "end"],
    ]


def test_follow_resumes_a_broken_connection() -> None:
    """A stream that breaks off within an event is resumed from the last complete one."""
    pauses = Pauses()
    broken = answer(progress() + b"id: 9\ndata: {", HEAD[0], "content-length: 9999")
    with playing(broken, stream(END)) as upstream:
        assert told(upstream.url, pause=pauses) == [("progress", 0.25), ("end", None)]
    assert pauses == [(2, "connection lost")]
    assert upstream.requests[1].headers["last-event-id"] == "A-0.25"


def test_follow_times_out_a_silent_connection() -> None:
    """A connection without data or heartbeats counts as lost."""
    pauses = Pauses()
    silent = iter([True, False])

    def behave(connection: socket.socket, _: Request) -> None:
        connection.sendall(answer(b": open\n\n", *HEAD) if next(silent) else stream(END))

    with RawUpstream(behave) as upstream:
        events = told(upstream.url, pause=pauses, silence_seconds=0.1, opening_seconds=30)
        assert events == [("end", None)]
    assert pauses == [(2, "no data for 0.1 s")]


def batch(*items: dict[str, Any], etag: str = 'W/"1"') -> bytes:
    """Return the response to a batch."""
    return closing(json.dumps({"items": items}).encode(), "content-type: application/json", f"etag: {etag}")


def item(task_id: str, **more: Any) -> dict[str, Any]:
    """Return an item of a batch."""
    found: dict[str, Any] = json.loads(progress(task_id, **more).split(b"data: ")[1])
    return found


@pytest.mark.parametrize("part", ["nothing", "head"])
def test_follow_polls_when_a_stream_does_not_begin(part: str) -> None:
    """If nothing or only the head of a stream arrives, but a query succeeds, long polls replace it."""
    notices: list[str] = []
    answers = iter(
        [
            batch(item("A"), {"taskId": "B", "error": {"code": "upstream-invalid", "detail": "no"}}),
            closing(b"", 'etag: W/"1"', status="HTTP/1.1 304 Not Modified"),
            batch(item("A", progress=0.5), item("B", terminal=True), etag='W/"2"'),
            batch(item("A", progress=1, terminal=True), item("B", terminal=True), etag='W/"3"'),
        ]
    )

    def behave(connection: socket.socket, request: Request) -> None:
        if b"/v1/events" in request.head:
            connection.sendall(answer(b"", *HEAD) if part == "head" else b"")
        else:
            connection.sendall(next(answers))
            connection.shutdown(socket.SHUT_WR)

    with RawUpstream(behave) as upstream:
        pauses = Pauses()
        events = told(upstream.url, "A", "B", pause=pauses, notify=notices.append, opening_seconds=0.2)
    assert events == [
        *[("progress", 0.25), ("problem", "no")],
        *[("progress", 0.5), ("progress", 0.25)],
        *[("progress", 1), ("end", None)],
    ]
    assert not pauses
    assert notices == [BUFFERED]
    stream_request, *polls = upstream.requests
    targets = [request.head.split()[1] for request in polls]
    assert targets[0] == b"/v1/progress?taskId=A&taskId=B&api=sd"
    assert targets[1:] == [targets[0] + b"&wait=25"] * 3
    assert [request.headers.get("if-none-match") for request in polls] == [None, 'W/"1"', 'W/"1"', 'W/"2"']
    assert stream_request.headers["accept"] == "text/event-stream"


def test_follow_returns_to_the_stream_if_the_gateway_does_not_respond() -> None:
    """If neither the stream nor a query gets a response, the gateway is down: the stream is retried."""
    notices: list[str] = []
    pauses = Pauses()
    busy = closing(b'{"detail": "too many"}', status="HTTP/1.1 503 Service Unavailable")
    answers = iter([None, busy, stream(END)])

    def behave(connection: socket.socket, _: Request) -> None:
        if (given := next(answers)) is not None:
            connection.sendall(given)
            connection.shutdown(socket.SHUT_WR)

    with RawUpstream(behave) as upstream:
        events = told(upstream.url, pause=pauses, notify=notices.append, opening_seconds=0.2)
    assert events == [("end", None)]
    assert pauses == [(2, "503 Service Unavailable: too many")]
    assert not notices


def test_polls_say_which_updates_are_overdue() -> None:
    """A batch gives the events of a stream: one for each change of `stale`, none for a new age."""
    responses = [
        batch(item("A", ageSeconds=1, stale=None)),
        batch(item("A", ageSeconds=2, stale="upstream-timeout")),
        batch(item("A", ageSeconds=3, stale="upstream-timeout")),
        batch(item("A", ageSeconds=0, stale=None, terminal=True)),
    ]
    with playing(*responses) as upstream, httpx.Client(trust_env=False) as client:
        polls = Polls(client, httpx.URL(upstream.url), notify=print, sleep=lambda _: None)
        events = list(polls.read())
    assert [event.name for event in events if event.name != "progress"] == ["stale", "stale", "end"]
    overdue = [event.data for event in events if event.name == "stale"]
    assert [(one["stale"], one["ageSeconds"], one["title"]) for one in overdue] == [
        ("upstream-timeout", 2, "Upstream timeout"),
        (None, 0, ""),
    ]
    assert all("ageSeconds" not in event.data for event in events if event.name == "progress")


def test_follow_polls_until_an_unknown_task_is_given_up() -> None:
    """A task that is rejected for 30 s counts as ended; one that becomes known in time does not."""
    now = [0.0]
    rejected = {"taskId": "A", "error": {"code": "upstream-rejected", "detail": "no"}}
    responses = [batch(rejected), batch(rejected), batch(item("A")), *[batch(rejected)] * 9]

    def sleep(_: float) -> None:
        now[0] += 10

    with playing(*responses) as upstream, httpx.Client(trust_env=False) as client:
        polls = Polls(client, httpx.URL(upstream.url), notify=print, sleep=sleep, clock=lambda: now[0])
        names = [event.name for event in polls.read()]
    assert names == ["problem", "problem", "progress", *["problem"] * 4, "end"]


@pytest.mark.parametrize(
    "response",
    [
        closing(b"<html>", "content-type: text/html"),
        closing(b"[]", "content-type: application/json"),
        closing(b"{", "content-type: application/json"),
        closing(b'{"items": {}}', "content-type: application/json"),
        closing(b'{"items": [1]}', "content-type: application/json"),
        closing(b'{"detail": "bad"}', status="HTTP/1.1 400 Bad Request"),
    ],
)
def test_polls_raise_permanent_errors(response: bytes) -> None:
    """A response that is not a batch is an error that a retry would not cure."""
    with (
        playing(response) as upstream,
        httpx.Client(trust_env=False) as client,
        pytest.raises(StreamRefused),
    ):
        list(Polls(client, httpx.URL(upstream.url), notify=print).read())


def test_follow_retries_a_refused_connection() -> None:
    """A refused connection is retried until the gateway listens."""
    port = free_port()
    pauses = Pauses()
    with ExitStack() as stack:

        def pause(seconds: float, reason: str) -> None:
            pauses(seconds, reason)
            if len(pauses) == 2:
                stack.enter_context(playing(stream(END), port=port))

        assert told(f"http://127.0.0.1:{port}", pause=pause) == [("end", None)]
    reason = "connection failed (Connection refused); check --gateway or SD_GATEWAY_URL"
    assert pauses == [(2, reason), (4, reason)]


def test_follow_does_not_doubt_the_url_after_a_connection() -> None:
    """If the gateway has responded before, a refused connection does not say to check the URL."""
    pauses = Pauses()
    with ExitStack() as stack:
        first = stack.enter_context(ExitStack())
        url = first.enter_context(playing(stream(progress()))).url

        def pause(seconds: float, reason: str) -> None:
            pauses(seconds, reason)
            first.close()
            if len(pauses) == 2:
                stack.enter_context(playing(stream(END), port=httpx.URL(url).port))

        told(url, pause=pause)
    assert pauses[1][1] == "connection failed (Connection refused)"


def test_follow_names_a_server_without_tls() -> None:
    """An https URL of a server without TLS says to use http."""
    pauses = Pauses()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_plainly() -> None:
            with listener.accept()[0] as connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

        def pause(seconds: float, reason: str) -> None:
            pauses(seconds, reason)
            raise StreamRefused

        threading.Thread(target=answer_plainly, daemon=True).start()
        with pytest.raises(StreamRefused):
            told(f"https://127.0.0.1:{listener.getsockname()[1]}", pause=pause)
    assert pauses[0][1] == "connection failed (the server does not speak TLS: use http://)"


def test_follow_backs_off_while_there_is_no_event() -> None:
    """Delays double up to a limit while no event arrives, and are short again after one."""
    pauses = Pauses()
    failing = closing(b"", status="HTTP/1.1 502 Bad Gateway")
    with playing(failing, *[stream()] * 5, stream(progress()), stream(END)) as upstream:
        told(upstream.url, pause=pauses)
    assert pauses.seconds == [2, 4, 8, LONGEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, 2]
    assert pauses[0][1] == "502 Bad Gateway"


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [
        ("retry: 1\n\n", 0.1),
        ("retry: 3600000\n\n", LONGEST_PAUSE_SECONDS),
        (f"retry: {'9' * 999}\n\n", LONGEST_PAUSE_SECONDS),
    ],
)
def test_follow_bounds_the_delay(asked: str, seconds: float) -> None:
    """The delay of `retry:` has a lower and an upper limit."""
    pauses = Pauses()
    with playing(stream(asked.encode()), stream(END)) as upstream:
        told(upstream.url, pause=pauses)
    assert pauses.seconds == [seconds]


@pytest.mark.parametrize("status", ["503 Service Unavailable", "429 Too Many Requests"])
@pytest.mark.parametrize(
    ("after", "seconds"),
    [("7", 7), ("1", 2), ("900", LONGEST_PAUSE_SECONDS), ("Wed, 21 Oct 2026 07:28:00 GMT", 2)],
)
def test_follow_obeys_retry_after(status: str, after: str, seconds: float) -> None:
    """Retry-After is obeyed within limits, and the problem is quoted."""
    pauses = Pauses()
    busy = closing(b'{"detail": "too many"}', f"retry-after: {after}", status=f"HTTP/1.1 {status}")
    with playing(busy, stream(END)) as upstream:
        told(upstream.url, pause=pauses)
    assert pauses == [(seconds, f"{status}: too many")]


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (
            closing(b'{"detail": "bad \x7f task"}', status="HTTP/1.1 400 Bad Request"),
            "400 Bad Request: bad   task",
        ),
        (closing(b'{"title": "No"}', status="HTTP/1.1 404 Not Found"), "404 Not Found: No"),
        (
            closing(b"<html>", status="HTTP/1.1 404 Not Found"),
            "404 Not Found; check the URL of the gateway",
        ),
        (closing(b"<html>", status="HTTP/1.1 403 Forbidden"), "403 Forbidden"),
        (closing(b"", "location: /elsewhere", status="HTTP/1.1 302 Found"), "302 Found"),
        (
            closing(b"<html>", "content-type: text/html"),
            "the response is not an event stream; check the URL of the gateway",
        ),
    ],
)
def test_follow_raises_permanent_errors(refusal: bytes, words: str) -> None:
    """A permanent error is raised with the gateway's message, without a second request."""
    pauses = Pauses()
    with playing(refusal) as upstream, pytest.raises(StreamRefused) as refused:
        told(upstream.url, pause=pauses)
    assert str(refused.value) == words
    assert pauses == []


ODD_NUMBERS: dict[str, dict[str, Any]] = {
    "largest-integer": {"etaSeconds": 9223372036854775807},
    "largest-float": {"etaSeconds": 1e308},
    "negative": {"etaSeconds": -1},
    "text": {"etaSeconds": "soon", "queueRemaining": "many"},
    "queue": {"queueRemaining": 10**308},
    "digits": {"queueRemaining": int("9" * 4000)},
}


@pytest.mark.parametrize("name", ODD_NUMBERS)
def test_follow_takes_odd_numbers_as_unknown(name: str) -> None:
    """An implausible number, also of a gateway of an earlier version, is unknown; the other tasks go on."""
    with playing(stream(progress("A", **ODD_NUMBERS[name]), progress("B", etaSeconds=5), END)) as upstream:
        first, second, _ = follow(httpx.URL(upstream.url), ["A", "B"], api="sd", pause=Pauses())
    assert isinstance(first.content, Progress)
    assert (first.content.eta_seconds, first.content.queue_remaining) == (None, None)
    assert isinstance(second.content, Progress)
    assert second.content.eta_seconds == 5


def test_follow_reads_an_event_that_python_cannot_read() -> None:
    """A member with an integer of more than 4,300 digits is null; the other members are read."""
    event = progress("A").replace(b'"state": null', b'"state": {"seed": %b}' % (b"9" * 5000))
    with playing(stream(event, END)) as upstream:
        first, _ = follow(httpx.URL(upstream.url), ["A"], api="sd", pause=Pauses())
    assert isinstance(first.content, Progress)
    assert (first.content.progress, first.data["state"]) == (0.25, None)


@pytest.mark.parametrize("data", ["{}", "{", "1", '{"taskId": "A", "status": 1}', "[" * 100_000])
def test_follow_skips_invalid_events(data: str) -> None:
    """An invalid event is skipped with one notice, and the other tasks go on."""
    notices: list[str] = []
    odd = "".join(f"event: {name}\ndata: {data}\n\n" for name in ("progress", "problem", "stale")).encode()
    with playing(stream(odd, progress("B"), END)) as upstream:
        events = told(upstream.url, "A", "B", pause=Pauses(), notify=notices.append)
    # No member of a problem is necessary.
    assert [event for event in events if event != ("problem", "")] == [("progress", 0.25), ("end", None)]
    assert len(notices) == 1


def test_polls_skip_invalid_items() -> None:
    """An invalid item of a batch, and a member that Python cannot read, do not concern the other items."""
    odd = batch({"taskId": "A", "terminal": True}, item("B", etaSeconds=1e308, terminal=True, state="SEED"))
    body = odd.partition(b"\r\n\r\n")[2].replace(b'"SEED"', b"9" * 5000)
    with (
        playing(closing(body, "content-type: application/json")) as upstream,
        httpx.Client(trust_env=False) as client,
    ):
        events = list(Polls(client, httpx.URL(upstream.url), notify=print).read())
    assert [event.name for event in events] == ["invalid", "progress", "end"]
    assert isinstance(events[1].content, Progress)
    assert events[1].content.eta_seconds is None


def test_follow_removes_escape_sequences() -> None:
    """Escape sequences in received texts are removed for the terminal; the JSON data is unchanged."""
    evil = "a\x1b[2Jb\u202ec\nd"
    upstream_said = {"errMessage": evil, "subErrMessage": "unheard"}
    with playing(stream(progress(message=evil), problem(upstream=upstream_said), END)) as upstream:
        first, second, _ = follow(httpx.URL(upstream.url), ["A"], api="sd", pause=Pauses())
    assert first.data["message"] == evil
    assert first.content
    assert not isinstance(first.content, Problem)
    assert first.content.message == "a [2Jb c d"
    assert isinstance(second.content, Problem)
    assert second.content.text == "no: a [2Jb c d"


def test_follow_uses_no_proxy_for_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy of the environment is not used for loopback."""
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    with playing(stream(END)) as upstream:
        assert told(upstream.url, pause=Pauses()) == [("end", None)]


def test_follow_closes_its_connection() -> None:
    """A reader that stops early closes its connection."""
    disconnected = threading.Event()

    def behave(connection: socket.socket, _: Request) -> None:
        connection.sendall(answer(progress(), *HEAD))
        assert connection.recv(1) == b""
        disconnected.set()

    with RawUpstream(behave) as upstream:
        events = follow(httpx.URL(upstream.url), ["A"], api="sd", pause=Pauses())
        assert next(events).name == "progress"
        events.close()
        assert disconnected.wait(20)
