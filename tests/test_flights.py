"""Many callers of one task, and what they cost: the promises about concurrency."""

import asyncio
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx

from tests.harness import Gateway, RawUpstream, Request, Simulator, drained, fresh_id, until, well

Launch = Callable[..., Gateway]


def crowd(url: str, *, timeout: float | None = 30) -> httpx.AsyncClient:
    """Return a client that opens a connection for each of many concurrent requests."""
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=url, trust_env=False, verify=False, timeout=timeout, limits=limits)  # noqa: S501


@contextmanager
def held_upstream() -> Iterator[tuple[RawUpstream, threading.Event]]:
    """Run an upstream that answers when the event is set, and not before."""
    released = threading.Event()

    def behaviour(connection: socket.socket, request: Request) -> None:
        released.wait(30)
        well(connection, request)

    with RawUpstream(behaviour) as upstream:
        try:
            yield upstream, released
        finally:
            released.set()


def ask(gate: Gateway, task_id: str) -> socket.socket:
    """Send a query on a connection of its own; when this returns, the gateway has read it."""
    connection = gate.connect()
    connection.sendall(
        f"GET /v1/progress/{task_id} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode()
    )
    # What came before this request is read before it: the event loop takes its sockets in turns.
    for _ in range(2):
        assert gate.client.get("/healthz").status_code == 200
    return connection


async def test_flights_fifty_callers_of_a_cold_task_cost_one_call(
    simulator: Simulator, launch: Launch
) -> None:
    """Concurrent callers of a task that nobody asked for before share one upstream call."""
    simulator.reset(latency_seconds=0.5)
    task = simulator.task()
    gate = launch(simulator.url)
    async with crowd(gate.url) as client:
        responses = await asyncio.gather(*(client.get(f"/v1/progress/{task}") for _ in range(50)))
    assert {response.status_code for response in responses} == {200}
    assert len({response.content for response in responses}) == 1
    assert simulator.calls(task) == 1
    told = Counter(response.headers["cache-status"].partition("; ttl")[0] for response in responses)
    assert told["sd-gateway; fwd=miss"] == 1
    assert gate.metric("cache_lookups_total", result="miss") == 1
    # Who came when the answer was there already had a hit: on a slow machine that may be one or two.
    assert told["sd-gateway; fwd=miss; collapsed"] + told["sd-gateway; hit"] == 49
    assert told["sd-gateway; fwd=miss; collapsed"] > 25
    assert gate.metric("cache_lookups_total") == 50


async def test_flights_are_shared_by_both_kinds_of_path(simulator: Simulator, launch: Launch) -> None:
    """Two hundred callers, half of them vendor SDKs, share one call and one answer."""
    simulator.reset(latency_seconds=0.5)
    task = simulator.task()
    gate = launch(simulator.url, cache={"running_seconds": 60})
    async with crowd(gate.url) as client:
        simple = [client.get(f"/v1/progress/{task}") for _ in range(100)]
        native = [client.post("/scc/sd_get_progress", json={"taskId": task}) for _ in range(100)]
        responses = await asyncio.gather(*simple, *native)
    assert {response.status_code for response in responses} == {200}
    assert len({response.content for response in responses[:100]}) == 1
    assert len({response.content for response in responses[100:]}) == 1
    assert simulator.calls(task) == 1


async def test_flights_of_different_operations_are_different(simulator: Simulator, launch: Launch) -> None:
    """The operation is part of a task's identity: each of the four is asked for once."""
    simulator.reset(latency_seconds=0.1)
    task = simulator.finished()
    gate = launch(simulator.url)
    operations = ("sd_get_progress", "comfy_get_progress", "sd_get_result", "comfy_get_result")
    async with crowd(gate.url) as client:
        asked = [client.post(f"/scc/{name}", json={"taskId": task}) for name in operations * 5]
        responses = await asyncio.gather(*asked)
    assert {response.status_code for response in responses} == {200}
    assert simulator.stats()["calls"] == dict.fromkeys(operations, 1)


