"""GET /v1/events and /v1/progress/{taskId}/events, over real sockets."""

import asyncio
import json
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Message
from structlog.testing import capture_logs

from gateway.api.server_extensions import ON_DISCONNECT
from gateway.app import create_app
from gateway.settings.model import Settings
from gateway.telemetry.redaction import Redactor
from tests.support.harness import (
    KEY,
    PATIENCE_SECONDS,
    SECRET,
    Gateway,
    Simulator,
    drained,
    running,
    serving,
    until,
)

QUICK = {
    "waiting_seconds": 0.1,
    "running_seconds": 0.1,
    "stale_while_revalidate_seconds": 0.2,
    "error_seconds": 0.1,
}
Launch = Callable[..., Gateway]
PARENT = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"


@dataclass
class Event:
    """One dispatched event, or a block of comments and retries when it has no name."""

    name: str = ""
    id: str = ""
    data: Any = None
    comments: list[str] = field(default_factory=list)
    retry: int | None = None


def blocks(lines: Iterator[str]) -> Iterator[Event]:
    """Yield the blocks of an event stream, as divided by the WHATWG's specification."""
    event = Event()
    for line in lines:
        if not line:
            yield event
            event = Event()
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "":
                event.comments.append(value)
            case "event":
                event.name = value
            case "id":
                event.id = value
            case "retry":
                event.retry = int(value)
            case "data":
                assert event.data is None, "the JSON is on one line"
                event.data = json.loads(value)


@contextmanager
def stream(gate: Gateway, path: str, **headers: str) -> Iterator[tuple[httpx.Response, Iterator[Event]]]:
    """Open a stream; yield its response and its blocks."""
    with gate.client.stream("GET", path, headers=headers) as response:
        yield response, blocks(response.iter_lines())


def dechunked(body: bytes) -> bytes:
    """Return the content of complete chunks (RFC 9112, 7.1); the last chunk may be incomplete."""
    parts = []
    while b"\r\n" in body:
        size, _, rest = body.partition(b"\r\n")
        end = int(size, 16)
        if len(rest) < end + 2:
            break
        assert rest[end : end + 2] == b"\r\n"
        parts.append(rest[:end])
        body = rest[end + 2 :]
    return b"".join(parts)


def named(events: Iterator[Event], name: str) -> Event:
    """Return the next event with this name."""
    return next(event for event in events if event.name == name)


def test_events_follow_a_task_to_its_end(simulator: Simulator, launch: Launch) -> None:
    """Each change of a task is one event; then the end event follows and the stream closes."""
    gate = launch(simulator.url, cache=QUICK)
    task = simulator.task(data={"status": "waiting", "progress": 0, "lastQueueRemaining": 2})
    with stream(gate, f"/v1/progress/{task}/events") as (response, events):
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-accel-buffering"] == "no"
        assert next(events).retry == 2000
        seen = [named(events, "progress")]
        for script in (
            {"status": "running", "progress": 0.25},
            {"status": "running", "progress": 0.75},
            {"status": "successed", "progress": 1},
        ):
            simulator.script(task, **script)
            seen.append(named(events, "progress"))
        end = next(events)
        assert end.name == "end"
        assert list(events) == [], "the stream closes"
    assert [(event.data["status"], event.data["progress"]) for event in seen] == [
        ("waiting", 0.0),
        ("running", 0.25),
        ("running", 0.75),
        ("succeeded", 1.0),
    ]
    assert len({event.id for event in seen}) == 4
    assert seen[-1].data == gate.get(task).json()
    again = gate.client.get(f"/v1/progress/{task}/events", headers={"Last-Event-ID": end.id})
    assert again.status_code == 204, "204 stops the reconnects after the end"
    assert gate.metric("events_sent_total", event="progress") == 4
    assert gate.metric("events_sent_total", event="end") == 1


@pytest.mark.parametrize("edge", [True, False])
def test_events_with_a_repeated_last_event_id(simulator: Simulator, launch: Launch, *, edge: bool) -> None:
    """If the header is repeated, or a proxy has joined the values, the last one counts."""
    gate = launch(simulator.url, server={"edge": edge})
    path = f"/v1/progress/{simulator.finished()}/events"
    [end] = re.findall("id: (end-.*)", gate.client.get(path).text)
    for ids, status in (([end, end], 204), (["x", end], 204), ([end, "x"], 200), ([f"{end},{end}"], 204)):
        headers = [("Last-Event-ID", value) for value in ids]
        assert gate.client.get(path, headers=headers).status_code == status, ids


