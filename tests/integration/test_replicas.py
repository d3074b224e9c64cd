"""The guarantees of several replicas with a shared store, over real sockets, on a real server."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from socket import socket
from typing import Any

import httpx
import pytest

from tests.support.harness import (
    Gateway,
    Json,
    RawUpstream,
    Request,
    drained,
    framed,
    fresh_id,
    plain_client,
    serving,
    until,
)
from tests.support.storeserver import StoreServer, binary, cluster, guarded, migrate

Launch = Callable[..., Gateway]
REPLICAS = 3
# Long enough for a busy machine: lease timeouts are tested elsewhere.
STORE: Json = {"timeout_seconds": 1.0}


@pytest.fixture
def server(tmp_path: Path, _leftovers: list[threading.Thread]) -> Iterator[StoreServer]:
    """Return a server for the replicas' store. It outlives them: its failure is tested elsewhere."""
    with StoreServer(binary("valkey"), tmp_path) as server:
        yield server
        for thread in _leftovers:
            thread.join()


class Held:
    """An upstream that answers one query after the other, each when it is released.

    Question number N is answered with a progress of N thousandths. While `closed`, none is.
    """

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self._numbers = itertools.count(1)

    def __call__(self, connection: socket, request: Request) -> None:
        number = next(self._numbers)
        self.open.wait(60)
        connection.sendall(framed(request.envelope(progress=number / 1000)))


@pytest.fixture
def held() -> Held:
    """Return the behaviour of the upstream."""
    return Held()


@pytest.fixture
def upstream(held: Held) -> Iterator[RawUpstream]:
    """Return an upstream that counts its responses and can delay them."""
    with RawUpstream(held) as upstream:
        try:
            yield upstream
        finally:
            held.open.set()


@pytest.fixture
def start(server: StoreServer, upstream: RawUpstream, launch: Launch) -> Callable[..., list[Gateway]]:
    """Return a function that starts replicas and returns them once they are connected."""

    def start(**sections: Json) -> list[Gateway]:
        sections["store"] = {**STORE, "url": server.url, **sections.get("store", {})}
        replicas = [launch(upstream.url, **sections) for _ in range(REPLICAS)]
        until(lambda: all(map(shares, replicas)), "every replica reaches the store")
        return replicas

    return start


@pytest.fixture
def replicas(start: Callable[..., list[Gateway]]) -> list[Gateway]:
    """Return replicas that share a store."""
    return start()


def shares(gateway: Gateway) -> bool:
    """Return whether a replica is connected to the store."""
    return gateway.metric("store_up") == 1


def shown(gateway: Gateway, task_id: str) -> Json:
    """Return a replica's response for a task."""
    answer = gateway.get(task_id)
    assert answer.status_code == httpx.codes.OK, answer.text
    body: Json = answer.json()
    return body


def progress(gateway: Gateway, task_id: str) -> float:
    """Return the progress that a replica serves."""
    value: float = shown(gateway, task_id)["progress"]
    return value


def events(gateway: Gateway, task_id: str) -> Iterator[Json]:
    """Follow the stream of a task; yield the data of its events."""
    with gateway.client.stream("GET", f"/v1/progress/{task_id}/events") as answer:
        for line in answer.iter_lines():
            if line.startswith("data:"):
                yield json.loads(line.removeprefix("data:"))


def test_replicas_make_one_call_for_simultaneous_clients(
    held: Held, upstream: RawUpstream, replicas: list[Gateway]
) -> None:
    """Sixty simultaneous clients of replicas with empty caches cause one upstream call."""
    held.open.clear()
    task_id = fresh_id()
    with ThreadPoolExecutor(60) as pool:
        asking = [pool.submit(progress, replica, task_id) for replica in replicas for _ in range(20)]
        until(lambda: upstream.requests, "a query arrives")
        until(
            lambda: all(taken_off(replica) for replica in replicas), "every replica has asked for the lease"
        )
        held.open.set()
        assert {answer.result() for answer in asking} == {0.001}
    assert len(upstream.requests) == 1


