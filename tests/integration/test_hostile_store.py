"""A store with forged values: no client receives forged content."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.domain.task import Operation, TaskKey
from gateway.stores.valkey.codec import _digest
from gateway.stores.valkey.connection import slot_of
from tests.support.harness import PATIENCE_SECONDS, Gateway, RawUpstream, framed, fresh_id, until
from tests.support.seen import answered
from tests.support.storeserver import StoreServer, binary

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


def slot(task_id: str) -> int:
    """Return a task's slot."""
    return slot_of(TaskKey(Operation.SD_GET_PROGRESS, task_id))


def hostile(kind: str, task_id: str) -> bytes:
    """Return a forged value of this kind for a task, fresh."""
    now = time.time_ns() // 1000
    body = answered(TaskKey(Operation.SD_GET_PROGRESS, task_id)).decode()
    header = {
        "operation": "sd_get_progress",
        "task": task_id,
        "progress": 0.5,
        "version": now,
        "lifetime": 60_000_000,
    }
    if kind in HEADERS:
        header |= HEADERS[kind]
    else:
        body = ENVELOPES[kind](body)
    content = json.dumps(header).encode() + b"\n" + body.encode()
    return b"sdg3 %d %d 60000000 %d 0\n%b %b" % (now, now, now, _digest(content), content)


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
    [name] = server.client.keys(f"*:{known}:s")
    channel = name.decode().partition(":sd_get_progress:")[0]
    # A task of the same slot has its ID at the same place.
    unknown = next(filter(lambda task: slot(task) == slot(known), iter(fresh_id, "")))
    # Stored for the first task before it is requested; published for the other, which is in the cache.
    server.client.set(name.decode().replace(known, unknown), hostile(kind, unknown))
    subject = f"Ssd_get_progress/{known}\n".encode()
    server.client.publish(channel, subject + hostile(kind, known))
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
    # Two were read. A value whose envelope is valid, whatever its white space, is an answer like others.
    refused = 0 if kind in {"white-space", "escaped"} else 2
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
