"""A minimal HTTP/1.1 client: one keep-alive connection, one request at a time, little CPU."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable
from typing import NamedTuple, Self

_OK = 200
_DEADLINE_SECONDS = 30.0


class Reply(NamedTuple):
    """A response; `head` has the status line and the headers in lower case."""

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
        """Send a GET request and return the response; `headers` are complete lines.

        Raises: TimeoutError, OSError, asyncio.IncompleteReadError.
        """
        return await self.ask("GET", path, headers)

    async def post(self, path: str, body: bytes) -> Reply:
        """Send a POST request and return the response. Raises: as `get`."""
        return await self.ask("POST", path, f"Content-Length: {len(body)}\r\n", body)

    async def ask(self, method: str, path: str, headers: str = "", body: bytes = b"") -> Reply:
        """Send a request and return the response. Raises: as `get`."""
        self.send(method, path, headers, body)
        async with asyncio.timeout(_DEADLINE_SECONDS):
            head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
            return Reply(int(head[9:12]), head, await self._reader.readexactly(length))

    def send(self, method: str, path: str, headers: str = "", body: bytes = b"") -> None:
        """Send a request without reading the response."""
        request = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\n{headers}\r\n"
        self._writer.write(request.encode() + body)

    async def read(self) -> bytes:
        """Return the next bytes of the response; empty at its end. Raises: OSError."""
        return await self._reader.read(65536)


async def fetch_all(port: int, paths: Iterable[str], *, connections: int) -> None:
    """Get every path once, over `connections`. Raises: RuntimeError for a status other than 200."""
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
    """Get one path over a new connection."""
    async with Connection(port) as connection:
        return await connection.get(path, headers)
