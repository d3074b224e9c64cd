"""Misses that the server's fast path serves: only a failure reaches the ASGI application."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from gateway.api.cached_responses import CachedResponses
from gateway.api.progress import ProgressEndpoint
from gateway.progress.service import ProgressService
from tests.support.harness import (
    Gateway,
    HeldUpstream,
    RawUpstream,
    Request,
    drained,
    framed,
    fresh_id,
    respond_ok,
    until,
)

Launch = Callable[..., Gateway]

WAIT_SECONDS = 0.2


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the paths for which the application's endpoint is called."""
    paths: list[str] = []
    original = ProgressEndpoint.__call__

    async def recording(self: ProgressEndpoint, scope: dict, receive: object, send: object) -> None:  # type: ignore[type-arg]
        paths.append(scope["path"])
        await original(self, scope, receive, send)  # type: ignore[arg-type]

    monkeypatch.setattr(ProgressEndpoint, "__call__", recording)
    return paths


def fail(connection: socket.socket, _: Request) -> None:
    """Respond after a while, with an error that is not cached."""
    time.sleep(WAIT_SECONDS)
    connection.sendall(framed(b"", status="HTTP/1.1 404 Not Found"))


def asked(task: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET /v1/progress/{task} HTTP/1.1", "host: x", *headers, "", ""]).encode()


def test_a_miss_does_not_reach_the_application(launch: Launch, calls: list[str]) -> None:
    """It is counted once, like any miss, and the connection then serves a hit and another miss."""
    with RawUpstream(respond_ok) as upstream:
        gate = launch(upstream.url, cache={"running_seconds": 600})
        task, other = fresh_id(), fresh_id()
        with gate.connect() as client:
            client.sendall(asked(task) + asked(task) + asked(other, "connection: close"))
            received = drained(client)
    assert received.count(b"HTTP/1.1 200 OK\r\n") == 3
    assert received.count(b"cache-status: sd-gateway; fwd=miss; ttl=") == 2
    assert [request.task_id for request in upstream.requests] == [task, other]
    # The last request closes the connection, so it is not simple.
    assert calls == [f"/v1/progress/{other}"]
    assert gate.metric("cache_lookups_total", result="miss") == 2
    assert gate.metric("http_requests_total", status="200", route="/v1/progress/{taskId}") == 3


def test_a_snapshot_that_arrives_after_the_lookup_is_a_hit(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the lookup and the start of the wait, another request may store the snapshot."""
    with RawUpstream(respond_ok) as upstream:
        gate = launch(upstream.url, cache={"running_seconds": 600})
        task = fresh_id()
        gate.get(task)
        monkeypatch.setattr(CachedResponses, "answer", lambda *_: None)
        response = gate.get(task)
    assert response.headers["cache-status"].startswith("sd-gateway; hit; ttl=")
    assert gate.metric("cache_lookups_total", result="hit") == 1
    assert gate.metric("cache_lookups_total", result="miss") == 1


@pytest.mark.parametrize("changed", [True, False])
def test_a_miss_with_an_entity_tag(launch: Launch, calls: list[str], *, changed: bool) -> None:
    """The response is a 304 if the body has not changed, and a 200 with the new body otherwise."""
    progress = iter([0.5, 0.75 if changed else 0.5])

    def respond(connection: socket.socket, request: Request) -> None:
        connection.sendall(framed(request.envelope(progress=next(progress))))

    with RawUpstream(respond) as upstream:
        gate = launch(upstream.url, cache={"running_seconds": 0, "stale_while_revalidate_seconds": 0})
        task = fresh_id()
        first = gate.get(task)
        second = gate.get(task, headers={"if-none-match": first.headers["etag"]})
    assert second.status_code == (200 if changed else 304)
    assert (second.headers["etag"] != first.headers["etag"]) is changed
    assert calls == []


def test_a_failed_miss_is_recorded_with_its_wait(launch: Launch, calls: list[str]) -> None:
    """The application sends the error; the duration includes the time before the application was called."""
    with RawUpstream(fail) as upstream:
        gate = launch(upstream.url, cache={"error_seconds": 0})
        task = fresh_id()
        response = gate.get(task)
    assert (response.status_code, response.json()["code"]) == (502, "upstream-invalid")
    assert calls == [f"/v1/progress/{task}"]
    route = "/v1/progress/{taskId}"
    assert gate.metric("http_request_duration_seconds_count", route=route) == 1
    assert gate.metric("http_request_duration_seconds_sum", route=route) >= WAIT_SECONDS
    assert gate.metric("cache_lookups_total", result="miss") == 1


def test_an_unexpected_exception_is_an_internal_error(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client receives a problem document, and the next request on the connection is served."""

    async def break_down(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    with RawUpstream(respond_ok) as upstream:
        gate = launch(upstream.url)
        with monkeypatch.context() as patch:
            patch.setattr(ProgressService, "get_after_miss", break_down)
            response = gate.get(fresh_id())
        assert (response.status_code, response.json()["code"]) == (500, "internal")
        assert gate.get(fresh_id()).status_code == 200


def test_a_client_that_disconnects_during_a_miss(launch: Launch) -> None:
    """The request is counted with 499, and the query is completed for the next client."""
    with HeldUpstream() as upstream:
        gate = launch(upstream.url)
        task = fresh_id()
        with gate.connect() as client:
            client.sendall(asked(task))
            until(lambda: upstream.requests, "the call is on the wire")
        until(lambda: gate.metric("http_requests_total", status="499") == 1, "it is counted")
        upstream.released.set()
        assert gate.get(task).status_code == 200
        assert len(upstream.requests) == 1


def test_misses_of_many_clients_share_a_call(launch: Launch, calls: list[str]) -> None:
    """All receive the same body, and one of them counts as the miss."""
    with HeldUpstream() as upstream, ExitStack() as clients:
        gate = launch(upstream.url)
        task = fresh_id()
        waiting = [clients.enter_context(gate.connect()) for _ in range(50)]
        for client in waiting:
            client.sendall(asked(task))
        until(lambda: gate.metric("http_connections") >= 50, "all are connected")
        until(lambda: upstream.requests, "the call is on the wire")
        threading.Timer(0.1, upstream.released.set).start()
        bodies = set()
        for client in waiting:
            received = b""
            while b"\r\n\r\n" not in received or not received.endswith(b"}"):
                received += client.recv(65536)
            bodies.add(received.partition(b"\r\n\r\n")[2])
        assert len(upstream.requests) == 1
    assert len(bodies) == 1
    assert json.loads(bodies.pop())["taskId"] == task
    assert gate.metric("cache_lookups_total", result="miss") == 1
    assert calls == []


def test_a_trusted_proxy_names_the_client(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries are fair to the clients behind a proxy, as with requests that reach the application."""
    seen: list[bytes] = []
    original = ProgressService.get_after_miss

    async def recording(self: ProgressService, key: object, *, client: bytes, **options: object) -> object:
        seen.append(client)
        return await original(self, key, client=client, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ProgressService, "get_after_miss", recording)
    with RawUpstream(respond_ok) as upstream:
        gate = launch(upstream.url, server={"trusted_proxies": ["127.0.0.1"]})
        gate.get(fresh_id(), headers={"x-forwarded-for": "192.0.2.7"})
        gate.get(fresh_id(), headers={"x-forwarded-for": "192.0.2.7, 198.51.100.9"})
        gate.get(fresh_id())
    assert seen == [bytes([192, 0, 2, 7]), bytes([198, 51, 100, 9]), bytes([127, 0, 0, 1])]
