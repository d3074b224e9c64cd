"""No error leaves a reference cycle of frames to the garbage collector.

A full collection blocks the event loop, with thousands of streams for a fifth of a second, so the gateway
collects rarely. Until then, a reference cycle would keep everything that the frames of an error refer to:
bodies of a megabyte, requests, connections.
"""

import gc
import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import gateway as package
from gateway.domain.errors import GatewayError
from gateway.progress import unanswered_tasks
from tests.support.harness import (
    PATIENCE_SECONDS,
    Gateway,
    HeldUpstream,
    RawUpstream,
    Request,
    Simulator,
    answer,
    drained,
    fresh_id,
    gateway,
    reset,
    respond_ok,
    until,
)

FAULTS: list[dict[str, Any]] = [
    {"name": "refuse", "code": "A403IS", "message": "Invalid Signature"},
    {"name": "refuse", "code": "T429ID", "message": "Throttled by API Flow Control", "retryAfter": 1},
    {"name": "refuse", "code": "B403MQ", "message": "Quota Exhausted"},
    {"name": "refuse", "code": "I400NC", "message": "Nonce Used"},
    {"name": "refuse", "status": 400, "message": "Timestamp Expired"},
    {"name": "status", "status": 502},
    {"name": "status", "status": 503, "retryAfter": 1},
    {"name": "reject", "errMessage": "no"},
    {"name": "body", "body": "<html>well?</html>"},
    {"name": "body", "body": '{"status": 10, "data": {"taskId": "another"}}'},
    {"name": "silent"},
    {"name": "drip", "interval": 0.05},
    {"name": "cut"},
    {"name": "large", "bytes": 2_000_000},
    {"name": "gzip_bomb", "bytes": 2_000_000},
    {"name": "redirect"},
    {"name": "deep"},
]
QUICK: dict[str, Any] = {
    "upstream": {"timeout_seconds": 1.0, "attempt_timeout_seconds": 0.3, "retries": 1},
    # Each query asks upstream anew; nothing covers a failure, or a result does.
    "cache": {"error_seconds": 0, "running_seconds": 0, "stale_while_revalidate_seconds": 0},
}
pytestmark = pytest.mark.unmeasured
OURS = str(Path(package.__file__).parent)
NOT_OURS = f"{OURS}/simulator"


@pytest.fixture(autouse=True)
def _alone(_leftovers: list[threading.Thread]) -> None:
    """Wait until the gateways of other tests have stopped, so that their objects are not counted."""
    for thread in _leftovers:
        thread.join()


@contextmanager
def circles() -> Iterator[Counter[str]]:
    """Count objects of the gateway in reference cycles that are created in the context."""
    found: Counter[str] = Counter()
    gc.collect()
    gc.disable()
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found.update(filter(None, map(trace_of, gc.garbage)))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def trace_of(thing: object) -> str:
    """Return a description of an object of the gateway; "" for one of the test."""
    if isinstance(thing, GatewayError):
        return repr(thing)
    if isinstance(thing, FrameType):
        file = thing.f_code.co_filename
        return thing.f_code.co_qualname if file.startswith(OURS) and not file.startswith(NOT_OURS) else ""
    module = type(thing).__module__
    ours = module.startswith("gateway.") and not module.startswith("gateway.simulator")
    return f"{type(thing)}" if ours else ""


def ask_in_every_way(gate: Gateway, task: str) -> None:
    """Ask for a task on every path, of which some cover a failure and others tell of it."""
    gate.get(task)
    gate.get(fresh_id())
    gate.native(task)
    gate.native(fresh_id(), "comfy_get_result")
    gate.client.get(f"/v1/progress?taskId={task}&taskId={fresh_id()}")
    gate.client.get(f"/v1/progress/{fresh_id()}?wait=1")
    with gate.connect() as stream:
        stream.sendall(f"GET /v1/events?taskId={fresh_id()} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        while b"event: problem" not in (part := stream.recv(65536)):
            assert part
    gate.client.get("/readyz")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: "-".join(map(str, fault.values()))[:30])
def test_no_upstream_failure_leaves_a_cycle(simulator: Simulator, fault: dict[str, Any]) -> None:
    """No fault of the upstream leaves a reference cycle."""
    with gateway(simulator.url, **QUICK) as gate:
        task = simulator.task()
        assert gate.get(task).status_code == 200
        with circles() as found:
            simulator.fault(**fault)
            ask_in_every_way(gate, task)
            simulator.heal()
        assert not found


@pytest.mark.parametrize("sent", [b"", b"no HTTP\r\n\r\n", answer(b"{", "content-length: 9"), None])
def test_no_broken_connection_leaves_a_cycle(sent: bytes | None) -> None:
    """A connection that ends before or within a response, sends no HTTP, or is reset."""

    def behaviour(connection: socket.socket, _request: Request) -> None:
        if sent is None:
            reset(connection)
        else:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_RDWR)

    with RawUpstream(behaviour) as upstream, gateway(upstream.url, **QUICK) as gate:
        gate.get(fresh_id())
        with circles() as found:
            ask_in_every_way(gate, fresh_id())
        assert not found


