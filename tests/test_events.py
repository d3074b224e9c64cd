"""GET /v1/events and /v1/progress/{taskId}/events, over real sockets."""

import asyncio
import json
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
from tests.harness import KEY, PATIENCE_SECONDS, SECRET, Gateway, Simulator, drained, running, serving, until

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
    """Give the blocks of an event stream, as the WHATWG's specification divides it."""
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
                assert event.data is None, "the JSON stands on one line"
                event.data = json.loads(value)


@contextmanager
def stream(gate: Gateway, path: str, **headers: str) -> Iterator[tuple[httpx.Response, Iterator[Event]]]:
    """Open a stream; give its response and its blocks."""
    with gate.client.stream("GET", path, headers=headers) as response:
        yield response, blocks(response.iter_lines())


def dechunked(body: bytes) -> bytes:
    """Return what whole chunks hold (RFC 9112, 7.1); of the last one a part may be missing."""
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
    """Return the next event of this name."""
    return next(event for event in events if event.name == name)


def test_events_tell_a_life_exactly(simulator: Simulator, launch: Launch) -> None:
    """A scripted life arrives as exactly its events, then the end, and the stream closes."""
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
    assert again.status_code == 204, "the reconnect after the end is told to stop"
    assert gate.metric("events_sent_total", event="progress") == 4
    assert gate.metric("events_sent_total", event="end") == 1


def test_events_end_of_other_tasks_is_not_this_end(simulator: Simulator, gate: Gateway) -> None:
    """The end of one stream's tasks does not stop a stream of others."""
    first, second = simulator.finished(), simulator.finished()
    with stream(gate, f"/v1/events?taskId={first}") as (_, events):
        end = named(events, "end")
    with stream(gate, f"/v1/events?taskId={second}", **{"Last-Event-ID": end.id}) as (response, events):
        assert response.status_code == 200
        assert named(events, "progress").data["taskId"] == second


def test_events_of_many_tasks_end_with_the_last(simulator: Simulator, launch: Launch) -> None:
    """Several tasks share a stream: one event each at once, and the end when every one has ended."""
    gate = launch(simulator.url, cache=QUICK)
    done, going = simulator.finished(), simulator.task(data={"status": "running", "progress": 0.5})
    with stream(gate, f"/v1/events?taskId={done}&taskId={going}&taskId={done}") as (_, events):
        first = {named(events, "progress").data["taskId"] for _ in range(2)}
        assert first == {done, going}
        simulator.script(going, status="failed", progress=0.5)
        assert named(events, "progress").data["status"] == "failed"
        assert next(events).name == "end"


def test_events_problem_is_told_once_until_it_changes(simulator: Simulator, launch: Launch) -> None:
    """A task that cannot be read is one problem event, however often it is tried, until it changes."""
    gate = launch(simulator.url, cache=QUICK, upstream={"retries": 0})
    with stream(gate, "/v1/events?taskId=nobody") as (_, events):
        problem = named(events, "problem")
        assert problem.data["taskId"] == "nobody"
        assert problem.data["code"] == "upstream-rejected"
        assert problem.data["upstream"]["errCode"] == "TASK_NOT_FOUND"
        calls = simulator.calls("nobody")
        until(lambda: simulator.calls("nobody") > calls, "it is tried again")
        simulator.fault("status", status=503)
        assert next(event for event in events if event.name).data["code"] == "upstream-invalid"
        simulator.heal()
        simulator.task("nobody", data={"status": "running", "progress": 0.5})
        assert next(event for event in events if event.name).name == "progress"


def test_events_heartbeat_is_a_comment(simulator: Simulator, launch: Launch) -> None:
    """A stream in which nothing changes has a comment line every heartbeat."""
    gate = launch(simulator.url, watch={"heartbeat_seconds": 0.05})
    task = simulator.task(data={"status": "running", "progress": 0.5})
    with stream(gate, f"/v1/progress/{task}/events") as (_, events):
        named(events, "progress")
        assert next(events).comments
        assert next(events).comments


