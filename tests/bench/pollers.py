"""A crowd that asks for one task, each once a second, their phases spread evenly.

    python pollers.py '{"port": 1234, "path": "/…", "count": 200, "seconds": 20, "ends": 1234567890.1}'

prints what they saw, as JSON. A poller that still waits when its next turn comes asks again as soon
as it can, and its wait counts from the turn.

How old an answer is, its own estimate of the time left tells: the task runs at an even pace and
ends at the Unix time `ends`, so the estimate names the moment at which it was made.
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


class Seen(NamedTuple):
    """One answer: when it was asked for and when it came, in seconds from the start; its age then."""

    asked: float
    came: float
    age: float


async def poll(*, port: int, path: str, count: int, seconds: float, ends: float) -> list[Seen]:
    """Let the crowd ask for so long, and return what it saw.

    Raises: RuntimeError for an answer that is no 200, within an ExceptionGroup.
    """
    seen: list[Seen] = []
    began = time.monotonic() + _PERIOD  # by then all are connected

    async def one(phase: float) -> None:
        turn = phase
        async with Connection(port) as connection:
            while turn < seconds:
                early = began + turn - time.monotonic()
                if early > 0:
                    await asyncio.sleep(early)
                asked = time.monotonic() - began if early > 0 else turn
                reply = await connection.get(path)
                came, now = time.monotonic() - began, time.time()
                if reply.status != _OK:
                    raise RuntimeError(f"{reply.status} {reply.body[:300]!r}")
                seen.append(Seen(asked, came, now - ends + _left(reply.body)))
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