def test_events_end_is_specific_to_its_tasks(simulator: Simulator, gate: Gateway) -> None:
    """The end event ID of one stream does not stop a stream of other tasks."""
    first, second = simulator.finished(), simulator.finished()
    with stream(gate, f"/v1/events?taskId={first}") as (_, events):
        end = named(events, "end")
    with stream(gate, f"/v1/events?taskId={second}", **{"Last-Event-ID": end.id}) as (response, events):
        assert response.status_code == 200
        assert named(events, "progress").data["taskId"] == second


def test_events_of_many_tasks_end_with_the_last(simulator: Simulator, launch: Launch) -> None:
    """Several tasks share a stream: one event each at once, and the end event when all have ended."""
    gate = launch(simulator.url, cache=QUICK)
    done, going = simulator.finished(), simulator.task(data={"status": "running", "progress": 0.5})
    with stream(gate, f"/v1/events?taskId={done}&taskId={going}&taskId={done}") as (_, events):
        first = {named(events, "progress").data["taskId"] for _ in range(2)}
        assert first == {done, going}
        simulator.script(going, status="failed", progress=0.5)
        assert named(events, "progress").data["status"] == "failed"
        assert next(events).name == "end"


def test_events_problem_is_sent_once_until_it_changes(simulator: Simulator, launch: Launch) -> None:
    """A failing task is one problem event, for any number of attempts, until the failure changes."""
    gate = launch(simulator.url, cache=QUICK, upstream={"retries": 0})
    with stream(gate, "/v1/events?taskId=missing") as (_, events):
        problem = named(events, "problem")
        assert problem.data["taskId"] == "missing"
        assert problem.data["code"] == "upstream-rejected"
        assert problem.data["upstream"]["errCode"] == "TASK_NOT_FOUND"
        calls = simulator.calls("missing")
        until(lambda: simulator.calls("missing") > calls, "the gateway retries")
        simulator.fault("status", status=503)
        assert next(event for event in events if event.name).data["code"] == "upstream-invalid"
        simulator.heal()
        simulator.task("missing", data={"status": "running", "progress": 0.5})
        assert next(event for event in events if event.name).name == "progress"


def test_events_heartbeat_is_a_comment(simulator: Simulator, launch: Launch) -> None:
    """A stream without changes has a comment at every heartbeat."""
    gate = launch(simulator.url, watch={"heartbeat_seconds": 0.1})
    task = simulator.task(data={"status": "running", "progress": 0.5})
    with stream(gate, f"/v1/progress/{task}/events") as (_, events):
        named(events, "progress")
        assert next(events).comments
        assert next(events).comments


def test_events_heartbeat_is_sent_with_an_event(simulator: Simulator, launch: Launch) -> None:
    """With frequent changes a heartbeat needs no write of its own: it is in the chunk of an event."""
    gate = launch(simulator.url, cache=QUICK, watch={"heartbeat_seconds": 1.7})
    task = simulator.task()
    with gate.connect() as connection:
        connection.sendall(b"GET /v1/progress/%s/events HTTP/1.1\r\nhost: x\r\n\r\n" % task.encode())
        received = b""
        step = 0
        while b"\r\n: still here\n\nevent: progress\n" not in received:
            step += 1
            simulator.script(task, status="running", progress=step / 1000)
            while b'"progress":%g,' % (step / 1000) not in received:
                received += connection.recv(65536)
        _, _, body = received.partition(b"\r\n\r\n")
    text = dechunked(body)
    assert text.count(b"event: progress\n") >= step
    assert all(
        block.startswith((b"retry: ", b": still here", b"event: progress\nid: ")) or not block
        for block in text.split(b"\n\n")
    ), "the chunk lengths are right, with nothing in between"