def test_events_heartbeat_goes_with_an_event(simulator: Simulator, launch: Launch) -> None:
    """Where something changes the heartbeat costs no write of its own: it stands in an event's chunk."""
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
    ), "every chunk says its length, and nothing stands between"


def test_events_share_one_schedule(simulator: Simulator, launch: Launch) -> None:
    """Forty streams and thirty long polls cost what one schedule costs, and nothing once they left."""
    # Whatever the upstream's answers take here: to a long poll that comes meanwhile the task is known.
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

        def ticked() -> int:
            made = simulator.calls(task) - before
            return made if made >= 5 else 0

        made: int = until(ticked, "the schedule ticks")
        elapsed = time.monotonic() - started
        # One on the edge, and one ahead: the long polls made the task hot as they came.
        assert made <= elapsed / 0.3 + 2
    until(lambda: gate.metric("watchers") == 0, "every watcher has left")
    assert gate.metric("watched_tasks") == 0
    until(lambda: gate.metric("upstream_in_flight") == 0, "the last flight lands")
    after = simulator.calls(task)
    # Two lifetimes pass by the upstream's own account of another task's watch.
    other = simulator.task(data={"status": "running", "progress": 0.1})
    with stream(gate, f"/v1/progress/{other}/events"):
        until(lambda: simulator.calls(other) >= 3, "other watches go on")
    assert simulator.calls(task) == after


def test_events_slow_reader_gets_the_newest(simulator: Simulator, launch: Launch) -> None:
    """A reader that never reads holds up nobody, and finds the newest state instead of a backlog."""
    gate = launch(simulator.url, cache=QUICK, server={"keep_alive_seconds": 60})
    big = "x" * 600_000
    steps = 24
    task = simulator.task(data={"status": "running", "progress": 0.0, "message": big})
    with socket.socket() as lazy, stream(gate, f"/v1/progress/{task}/events") as (_, events):
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # what the kernel holds is not ours
        lazy.settimeout(PATIENCE_SECONDS)
        lazy.connect(gate.address)
        lazy.sendall(
            b"GET /v1/progress/%s/events HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" % task.encode()
        )
        until(lambda: gate.metric("watchers", kind="events") == 2, "the lazy reader is there")
        for step in range(1, steps + 1):
            simulator.script(task, status="running", progress=step / 100, message=big)
            while named(events, "progress").data["progress"] < step / 100:
                pass
        simulator.script(task, status="failed", progress=0.6, message="over")
        named(events, "end")
        received = drained(lazy)
    assert received.count(b"event: progress") < steps
    assert b'"status":"failed"' in received
    assert b"event: end" in received


@pytest.mark.parametrize("protocol", [b"HTTP/1.0", b"HTTP/1.1"])
def test_events_of_any_framing_arrive_whole(simulator: Simulator, launch: Launch, protocol: bytes) -> None:
    """Without chunks, or with another request behind it on the connection, a stream is the same."""
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


def test_events_refuse_what_is_wrong(simulator: Simulator, gate: Gateway) -> None:
    """No task, too many, a bad one, an unknown parameter: a problem each, and no stream."""
    many = "&".join(f"taskId=t{number}" for number in range(101))
    for query, code in (
        ("", "invalid-parameter"),
        (f"?{many}", "invalid-parameter"),
        ("?taskId=a/b", "invalid-task-id"),
        ("?taskId=a&wait=3", "invalid-parameter"),
        ("?taskId=a&api=dall-e", "invalid-parameter"),
    ):
        answer = gate.client.get(f"/v1/events{query}")
        assert (answer.status_code, answer.json()["code"]) == (400, code), query
    assert simulator.calls() == 0


def test_events_head_answers_without_a_stream(simulator: Simulator, gate: Gateway) -> None:
    """HEAD tells a stream's headers and ends; nobody watches, nothing is asked upstream."""
    answer = gate.client.head("/v1/events?taskId=a")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert simulator.calls() == 0


