"""Pollers of one task: each polls once a second, with evenly spread phases.

    python pollers.py '{"port": 1234, "path": "/…", "count": 200, "seconds": 20, "ends": 1234567890.1}'

prints the responses as JSON. If a response is late, the poller sends its next request as soon as it has
arrived, and the wait time counts from the due time.

The age of a response follows from its estimate of the time left: the task runs at a constant speed and
ends at the Unix time `ends`, so the estimate gives the time at which upstream created it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import NamedTuple

import uvloop
from client import Connection

_OK = 200
_PERIOD = 1.0


class Response(NamedTuple):
    """One response: due and arrival times in seconds from the start, and its age at arrival."""

    requested: float
    arrived: float
    age: float


async def poll(*, port: int, path: str, count: int, seconds: float, ends: float) -> list[Response]:
    """Poll for this time and return the responses.

    Raises: RuntimeError for a status other than 200, in an ExceptionGroup.
    """
    seen: list[Response] = []
    began = time.monotonic() + _PERIOD  # all are connected by then

    async def one(phase: float) -> None:
        turn = phase
        async with Connection(port) as connection:
            while turn < seconds:
                early = began + turn - time.monotonic()
                if early > 0:
                    await asyncio.sleep(early)
                requested = time.monotonic() - began if early > 0 else turn
                reply = await connection.get(path)
                arrived, now = time.monotonic() - began, time.time()
                if reply.status != _OK:
                    raise RuntimeError(f"{reply.status} {reply.body[:300]!r}")
                seen.append(Response(requested, arrived, now - ends + _left(reply.body)))
                turn += _PERIOD

    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(one(number / count * _PERIOD))
    return seen


def _left(body: bytes) -> float:
    answer = json.loads(body)
    return float(answer["data"]["etaRelative"] if "data" in answer else answer["etaSeconds"])


if __name__ == "__main__":
    json.dump(uvloop.run(poll(**json.loads(sys.argv[1]))), sys.stdout)