def test_events_share_one_schedule(simulator: Simulator, launch: Launch) -> None:
    """Forty streams and thirty long polls share one schedule, which ends when all have left."""
    # Long enough that a long poll always finds a snapshot, even while the upstream responds slowly.
    lifetimes = {"running_seconds": 0.3, "stale_while_revalidate_seconds": 60}
    gate = launch(simulator.url, cache=QUICK | lifetimes)
    task = simulator.task(data={"status": "running", "progress": 0.5})
    with ExitStack() as stack:
        opened = [stack.enter_context(stream(gate, f"/v1/progress/{task}/events")) for _ in range(40)]
        for _, events in opened:
            named(events, "progress")
        polls = []
        for _ in range(30):
            connection = stack.enter_context(gate.connect())
            connection.sendall(b"GET /v1/progress/%s?wait=60 HTTP/1.1\r\nhost: x\r\n\r\n" % task.encode())
            polls.append(connection)
        until(lambda: gate.metric("watchers", kind="longpoll") == 30, "every long poll waits")
        assert gate.metric("watchers", kind="events") == 40
        assert gate.metric("watched_tasks") == 1
        started = time.monotonic()
        before = simulator.calls(task)

        def refreshes() -> int:
            made = simulator.calls(task) - before
            return made if made >= 5 else 0

        made: int = until(refreshes, "the schedule refreshes")
        elapsed = time.monotonic() - started
        # One more at the interval's edge, and one refresh-ahead: the arriving long polls made the task hot.
        assert made <= elapsed / 0.3 + 2
    until(lambda: gate.metric("watchers") == 0, "every subscriber has left")
    assert gate.metric("watched_tasks") == 0
    until(lambda: gate.metric("upstream_in_flight") == 0, "the last in-flight request is done")
    after = simulator.calls(task)
    # Wait for two lifetimes, measured by the upstream's calls for another task.
    other = simulator.task(data={"status": "running", "progress": 0.1})
    with stream(gate, f"/v1/progress/{other}/events"):
        until(lambda: simulator.calls(other) >= 3, "the other task is refreshed")
    assert simulator.calls(task) == after


def test_events_slow_reader_receives_the_latest(simulator: Simulator, launch: Launch) -> None:
    """A reader that stops reading delays no other stream, and then receives the latest state, no backlog."""
    gate = launch(simulator.url, cache=QUICK, server={"keep_alive_seconds": 60})
    big = "x" * 600_000
    steps = 24
    task = simulator.task(data={"status": "running", "progress": 0.0, "message": big})
    with socket.socket() as slow, stream(gate, f"/v1/progress/{task}/events") as (_, events):
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # keep little in the kernel's buffers
        slow.settimeout(PATIENCE_SECONDS)
        slow.connect(gate.address)
        slow.sendall(
            b"GET /v1/progress/%s/events HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" % task.encode()
        )
        until(lambda: gate.metric("watchers", kind="events") == 2, "the slow reader is there")
        for step in range(1, steps + 1):
            simulator.script(task, status="running", progress=step / 100, message=big)
            while named(events, "progress").data["progress"] < step / 100:
                pass
        simulator.script(task, status="failed", progress=0.6, message="over")
        named(events, "end")
        received = drained(slow)
    assert received.count(b"event: progress") < steps
    assert b'"status":"failed"' in received
    assert b"event: end" in received


@pytest.mark.parametrize("protocol", [b"HTTP/1.0", b"HTTP/1.1"])
def test_events_are_the_same_with_any_framing(simulator: Simulator, launch: Launch, protocol: bytes) -> None:
    """A stream is the same without chunks, and with another request pipelined behind it."""
    gate = launch(simulator.url, cache=QUICK)
    task = simulator.task(data={"status": "running", "progress": 0.1})
    with socket.create_connection(gate.address, timeout=PATIENCE_SECONDS) as connection:
        connection.sendall(b"GET /v1/progress/%s/events %s\r\nhost: x\r\n\r\n" % (task.encode(), protocol))
        if protocol == b"HTTP/1.1":
            connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        received = b""
        for progress in (0.1, 0.2, 0.3):
            simulator.script(task, status="running", progress=progress)
            while b'"progress":%g' % progress not in received:
                received += connection.recv(65536)
        simulator.script(task, status="succeeded", progress=1.0)
        received += drained(connection)
    assert received.count(b"event: progress") == 4
    assert received.count(b"event: end") == 1
    assert received.count(b"HTTP/1.1 200 OK") == (2 if protocol == b"HTTP/1.1" else 1)


def test_events_refuse_invalid_requests(simulator: Simulator, gate: Gateway) -> None:
    """No task, too many, an invalid one, an unknown parameter: each is a problem, without a stream."""
    many = "&".join(f"taskId=t{number}" for number in range(101))
    for query, code in (
        ("", "invalid-parameter"),
        (f"?{many}", "invalid-parameter"),
        ("?taskId=a/b", "invalid-task-id"),
        ("?taskId=a&wait=3", "invalid-parameter"),
        ("?taskId=a&api=dall-e", "invalid-parameter"),
    ):
        response = gate.client.get(f"/v1/events{query}")
        assert (response.status_code, response.json()["code"]) == (400, code), query
    assert simulator.calls() == 0


