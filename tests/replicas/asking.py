"""A small asyncio HTTP client that notes when each request was sent and when its response had arrived."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from itertools import pairwise
from typing import Any, NamedTuple, Self

_DEADLINE_SECONDS = 60.0
FAILURES = (OSError, EOFError, TimeoutError, ValueError)

Rank = tuple[int, float]
"""Orders the states of a task as the simulated upstream passes through them."""


class Reply(NamedTuple):
    """A response; times are on the monotonic clock, header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    sent: float
    received: float

    @property
    def seconds(self) -> float:
        return self.received - self.sent

    def json(self) -> Any:
        return json.loads(self.body)


class Event(NamedTuple):
    """A server-sent event."""

    name: str
    id: str
    data: str
    received: float


class Connection:
    """A keep-alive connection to a port of 127.0.0.1. It is opened when needed, and again after a failure."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        streams = self._streams
        self.close()
        if streams is not None:
            with suppress(*FAILURES):
                await streams[1].wait_closed()

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> Reply:
        """Send a GET request, and return the response. Raises: OSError, EOFError, TimeoutError."""
        sent = time.monotonic()
        try:
            async with asyncio.timeout(_DEADLINE_SECONDS):
                reader = await self.send(path, headers)
                status, fields = await _head(reader)
                body = await reader.readexactly(int(fields.get("content-length", "0")))
        except BaseException:
            self.close()
            raise
        if fields.get("connection", "").lower() == "close":
            self.close()
        return Reply(status, fields, body, sent, time.monotonic())

    async def send(self, path: str, headers: Mapping[str, str] | None = None) -> asyncio.StreamReader:
        """Send a GET request; return what reads the response. Raises: OSError."""
        if self._streams is not None and self._streams[0].at_eof():  # the replica has closed it meanwhile
            self.close()
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        lines = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{lines}\r\n".encode())
        return reader


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines if line)
    return int(first.split()[1]), {name.lower(): value.strip() for name, _, value in pairs}


async def events(port: int, path: str, last_event_id: str = "") -> AsyncIterator[Event]:
    """Follow a stream until it ends; yield its events. Raises: OSError, EOFError, ValueError (not 200)."""
    async with Connection(port) as connection:
        reader = await connection.send(path, {"Last-Event-ID": last_event_id} if last_event_id else None)
        async with asyncio.timeout(_DEADLINE_SECONDS):
            status, headers = await _head(reader)
        if status == 204:
            return
        if status != 200 or headers.get("transfer-encoding") != "chunked":
            raise ValueError(f"no stream: {status}")
        text = b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            text += (await reader.readexactly(size + 2))[:-2]
            received = time.monotonic()
            *blocks, text = text.split(b"\n\n")
            for block in blocks:
                fields = dict(line.partition(": ")[::2] for line in block.decode().split("\n"))
                if "data" in fields:
                    yield Event(fields.get("event", ""), fields.get("id", ""), fields["data"], received)


def rank(body: Mapping[str, Any]) -> Rank:
    """Return how far a task has come, from its JSON. Tasks of the simulator pass through the ranks in order.

    It is based on the time left, because the vendor's progress jumps back.
    """
    if body["terminal"]:
        return (2, 0.0)
    if body["status"] == "waiting":
        return (0, -float(body["queueRemaining"] or 0))
    return (1, -float(body["etaSeconds"] or 0.0))


async def poll(
    ports: list[int],
    task_id: str,
    *,
    every: float,
    going_on: Callable[[], bool],
    tagged: bool = False,
) -> list[Reply]:
    """Query the replicas in turn every so many seconds; return the responses.

    With `tagged`, each request has If-None-Match with the last ETag. Without it, `every` also passes after a
    late response: a client that sends its next request at once may meet a replica that has not received the
    others' latest message.
    """
    replies: list[Reply] = []
    tag = ""
    async with AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(Connection(port)) for port in ports]
        number = 0
        while going_on():
            connection = connections[number % len(connections)]
            number += 1
            headers = {"If-None-Match": tag} if tagged and tag else None
            reply = await connection.get(f"/v1/progress/{task_id}", headers)
            replies.append(reply)
            tag = reply.headers.get("etag", tag)
            await asyncio.sleep(max(0.0, reply.sent + every - time.monotonic()) if tagged else every)
    return replies


async def ask(port: int, task_id: str) -> Reply:
    """Query one task on a connection of its own."""
    async with Connection(port) as connection:
        return await connection.get(f"/v1/progress/{task_id}")


async def ask_all(ports: list[int], tasks: list[str]) -> list[Reply]:
    """Query every task at every port at the same time."""
    return await asyncio.gather(*(ask(port, task) for task in tasks for port in ports))


def steps_back(replies: list[Reply]) -> int:
    """Return how many of a client's successive responses are older than the one before."""
    ranks = [rank(reply.json()) for reply in replies if reply.status == 200]
    return sum(later < earlier for earlier, later in pairwise(ranks))


def late_steps_back(replies: list[Reply], seconds: float) -> int:
    """Return how many responses are older than one that had arrived this long before the request was sent."""
    ranked = [(reply, rank(reply.json())) for reply in replies if reply.status == 200]
    return sum(
        any(before.received < after.sent - seconds and known > received for before, known in ranked)
        for after, received in ranked
    )
