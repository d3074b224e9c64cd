"""A steady load: so many queries a second, each due at its time whatever became of those before it."""

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
    """What became of a query: `late` are the seconds from its being due; status 0 is no answer."""

    status: int
    late: float
    text: bytes


async def ask(
    port: int, paths: Sequence[str], *, rate: float, seconds: float, connections: int = 32
) -> list[Query]:
    """Ask for the paths in turn, `rate` times a second; return all queries.

    A query that finds every connection busy is asked later, and is late by that much.
    """
    loop = asyncio.get_running_loop()
    numbers = iter(range(round(rate * seconds)))
    queries: list[Query] = []
    began = loop.time()

    async def work() -> None:
        while True:
            # A connection is new after it broke, and given up with the last query.
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
    """Return by how many seconds this share of the queries, or fewer, were late; more the others."""
    return statistics.quantiles((query.late for query in queries), n=_PERCENTS)[percent - 1]
