"""Many callers of one task, and the number of upstream calls: the promises about concurrency."""

import asyncio
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest

from gateway.app import create_app
from gateway.settings.model import Settings
from gateway.telemetry.redaction import Redactor
from tests.support.harness import (
    KEY,
    SECRET,
    Gateway,
    RawUpstream,
    Request,
    Simulator,
    drained,
    framed,
    fresh_id,
    plain_client,
    respond_ok,
    running,
    until,
)

Launch = Callable[..., Gateway]


def crowd(url: str, *, timeout: float | None = 30) -> httpx.AsyncClient:
    """Return a client that opens a connection for each of many concurrent requests."""
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=url, trust_env=False, verify=False, timeout=timeout, limits=limits)  # noqa: S501


@contextmanager
def held_upstream() -> Iterator[tuple[RawUpstream, threading.Event]]:
    """Run an upstream that responds only once the event is set."""
    released = threading.Event()

    def behaviour(connection: socket.socket, request: Request) -> None:
        released.wait(30)
        respond_ok(connection, request)

    with RawUpstream(behaviour) as upstream:
        try:
            yield upstream, released
        finally:
            released.set()


def query(task_id: str) -> bytes:
    """Return a request of the simplified path."""
    return f"GET /v1/progress/{task_id} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode()


def vendor_query(task_id: str) -> bytes:
    """Return a request of a drop-in path."""
    body = json.dumps({"taskId": task_id})
    head = (
        f"POST /scc/sd_get_progress HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}"
    )
    return f"{head}\r\n\r\n{body}".encode()


def send(gate: Gateway, request: bytes) -> socket.socket:
    """Send a request on a connection of its own."""
    connection = gate.connect()
    connection.sendall(request)
    return connection


def sync(gate: Gateway) -> None:
    """Return once the gateway has read what was sent: its event loop serves sockets round robin."""
    for _ in range(2):
        assert gate.client.get("/healthz").status_code == 200


def ask(gate: Gateway, task_id: str) -> socket.socket:
    """Send a query on its own connection; it is read when this returns."""
    connection = send(gate, query(task_id))
    sync(gate)
    return connection


def test_flights_fifty_callers_of_a_cold_task_cost_one_call(launch: Launch) -> None:
    """Concurrent callers of a task that is not cached share one upstream call."""
    with held_upstream() as (upstream, released), ExitStack() as callers:
        gate = launch(upstream.url)
        task = fresh_id()
        waiting = [callers.enter_context(ask(gate, task)) for _ in range(50)]
        released.set()
        answers = [drained(connection) for connection in waiting]
        assert len(upstream.requests) == 1
    assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in answers)
    assert len({answer.partition(b"\r\n\r\n")[2] for answer in answers}) == 1
    statuses = Counter(re.findall(rb"cache-status: ([^\r]*); ttl", answer)[0] for answer in answers)
    assert statuses == {b"sd-gateway; fwd=miss": 1, b"sd-gateway; fwd=miss; collapsed": 49}
    assert gate.metric("cache_lookups_total", result="miss") == 1
    assert gate.metric("cache_lookups_total", result="collapsed") == 49


def test_flights_are_shared_by_both_kinds_of_path(launch: Launch) -> None:
    """Two hundred callers, half of them vendor SDKs, share one call and one response."""
    with held_upstream() as (upstream, released), ExitStack() as callers:
        gate = launch(upstream.url)
        task = fresh_id()
        simple = [callers.enter_context(send(gate, query(task))) for _ in range(100)]
        native = [callers.enter_context(send(gate, vendor_query(task))) for _ in range(100)]
        sync(gate)
        released.set()
        for kind in (simple, native):
            answers = [drained(connection) for connection in kind]
            assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in answers)
            assert len({answer.partition(b"\r\n\r\n")[2] for answer in answers}) == 1
        assert len(upstream.requests) == 1
    assert gate.metric("cache_lookups_total", result="miss") == 1
    assert gate.metric("cache_lookups_total", result="collapsed") == 199