def test_flights_survive_the_first_callers_hanging_up(launch: Launch) -> None:
    """A caller who leaves, the first one included, cancels nothing for those who wait."""
    with held_upstream() as (upstream, released):
        gate = launch(upstream.url)
        task = fresh_id()
        with ask(gate, task) as first:
            until(lambda: upstream.requests, "the flight is in the air")
            with ask(gate, task) as second:
                first.close()
                assert gate.client.get("/healthz").status_code == 200
                released.set()
                response = drained(second)
        assert response.startswith(b"HTTP/1.1 200 ")
        assert b"collapsed" in response
        assert len(upstream.requests) == 1


def test_flights_land_though_nobody_waits(launch: Launch) -> None:
    """A flight whose every caller has left ends well, and the next caller finds its answer."""
    with held_upstream() as (upstream, released):
        gate = launch(upstream.url, cache={"running_seconds": 60})
        task = fresh_id()
        ask(gate, task).close()
        until(lambda: upstream.requests, "the flight is in the air")
        released.set()
        until(lambda: gate.metric("upstream_requests_total", outcome="ok") == 1, "the flight lands")
        assert gate.get(task).headers["cache-status"].startswith("sd-gateway; hit")
        assert len(upstream.requests) == 1


def test_flights_failures_are_shared(simulator: Simulator, launch: Launch) -> None:
    """Those who wait for a flight that fails all hear of it, and upstream is asked no more than once."""
    simulator.reset(latency_seconds=0.3)
    simulator.fault("status", status=404)
    gate = launch(simulator.url)
    task = fresh_id()
    with ThreadPoolExecutor(20) as pool:
        codes = list(pool.map(lambda _: gate.get(task).json()["code"], range(20)))
    assert set(codes) == {"upstream-invalid"}
    assert simulator.calls(task) == 1


def test_flights_of_impatient_callers_leave_nothing_behind(simulator: Simulator, launch: Launch) -> None:
    """Six hundred callers who leave before their answers leave no call in the air; the gateway serves on."""
    simulator.reset(latency_seconds=0.05)
    patient = {"timeout_seconds": 30, "attempt_timeout_seconds": 30, "max_in_flight": 16}
    gate = launch(simulator.url, upstream=patient)
    for _ in range(600):
        with gate.connect() as caller:
            caller.sendall(f"GET /v1/progress/{fresh_id()} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    until(lambda: gate.metric("upstream_requests_total") == 600, "every flight has landed")
    assert gate.metric("upstream_in_flight") == 0
    stats = simulator.stats()
    assert stats["inFlight"] == 0
    assert stats["maxInFlight"] == 16
    assert len(stats["callsByTask"]) == 600
    assert gate.get(simulator.task()).status_code == 200


async def test_flights_keep_the_freshness_promise_under_polling(simulator: Simulator, launch: Launch) -> None:
    """Pollers see no answer older than lifetime + stale_while_revalidate, upstream one call a lifetime."""
    lifetime, tolerated, latency = 0.4, 0.4, 0.05
    simulator.reset(latency_seconds=latency)
    # A step of this task's progress is a millisecond of its life, so that an answer tells when it was true.
    born = time.time()
    task = simulator.task(
        life={"waitingSeconds": 0, "runningSeconds": 1000, "steps": 1_000_000, "jumpBack": False}
    )
    gate = launch(
        simulator.url, cache={"running_seconds": lifetime, "stale_while_revalidate_seconds": tolerated}
    )
    ages: list[float] = []
    began = time.monotonic()

    async def poll(client: httpx.AsyncClient) -> None:
        while time.monotonic() - began < 6 * lifetime:
            response = await client.get(f"/v1/progress/{task}")
            ages.append(time.time() - born - response.json()["state"]["sampling_step"] / 1000)
            await asyncio.sleep(0.05)  # the pollers' own rhythm

    async with crowd(gate.url) as client:
        await asyncio.gather(*(poll(client) for _ in range(20)))
    elapsed = time.monotonic() - began
    noise = 0.5  # of a machine that does other things as well
    assert max(ages) < lifetime + tolerated + latency + noise
    assert simulator.calls(task) <= 1 + elapsed / lifetime
