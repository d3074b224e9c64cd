"""A crowd that watches: by event streams that stay open, or by polling once a second, phases spread.

    python streams.py '{"port": 1234, "paths": ["/…", …], "how": "events", "count": 5000, …}'

prints what it saw, as JSON. Every change carries the Unix time at which upstream sent it, as `message`:
how late it came is the time it was read less that. Only every tenth reader looks at it, for the
crowd must cost less than whom it loads. The server's CPU time and memory are read here, because only
the crowd knows when all are watching.
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
_SAMPLED = 10  # one reader in so many looks at the time
_PATIENCE_SECONDS = 60.0
_SETTLE_SECONDS = 2.0
_PERIOD = 1.0
_LOOK_SECONDS = 0.002
_SMALL_BYTES, _SMALL_SEGMENT = 4096, 536  # the kernel holds little for one who does not read


class Sight(NamedTuple):
    """What a crowd saw within `seconds`, and what that cost the server."""

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
    """What all readers, `count` of them, count together."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.watching = 0
        self.all_watching = asyncio.Event()
        self.lost = 0
        self.skipped = 0  # turns at which the last answer had not come yet
        self.delivered = 0
        self.late: list[float] = []

    def clear(self) -> None:
        """Count anew."""
        self.skipped = self.delivered = 0
        self.late.clear()

    def welcome(self) -> None:
        """Note that one more has been told something."""
        self.watching += 1
        if self.watching == self._count:
            self.all_watching.set()

    def note(self, count: int, text: bytes, *, sampled: bool) -> None:
        """Note changes that came just now."""
        self.delivered += count
        if sampled:
            now = time.time()
            self.late += [now - float(part[: part.index(b'"')]) for part in text.split(_MESSAGE)[1:]]


class Watcher(asyncio.Protocol):
    """A connection that watches one task."""

    def __init__(self, tally: Tally, path: str, *, sampled: bool) -> None:
        self._tally = tally
        self._request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
        self._sampled = sampled
        self._unread = b""
        self._watching = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self.ask()

    def connection_lost(self, exc: Exception | None) -> None:
        self._tally.lost += 1

    def ask(self) -> None:
        """Send the request."""
        self._transport.write(self._request)

    def _note(self, count: int, text: bytes) -> None:
        if not self._watching:
            self._watching = True
            self._tally.welcome()
        self._tally.note(count, text, sampled=self._sampled)


class Reader(Watcher):
    """Reads a stream of events."""

    def data_received(self, data: bytes) -> None:
        whole, _, self._unread = (self._unread + data).rpartition(b"\n\n")
        if count := whole.count(_EVENT):
            self._note(count, whole)


class Poller(Watcher):
    """Asks again and again; an answer unlike the last one is a change."""

    _last = b""
    _waiting = False

    def ask(self) -> None:
        """Send the request, unless the last one is still to be answered."""
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
            self._transport.close()  # which is noticed
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
    """Let the crowd watch for so long, once all do, and return what it saw.

    The watchers of a task come together, the tasks at times drawn evenly from `opening_seconds`.
    `slow` more never read what they asked for. `poked` is asked for so many times a second besides.
    Raises: RuntimeError when connections are refused or lost; OSError.
    """
    loop = asyncio.get_running_loop()
    tally = Tally(count)
    kind = Reader if how == "events" else Poller
    chance = random.Random(1)
    begins = [chance.uniform(0.0, opening_seconds) for _ in paths]
    idle = resident_bytes(pids)
    began = time.monotonic()

    async def begin(number: int) -> Watcher:
        path = paths[number % len(paths)]
        await asyncio.sleep(began + begins[number % len(paths)] - time.monotonic())
        sampled = number // len(paths) % _SAMPLED == 0  # of every task some
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
            pace.append(asyncio.create_task(_ask_in_turn(subscribers, _PERIOD)))
        if poked:
            _, poker = await loop.create_connection(
                lambda: Poller(Tally(1), poked, sampled=False), "127.0.0.1", port
            )
            pace.append(asyncio.create_task(_ask_in_turn([poker], 1 / pokes)))
        with suppress(TimeoutError):  # which is told below, with numbers
            await asyncio.wait_for(tally.all_watching.wait(), _PATIENCE_SECONDS)
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
    if tally.lost or tally.watching < count:
        raise RuntimeError(f"{tally.watching} of {count} were watching, {tally.lost} connections were lost")
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


async def _ask_in_turn(subscribers: Sequence[Watcher], period: float) -> None:
    """Let each ask once a period; ends when it is cancelled."""
    began, asked = time.monotonic(), 0
    while True:
        while asked < (time.monotonic() - began) / period * len(subscribers):
            subscribers[asked % len(subscribers)].ask()
            asked += 1
        await asyncio.sleep(_LOOK_SECONDS)


def _never_reading(port: int, path: str) -> socket.socket:
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BYTES)
    reader.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SMALL_SEGMENT)
    reader.settimeout(_PATIENCE_SECONDS)
    reader.connect(("127.0.0.1", port))
    reader.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    return reader


if __name__ == "__main__":
    json.dump(uvloop.run(watch(**json.loads(sys.argv[1]))), sys.stdout)
