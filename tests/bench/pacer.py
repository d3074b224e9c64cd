"""Open-loop load: queries have fixed due times, independent of earlier responses.

    python pacer.py '{"port": 1234, "prefix": "/…-", "tasks": 1000, "rate": 5000, "seconds": 12}'

queries the tasks in random order, and prints the delay of each response as JSON: the time from the due
time of its query to its end, in seconds. If every connection is busy, a query waits for one.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import deque

import uvloop

_OK = b"HTTP/1.1 200 "
_CONNECTIONS = 256
_TICK_SECONDS = 0.001
_TIMEOUT_SECONDS = 30.0


class Pacer:
    """Due queries, idle connections, and the measured delays."""

    def __init__(self, prefix: str, tasks: int) -> None:
        self._requests = [
            f"GET {prefix}{number} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode() for number in range(tasks)
        ]
        self._random = random.Random(1)
        self._due: deque[float] = deque()
        self._idle: list[Line] = []
        self.late: list[float] = []
        self.refused = 0
        self.all_idle = asyncio.Event()

    def ask(self, due: float) -> None:
        """Query a random task, now or when a connection is free."""
        self.all_idle.clear()
        if self._idle:
            self._idle.pop().send(self._random.choice(self._requests), due)
        else:
            self._due.append(due)

    def free(self, line: Line) -> None:
        """Send the next due query on a connection, or mark it idle."""
        if self._due:
            line.send(self._random.choice(self._requests), self._due.popleft())
        else:
            self._idle.append(line)
            if len(self._idle) == _CONNECTIONS:
                self.all_idle.set()


class Line(asyncio.Protocol):
    """A keep-alive connection with one query at a time."""

    def __init__(self, pacer: Pacer) -> None:
        self._pacer = pacer
        self._unread = b""
        self._due = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._pacer.free(self)

    def send(self, request: bytes, due: float) -> None:
        """Send a query with this due time."""
        self._due = due
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._unread += data
        head, _, body = self._unread.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        if not length or len(body) < int(length):
            return
        self._pacer.late.append(time.monotonic() - self._due)
        self._pacer.refused += not head.startswith(_OK)
        self._unread = b""
        self._pacer.free(self)


async def ask(*, port: int, prefix: str, tasks: int, rate: int, seconds: float) -> list[float]:
    """Send queries for this time and return the delays. Raises: RuntimeError for a status other than 200."""
    loop = asyncio.get_running_loop()
    pacer = Pacer(prefix, tasks)
    for _ in range(_CONNECTIONS):
        await loop.create_connection(lambda: Line(pacer), "127.0.0.1", port)
    began, asked, all_of_them = time.monotonic(), 0, round(rate * seconds)
    while asked < all_of_them:
        while asked < min((time.monotonic() - began) * rate, all_of_them):
            pacer.ask(began + asked / rate)
            asked += 1
        await asyncio.sleep(_TICK_SECONDS)
    async with asyncio.timeout(_TIMEOUT_SECONDS):
        await pacer.all_idle.wait()
    if pacer.refused:
        raise RuntimeError(f"{pacer.refused} of {asked} responses were not 200")
    return pacer.late


if __name__ == "__main__":
    json.dump(uvloop.run(ask(**json.loads(sys.argv[1]))), sys.stdout)
