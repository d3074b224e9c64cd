"""What streams and batches say while the upstream fails: which snapshot is old, how old, and why.

outage             code of the stale event, of the batch and of the second stream
credentials        upstream-credentials
throttled          upstream-throttled
busy               upstream-invalid
unreachable        upstream-unreachable
silent             upstream-timeout
circuit open       upstream-open
gateway's limits   overloaded
store lost         none: updates continue
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_events import Event, named, stream
from tests.support.harness import (
    PATIENCE_SECONDS,
    Gateway,
    RawUpstream,
    Simulator,
    free_port,
    fresh_id,
    respond_ok,
    until,
)
from tests.support.storeserver import StoreServer, binary

Launch = Callable[..., Gateway]

TTL = 0.3
CACHE = {"running_seconds": TTL, "waiting_seconds": TTL, "error_seconds": 0.2}
NOTICED_SECONDS = 2.0  # after one lifetime
CLEARED_SECONDS = 2.0
BUSY_MACHINE_SECONDS = 2.0
REFUSED = {"name": "refuse", "code": "A403IS", "message": "Invalid Signature"}
FAULTS = {
    "credentials": (REFUSED, "upstream-credentials"),
    "throttled": (
        {"name": "refuse", "code": "T429ID", "message": "Throttled by API Flow Control"},
        "upstream-throttled",
    ),
    "busy": ({"name": "status", "status": 503}, "upstream-invalid"),
    "silent": ({"name": "silent"}, "upstream-timeout"),
}


def batch(gate: Gateway, *tasks: str, **headers: str) -> Any:
    """Query a batch."""
    response = gate.client.get("/v1/progress", params={"taskId": tasks}, headers=headers)
    assert response.status_code == 200
    return response.json()


def next_named(events: Iterator[Event]) -> Event:
    """Return the next event that is no comment."""
    return next(event for event in events if event.name)


def assert_noticed(gate: Gateway, events: Iterator[Event], task: str, code: str) -> Event:
    """Check that the stream, the batch, a new stream and the metric say that the snapshot is old, and why."""
    event = next_named(events)
    assert (event.name, event.id) == ("stale", "")
    assert event.data.keys() == {"taskId", "api", "stale", "ageSeconds", "title"}
    assert (event.data["taskId"], event.data["api"], event.data["stale"]) == (task, "sd", code)
    assert event.data["title"]
    assert event.data["ageSeconds"] <= TTL + NOTICED_SECONDS + BUSY_MACHINE_SECONDS
    started = time.monotonic()
    answer = batch(gate, task)
    assert time.monotonic() - started < BUSY_MACHINE_SECONDS, "the batch does not wait for the upstream"
    [item] = answer["items"]
    assert (item["stale"], item["status"], answer["summary"]["stale"]) == (code, "running", 1)
    assert item["ageSeconds"] >= event.data["ageSeconds"]
    with stream(gate, f"/v1/events?taskId={task}") as (_, opened):
        assert [next_named(opened).name for _ in range(2)] == ["progress", "stale"]
    assert gate.metric("snapshots_stale") == 1
    return event


def assert_cleared(gate: Gateway, events: Iterator[Event], task: str) -> None:
    """Check that the stream, the batch and the metric say soon that the snapshot is up to date."""
    ended = time.monotonic()
    event = next_named(events)
    assert time.monotonic() - ended < CLEARED_SECONDS + BUSY_MACHINE_SECONDS
    assert event.name == "stale", "the body is unchanged"
    assert (event.data["stale"], event.data["title"]) == (None, None)
    assert event.data["ageSeconds"] < TTL + BUSY_MACHINE_SECONDS
    assert batch(gate, task)["items"][0]["stale"] is None
    until(lambda: gate.metric("snapshots_stale") == 0, "no snapshot is stale")


@pytest.mark.parametrize("outage", FAULTS)
def test_staleness_in_each_outage(simulator: Simulator, launch: Launch, outage: str) -> None:
    """Within a lifetime + 2 s everything says so, with one code, and within 2 s that it is over."""
    fault, code = FAULTS[outage]
    gate = launch(simulator.url, cache=CACHE)
    task = simulator.task(data={"status": "running", "progress": 0.5})
    with stream(gate, f"/v1/events?taskId={task}") as (_, events):
        assert next_named(events).name == "progress"
        for _ in range(2):
            simulator.control("PUT", "/faults", **fault)
            assert_noticed(gate, events, task, code)
            simulator.heal()
            assert_cleared(gate, events, task)
    assert gate.metric("events_sent_total", event="stale") >= 4


def test_staleness_of_an_unreachable_upstream(launch: Launch) -> None:
    """While nothing listens, the snapshot is old because the upstream is unreachable."""
    port, task = free_port(), fresh_id()
    with ExitStack() as stack:
        upstream = RawUpstream(respond_ok, port=port)
        with upstream:
            gate = launch(upstream.url, cache=CACHE)
            _, events = stack.enter_context(stream(gate, f"/v1/events?taskId={task}"))
            assert next_named(events).name == "progress"
        assert_noticed(gate, events, task, "upstream-unreachable")
        stack.enter_context(RawUpstream(respond_ok, port=port))
        assert_cleared(gate, events, task)


def test_staleness_behind_an_open_circuit(simulator: Simulator, launch: Launch) -> None:
    """While other tasks keep the circuit open, the code is that of the open circuit."""
    gate = launch(simulator.url, cache=CACHE | {"error_seconds": 0}, upstream={"retries": 0})
    task, other = (simulator.task(data={"status": "running", "progress": 0.5}) for _ in range(2))
    gate.get(other)  # failed queries of a task that was never known do not open the circuit
    simulator.fault("status", status=503, taskId=other)
    noticed = threading.Event()

    def query_other() -> None:
        while not noticed.is_set():
            gate.get(other)

    with stream(gate, f"/v1/events?taskId={task}") as (_, events):
        assert next_named(events).name == "progress"
        with ThreadPoolExecutor(1) as pool:
            pool.submit(query_other)
            try:
                event = next_named(events)
            finally:
                noticed.set()
        assert (event.name, event.data["stale"]) == ("stale", "upstream-open")
        assert batch(gate, task)["items"][0]["stale"] == "upstream-open"
        assert_cleared(gate, events, task)


def test_staleness_at_the_limit_of_concurrent_calls(simulator: Simulator, launch: Launch) -> None:
    """While other calls take all slots, the code is that of the gateway's own limit."""
    gate = launch(simulator.url, cache=CACHE, upstream={"max_in_flight": 1})
    task = simulator.task(data={"status": "running", "progress": 0.5})
    with stream(gate, f"/v1/events?taskId={task}") as (_, events), gate.connect() as other:
        assert next_named(events).name == "progress"
        simulator.fault("slow", taskId="other", seconds=4.0)
        other.sendall(b"GET /v1/progress/other HTTP/1.1\r\nhost: x\r\n\r\n")
        assert_noticed(gate, events, task, "overloaded")
        assert_cleared(gate, events, task)


