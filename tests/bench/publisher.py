"""Publishes changes to nchan: it takes the place of the upstream, which nchan does not query.

    python publisher.py '{"port": 1234, "tasks": ["…", …]}'

publishes every task at once, and then once a second with random phases. The data equals the data of the
gateway's events. `message` is the Unix time at which the change was sent, as in upstream.py.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence

import uvloop
from client import Connection
from upstream import progress_json

_PERIOD = 1.0
_PUBLISHED = (201, 202)  # with subscribers, and without
_HEADERS = "Content-Type: application/json\r\nX-EventSource-Event: progress\r\n"


async def publish(*, port: int, tasks: Sequence[str]) -> None:
    """Publish until the process is terminated. Raises: RuntimeError if nchan refuses a change."""
    chance = random.Random(1)
    loop = asyncio.get_running_loop()
    began = loop.time()

    async def repeat(task_id: str, phase: float) -> None:
        due = began + phase
        async with Connection(port) as connection:
            while True:
                body = progress_json(task_id, f"{time.time():.6f}")
                headers = f"{_HEADERS}Content-Length: {len(body)}\r\n"
                reply = await connection.ask("POST", f"/publish/{task_id}", headers, body)
                if reply.status not in _PUBLISHED:
                    raise RuntimeError(f"nchan refused a change: {reply.status} {reply.body!r}")
                due += _PERIOD
                await asyncio.sleep(due - loop.time())

    async with asyncio.TaskGroup() as group:
        for task_id in tasks:
            group.create_task(repeat(task_id, chance.uniform(0.0, _PERIOD)))


if __name__ == "__main__":
    uvloop.run(publish(**json.loads(sys.argv[1])))