async def test_flights_of_different_operations_are_different(simulator: Simulator, launch: Launch) -> None:
    """The operation is part of the task's key: each of the four causes its own call."""
    simulator.reset(latency_seconds=0.1)
    task = simulator.finished()
    gate = launch(simulator.url)
    operations = ("sd_get_progress", "comfy_get_progress", "sd_get_result", "comfy_get_result")
    async with crowd(gate.url) as client:
        asked = [client.post(f"/scc/{name}", json={"taskId": task}) for name in operations * 5]
        responses = await asyncio.gather(*asked)
    assert {response.status_code for response in responses} == {200}
    assert simulator.stats()["calls"] == dict.fromkeys(operations, 1)


def test_flights_survive_the_disconnect_of_the_first_caller(launch: Launch) -> None:
    """A caller that disconnects, even the first one, cancels nothing for the others."""
    with held_upstream() as (upstream, released):
        gate = launch(upstream.url)
        task = fresh_id()
        with ask(gate, task) as first:
            until(lambda: upstream.requests, "the call is in flight")
            with ask(gate, task) as second:
                first.close()
                assert gate.client.get("/healthz").status_code == 200
                released.set()
                response = drained(second)
        assert response.startswith(b"HTTP/1.1 200 ")
        assert b"collapsed" in response
        assert len(upstream.requests) == 1


def test_flights_on_the_wire_complete_without_callers(launch: Launch) -> None:
    """A request on the wire completes after all callers have left, and the next caller gets its result."""
    with held_upstream() as (upstream, released):
        gate = launch(upstream.url, cache={"running_seconds": 60})
        task = fresh_id()
        ask(gate, task).close()
        until(lambda: upstream.requests, "the call is in flight")
        released.set()
        until(lambda: gate.metric("upstream_requests_total", outcome="ok") == 1, "the call completes")
        assert gate.get(task).headers["cache-status"].startswith("sd-gateway; hit")
        assert len(upstream.requests) == 1


def test_flights_failures_are_shared(launch: Launch) -> None:
    """All waiting callers receive the failure of their shared request, and there is one call only."""
    released = threading.Event()

    def behaviour(connection: socket.socket, _: Request) -> None:
        released.wait(30)
        connection.sendall(framed(b"", status="HTTP/1.1 404 Not Found"))

    with RawUpstream(behaviour) as upstream, ExitStack() as callers:
        gate = launch(upstream.url, cache={"error_seconds": 0})  # only the in-flight request returns it
        task = fresh_id()
        waiting = [callers.enter_context(ask(gate, task)) for _ in range(20)]
        released.set()
        bodies = [drained(connection).partition(b"\r\n\r\n")[2] for connection in waiting]
        assert [json.loads(body)["code"] for body in bodies] == ["upstream-invalid"] * 20
        assert len(upstream.requests) == 1