def taken_off(gateway: Gateway) -> float:
    """Return how often a replica has tried to acquire a lease."""
    return gateway.metric("store_operation_duration_seconds_count", operation="take_off")


def test_replicas_make_one_call_per_lifetime(
    upstream: RawUpstream, start: Callable[..., list[Gateway]]
) -> None:
    """Replicas polled in turn query the upstream as often as one replica: once per lifetime."""
    lifetime = 0.3
    replicas = start(cache={"running_seconds": lifetime})
    task_id = fresh_id()
    began = time.monotonic()
    for replica in itertools.cycle(replicas):
        shown(replica, task_id)
        if len(upstream.requests) >= 6:
            break
    calls, elapsed = len(upstream.requests), time.monotonic() - began
    # A refresh starts early by the average duration of the calls so far. The sum of these averages is at most
    # the sum of the durations, however busy the machine is.
    called = sum(replica.metric("upstream_request_duration_seconds_sum") for replica in replicas)
    assert calls <= 1 + (elapsed + called) / lifetime


class Latest:
    """The largest progress that a client has received of a task from any replica, and when.

    A client without a tag may receive an older response only within the propagation time of a change: a few
    milliseconds, and more on a busy machine.
    """

    PROPAGATION_SECONDS = 0.5

    def __init__(self) -> None:
        self.progress = 0.0
        self._received_at = time.monotonic()

    def read(self, gateway: Gateway, task_id: str) -> None:
        """Query a replica, and check that it is not behind."""
        sent = time.monotonic()
        now = progress(gateway, task_id)
        if now > self.progress:
            self.progress, self._received_at = now, time.monotonic()
        elif now < self.progress:
            assert sent - self._received_at < self.PROPAGATION_SECONDS


def test_replicas_never_go_back_for_a_client_with_a_tag(
    upstream: RawUpstream, start: Callable[..., list[Gateway]]
) -> None:
    """A client that returns its last tag receives the same version from any replica, or a newer one."""
    replicas = start(cache={"running_seconds": 0.1})
    task_id = fresh_id()
    last, tag = 0.0, '""'
    for replica in itertools.cycle(replicas):
        answer = replica.get(task_id, headers={"If-None-Match": tag})
        tag = answer.headers["etag"]
        if answer.status_code == httpx.codes.OK:
            now = answer.json()["progress"]
            assert now > last
            last = now
        else:
            assert answer.status_code == httpx.codes.NOT_MODIFIED
        if len(upstream.requests) >= 20:
            break
    assert last >= 0.015


def test_replicas_never_go_back_for_a_stream_that_reconnects(
    upstream: RawUpstream, start: Callable[..., list[Gateway]]
) -> None:
    """A stream that is opened again on another replica, with its last event ID, begins where it was."""
    replicas = start(cache={"running_seconds": 0.1})
    task_id = fresh_id()
    last, last_id = 0.0, ""
    for replica in itertools.cycle(replicas):
        with replica.client.stream(
            "GET", f"/v1/progress/{task_id}/events", headers={"Last-Event-ID": last_id}
        ) as stream:
            for line in stream.iter_lines():
                if line.startswith("id:"):
                    last_id = line.removeprefix("id:").strip()
                if line.startswith("data:"):
                    now = json.loads(line.removeprefix("data:"))["progress"]
                    assert now >= last
                    last = now
                    break
        if len(upstream.requests) >= 20:
            break


def test_replicas_are_behind_for_a_moment_at_most(
    upstream: RawUpstream, start: Callable[..., list[Gateway]]
) -> None:
    """Each replica serves the same snapshot as the one queried before, once a change has arrived."""
    replicas = start(cache={"running_seconds": 0.1})
    task_id, latest = fresh_id(), Latest()
    for replica in itertools.cycle(replicas):
        latest.read(replica, task_id)
        if len(upstream.requests) >= 20:
            break
    assert latest.progress >= 0.015


