"""Subscribers: event streams, or polling once a second with random phases.

    python streams.py '{"port": 1234, "paths": ["/…", …], "how": "events", "count": 5000, …}'

prints the results as JSON. The `message` of every change is the Unix time at which upstream sent it; the
delay is the time from then until it is read. Only every tenth subscriber measures it, to keep the cost of the
load low. The CPU time and memory of the server are read here, because only this process knows when all are
subscribed.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import NamedTuple

import uvloop
from processes import cpu_seconds, resident_bytes

_EVENT = b"event: progress\n"
_MESSAGE = b'"message":"'
_OK = b"HTTP/1.1 200 "
_SAMPLED = 10  # one subscriber of this number measures delays
_TIMEOUT_SECONDS = 60.0
_SETTLE_SECONDS = 2.0
_PERIOD = 1.0
_TICK_SECONDS = 0.002
_SMALL_BYTES, _SMALL_SEGMENT = 4096, 536  # small kernel buffers for unread sockets


class Sight(NamedTuple):
    """Results within `seconds`, and the resources of the server."""

    seconds: float
    delivered: int
    late_p50: float
    late_p99: float
    late_max: float
    skipped: int
    server_cpu: float
    own_cpu: float
    idle_bytes: int
    open_bytes: int
    half_way_bytes: int
    end_bytes: int


class Tally:
    """Shared counters of all `count` subscribers."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.subscribed_count = 0
        self.all_subscribed = asyncio.Event()
        self.lost = 0
        self.skipped = 0  # polls skipped because the last response had not arrived
        self.delivered = 0
        self.late: list[float] = []

    def clear(self) -> None:
        """Reset the counters."""
        self.skipped = self.delivered = 0
        self.late.clear()

    def subscribed(self) -> None:
        """Count a subscriber that has received its first event."""
        self.subscribed_count += 1
        if self.subscribed_count == self._count:
            self.all_subscribed.set()

    def note(self, count: int, text: bytes, *, sampled: bool) -> None:
        """Count changes that have just arrived."""
        self.delivered += count
        if sampled:
            now = time.time()
            self.late += [now - float(part[: part.index(b'"')]) for part in text.split(_MESSAGE)[1:]]


class Subscriber(asyncio.Protocol):
    """A connection that is subscribed to one task."""

    _headers = ""

    def __init__(self, tally: Tally, path: str, *, sampled: bool) -> None:
        self._tally = tally
        self._request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{self._headers}\r\n".encode()
        self._sampled = sampled
        self._unread = b""
        self._subscribed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self.ask()

    def connection_lost(self, exc: Exception | None) -> None:
        self._tally.lost += 1

    def ask(self) -> None:
        """Send the request."""
        self._transport.write(self._request)

    def _note(self, count: int, text: bytes) -> None:
        if not self._subscribed:
            self._subscribed = True
            self._tally.subscribed()
        self._tally.note(count, text, sampled=self._sampled)


class Reader(Subscriber):
    """Reads a stream of events."""

    _headers = "Accept: text/event-stream\r\n"  # nchan requires it, and browsers send it

    def data_received(self, data: bytes) -> None:
        whole, _, self._unread = (self._unread + data).rpartition(b"\n\n")
        if count := whole.count(_EVENT):
            self._note(count, whole)


class Poller(Subscriber):
    """Polls a task; a response that differs from the last one is a change."""

    _last = b""
    _waiting = False

    def ask(self) -> None:
        """Send the request, unless the last response has not arrived yet."""
        if self._waiting:
            self._tally.skipped += 1
        else:
            self._waiting = True
            super().ask()

    def data_received(self, data: bytes) -> None:
        self._unread += data
        head, _, body = self._unread.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        if not length or len(body) < int(length):
            return
        self._unread, self._waiting = b"", False
        if not head.startswith(_OK):
            self._transport.close()  # counted as lost
        elif body != self._last:
            self._last = body
            self._note(1, body)


