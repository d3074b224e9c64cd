"""A constant open-loop load: queries have fixed due times, independent of earlier responses."""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from client import Connection

_PERCENTS = 100


class Query(NamedTuple):
    """Result of a query: `late` is the time from its due time in seconds; status 0 means no response."""

    status: int
    late: float
    text: bytes


async def ask(
    port: int, paths: Sequence[str], *, rate: float, seconds: float, connections: int = 32
) -> list[Query]:
    """Query the paths in turn, `rate` times per second; return all queries.

    If every connection is busy, a query is sent later; its delay includes that time.
    """
    loop = asyncio.get_running_loop()
    numbers = iter(range(round(rate * seconds)))
    queries: list[Query] = []
    began = loop.time()

    async def work() -> None:
        while True:
            # A broken connection is replaced.
            with suppress(OSError, EOFError, TimeoutError):
                async with Connection(port) as connection:
                    for number in numbers:
                        due = began + number / rate
                        await asyncio.sleep(max(due - loop.time(), 0))
                        query = Query(0, 0.0, b"")
                        try:
                            reply = await connection.get(paths[number % len(paths)])
                            query = Query(reply.status, loop.time() - due, reply.head + reply.body)
                        finally:
                            queries.append(query)
                    return

    async with asyncio.TaskGroup() as group:
        for _ in itertools.repeat(None, connections):
            group.create_task(work())
    return queries


def percentile(queries: Sequence[Query], percent: int) -> float:
    """Return this percentile of the delays, in seconds."""
    return statistics.quantiles((query.late for query in queries), n=_PERCENTS)[percent - 1]