def test_replicas_streams_share_a_schedule(start: Callable[..., list[Gateway]]) -> None:
    """Streams of one task on all replicas share one schedule: each receives every result of any replica."""
    replicas = start(cache={"running_seconds": 0.4})
    task_id = fresh_id()
    with ExitStack() as stack:
        streams = [stack.enter_context(closing(events(replica, task_id))) for replica in replicas]
        told = [[next(stream)["progress"]] for stream in streams]
        for one, stream in zip(told, streams, strict=True):
            one.extend(next(stream)["progress"] for _ in range(5))
    for one in told:
        assert one == sorted(one)
        # With one schedule per replica, every third result would be its own.
        assert one[-1] - one[0] <= 0.008
    # Each response of the upstream is another one, so a result that all replicas show came from one of them.
    assert set.intersection(*map(set, told))


def test_replicas_share_a_failure(upstream: RawUpstream, start: Callable[..., list[Gateway]]) -> None:
    """An invalid response that one replica received is a cached failure in all others."""
    upstream.behaviour = lambda connection, _request: connection.sendall(framed(b"no envelope"))
    replicas = start(cache={"error_seconds": 60})
    task_id = fresh_id()
    answers = [replica.get(task_id).json()["code"] for replica in replicas]
    assert answers == ["upstream-invalid"] * REPLICAS
    assert len(upstream.requests) == 1


def test_replicas_share_the_end_of_a_task(upstream: RawUpstream, replicas: list[Gateway]) -> None:
    """A task that ended on one replica has ended on all, and is not queried again."""
    upstream.behaviour = lambda connection, request: connection.sendall(
        framed(request.envelope(status="succeeded", progress=1))
    )
    task_id = fresh_id()
    assert [shown(replica, task_id)["terminal"] for replica in replicas] == [True] * REPLICAS
    assert len(upstream.requests) == 1


def test_replicas_share_the_rate_limit(upstream: RawUpstream, start: Callable[..., list[Gateway]]) -> None:
    """A limit of ten calls per second applies to all replicas together."""
    per_second, calls = 10, 24
    replicas = start(upstream={"requests_per_second": per_second, "timeout_seconds": 60})
    began = time.monotonic()
    with ThreadPoolExecutor(calls) as pool:
        asked = itertools.islice(itertools.cycle(replicas), calls)
        answers = list(pool.map(lambda replica: replica.get(fresh_id()).status_code, asked))
    assert answers == [httpx.codes.OK] * calls
    # A busy machine takes longer, never shorter; with separate limits it would take a third.
    assert time.monotonic() - began >= (calls - 2) / per_second
    assert len(upstream.requests) == calls