def test_staleness_while_the_rate_limiter_queues(simulator: Simulator, launch: Launch) -> None:
    """While refreshes are queued by the gateway's own rate limiter, the code is that of throttling."""
    gate = launch(simulator.url, cache=CACHE, upstream={"requests_per_second": 0.2})
    task = simulator.task(data={"status": "running", "progress": 0.5})
    with stream(gate, f"/v1/events?taskId={task}") as (_, events):
        assert next_named(events).name == "progress"
        assert_noticed(gate, events, task, "upstream-throttled")


def test_staleness_without_a_store(simulator: Simulator, launch: Launch, tmp_path: Path) -> None:
    """When the store is lost, updates continue, and no snapshot is called old."""
    with StoreServer(binary("valkey"), tmp_path) as server:
        gate = launch(simulator.url, cache=CACHE, store={"url": server.url})
        until(lambda: gate.metric("store_up") == 1, "the store is connected")
        task = simulator.task(data={"status": "running", "progress": 0.1})
        with stream(gate, f"/v1/events?taskId={task}") as (_, events):
            assert next_named(events).data["progress"] == 0.1
            server.kill()
            for step in range(2, 6):
                simulator.script(task, status="running", progress=step / 10)
                assert next_named(events).data["progress"] == step / 10
                assert batch(gate, task)["items"][0]["stale"] is None
            simulator.control("PUT", "/faults", **REFUSED)
            assert_noticed(gate, events, task, "upstream-credentials")
            simulator.heal()
            assert_cleared(gate, events, task)


def test_staleness_with_a_store(simulator: Simulator, launch: Launch, tmp_path: Path) -> None:
    """Subscribers of two replicas learn of an outage and of its end."""
    with StoreServer(binary("valkey"), tmp_path) as server, ExitStack() as stack:
        gates = [launch(simulator.url, cache=CACHE, store={"url": server.url}) for _ in range(2)]
        for gate in gates:
            until(lambda gate=gate: gate.metric("store_up") == 1, "the store is connected")
        task = simulator.task(data={"status": "running", "progress": 0.5})
        streams = [stack.enter_context(stream(gate, f"/v1/events?taskId={task}"))[1] for gate in gates]
        for events in streams:
            assert next_named(events).name == "progress"
        simulator.control("PUT", "/faults", **REFUSED)
        for gate, events in zip(gates, streams, strict=True):
            assert_noticed(gate, events, task, "upstream-credentials")
        simulator.heal()
        for gate, events in zip(gates, streams, strict=True):
            assert_cleared(gate, events, task)