def test_events_wait_for_a_new_task(simulator: Simulator, launch: Launch) -> None:
    """A task that the upstream does not know yet has a problem, and then its progress."""
    gate = launch(simulator.url, cache={"running_seconds": 0.1})
    with gate.client.stream("GET", "/v1/progress/new/events") as response:
        lines = response.iter_lines()
        assert next(line for line in lines if line.startswith("event:")) == "event: problem"
        simulator.script("new", status="succeeded", progress=1)
        assert [line for line in lines if line.startswith("event:")] == ["event: progress", "event: end"]


@pytest.mark.parametrize("seconds", [0, 1.5])
def test_events_end_when_every_task_has_ended_or_is_unknown(
    simulator: Simulator, launch: Launch, seconds: float
) -> None:
    """After `watch.unknown_task_seconds` of rejections a task counts as ended; a reconnect gets 204."""
    quick = {"running_seconds": 0.1, "error_seconds": 0}
    gate = launch(simulator.url, cache=quick, watch={"unknown_task_seconds": seconds})
    done = simulator.finished()
    url = f"/v1/events?taskId=missing&taskId={done}"
    began = time.monotonic()
    text = gate.client.get(url).text
    assert seconds <= time.monotonic() - began < 30
    assert re.findall("event: (.*)", text) in (["problem", "progress", "end"], ["progress", "problem", "end"])
    assert simulator.calls("missing") == (3 if seconds else 1)
    [end] = re.findall("id: (end-.*)", text)
    assert gate.client.get(url, headers={"last-event-id": end}).status_code == 204
    # Other clients query again: the task may have become known meanwhile.
    simulator.script("missing", status="running", progress=0.5)
    with gate.client.stream("GET", "/v1/progress/missing/events") as response:
        assert next(line for line in response.iter_lines() if line.startswith("event:")) == "event: progress"


def test_events_of_an_unknown_task_wait_for_the_others(simulator: Simulator, launch: Launch) -> None:
    """An unknown task ends no stream with a running task, and is shown when it becomes known after all."""
    quick = {"running_seconds": 0.1, "error_seconds": 0}
    gate = launch(simulator.url, cache=quick, watch={"unknown_task_seconds": 0})
    running = simulator.task(data={"status": "running", "progress": 0.5})
    with gate.client.stream("GET", f"/v1/events?taskId=missing&taskId={running}") as response:
        events = (line.partition(" ")[2] for line in response.iter_lines() if line.startswith("event:"))
        assert {next(events), next(events)} == {"problem", "progress"}
        # A stream that joins is not served with the old rejection.
        simulator.script("missing", status="running", progress=0.1)
        with gate.client.stream("GET", "/v1/progress/missing/events") as other:
            assert next(line for line in other.iter_lines() if line.startswith("event:")) == "event: progress"
        assert next(events) == "progress"  # of the task that has become known
        simulator.script(running, status="succeeded", progress=1)
        assert next(events) == "progress"
        simulator.script("missing", status="succeeded", progress=1)
        assert list(events) == ["progress", "end"]


def test_events_head_answers_without_a_stream(simulator: Simulator, gate: Gateway) -> None:
    """HEAD responds with a stream's headers, without a subscription or an upstream call."""
    response = gate.client.head("/v1/events?taskId=a")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert simulator.calls() == 0


def test_events_subscriptions_are_bounded(simulator: Simulator, launch: Launch) -> None:
    """Above `watch.max_watchers` a stream is refused as `overloaded`, with Retry-After."""
    gate = launch(simulator.url, watch={"max_watchers": 1})
    task = simulator.task()
    with stream(gate, f"/v1/progress/{task}/events") as (_, events):
        named(events, "progress")
        refused = gate.client.get(f"/v1/progress/{task}/events")
        assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
    until(lambda: gate.metric("watchers") == 0, "the first one has left")
    with stream(gate, f"/v1/progress/{task}/events") as (response, _):
        assert response.status_code == 200


def test_events_end_at_graceful_shutdown(simulator: Simulator, tmp_path: Path) -> None:
    """On SIGTERM readyz is 503 at once, every stream and long poll is ended, and the exit status is 0."""
    task = simulator.task(data={"status": "running", "progress": 0.5})
    environment = {"SD_GATEWAY_UPSTREAM__ENDPOINT": simulator.url, "SD_GATEWAY_CACHE__RUNNING_SECONDS": "600"}
    with serving(tmp_path, environment) as (process, gate), ExitStack() as stack:
        gate.get(task)  # a long poll of a task that is not cached does not wait
        streams, polls = [], []
        for target, opened in ((b"/events", streams), (b"?wait=60", polls)):
            for _ in range(20):
                connection = stack.enter_context(gate.connect())
                request = b"GET /v1/progress/%s%s HTTP/1.1\r\nhost: x\r\n\r\n"
                connection.sendall(request % (task.encode(), target))
                opened.append(connection)
        until(lambda: gate.metric("watchers") == 40, "all are subscribed")
        process.signal(signal.SIGTERM)
        until(lambda: gate.client.get("/readyz").status_code == 503, "the gateway is unready")
        endings = [drained(connection) for connection in streams]
        assert all(ending.count(b"retry: ") == 2 for ending in endings)
        assert len({ending.rpartition(b"retry: ")[2] for ending in endings}) > 1, "the reconnects are spread"
        assert all(b'"progress":0.5' in drained(connection) for connection in polls)
        assert process.exit_status() == 0
        assert "Traceback" not in process.output
        assert KEY not in process.output