def test_replicas_need_the_extra_to_share(tmp_path: Path) -> None:
    """Without the client library, a configured store stops the start; the message says what to install."""
    without = (
        "import sys; sys.modules['redis'] = None\n"
        "from gateway.cli.main import main; sys.exit(main(['serve']))"
    )
    told = subprocess.run(
        [sys.executable, "-c", without],
        cwd=tmp_path,
        env={**os.environ, "SD_GATEWAY_STORE__URL": "valkey://:s3cret@127.0.0.1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 2
    assert told.stderr == (
        'sd-gateway: SD_GATEWAY_STORE__URL: store.url = "valkey://(hidden)@127.0.0.1": '
        "needs the extra valkey (the package redis): pip install 'redis[hiredis]<9,>=8.1'\n"
    )
    assert "s3cret" not in told.stdout + told.stderr


# Without the store


def alone(gateway: Gateway) -> bool:
    """Return whether a replica reports that it works without the store, while it stays ready."""
    answer = gateway.client.get("/readyz")
    assert answer.status_code == httpx.codes.OK
    told = any(line.startswith("store: ") for line in answer.json()["degraded"])
    return told and not shares(gateway)


@contextmanager
def polled(replicas: list[Gateway], task_ids: list[str]) -> Iterator[list[int]]:
    """Query every replica from a few clients until the context ends; yield the statuses received."""
    over = threading.Event()
    statuses: list[int] = []

    def poll(replica: Gateway) -> None:
        with plain_client(replica.url) as client:
            for task_id in itertools.cycle(task_ids):
                # Without a pause, the servers of the store have taken longer than a second to reply.
                if over.wait(0.001):
                    return
                statuses.append(client.get(f"/v1/progress/{task_id}").status_code)

    with ThreadPoolExecutor(len(replicas)) as pool:
        polling = [pool.submit(poll, replica) for replica in replicas]
        try:
            yield statuses
        finally:
            over.set()
        for each in polling:
            each.result()


@pytest.mark.parametrize(
    ("harm", "heal"),
    [
        (StoreServer.kill, StoreServer.start),
        (StoreServer.freeze, StoreServer.thaw),
        (StoreServer.forbid_writes, StoreServer.allow_writes),
        (StoreServer.fill, StoreServer.unfill),
    ],
    ids=["killed", "frozen", "read-only", "full"],
)
def test_replicas_work_without_the_store(
    harm: Callable[[StoreServer], None],
    heal: Callable[[StoreServer], None],
    server: StoreServer,
    upstream: RawUpstream,
    start: Callable[..., list[Gateway]],
) -> None:
    """If the server fails in any way, no response fails; each replica queries for itself until it is back."""
    # With a shorter timeout, a process that is paused on a busy machine would count the store as lost again.
    replicas = start(cache={"terminal_seconds": 600}, store={"timeout_seconds": 1})
    old = fresh_id()
    assert len({progress(replica, old) for replica in replicas}) == 1
    with polled(replicas, [old, *(fresh_id() for _ in range(5))]) as statuses:
        harm(server)
        for replica in replicas:
            until(lambda replica=replica: shown(replica, fresh_id()) and alone(replica), "it is alone")  # type: ignore[misc]
        new = fresh_id()
        assert len({progress(replica, new) for replica in replicas}) == REPLICAS
        asked = [request.task_id for request in list(upstream.requests)]
        assert asked.count(new) >= REPLICAS
        heal(server)
        until(lambda: all(map(shares, replicas)), "every replica shares again")
        ended = fresh_id()
        upstream.behaviour = lambda connection, request: connection.sendall(
            framed(request.envelope(status="succeeded", progress=1))
        )
        assert [shown(replica, ended)["taskId"] for replica in replicas] == [ended] * REPLICAS
        asked = [request.task_id for request in list(upstream.requests)]
        assert asked.count(ended) == 1
    assert set(statuses) == {httpx.codes.OK}
    assert all(replica.metric("store_errors_total") > 0 for replica in replicas)


@pytest.fixture
def sharing(upstream: RawUpstream, launch: Launch) -> Callable[[Json], list[Gateway]]:
    """Return a function that starts replicas with a store of any kind."""

    def start(store: Json) -> list[Gateway]:
        replicas = [launch(upstream.url, store={**STORE, **store}) for _ in range(REPLICAS)]
        until(lambda: all(map(shares, replicas)), "every replica reaches the store")
        return replicas

    return start


def test_replicas_follow_a_failover(sharing: Callable[[Json], list[Gateway]], tmp_path: Path) -> None:
    """While Sentinel promotes another server no response fails; then all replicas share again."""
    with guarded(tmp_path) as servers:
        replicas = sharing({"url": servers.sentinel.url, "sentinel_service": "main", "timeout_seconds": 0.2})
        with polled(replicas, [fresh_id() for _ in range(5)]) as statuses:
            until(lambda: len(statuses) > 100, "there is load")
            servers.primary.kill()
            until(lambda: not any(map(shares, replicas)), "every replica is alone")
            until(lambda: all(map(shares, replicas)), "every replica shares again")
        assert set(statuses) == {httpx.codes.OK}


def test_replicas_share_while_slots_move(
    sharing: Callable[[Json], list[Gateway]], upstream: RawUpstream, tmp_path: Path
) -> None:
    """While slots of a cluster move no response fails, no replica works alone, none falls behind."""
    with cluster(tmp_path) as nodes:
        replicas = sharing({"url": nodes[0].url, "cluster": True})
        tasks = [fresh_id() for _ in range(8)]
        latest = {task_id: Latest() for task_id in tasks}
        with polled(replicas, tasks) as statuses, ThreadPoolExecutor(1) as pool:
            moving = pool.submit(migrate, nodes[0], nodes[1])
            for replica in itertools.cycle(replicas):
                if moving.done() and len(upstream.requests) > 5 * len(tasks):
                    break
                for task_id in tasks:
                    latest[task_id].read(replica, task_id)
            moving.result()
        assert set(statuses) == {httpx.codes.OK}
        assert all(map(shares, replicas))
        errors = [line for replica in replicas for line in metric_lines(replica, "store_errors_total")]
        assert all(line.endswith(" 0.0") for line in errors), errors


def test_replicas_are_throttled_together(upstream: RawUpstream, replicas: list[Gateway]) -> None:
    """When the upstream throttles one replica the others slow down, before they are throttled themselves."""
    upstream.behaviour = lambda connection, _: connection.sendall(
        framed(b"", "retry-after: 5", status="HTTP/1.1 429 Too Many Requests")
    )
    assert replicas[0].get(fresh_id()).json()["code"] == "upstream-throttled"
    for replica in replicas:
        until(lambda replica=replica: has_learned_limit(replica), "it holds back")  # type: ignore[misc]
    assert len(upstream.requests) == 1


def metric_lines(gateway: Gateway, name: str) -> list[str]:
    """Return the samples of a metric with their labels."""
    lines: list[str] = gateway.client.get("/metrics").text.splitlines()
    return [line for line in lines if line.startswith(f"sd_gateway_{name}{{")]


def has_learned_limit(gateway: Gateway) -> bool:
    """Return whether a replica is throttled."""
    return "upstream: upstream-throttled" in gateway.client.get("/readyz").json()["degraded"]


def place(server: StoreServer, task_id: str) -> str:
    """Return the key of a task."""
    [name] = server.client.keys(f"*:sd_get_progress/{task_id}")  # type: ignore[misc]
    return str(name.decode())


FOREVER = 8_000_000_000_000_000  # microseconds since 1970: far in the future


@pytest.mark.parametrize(
    "garbage",
    [
        dict.fromkeys(["version", "fetched", "lifetime", "terminal", "value"], b""),
        dict.fromkeys(["version", "fetched", "lifetime", "terminal", "value"], b"garbage"),
        {"value": b"{}"},
        {"version": b"-1"},
        {"version": b"nan", "lifetime": b"inf"},
        {"version": b"9" * 16},
        {"version": b"9" * 5000},
        {"lifetime": b"9" * 15},
        {"fetched": FOREVER},
        {"terminal": 1},
        {"failure": b"garbage", "failed_until": FOREVER},
        {"failure": b"garbage", "failed_until": b"1e99"},
        {"holder": b"unknown", "held_until": FOREVER},
        {"holder": b"unknown", "held_until": b"garbage"},
        None,
    ],
    ids=str,
)
def test_replicas_replace_invalid_values(
    garbage: dict[str, Any] | None, server: StoreServer, replicas: list[Gateway]
) -> None:
    """Invalid stored values, and a key of another type, are ignored and replaced by valid ones."""
    task_id = fresh_id()
    shown(replicas[0], task_id)
    name = place(server, task_id)
    server.client.delete(name) if garbage is None else server.client.hset(name, mapping=garbage)
    if garbage is None:
        server.client.lpush(name, "of another type")
    began = time.monotonic()
    assert [shown(replica, task_id)["taskId"] for replica in replicas[1:]] == [task_id] * 2
    assert time.monotonic() - began < 2, "no replica has waited for a forged lease"
    fields: Any = server.client.hgetall(name)
    assert fields[b"value"].count(task_id.encode()) > 1
    assert int(fields[b"fetched"]) < FOREVER


def test_replicas_ignore_values_of_another_task(server: StoreServer, replicas: list[Gateway]) -> None:
    """A value of another task is not accepted."""
    one, other = fresh_id(), fresh_id()
    shown(replicas[0], one)
    shown(replicas[0], other)
    server.client.hset(place(server, other), mapping=server.client.hgetall(place(server, one)))  # type: ignore[arg-type]
    assert shown(replicas[1], other)["taskId"] == other
    assert replicas[1].metric("store_errors_total", operation="read") >= 1


# Holders that die


@pytest.fixture
def processes(server: StoreServer, upstream: RawUpstream, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Return a function that starts a replica as a process."""
    environment = {
        "SD_GATEWAY_UPSTREAM__ENDPOINT": upstream.url,
        "SD_GATEWAY_UPSTREAM__TIMEOUT_SECONDS": "60",
        "SD_GATEWAY_UPSTREAM__ATTEMPT_TIMEOUT_SECONDS": "60",
        "SD_GATEWAY_STORE__URL": server.url,
        "SD_GATEWAY_STORE__TIMEOUT_SECONDS": "1",
    }
    with ExitStack() as stack:

        def start(cache: Json | None = None) -> Any:
            given = {f"SD_GATEWAY_CACHE__{name.upper()}": str(value) for name, value in (cache or {}).items()}
            process, gateway = stack.enter_context(serving(tmp_path, environment | given))
            until(lambda: shares(gateway), "the replica reaches the store")
            return process, gateway

        yield start


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_replicas_replace_a_failed_lease_holder(
    number: signal.Signals,
    held: Held,
    upstream: RawUpstream,
    processes: Callable[[], Any],
    replicas: list[Gateway],
) -> None:
    """When the lease holder is killed or suspended another replica queries; the late result is ignored."""
    process, holder = processes()
    task_id = fresh_id()
    held.open.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(holder.get, task_id)
        until(lambda: upstream.requests, "the holder asks")
        second = pool.submit(shown, replicas[0], task_id)
        until(lambda: taken_off(replicas[0]), "another asks for the lease")
        process.signal(number)
        until(lambda: len(upstream.requests) == 2, "the other has the lease, and asks")
        held.open.set()
        assert second.result()["progress"] == 0.002
        if number is signal.SIGSTOP:
            process.signal(signal.SIGCONT)
            assert first.result().json()["progress"] >= 0.002
            assert progress(replicas[1], task_id) >= 0.002
        else:
            with pytest.raises(httpx.TransportError):
                first.result()


# Processes that are suspended


@pytest.mark.usefixtures("upstream")
def test_replicas_do_not_go_back_after_a_suspension(
    processes: Callable[..., Any], start: Callable[..., list[Gateway]]
) -> None:
    """A change that is published while a replica is suspended is visible to the requests that waited there.

    When the process continues, both are in its sockets. It reads the requests first.
    """
    cache = {"running_seconds": 0.2, "stale_while_revalidate_seconds": 600}
    others = start(cache=cache)
    process, one = processes(cache)
    task_id = fresh_id()
    request = f"GET /v1/progress/{task_id} HTTP/1.1\r\nHost: one\r\nConnection: close\r\n\r\n".encode()
    for _ in range(5):
        with ExitStack() as stack:
            connections = [stack.enter_context(closing(one.connect())) for _ in range(5)]
            known = progress(one, task_id)
            process.signal(signal.SIGSTOP)
            stopped = time.monotonic()
            for connection in connections:
                connection.sendall(request[:20])
            newer = until(partial(newer_than, others[0], task_id, known), "another shows something newer")
            for connection in connections:
                connection.sendall(request[20:])
            time.sleep(max(0.0, stopped + 0.1 - time.monotonic()))  # a noticeable pause
            process.signal(signal.SIGCONT)
            answers = [json.loads(drained(connection).rpartition(b"\r\n")[2]) for connection in connections]
        assert min(answer["progress"] for answer in answers) >= newer


def newer_than(gateway: Gateway, task_id: str, known: float) -> float | None:
    """Return the progress that a replica serves, if it is above a value."""
    now = progress(gateway, task_id)
    return now if now > known else None
