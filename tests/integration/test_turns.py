"""Requests for many tasks take turns: the application, with a connection whose turns the test controls."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
from starlette.types import ASGIApp, Message, Scope

import gateway.app
from gateway.api.server_extensions import CONNECTION, ON_DISCONNECT
from gateway.app import create_app
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import Operation, TaskKey
from gateway.server.application_parts import Application
from gateway.settings.model import Settings
from gateway.stores.base import Lease, Store
from gateway.stores.create_store import create_store
from gateway.telemetry.redaction import Redactor
from tests.support.harness import CA_FILE, KEY, SECRET, Simulator, eventually
from tests.support.seen import seen

TASKS = 16


class Turns:
    """The turns of a server: each request waits until the test admits it."""

    def __init__(self) -> None:
        self.waiting: list[tuple[int, asyncio.Future[None]]] = []

    async def turn(self, *, tasks: int, client: bytes) -> None:
        """Wait until the test admits this request."""
        assert client
        admitted = asyncio.get_running_loop().create_future()
        self.waiting.append((tasks, admitted))
        await admitted

    async def admit(self) -> int:
        """Wait for a request, admit it, and return the number of its tasks."""
        await eventually(lambda: self.waiting, "a request waits for its turn")
        tasks, admitted = self.waiting.pop(0)
        admitted.set_result(None)
        return tasks


class Client:
    """Sends requests to an application. All of them wait for the same turns."""

    def __init__(self, app: Application) -> None:
        self._app: ASGIApp = app.asgi
        self.metrics = app.metrics
        self.turns = Turns()
        self.parts: list[bytes] = []

    def get(self, path: str, query: str) -> asyncio.Task[None]:
        """Start a request. `parts` receives the body of its response."""
        connection = Mock(heavy_work=self.turns)
        connection.client_has_left.return_value = False
        connection.client_transport.return_value = None
        scope: Scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "GET",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": [(b"host", b"x")],
            "client": ("192.0.2.1", 1),
            "extensions": {ON_DISCONNECT: {}, CONNECTION: connection},
        }
        self.parts.clear()
        return asyncio.create_task(self._app(scope, self._receive, self._send))  # type: ignore[arg-type]

    async def _receive(self) -> Message:
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    async def _send(self, message: Message) -> None:
        self.parts.append(message.get("body", b""))


@pytest.fixture
def tasks(simulator: Simulator) -> list[str]:
    """Return the IDs of running tasks."""
    return [simulator.task(data={"status": "running", "progress": 0.5}) for _ in range(TASKS)]


@asynccontextmanager
async def connected(simulator: Simulator, *, lifetime: float) -> AsyncIterator[Client]:
    """Run a gateway in this process, where responses are fresh for so many seconds; yield a client."""
    settings = Settings.model_validate(
        {
            "server": {"trusted_hosts": ["*"]},
            "upstream": {"endpoint": simulator.url, "ca_file": CA_FILE},
            "credentials": {"access_key": KEY, "secret_key": SECRET},
            "cache": {"running_seconds": lifetime},
        }
    )
    app = create_app(settings, redactor=Redactor())
    async with app.asgi.router.lifespan_context(app.asgi):
        yield Client(app)


async def read(client: Client, tasks: list[str]) -> None:
    """Read a batch, so that the cache has the tasks."""
    request = client.get("/v1/progress", query_of(tasks))
    assert await client.turns.admit() == TASKS
    assert await client.turns.admit() == TASKS, "queries take a second turn"
    await request
    assert json.loads(b"".join(client.parts))["summary"]["running"] == TASKS


def query_of(tasks: list[str]) -> str:
    """Return the query string that names these tasks."""
    return "&".join(f"taskId={task}" for task in tasks)


async def test_batch_of_cached_tasks_takes_a_turn(simulator: Simulator, tasks: list[str]) -> None:
    """A response for many cached tasks is built in its turn."""
    async with connected(simulator, lifetime=60) as client:
        await read(client, tasks)
        request = client.get("/v1/progress", query_of(tasks))
        await eventually(lambda: client.turns.waiting, "it waits")
        assert not client.parts
        assert await client.turns.admit() == TASKS
        await request
    assert client.parts


async def test_stream_of_cached_tasks_takes_a_turn(simulator: Simulator, tasks: list[str]) -> None:
    """A stream of many cached tasks begins in its turn."""
    async with connected(simulator, lifetime=60) as client:
        await read(client, tasks)
        request = client.get("/v1/events", query_of(tasks))
        await eventually(lambda: client.turns.waiting, "it waits")
        assert not client.parts
        assert await client.turns.admit() == TASKS
        await eventually(lambda: b"".join(client.parts).count(b"event: progress") == TASKS, "it sends all")
        request.cancel()


@pytest.mark.parametrize("end", ["change", "outage", "time"])
async def test_long_poll_of_many_tasks_ends_in_its_turn(
    simulator: Simulator, tasks: list[str], end: str
) -> None:
    """A long poll of many tasks takes one turn when it begins, and another one before it responds."""
    async with connected(simulator, lifetime=0.3) as client:
        await read(client, tasks)
        request = client.get("/v1/progress", query_of(tasks) + f"&wait={1 if end == 'time' else 30}")
        assert await client.turns.admit() == TASKS
        assert not client.turns.waiting
        if end == "change":
            simulator.script(tasks[0], status="running", progress=0.75)
        elif end == "outage":
            simulator.fault("status", status=502)
        await eventually(lambda: client.turns.waiting, "it ends")
        assert not client.parts
        assert await client.turns.admit() == TASKS
        await request
    answer = json.loads(b"".join(client.parts))
    assert len(answer["items"]) == TASKS
    assert (answer["items"][0]["progress"] > 0.5) is (end == "change")
    assert (answer["summary"]["stale"] > 0) is (end == "outage")


async def test_long_poll_goes_on_if_its_change_is_undone_before_its_turn(
    simulator: Simulator, tasks: list[str]
) -> None:
    """A long poll that waits for its turn responds to the state that the tasks have then."""
    async with connected(simulator, lifetime=0.3) as client:
        await read(client, tasks)
        request = client.get("/v1/progress", query_of(tasks) + "&wait=30")
        await client.turns.admit()
        simulator.fault("status", status=502)
        await eventually(lambda: client.turns.waiting, "it ends, because the updates are overdue")
        simulator.heal()
        registry = client.metrics.registry
        await eventually(lambda: registry.get_sample_value("sd_gateway_snapshots_stale") == 0, "it recovers")
        await client.turns.admit()
        await asyncio.sleep(0)
        simulator.script(tasks[0], status="running", progress=0.75)
        await client.turns.admit()
        await request
    answer = json.loads(b"".join(client.parts))
    assert (answer["items"][0]["progress"], answer["summary"]["stale"]) == (0.75, 0)


async def test_long_poll_returns_the_snapshots_that_are_stored_before_its_turn(
    simulator: Simulator, tasks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot that the hub has not published yet replaces the failure that has ended the wait."""
    stores: list[Store] = []

    def create(*args: Any, **options: Any) -> Store:
        stores.append(create_store(*args, **options))
        return stores[0]

    monkeypatch.setattr(gateway.app, "create_store", create)
    simulator.fault("status", status=502)
    async with connected(simulator, lifetime=60) as client:
        request = client.get("/v1/progress", query_of(tasks) + "&wait=30")
        await client.turns.admit()
        await eventually(lambda: client.turns.waiting, "it ends, because all queries have failed")
        for number, task in enumerate(tasks):
            key = TaskKey(Operation.SD_GET_PROGRESS, task)
            snapshot = seen(key, at=time.monotonic(), lifetime=60.0, version=10**16 + number)
            assert await stores[0].commit(Lease(key, snapshot.version), partial(_first, snapshot)) is snapshot
        await client.turns.admit()
        await request
    assert json.loads(b"".join(client.parts))["summary"]["errors"] == 0


def _first(snapshot: Snapshot, _previous: Snapshot | None) -> Snapshot:
    return snapshot