def test_no_invalid_request_leaves_a_cycle(simulator: Simulator) -> None:
    """Requests that are refused, aborted or not HTTP."""
    with gateway(simulator.url) as gate:
        gate.client.get("/readyz")
        with circles() as found:
            for method, path in [
                ("GET", "/v1/progress/no%20task%20id"),
                ("GET", "/v1/progress/a?colour=blue"),
                ("GET", "/v1/progress/a?wait=soon"),
                ("GET", "/v1/progress"),
                ("GET", "/v2/progress/a"),
                ("PUT", "/v1/progress/a"),
                ("GET", "/scc/sd_get_progress"),
                ("POST", "/scc/sd_txt2img"),
                ("POST", "/scc/sd_get_progress"),
            ]:
                assert gate.client.request(method, path).status_code >= 400
            for body in ("not JSON", json.dumps({"taskId": 7}), "[" * 50_000, " " * 100_000):
                assert gate.client.post("/scc/sd_get_progress", content=body).status_code >= 400
            with gate.connect() as connection:
                connection.sendall(b"no HTTP\r\n\r\n")
                assert b"400" in drained(connection)
            with gate.connect() as connection:
                connection.sendall(
                    b"POST /scc/sd_get_progress HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n"
                )
            gate.client.get("/readyz")
        assert not found


@pytest.mark.parametrize(
    "sent", [b"", b"5", b"5\r\nab", b"5\r\nabcde", b"0\r\nx: y", b"no size\r\n", b"0\r\n\r\n"]
)
@pytest.mark.parametrize("path", ["/scc/sd_get_progress", "/nothing"])
def test_no_chunked_body_leaves_a_cycle(simulator: Simulator, path: str, sent: bytes) -> None:
    """A chunked body that is incomplete, invalid or complete, for a path that reads it or not."""
    with gateway(simulator.url) as gate:
        gate.client.get("/readyz")
        with circles() as found:
            with gate.connect() as connection:
                head = f"POST {path} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
                connection.sendall(head.encode() + sent)
                if path == "/nothing":
                    assert b" 404 " in drained(connection)
            until(lambda: gate.metric("http_connections") <= 1, "the connection is closed")
        assert not found


@pytest.mark.parametrize("target", ["/v1/progress?wait=0", "/v1/progress?wait=30", "/v1/events?"])
def test_no_client_that_leaves_leaves_a_cycle(target: str) -> None:
    """The client of several tasks leaves while they wait for a slot."""
    with HeldUpstream() as upstream, gateway(upstream.url, upstream={"max_in_flight": 1}) as gate:
        gate.client.get("/readyz")
        with circles() as found:
            with gate.connect() as connection:
                tasks = "".join(f"&taskId={fresh_id()}" for _ in range(3))
                connection.sendall(f"GET {target}{tasks} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
                until(lambda: upstream.requests, "a query has the slot")
            until(lambda: gate.metric("upstream_abandoned_total") == 2, "the others are dropped")
            upstream.released.set()
            until(lambda: gate.metric("upstream_in_flight") == 0, "the query has ended")
        assert not found


@pytest.mark.parametrize("target", ["/v1/progress?", "/v1/progress?wait=30&", "/v1/events?"])
def test_no_refused_request_leaves_a_cycle(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that is refused because too many tasks wait for upstream calls."""
    monkeypatch.setattr(unanswered_tasks, "MAX_UNANSWERED_TASKS_PER_CLIENT", 3)
    with HeldUpstream() as upstream, gateway(upstream.url) as gate, gate.connect() as connection:
        tasks = "&".join(f"taskId={fresh_id()}" for _ in range(3))
        connection.sendall(f"GET /v1/events?{tasks} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        until(lambda: gate.metric("watched_tasks") == 3, "tasks wait")
        gate.client.get("/readyz")
        with circles() as found:
            for _ in range(3):
                tasks = "&".join(f"taskId={fresh_id()}" for _ in range(3))
                assert gate.client.get(f"{target}{tasks}").json()["code"] == "overloaded"
        assert not found
        upstream.released.set()


def test_no_dropped_refresh_leaves_a_cycle() -> None:
    """The client of a stream leaves while the refresh of its task waits for a slot."""
    released = threading.Event()

    def behaviour(connection: socket.socket, request: Request) -> None:
        if request.task_id == "slow":
            released.wait(PATIENCE_SECONDS)
        respond_ok(connection, request)

    with (
        RawUpstream(behaviour) as upstream,
        gateway(upstream.url, upstream={"max_in_flight": 1}, cache={"running_seconds": 0.1}) as gate,
        gate.connect() as slow,
    ):
        assert gate.get("known").status_code == 200
        with circles() as found:
            slow.sendall(b"GET /v1/progress/slow HTTP/1.1\r\nhost: x\r\n\r\n")
            until(lambda: len(upstream.requests) == 2, "a query has the slot")
            with gate.connect() as stream:
                stream.sendall(b"GET /v1/events?taskId=known HTTP/1.1\r\nhost: x\r\n\r\n")
                until(lambda: b"event: stale" in stream.recv(65536), "the refresh waits")
            until(lambda: gate.metric("upstream_abandoned_total") == 1, "the refresh is dropped")
            released.set()
            until(lambda: gate.metric("upstream_in_flight") == 0, "the query has ended")
        assert not found
