"""A mixed load for the soak: all kinds of requests, valid and invalid.

    polls of many tasks, long polls, short streams, batches, drop-in queries, invalid requests,
    unknown tasks, clients that disconnect

A worker with a broken connection counts it, reconnects and continues. Tasks are created here, a few per
second, and run to their ends in the simulator.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import uuid
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from client import Connection, Reply

_TASKS = 200
_CREATED = 4.0  # tasks per second
_POLLERS, _POLLS = 50, 120.0  # rates: polls per second of all pollers; the same below
_LONG_POLLERS, _WAIT_SECONDS = 25, 5
_STREAMS, _STREAM_SECONDS, _STREAM_TASKS = 40, 8.0, 5
_BATCHES, _BATCH_TASKS = 3.0, 20
_NATIVE, _RESULTS = 20.0, 5.0
_WRONG, _UNKNOWN = 10.0, 3.0
_HANG_UPS = 8.0
_CLIENT_ERROR = 400
_DETAIL = re.compile(rb"detail=([a-z-]+)")
_CODE = re.compile(rb'"(?:code|errCode)":"([^"]*)"')
_PROBLEM = b"event: problem\n"
_WRONG_REQUESTS: tuple[tuple[str, str, bytes], ...] = (
    ("GET", "/v1/progress/no%20task%20id", b""),
    ("GET", "/v1/progress/a?colour=blue", b""),
    ("GET", "/v1/progress/a?wait=soon", b""),
    ("GET", "/v1/progress", b""),
    ("GET", "/v2/progress/a", b""),
    ("PUT", "/v1/progress/a", b""),
    ("POST", "/scc/sd_txt2img", b"{}"),
    ("POST", "/scc/sd_get_progress", b"not JSON"),
    ("POST", "/scc/sd_get_progress", b'{"taskId":7}'),
    ("POST", "/scc/sd_get_progress", b" " * 100_000),
)


class Tally:
    """Counters of the load."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.codes: Counter[str] = Counter()  # of problems and of rejecting envelopes
        self.covered: Counter[str] = Counter()  # failures replaced by a stale response
        self.broken: Counter[str] = Counter()  # broken connections by cause

    def note(self, reply: Reply) -> None:
        """Count a response."""
        self.statuses[reply.status] += 1
        if reply.status >= _CLIENT_ERROR:
            found = _CODE.search(reply.body)
            self.codes[found[1].decode() if found else "no code"] += 1
        elif found := _DETAIL.search(reply.head):
            self.covered[found[1].decode()] += 1

    def add(self, other: Tally) -> None:
        """Add the counts of another tally."""
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            mine.update(theirs)


