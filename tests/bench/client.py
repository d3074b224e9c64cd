"""A bare HTTP/1.1 client: one keep-alive connection, one request at a time, as little CPU as can be."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable
from typing import NamedTuple, Self

_OK = 200
_DEADLINE_SECONDS = 30.0


class Reply(NamedTuple):
    """An answer: `head` is its status line and headers in lower case."""

    status: int
    head: bytes
    body: bytes


class Connection:
    """A connection to 127.0.0.1; open it with `async with`."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._writer.close()

    async def get(self, path: str, headers: str = "") -> Reply:
        """Ask, and read the answer; `headers` are whole lines.

        Raises: TimeoutError, OSError, asyncio.IncompleteReadError.
        """
        return await self.ask("GET", path, headers)

    async def post(self, path: str, body: bytes) -> Reply:
        """Ask with a body, and read the answer. Raises: as `get`."""
        return await self.ask("POST", path, f"Content-Length: {len(body)}\r\n", body)

    async def ask(self, method: str, path: str, headers: str = "", body: bytes = b"") -> Reply:
        """Make any request, and read its answer. Raises: as `get`."""
        self.send(method, path, headers, body)
        async with asyncio.timeout(_DEADLINE_SECONDS):
            head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
            return Reply(int(head[9:12]), head, await self._reader.readexactly(length))

    def send(self, method: str, path: str, headers: str = "", body: bytes = b"") -> None:
        """Send a request, and leave its answer."""
        request = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\n{headers}\r\n"
        self._writer.write(request.encode() + body)

    async def read(self) -> bytes:
        """Return what came next of an answer; nothing when it is over. Raises: OSError."""
        return await self._reader.read(65536)


async def fetch_all(port: int, paths: Iterable[str], *, connections: int) -> None:
    """Get every path once, over so many connections. Raises: RuntimeError for an answer that is no 200."""
    waiting = iter(paths)

    async def work() -> None:
        async with Connection(port) as connection:
            for path in waiting:
                reply = await connection.get(path)
                if reply.status != _OK:
                    raise RuntimeError(f"{path}: {reply.status} {reply.body[:300]!r}")

    async with asyncio.TaskGroup() as group:
        for _ in itertools.repeat(None, connections):
            group.create_task(work())


async def fetch(port: int, path: str, headers: str = "") -> Reply:
    """Get one path, over a connection of its own."""
    async with Connection(port) as connection:
        return await connection.get(path, headers)