def test_events_notice_a_disconnect_under_any_server(simulator: Simulator) -> None:
    """Under a server without the disconnect extension, a disconnect is noticed as well."""
    settings = Settings.model_validate(
        {
            "upstream": {"endpoint": simulator.url},
            "credentials": {"access_key": KEY, "secret_key": SECRET},
        }
    )
    task = simulator.task(data={"status": "running", "progress": 0.5})
    with (
        running(create_app(settings, redactor=Redactor()).asgi, lifespan="on") as url,
        httpx.Client(base_url=url, trust_env=False, timeout=PATIENCE_SECONDS) as client,
    ):
        gate = Gateway(client)
        with stream(gate, f"/v1/progress/{task}/events") as (_, events):
            named(events, "progress")
            assert gate.metric("watchers", kind="events") == 1
        until(lambda: gate.metric("watchers", kind="events") == 0, "the subscription is closed")


@pytest.mark.parametrize("extension", [True, False], ids=["ours", "any"])
async def test_events_notice_a_disconnect_before_the_response(*, extension: bool) -> None:
    """After a disconnect while the head waits for a full socket, subscription and request are freed."""
    settings = Settings.model_validate(
        {
            "server": {"trusted_hosts": ["*"]},
            "upstream": {"endpoint": "http://127.0.0.1:9"},
            "limits": {"subscriptions_per_client": 1},
        }
    )
    app = create_app(settings, redactor=Redactor())
    gone, full, writable = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(_: Message) -> None:
        full.set()
        await writable.wait()

    for _ in range(2):  # the second is admitted only if the first one's subscription was freed
        for event in (gone, full, writable):
            event.clear()
        listeners: dict[object, Callable[[], None]] = {}
        headers = [(b"host", b"x"), (b"traceparent", PARENT), *[(b"a", b"")] * 6500]
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "GET",
            "path": "/v1/events",
            "raw_path": b"/v1/events",
            "query_string": b"taskId=a",
            "headers": headers,
            "client": ("192.0.2.1", 1),
            "extensions": {ON_DISCONNECT: listeners} if extension else {},
        }
        streaming = asyncio.create_task(app.asgi(scope, receive, send))
        await full.wait()
        gone.set()
        for listener in listeners.values():
            listener()
        writable.set()
        await asyncio.wait_for(streaming, PATIENCE_SECONDS)
        assert app.metrics.registry.get_sample_value("sd_gateway_watchers", {"kind": "events"}) == 0
        assert (headers if extension else scope["headers"]) == [(b"traceparent", PARENT)]
        assert scope["query_string"] == b""


@pytest.mark.parametrize("edge", [True, False])
def test_events_behind_unread_responses_are_closed(
    simulator: Simulator, launch: Launch, *, edge: bool
) -> None:
    """Streams that are pipelined behind unread responses leave no subscriber when the connections close."""
    gate = launch(simulator.url, server={"edge": edge})
    task = simulator.task(data={"status": "running", "progress": 0.5})
    stream = b"GET /v1/events?taskId=%b HTTP/1.1\r\nhost: x\r\n\r\n" % task.encode()
    with capture_logs(), ExitStack() as stack:  # rendering a traceback for each connection takes long
        for count in range(100):  # with some of these counts the socket is full when the stream begins
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(gate.address)
            connection.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * count + stream)
        until(lambda: gate.metric("watchers") > 1, "the first streams are open")
        counts = [gate.metric("http_requests_total", route="/openapi.json") for _ in range(3)]
        until(
            lambda: (
                counts.append(gate.metric("http_requests_total", route="/openapi.json"))
                or len(set(counts[-5:])) == 1
            ),
            "no more responses are sent",
        )
        stack.close()
        until(lambda: gate.metric("watchers") == 0, "every subscription is closed")
    assert gate.metric("watched_tasks") == 0
