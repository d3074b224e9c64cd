"""Graceful shutdown: what clients experience after SIGTERM, and what further signals change."""

import json
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from gateway.server.graceful_shutdown import HANDOVER_SECONDS
from tests.support.harness import (
    PATIENCE_SECONDS,
    Gateway,
    HeldUpstream,
    Simulator,
    drained,
    fresh_id,
    gateway,
    plain_client,
    serving,
    until,
)


@pytest.fixture
def upstream() -> Iterator[HeldUpstream]:
    """Run an upstream that responds when it is released."""
    with HeldUpstream() as running:
        yield running


def unready(gate: Gateway) -> bool:
    """Query /readyz on a new connection, as a load balancer does."""
    with plain_client(gate.url) as probe:
        response = probe.get("/readyz")
    return response.status_code == 503 and response.json()["reasons"] == ["draining"]


def assert_clean(output: str) -> None:
    """Check that no error was logged."""
    assert not re.search(r"Traceback|\"level\": \"error\"|Exception", output), output


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 0), (signal.SIGQUIT, 0), (signal.SIGINT, 130)]
)
def test_shutdown_completes_in_flight_requests(
    tmp_path: Path, upstream: HeldUpstream, number: signal.Signals, status: int
) -> None:
    """After a signal the gateway is not ready, completes its in-flight requests, and exits.

    The exit status is 0 after SIGTERM, and 130 after Ctrl-C.
    """
    with (
        serving(tmp_path, {"SD_GATEWAY_UPSTREAM__ENDPOINT": upstream.url}) as (process, gate),
        ThreadPoolExecutor(1) as pool,
    ):
        assert gate.client.get("/readyz").status_code == 200
        in_flight = pool.submit(gate.get, fresh_id())
        until(lambda: upstream.requests, "the request is in flight")
        process.signal(number)
        until(lambda: unready(gate), "readyz says that we drain")
        upstream.released.set()
        response = in_flight.result()
        assert (response.status_code, response.json()["status"]) == (200, "running")
        assert process.exit_status() == status
    assert '"event": "shutdown_started"' in process.output
    assert '"event": "stopped"' in process.output
    assert_clean(process.output)


def test_shutdown_closes_idle_connections(tmp_path: Path, upstream: HeldUpstream) -> None:
    """Idle kept-alive connections do not delay the shutdown."""
    with serving(tmp_path, {"SD_GATEWAY_UPSTREAM__ENDPOINT": upstream.url}) as (process, gate):
        assert gate.client.get("/healthz").status_code == 200
        with gate.connect() as silent:
            process.signal()
            assert drained(silent) == b""
        assert process.exit_status() == 0
    assert_clean(process.output)


@pytest.mark.parametrize("edge", ["true", "false"])
def test_shutdown_closes_connections_after_their_next_response(
    tmp_path: Path, upstream: HeldUpstream, edge: str
) -> None:
    """After the first signal every response closes its connection, including hits of the fast path."""
    env = {"SD_GATEWAY_UPSTREAM__ENDPOINT": upstream.url, "SD_GATEWAY_SERVER__EDGE": edge}
    upstream.released.set()
    with serving(tmp_path, env) as (process, gate):
        hit = f"GET /v1/progress/{fresh_id()} HTTP/1.1\r\nhost: x\r\n\r\n".encode()
        health = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
        with gate.connect() as warm, gate.connect() as probe:
            for connection, request in ((warm, hit), (warm, hit), (probe, health)):
                connection.sendall(request)
                answer = connection.recv(65536).lower()
                assert answer.startswith(b"http/1.1 200")
                assert b"connection: close" not in answer
            process.signal()
            until(lambda: unready(gate), "readyz says that we drain")
            for connection, request in ((warm, hit), (probe, health)):
                connection.sendall(request + request)
                answers = drained(connection).lower()
                assert answers.count(b"http/1.1 200") == 1
                assert b"connection: close" in answers
        assert process.exit_status() == 0
    assert_clean(process.output)