def test_flights_of_abandoned_requests_leave_nothing_behind(simulator: Simulator, launch: Launch) -> None:
    """Six hundred callers that disconnect early leave no call in flight, and the gateway still serves."""
    simulator.reset(latency_seconds=0.05)
    patient = {"timeout_seconds": 30, "attempt_timeout_seconds": 30, "max_in_flight": 16}
    gate = launch(simulator.url, upstream=patient)
    for _ in range(600):
        with gate.connect() as caller:
            caller.sendall(f"GET /v1/progress/{fresh_id()} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    until(lambda: gate.metric("http_requests_total", status="499") == 600, "every caller has left")
    until(lambda: gate.metric("upstream_in_flight") == 0, "no call is in flight")
    stats = simulator.stats()
    assert stats["inFlight"] == 0
    assert stats["maxInFlight"] <= 16
    assert gate.get(simulator.task()).status_code == 200


@contextmanager
def plain_gateway(endpoint: str, **upstream: float) -> Iterator[Gateway]:
    """Run a gateway under a server without extensions to ASGI."""
    settings = Settings.model_validate(
        {
            "server": {"trusted_hosts": ["*"]},
            "upstream": {"endpoint": endpoint, **upstream},
            "credentials": {"access_key": KEY, "secret_key": SECRET},
        }
    )
    app = create_app(settings, redactor=Redactor()).asgi
    with running(app, lifespan="on") as url, plain_client(url) as client:
        yield Gateway(client)


def batch_query(task_id: str) -> bytes:
    """Return a request for two tasks."""
    head = f"GET /v1/progress?taskId={task_id}&taskId={fresh_id()} HTTP/1.1\r\nhost: x"
    return f"{head}\r\n\r\n".encode()


def long_poll(task_id: str) -> bytes:
    """Return a long poll request."""
    return f"GET /v1/progress/{task_id}?wait=30 HTTP/1.1\r\nhost: x\r\n\r\n".encode()


def stream(task_id: str) -> bytes:
    """Return a request for a task's events."""
    return f"GET /v1/events?taskId={task_id} HTTP/1.1\r\nhost: x\r\n\r\n".encode()


@pytest.mark.parametrize("request_for", [query, vendor_query, batch_query, long_poll, stream])
@pytest.mark.parametrize("edge", [True, False], ids=["extension", "plain ASGI"])
def test_flights_without_callers_are_dropped_while_queued(
    launch: Launch, request_for: Callable[[str], bytes], *, edge: bool
) -> None:
    """Of the queries of callers that leave, only those on the wire are completed."""
    callers, limit = 100, 8
    with held_upstream() as (upstream, released), ExitStack() as stack:
        bounds = {"max_in_flight": limit, "timeout_seconds": 60, "attempt_timeout_seconds": 60}
        if edge:
            gate = launch(upstream.url, upstream=bounds)
        else:
            gate = stack.enter_context(plain_gateway(upstream.url, **bounds))
        waiting = [stack.enter_context(send(gate, request_for(fresh_id()))) for _ in range(callers)]
        until(lambda: len(upstream.requests) == limit, "the limit is reached")
        queries = callers * (2 if request_for is batch_query else 1)
        for _ in range(2):  # requests start in order: with these responses, all queries are queued
            gate.client.get("/healthz")
        for connection in waiting:
            connection.close()
        until(lambda: gate.metric("upstream_abandoned_total") == queries - limit, "the others are dropped")
        released.set()
        until(lambda: gate.metric("upstream_in_flight") == 0, "those on the wire are completed")
        assert gate.metric("upstream_requests_total", outcome="ok") == limit
        assert gate.get(fresh_id()).status_code == 200
        assert len(upstream.requests) == limit + 1


async def test_flights_keep_the_freshness_promise_under_polling(simulator: Simulator, launch: Launch) -> None:
    """No poller sees a response older than lifetime + stale_while_revalidate, at one call per lifetime."""
    lifetime, tolerated, latency = 0.4, 0.4, 0.05
    simulator.reset(latency_seconds=latency)
    # The task's progress advances once per millisecond, so a response shows when it was true.
    task = simulator.task(
        life={"waitingSeconds": 0, "runningSeconds": 1000, "steps": 1_000_000, "jumpBack": False}
    )
    born = time.time()  # Rounded down, so that no response looks older than it is.
    gate = launch(
        simulator.url, cache={"running_seconds": lifetime, "stale_while_revalidate_seconds": tolerated}
    )
    ages: list[float] = []
    began = time.monotonic()

    async def poll(client: httpx.AsyncClient) -> None:
        while time.monotonic() - began < 6 * lifetime:
            asked = time.time()
            response = await client.get(f"/v1/progress/{task}")
            ages.append(asked - born - response.json()["state"]["sampling_step"] / 1000)
            await asyncio.sleep(0.05)  # the interval of the pollers

    async with crowd(gate.url) as client:
        await asyncio.gather(*(poll(client) for _ in range(20)))
    elapsed = time.monotonic() - began
    # Freshness counts from the arrival of a response, whose content was true when the call was sent: the
    # difference is at most the duration of all calls, however busy the machine is.
    called = gate.metric("upstream_request_duration_seconds_sum")
    assert max(ages) < lifetime + tolerated + called
    assert simulator.calls(task) <= 1 + elapsed / lifetime