def test_events_watchers_are_bounded(simulator: Simulator, launch: Launch) -> None:
    """Beyond `watch.max_watchers` a stream is refused as overloaded, with a Retry-After."""
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


def test_events_farewell_when_the_gateway_leaves(simulator: Simulator, tmp_path: Path) -> None:
    """On SIGTERM readyz is 503 at once, every stream and long poll is told, and the exit status is 0."""
    task = simulator.task(data={"status": "running", "progress": 0.5})
    environment = {"SD_GATEWAY_UPSTREAM__ENDPOINT": simulator.url, "SD_GATEWAY_CACHE__RUNNING_SECONDS": "600"}
    with serving(tmp_path, environment) as (process, gate), ExitStack() as stack:
        gate.get(task)  # a long poll of a task that nobody knows does not wait
        streams, polls = [], []
        for target, opened in ((b"/events", streams), (b"?wait=60", polls)):
            for _ in range(20):
                connection = stack.enter_context(gate.connect())
                request = b"GET /v1/progress/%s%s HTTP/1.1\r\nhost: x\r\n\r\n"
                connection.sendall(request % (task.encode(), target))
                opened.append(connection)
        until(lambda: gate.metric("watchers") == 40, "everybody watches")
        process.signal(signal.SIGTERM)
        until(lambda: gate.client.get("/readyz").status_code == 503, "the gateway is unready")
        farewells = [drained(connection) for connection in streams]
        assert all(farewell.count(b"retry: ") == 2 for farewell in farewells)
        assert len({farewell.rpartition(b"retry: ")[2] for farewell in farewells}) > 1, "spread out"
        assert all(b'"progress":0.5' in drained(connection) for connection in polls)
        assert process.exit_status() == 0
        assert "Traceback" not in process.output
        assert KEY not in process.output


def test_events_notice_a_hang_up_under_any_server(simulator: Simulator) -> None:
    """Under a server that does not call back, a reader that leaves is noticed all the same."""
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
        until(lambda: gate.metric("watchers", kind="events") == 0, "the reader is forgotten")


@pytest.mark.parametrize("extension", [True, False], ids=["ours", "any"])
async def test_events_notice_a_hang_up_before_anything_is_sent(*, extension: bool) -> None:
    """A reader that leaves while the head waits for a full socket is forgotten, and so is its request."""
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

    for _ in range(2):  # the second is let in, so the first one's subscription was freed
        for event in (gone, full, writable):
            event.clear()
        listeners: dict[object, Callable[[], None]] = {}
        headers = [(b"host", b"x"), (b"traceparent", PARENT), *[(b"a", b"")] * 6500]
        scope = {
            "type": "http",
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
def test_events_behind_answers_that_nobody_reads_are_forgotten(
    simulator: Simulator, launch: Launch, *, edge: bool
) -> None:
    """Streams pipelined behind unread answers leave no watcher when their connections close."""
    gate = launch(simulator.url, server={"edge": edge})
    task = simulator.task(data={"status": "running", "progress": 0.5})
    stream = b"GET /v1/events?taskId=%b HTTP/1.1\r\nhost: x\r\n\r\n" % task.encode()
    with capture_logs(), ExitStack() as stack:  # a traceback of each connection takes long to render
        for count in range(100):  # with some of these the socket is full when the stream is due
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(gate.address)
            connection.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * count + stream)
        until(lambda: gate.metric("watchers") > 1, "the first streams are open")
        settled = [gate.metric("http_requests_total", route="/openapi.json") for _ in range(3)]
        until(
            lambda: (
                settled.append(gate.metric("http_requests_total", route="/openapi.json"))
                or len(set(settled[-5:])) == 1
            ),
            "no more is answered",
        )
        stack.close()
        until(lambda: gate.metric("watchers") == 0, "every reader is forgotten")
    assert gate.metric("watched_tasks") == 0
