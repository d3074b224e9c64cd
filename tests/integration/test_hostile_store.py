"""A store with forged values: no client receives forged content."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.domain.task import Operation, TaskKey
from tests.support.harness import PATIENCE_SECONDS, Gateway, RawUpstream, framed, fresh_id, until
from tests.support.seen import answered
from tests.support.storeserver import StoreServer, binary
from tests.support.valkey import server_time

Launch = Callable[..., Gateway]
EVIL = b"evil"

# Replaces a field of the header, or the envelope. Each value has a valid digest.
HEADERS = {
    "etag": {"etag": '"a"\r\nSet-Cookie: evil=1\r\n\r\nHTTP/1.1 200 OK\r\n'},
    "operation": {"operation": "sd_get_progress\r\nevil: 1"},
    "infinite-progress": {"progress": float("inf")},
    "no-progress": {"progress": float("nan")},
    "far-progress": {"progress": 1e300},
    "lifetime": {"lifetime": float("inf")},
    "long-lifetime": {"lifetime": 10**15},
    "revision": {"revision": '1"\r\nevil: 1'},
    "late-revision": {"revision": 2**53},
    "no-revision": {"revision": 0},
}
STATUS = '"status": "running"'
ENVELOPES: dict[str, Callable[[str], str]] = {
    "line-break": lambda body: body.replace(STATUS, STATUS + ', "state": {"a":\r\n\r\nevent: evil\r\n\r\n1}'),
    "line-break-in-text": lambda body: body.replace(STATUS, STATUS + ', "message": "a\n\nevent: evil\n\n"'),
    "white-space": lambda body: body.replace(STATUS, STATUS + ', "state": {"a":\r\n\r\n[1,\n\n2]}'),
    "escaped": lambda body: body.replace(STATUS, STATUS + r', "message": "a\n\nevent: end\n\n"'),
    "another-task": lambda body: body.replace('"taskId": "', '"taskId": "evil'),
    "nan": lambda body: body.replace("0.5", "NaN"),
    "rejected": lambda body: body.replace('"status": 10', '"status": 20, "errCode": "evil"'),
    "not-json": lambda body: body + "evil",
}


@pytest.fixture
def server(tmp_path: Path, _leftovers: list[threading.Thread]) -> Iterator[StoreServer]:
    """Return a server for the store."""
    with StoreServer(binary("valkey"), tmp_path) as server:
        yield server
        for thread in _leftovers:
            thread.join()


@pytest.fixture
def upstream() -> Iterator[RawUpstream]:
    """Return an upstream that responds."""
    with RawUpstream(lambda connection, request: connection.sendall(framed(request.envelope()))) as upstream:
        yield upstream


def hostile(kind: str, task_id: str, version: int, now: int) -> dict[str, Any]:
    """Return the fields of a forged task of this kind, fetched now."""
    body = answered(TaskKey(Operation.SD_GET_PROGRESS, task_id)).decode()
    header = {
        "operation": "sd_get_progress",
        "task": task_id,
        "progress": 0.5,
        "version": version,
        "revision": version,
        "lifetime": 60_000_000,
    }
    if kind in HEADERS:
        header |= HEADERS[kind]
    else:
        body = ENVELOPES[kind](body)
    content = json.dumps(header).encode() + b"\n" + body.encode()
    digest = hashlib.blake2b(content, digest_size=12).hexdigest().encode()
    return {
        "version": version,
        "fetched": now,
        "lifetime": 60_000_000,
        "terminal": 0,
        "value": digest + b" " + content,
    }


@pytest.mark.parametrize("edge", ["edge", "asgi"])
@pytest.mark.parametrize("kind", [*HEADERS, *ENVELOPES])
def test_hostile_value_reaches_no_caller(
    kind: str, edge: str, server: StoreServer, upstream: RawUpstream, launch: Launch
) -> None:
    """No hit, batch or stream has a forged header, event or text."""
    gateway = launch(
        upstream.url,
        store={"url": server.url, "timeout_seconds": 1.0},
        server={"edge": edge == "edge", "trusted_hosts": ["*"]},
    )
    until(lambda: gateway.metric("store_up") == 1, "the store is shared")
    known = fresh_id()
    assert gateway.get(known).json()["taskId"] == known
    gateway.get(known)  # a task that is read loads what is announced
    [name] = server.client.keys(f"*:sd_get_progress/{known}")
    channel = name.rpartition(b":")[0].decode()
    unknown = fresh_id()
    # Stored for one task before it is requested; announced for the other, which is in the cache.
    version = int(server.client.hget(name, "version")) + 10**6
    now = server_time(server)
    for task_id in (known, unknown):
        place = name.decode().replace(known, task_id)
        server.client.hset(place, mapping=hostile(kind, task_id, version, now))
    announced = f"Ssd_get_progress/{known}\n{version} {version} 0 60000000 0"
    server.client.publish(channel, announced)
    # A valid envelope, whatever its white space, is an answer like others; NaN is read as null. Other values
    # are deleted.
    refused = 0 if kind in {"white-space", "escaped", "nan"} else 2
    if refused:  # else a request could read the value, too, before it is deleted
        until(
            lambda: gateway.metric("store_errors_total", operation="read") == 1, "the announced one is read"
        )
    for task_id in (known, unknown):
        ask = f"GET /v1/progress/{task_id} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        last = ask.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        text = gateway.raw(ask * 2 + last)
        assert text.count(b"HTTP/1.1 200 OK\r\n") == 3
        assert EVIL not in text.lower()
        assert b"cookie" not in text.lower()
        batch = gateway.client.get("/v1/progress", params={"taskId": [task_id, fresh_id()]}).json()
        assert (batch["items"][0]["taskId"], batch["summary"]["errors"]) == (task_id, 0)
        assert gateway.native(task_id).json()["data"]["taskId"] == task_id
        events = first_event(gateway, task_id)
        names = [line.partition(b":")[0] for line in events.splitlines()]
        assert names == [b"event", b"id", b"data", b""]
        data = json.loads(events.partition(b"data: ")[2].partition(b"\n\n")[0])
        assert (data["taskId"], 0 <= data["progress"] <= 0.999) == (task_id, True)
    assert gateway.metric("store_errors_total", operation="read") == refused


def first_event(gateway: Gateway, task_id: str) -> bytes:
    """Return a stream up to the end of its first event."""
    got = b""
    with gateway.client.stream("GET", f"/v1/progress/{task_id}/events", timeout=PATIENCE_SECONDS) as stream:
        for part in stream.iter_raw():
            got += part
            if b"event: progress" in got and got.endswith(b"\n\n"):
                break
    return got.partition(b"retry: 2000\n\n")[2]