def test_staleness_without_credentials_says_so(simulator: Simulator, launch: Launch) -> None:
    """Without a key pair the upstream was never asked, and the title does not say that it refused."""
    gate = launch(simulator.url, credentials={"access_key": "", "secret_key": ""})
    with stream(gate, "/v1/events?taskId=a") as (_, events):
        problem = named(events, "problem").data
    assert (problem["code"], problem["title"]) == ("upstream-credentials", "The gateway has no credentials")
    [item] = batch(gate, "a")["items"]
    assert item["error"]["title"] == "The gateway has no credentials"
    assert simulator.calls() == 0


def test_staleness_is_in_the_etag_of_a_batch_and_the_age_is_not(simulator: Simulator, launch: Launch) -> None:
    """A batch is 304 while only its age changes, and a long poll returns when an update becomes overdue."""
    gate = launch(simulator.url, cache=CACHE)
    task = simulator.task(data={"status": "running", "progress": 0.5})
    query = {"taskId": [task]}
    first = gate.client.get("/v1/progress", params=query)
    calls = simulator.calls()
    until(lambda: gate.client.get("/v1/progress", params=query) and simulator.calls() > calls, "a refresh")
    tag = {"If-None-Match": first.headers["etag"]}
    assert gate.client.get("/v1/progress", params=query, headers=tag).status_code == 304
    simulator.control("PUT", "/faults", **REFUSED)
    stale = gate.client.get("/v1/progress", params=query | {"wait": 30}, headers=tag)
    assert (stale.status_code, stale.json()["items"][0]["stale"]) == (200, "upstream-credentials")
    tag = {"If-None-Match": stale.headers["etag"]}
    assert gate.client.get("/v1/progress", params=query, headers=tag).status_code == 304
    simulator.heal()
    cleared = gate.client.get("/v1/progress", params=query | {"wait": 30}, headers=tag)
    assert (cleared.status_code, cleared.json()["items"][0]["stale"]) == (200, None)
    assert cleared.headers["etag"] == first.headers["etag"]


def test_staleness_of_a_task_that_nobody_watches(simulator: Simulator, launch: Launch) -> None:
    """Batches alone say that the upstream is silent, without waiting for it, and that it is not any more."""
    gate = launch(simulator.url, cache=CACHE)
    task = simulator.task(data={"status": "running", "progress": 0.5})
    assert batch(gate, task)["items"][0]["stale"] is None
    simulator.fault("silent")
    began = time.monotonic()
    until(lambda: batch(gate, task)["items"][0]["stale"] == "upstream-timeout", "the batch says so")
    assert time.monotonic() - began < TTL + NOTICED_SECONDS + BUSY_MACHINE_SECONDS
    simulator.heal()
    until(lambda: batch(gate, task)["items"][0]["stale"] is None, "the batch says that it is over")
    assert gate.metric("snapshots_stale") == 0, "the metric counts watched tasks"


def test_staleness_for_the_first_subscriber(simulator: Simulator, launch: Launch) -> None:
    """Streams and long polls that begin during a silent outage soon receive the stale snapshot."""
    gate = launch(simulator.url, cache=CACHE | {"stale_while_revalidate_seconds": 0})
    tasks = [simulator.task(data={"status": "running", "progress": 0.5}) for _ in range(3)]
    path = f"/v1/events?taskId={tasks[0]}"
    with stream(gate, path) as (_, events):
        received = next_named(events).id
    for task in tasks[1:]:
        gate.get(task)
    simulator.fault("silent")
    time.sleep(TTL)
    began = time.monotonic()
    with ThreadPoolExecutor() as pool, ExitStack() as stack:
        poll = pool.submit(gate.get, tasks[1], params={"wait": 30})
        batch_poll = pool.submit(gate.client.get, "/v1/progress", params={"taskId": tasks[2], "wait": 30})
        streams = [
            stack.enter_context(stream(gate, path))[1],
            stack.enter_context(stream(gate, path, **{"Last-Event-ID": received}))[1],
        ]
        for events in streams:
            assert next_named(events).name == "progress"
            assert next_named(events).data["stale"] == "upstream-timeout"
        response, answer = poll.result(), batch_poll.result().json()
        assert time.monotonic() - began < NOTICED_SECONDS + BUSY_MACHINE_SECONDS
        assert "detail=upstream-timeout" in response.headers["cache-status"]
        assert answer["items"][0]["stale"] == "upstream-timeout"
        simulator.heal()
        for events in streams:
            assert_cleared(gate, events, tasks[0])