# Requests, each with the status of its response. TASK is a task whose snapshot is fresh, and ETAG its tag.
RESPONSES = {
    "page": ("GET / HTTP/1.1", 200),
    "not-modified": ("GET /v1/progress/TASK HTTP/1.1\r\nif-none-match: ETAG", 304),
    "head": ("HEAD /v1/progress/TASK HTTP/1.1", 200),
    "batch": ("GET /v1/progress?taskId=TASK HTTP/1.1", 200),
    "post": ('POST /scc/sd_get_progress HTTP/1.1\r\ncontent-length: 18\r\n\r\n{"taskId": "TASK"}', 200),
    "stream": ("GET /v1/progress/TASK/events HTTP/1.1", 200),
    "options": ("OPTIONS * HTTP/1.1", 204),
    "metrics": ("GET /metrics HTTP/1.1", 200),
    "unready": ("GET /readyz HTTP/1.1", 503),
    "invalid-parameter": ("GET /v1/progress/TASK?no=1 HTTP/1.1", 400),
    "not-found": ("GET /nothing HTTP/1.1", 404),
    "method": ("DELETE /v1/progress/TASK HTTP/1.1", 405),
    "too-large": ("POST /scc/sd_get_progress HTTP/1.1\r\ncontent-length: 9999999", 413),
    "malformed": ("GET / HTTP/9.9", 400),
}


@pytest.mark.parametrize("edge", ["true", "false"])
def test_shutdown_announces_the_end_of_each_connection(
    tmp_path: Path, upstream: HeldUpstream, edge: str
) -> None:
    """While the gateway drains, every kind of response has `Connection: close`."""
    env = {
        "SD_GATEWAY_UPSTREAM__ENDPOINT": upstream.url,
        "SD_GATEWAY_SERVER__EDGE": edge,
        "SD_GATEWAY_CACHE__RUNNING_SECONDS": "600",
    }
    upstream.released.set()
    with serving(tmp_path, env) as (process, gate), ExitStack() as stack:
        etag = gate.get("task").headers["etag"]
        connections = {name: stack.enter_context(gate.connect()) for name in RESPONSES}
        process.signal()
        until(lambda: unready(gate), "readyz says that we drain")
        for name, (request, _) in RESPONSES.items():
            head, _, body = request.replace("TASK", "task").replace("ETAG", etag).partition("\r\n\r\n")
            connections[name].sendall(f"{head}\r\nhost: x\r\n\r\n{body}".encode())
        heads = {name: drained(each).partition(b"\r\n\r\n")[0].lower() for name, each in connections.items()}
        assert process.exit_status() == 0
    statuses = {name: int(head.split()[1]) for name, head in heads.items()}
    assert statuses == {name: status for name, (_, status) in RESPONSES.items()}
    assert [name for name, head in heads.items() if b"\r\nconnection: close" not in head] == []


