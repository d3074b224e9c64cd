"""Requests for many tasks take turns: the application, with a connection whose turns the test controls."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from unittest.mock import Mock

import pytest
from starlette.types import ASGIApp, Message, Scope

from gateway.api.server_extensions import CONNECTION, ON_DISCONNECT
from gateway.app import create_app
from gateway.settings.model import Settings
from gateway.telemetry.redaction import Redactor
from tests.support.harness import CA_FILE, KEY, SECRET, Simulator, eventually

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

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.turns = Turns()
        self.parts: list[bytes] = []

    def get(self, path: str, query: str) -> asyncio.Task[None]:
        """Start a request. `parts` receives the body of its response."""
        connection = Mock(heavy_work=self.turns)
        connection.client_has_left.return_value = False
        connection.direct_transport.return_value = None
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
        yield Client(app.asgi)


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