def test_staleness_ends_with_a_problem(simulator: Simulator, launch: Launch) -> None:
    """When the snapshot is too old to be shown, a problem replaces it; afterwards both are over."""
    gate = launch(simulator.url, cache=CACHE | {"stale_if_error_seconds": 1.0})
    task = simulator.task(data={"status": "running", "progress": 0.5})
    with stream(gate, f"/v1/events?taskId={task}") as (_, events):
        assert next_named(events).name == "progress"
        simulator.control("PUT", "/faults", **REFUSED)
        assert next_named(events).name == "stale"
        problem = next_named(events)
        assert (problem.name, problem.data["code"]) == ("problem", "upstream-credentials")
        with stream(gate, f"/v1/events?taskId={task}") as (_, opened):
            assert next_named(opened).name == "problem", "no snapshot is shown that could be stale"
        simulator.heal()
        assert [next_named(events).name for _ in range(2)] == ["progress", "stale"]


def test_staleness_of_ended_tasks_does_not_exist(simulator: Simulator, launch: Launch) -> None:
    """The snapshot of a task that has ended is final, however old it is."""
    gate = launch(simulator.url, cache=CACHE | {"terminal_seconds": 0.1, "stale_while_revalidate_seconds": 0})
    task = simulator.finished()
    gate.get(task)
    simulator.control("PUT", "/faults", **REFUSED)
    until(
        lambda: "detail" in gate.get(task).headers["cache-status"],
        "the snapshot is served instead of an error",
    )
    answer = batch(gate, task)
    assert (answer["items"][0]["stale"], answer["summary"]["stale"]) == (None, 0)
    with stream(gate, f"/v1/events?taskId={task}") as (_, events):
        assert [next_named(events).name for _ in range(2)] == ["progress", "end"]


def test_staleness_and_resume(simulator: Simulator, launch: Launch) -> None:
    """A client that reconnects with its last event ID gets the progress and then the stale event."""
    gate = launch(simulator.url, cache=CACHE)
    task = simulator.task(data={"status": "running", "progress": 0.5})
    path = f"/v1/events?taskId={task}"
    with stream(gate, path) as (_, events):
        progress = next_named(events)
        simulator.control("PUT", "/faults", **REFUSED)
        assert next_named(events).name == "stale"
        # The first stream is still open: its schedule keeps the task.
        with stream(gate, path, **{"Last-Event-ID": progress.id}) as (_, resumed):
            again, stale = next_named(resumed), next_named(resumed)
            assert (again.name, again.id, again.data) == ("progress", progress.id, progress.data)
            assert (stale.name, stale.id, stale.data["stale"]) == ("stale", "", "upstream-credentials")


def test_staleness_reaches_a_slow_reader_as_the_latest_state(simulator: Simulator, launch: Launch) -> None:
    """A reader that stops reading during several outages receives only the latest state."""
    gate = launch(simulator.url, cache=CACHE, server={"keep_alive_seconds": 60})
    task = simulator.task(data={"status": "running", "progress": 0.1, "message": "x" * 600_000})
    with slow_reader(gate, task) as slow, stream(gate, f"/v1/events?taskId={task}") as (_, events):
        assert next_named(events).name == "progress"
        for _ in range(3):
            simulator.control("PUT", "/faults", **REFUSED)
            assert named(events, "stale").data["stale"]
            simulator.heal()
            assert named(events, "stale").data["stale"] is None
        simulator.script(task, status="failed", progress=0.1)
        named(events, "end")
        received = b""
        while b"event: end" not in received:
            received += slow.recv(65536)
    assert received.count(b"event: stale") == 0
    assert b'"status":"failed"' in received


@contextmanager
def slow_reader(gate: Gateway, task: str) -> Iterator[Any]:
    """Open a stream on a connection that is not read; yield the connection."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(PATIENCE_SECONDS)
        connection.connect(gate.address)
        connection.sendall(b"GET /v1/progress/%s/events HTTP/1.1\r\nhost: x\r\n\r\n" % task.encode())
        until(lambda: gate.metric("watchers", kind="events") >= 1, "the slow reader is there")
        yield connection