async def watch(
    *,
    port: int,
    paths: Sequence[str],
    how: str,
    count: int,
    seconds: float,
    opening_seconds: float,
    pids: Sequence[int],
    slow: int = 0,
    poked: str = "",
    pokes: float = 0.0,
) -> Sight:
    """Subscribe, measure for this time once all are subscribed, and return the results.

    All subscribers of a task connect together, at a random time within `opening_seconds`. `slow` more
    subscribers never read. `poked` is queried `pokes` times per second. Raises: OSError, and RuntimeError if
    connections are refused or lost.
    """
    loop = asyncio.get_running_loop()
    tally = Tally(count)
    kind = Reader if how == "events" else Poller
    chance = random.Random(1)
    begins = [chance.uniform(0.0, opening_seconds) for _ in paths]
    idle = resident_bytes(pids)
    began = time.monotonic()

    async def begin(number: int) -> Subscriber:
        path = paths[number % len(paths)]
        await asyncio.sleep(began + begins[number % len(paths)] - time.monotonic())
        sampled = number // len(paths) % _SAMPLED == 0  # some of every task
        _, subscriber = await loop.create_connection(
            lambda: kind(tally, path, sampled=sampled), "127.0.0.1", port
        )
        return subscriber

    with ExitStack() as stack:
        for number in range(slow):
            stack.enter_context(_never_reading(port, paths[number % len(paths)]))
        subscribers = await asyncio.gather(*map(begin, range(count)))
        pace = []
        if kind is Poller:
            pace.append(asyncio.create_task(_poll_in_turn(subscribers, _PERIOD)))
        if poked:
            _, poker = await loop.create_connection(
                lambda: Poller(Tally(1), poked, sampled=False), "127.0.0.1", port
            )
            pace.append(asyncio.create_task(_poll_in_turn([poker], 1 / pokes)))
        with suppress(TimeoutError):  # reported below, with counts
            await asyncio.wait_for(tally.all_subscribed.wait(), _TIMEOUT_SECONDS)
        await asyncio.sleep(_SETTLE_SECONDS)
        opened, cpu, own, start = (
            resident_bytes(pids),
            cpu_seconds(pids),
            time.process_time(),
            time.monotonic(),
        )
        tally.clear()
        await asyncio.sleep(seconds / 2)
        half_way = resident_bytes(pids)
        await asyncio.sleep(seconds / 2)
        elapsed = time.monotonic() - start
        delivered, late, skipped = tally.delivered, list(tally.late), tally.skipped
        cpu, own, end = cpu_seconds(pids) - cpu, time.process_time() - own, resident_bytes(pids)
        for task in pace:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
    if tally.lost or tally.subscribed_count < count:
        raise RuntimeError(
            f"{tally.subscribed_count} of {count} were subscribed, {tally.lost} connections were lost"
        )
    p99 = statistics.quantiles(late, n=100, method="inclusive")[-1]
    return Sight(
        seconds=elapsed,
        delivered=delivered,
        late_p50=statistics.median(late),
        late_p99=p99,
        late_max=max(late),
        skipped=skipped,
        server_cpu=cpu,
        own_cpu=own,
        idle_bytes=idle,
        open_bytes=opened,
        half_way_bytes=half_way,
        end_bytes=end,
    )


async def _poll_in_turn(subscribers: Sequence[Subscriber], period: float) -> None:
    """Let each subscriber poll once per period, until cancelled."""
    began, asked = time.monotonic(), 0
    while True:
        while asked < (time.monotonic() - began) / period * len(subscribers):
            subscribers[asked % len(subscribers)].ask()
            asked += 1
        await asyncio.sleep(_TICK_SECONDS)


def _never_reading(port: int, path: str) -> socket.socket:
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BYTES)
    reader.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SMALL_SEGMENT)
    reader.settimeout(_TIMEOUT_SECONDS)
    reader.connect(("127.0.0.1", port))
    reader.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    return reader


if __name__ == "__main__":
    json.dump(uvloop.run(watch(**json.loads(sys.argv[1]))), sys.stdout)