class Crowd:
    """Loads the gateway on `port` with tasks of the simulator on `simulator`."""

    def __init__(self, port: int, *, simulator: int, chance: random.Random) -> None:
        self._port = port
        self._simulator = simulator
        self._chance = chance
        self._tasks: deque[str] = deque(maxlen=_TASKS)
        self.tally = Tally()

    async def run(self, seconds: float) -> Tally:
        """Load the gateway for this time, close all connections, and return the counts."""
        self.tally = Tally()
        async with Connection(self._simulator) as control:
            for _ in range(_TASKS if not self._tasks else 0):
                await self._make(control)
        work = [self._each(self._simulator, 1, _CREATED, self._make)]
        work.append(self._each(self._port, _POLLERS, _POLLS, self._poll))
        work.append(self._each(self._port, 1, _BATCHES, self._batch))
        work.append(self._each(self._port, 4, _NATIVE, self._native))
        work.append(self._each(self._port, 2, _RESULTS, self._result))
        work.append(self._each(self._port, 2, _WRONG, self._mistake))
        work.append(self._each(self._port, 4, _UNKNOWN, self._unknown))
        work.append(self._each(self._port, _LONG_POLLERS, None, self._long_poll))
        work.append(self._each(self._port, _STREAMS, None, self._stream))
        work.append(self._each(self._port, 1, _HANG_UPS, self._hang_up))
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(*work)
        return self.tally

    async def _each(
        self, port: int, workers: int, rate: float | None, act: Callable[[Connection], Awaitable[Any]]
    ) -> None:
        """Run this number of workers with a total rate of `rate` per second; None for no pause."""
        await asyncio.gather(
            *(self._work(port, None if rate is None else workers / rate, act) for _ in range(workers))
        )

    async def _work(
        self, port: int, period: float | None, act: Callable[[Connection], Awaitable[Any]]
    ) -> None:
        clock = asyncio.get_running_loop().time
        turn = clock() + self._chance.uniform(0.0, period or 1.0)
        while True:
            try:
                async with Connection(port) as connection:
                    while True:
                        await asyncio.sleep(turn - clock())
                        turn = max(turn, clock() - 1.0) + period if period else clock()
                        if await act(connection) is None:
                            break
            except (OSError, TimeoutError, asyncio.IncompleteReadError) as exc:
                self.tally.broken[f"{act.__name__.strip('_')}: {type(exc).__name__}"] += 1
                turn = clock() + 0.1

    async def _make(self, control: Connection) -> Reply:
        running = self._chance.uniform(5.0, 60.0)
        outcome = self._chance.choice(["succeeded", "succeeded", "failed", "canceled"])
        life = {"waitingSeconds": 2.0, "runningSeconds": running, "outcome": outcome}
        reply = await control.post("/_simulator/tasks", json.dumps({"life": life}).encode())
        self._tasks.append(json.loads(reply.body)["taskId"])
        return reply

    async def _poll(self, connection: Connection) -> Reply:
        return self._noted(await connection.get(f"/v1/progress/{self._task()}"))

    async def _long_poll(self, connection: Connection) -> Reply:
        return self._noted(await connection.get(f"/v1/progress/{self._task()}?wait={_WAIT_SECONDS}"))

    async def _batch(self, connection: Connection) -> Reply:
        query = "&".join(f"taskId={self._task()}" for _ in range(_BATCH_TASKS))
        return self._noted(await connection.get(f"/v1/progress?{query}"))

    async def _native(self, connection: Connection) -> Reply:
        return self._noted(await connection.post("/scc/sd_get_progress", self._body()))

    async def _result(self, connection: Connection) -> Reply:
        return self._noted(await connection.post("/scc/sd_get_result", self._body()))

    async def _unknown(self, connection: Connection) -> Reply:
        return self._noted(await connection.get(f"/v1/progress/{uuid.uuid4().hex}"))

    async def _mistake(self, connection: Connection) -> Reply | None:
        method, path, body = self._chance.choice(_WRONG_REQUESTS)
        length = f"Content-Length: {len(body)}\r\n" if body else ""
        reply = self._noted(await connection.ask(method, path, length, body))
        return None if b"connection: close" in reply.head else reply

    async def _stream(self, connection: Connection) -> None:
        query = "&".join(f"taskId={self._task()}" for _ in range(_STREAM_TASKS))
        connection.send("GET", f"/v1/events?{query}")
        leaves = asyncio.get_running_loop().time() + self._chance.uniform(0.1, _STREAM_SECONDS)
        with suppress(TimeoutError):
            async with asyncio.timeout_at(leaves):
                first = await connection.read()
                self.tally.statuses[int(first[9:12])] += 1
                while part := await connection.read():
                    for problem in part.split(_PROBLEM)[1:]:
                        if found := _CODE.search(problem):
                            self.tally.codes[f"{found[1].decode()} (event)"] += 1

    async def _hang_up(self, connection: Connection) -> None:
        # An unknown task needs an upstream call; the client disconnects before the response.
        connection.send("GET", f"/v1/progress/{uuid.uuid4().hex}")
        await asyncio.sleep(self._chance.choice([0.0, 0.0, 0.01, 0.1]))

    def _task(self) -> str:
        return self._chance.choice(self._tasks)

    def _body(self) -> bytes:
        return json.dumps({"taskId": self._task()}).encode()

    def _noted(self, reply: Reply) -> Reply:
        self.tally.note(reply)
        return reply