def test_shutdown_serves_connections_that_wait_to_be_accepted(tmp_path: Path, upstream: HeldUpstream) -> None:
    """A request on a connection that the kernel has accepted, but not yet the gateway, gets its response.

    The process is paused meanwhile, so that it finds the connection and the end of the handover together.
    """
    upstream.released.set()
    with serving(tmp_path, {"SD_GATEWAY_UPSTREAM__ENDPOINT": upstream.url}) as (process, gate):
        process.signal()
        begun = time.monotonic()
        process.says("(shutdown_started)")
        process.signal(signal.SIGSTOP)
        with gate.connect() as connection:
            connection.sendall(b"GET /v1/progress/task HTTP/1.1\r\nhost: x\r\n\r\n")
            until(lambda: time.monotonic() > begun + 2 * HANDOVER_SECONDS, "the handover is over")
            process.signal(signal.SIGCONT)
            answer = drained(connection).lower()
        assert process.exit_status() == 0
    assert answer.startswith(b"http/1.1 200")
    assert b"\r\nconnection: close" in answer
    assert_clean(process.output)


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HT"], ids=["idle", "head-begun"])
def test_shutdown_serves_requests_that_are_on_their_way(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    """A load balancer that does not know yet that the listener is closed gets one more response."""
    monkeypatch.setattr("gateway.server.connection._LAST_REQUEST_SECONDS", PATIENCE_SECONDS)
    threads: list[threading.Thread] = []
    request = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
    with ExitStack() as stack:
        with gateway(simulator.url, leftovers=threads) as gate:
            connection = stack.enter_context(gate.connect())
            connection.sendall(request)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            connection.sendall(sent)
        until(lambda: not gate.listens(), "the listener is closed")
        connection.sendall(request[len(sent) :])
        answer = drained(connection).lower()
        threads[0].join()
    assert answer.startswith(b"http/1.1 200")
    assert b"\r\nconnection: close" in answer


def test_shutdown_has_a_timeout(tmp_path: Path, upstream: HeldUpstream) -> None:
    """After server.drain_seconds waiting requests receive an error; the process exits with 0."""
    env = {"SD_GATEWAY_UPSTREAM__ENDPOINT": upstream.url, "SD_GATEWAY_SERVER__DRAIN_SECONDS": "0.2"}
    with (
        serving(tmp_path, env) as (process, gate),
        gate.connect() as caller,
        gate.connect() as deaf,
    ):
        caller.sendall(f"GET /v1/progress/{fresh_id()} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        until(lambda: upstream.requests, "the request is in flight")
        # A client that never reads: its partly sent response can only be cut off.
        deaf.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * 1000)
        process.signal()
        assert process.exit_status() == 0
        head, _, body = drained(caller).partition(b"\r\n\r\n")
    assert b"503" in head.splitlines()[0]
    assert b"retry-after: 1" in head
    assert json.loads(body)["code"] == "overloaded"
    assert "timeout graceful shutdown exceeded" in process.output
    assert "Traceback" not in process.output


# Further signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
def test_shutdown_ignores_repeated_signals(
    tmp_path: Path, upstream: HeldUpstream, number: signal.Signals
) -> None:
    """Further stops, before and after the listeners are closed, leave open requests alone."""
    with (
        serving(tmp_path, {"SD_GATEWAY_UPSTREAM__ENDPOINT": upstream.url}) as (process, gate),
        ThreadPoolExecutor(1) as pool,
    ):
        in_flight = pool.submit(gate.get, fresh_id())
        until(lambda: upstream.requests, "the request is in flight")
        for _ in range(3):
            process.signal(number)
        until(lambda: not gate.listens(), "the listener is closed")
        process.signal(number)
        process.signal(signal.SIGHUP)
        upstream.released.set()
        assert in_flight.result().status_code == 200
        assert process.exit_status() == 0
    assert_clean(process.output)


def test_shutdown_is_interrupted_by_ctrl_c_after_the_handover(tmp_path: Path, upstream: HeldUpstream) -> None:
    """SIGINT after the handover cancels open requests, which get a problem; the exit status is 130."""
    with (
        serving(tmp_path, {"SD_GATEWAY_UPSTREAM__ENDPOINT": upstream.url}) as (process, gate),
        ThreadPoolExecutor(1) as pool,
    ):
        in_flight = pool.submit(gate.get, fresh_id())
        until(lambda: upstream.requests, "the request is in flight")
        process.signal(signal.SIGINT)
        process.signal(signal.SIGINT)  # a wrapper may forward what the terminal has already sent
        until(lambda: not gate.listens(), "the listener is closed")
        assert not in_flight.done()
        process.signal(signal.SIGINT)
        response = in_flight.result()
        assert (response.status_code, response.json()["code"]) == (503, "overloaded")
        assert process.exit_status() == 130
    assert '"event": "requests_cancelled"' in process.output
    assert '"event": "stopped"' in process.output


@pytest.mark.unmeasured  # coverage's lock can stop a process whose signal handlers interrupt each other
def test_shutdown_keeps_its_status_to_the_end(tmp_path: Path, upstream: HeldUpstream) -> None:
    """SIGTERM again and again until the process is gone: the status is 0."""
    with serving(tmp_path, {"SD_GATEWAY_UPSTREAM__ENDPOINT": upstream.url}) as (process, _):
        while process.alive:
            process.signal()
        assert process.exit_status() == 0, process.output


def test_shutdown_on_two_ctrl_c_exits_in_the_same_way(tmp_path: Path, upstream: HeldUpstream) -> None:
    """A second SIGINT during the handover changes neither the shutdown nor the exit status."""
    with serving(tmp_path, {"SD_GATEWAY_UPSTREAM__ENDPOINT": upstream.url}) as (process, gate):
        assert gate.client.get("/readyz").status_code == 200
        process.signal(signal.SIGINT)
        until(lambda: unready(gate), "readyz says that we drain")
        process.signal(signal.SIGINT)
        assert process.exit_status() == 130
    assert not upstream.released.is_set()
    assert_clean(process.output)
