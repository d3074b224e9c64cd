"""200 tasks queried every second with an upstream limit of 20 calls per second: how the call rate settles."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import statistics
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import servers
from client import Connection, fetch
from measuring import Bench, Comparison, Figures
from servers import Server

NEEDS = ()

_LIMIT, _LATENCY_SECONDS = 20, 0.05
_TASKS, _HOT, _HOT_POLLERS = 200, 10, 5
_LONGER = 15  # multiple of the measurement: three growth cycles of the rate limit
_SETTLING = 0.25  # share of the time, not measured
_PERIOD = 1.0
_OK, _UNAVAILABLE = 200, 503


class Response(NamedTuple):
    """One response: status, Cache-Status, and arrival time, wait time and age in seconds."""

    status: int
    cache_status: str
    came: float
    waited: float
    age: float


def run(bench: Bench) -> Iterator[Comparison]:
    """Measure the gateway only; the alternatives do not learn a limit."""
    seconds = _LONGER * bench.seconds
    series: list[str] = []
    samples: dict[str, list[Figures]] = {}
    for number in range(bench.rounds):
        retry_after = (None, 1)[number % 2]
        name = "gateway" if retry_after is None else "gateway, Retry-After: 1"
        with (
            servers.simulator(bench.cores, bench.folder, latency_seconds=_LATENCY_SECONDS) as upstream,
            servers.gateway(bench.cores, bench.folder, upstream=upstream) as server,
        ):
            figures, calls = asyncio.run(_measured(server, upstream, seconds, retry_after))
        samples.setdefault(name, []).append(figures)
        series.append(f"{name}, calls in each second: {' '.join(map(str, calls))}")
    rounds = min(map(len, samples.values()))
    yield Comparison(
        title=f"throttle: {_TASKS} tasks at 1 Hz for {seconds:g} s, {_HOT} of them hot ({_HOT_POLLERS} more "
        f"pollers each), upstream takes {_LIMIT} calls a second",
        samples={name: taken[:rounds] for name, taken in samples.items()},
        baseline="gateway",
        notes=[f"Settled: after the first {_SETTLING * seconds:g} s.", *series],
    )


async def _measured(
    server: Server, upstream: int, seconds: float, retry_after: int | None
) -> tuple[Figures, list[int]]:
    tasks = [uuid.uuid4().hex for _ in range(_TASKS)]
    for task_id in tasks:
        servers.create_task(upstream, taskId=task_id, life={"waitingSeconds": 0, "runningSeconds": 36_000})
    servers.limit_calls(upstream, _LIMIT, retry_after=retry_after)
    seen: list[Response] = []
    hot: list[Response] = []
    began = time.monotonic() + _PERIOD
    calls: list[int] = []
    refused: list[int] = []

    async def poll(task_id: str, phase: float, into: list[Response]) -> None:
        async with Connection(server.port) as connection:
            for turn in itertools.count():
                at = began + phase + turn * _PERIOD
                if at >= began + seconds:
                    return
                early = at - time.monotonic()
                if early < -_PERIOD:
                    continue  # the previous response has not arrived: one request at a time
                await asyncio.sleep(max(early, 0.0))
                asked = time.monotonic()
                reply = await connection.get(f"/v1/progress/{task_id}")
                came = time.monotonic()
                into.append(
                    Response(
                        reply.status, _cache_status(reply.head), came - began, came - asked, _age(reply.head)
                    )
                )

    async def count() -> None:
        for second in range(int(seconds) + 1):
            await asyncio.sleep(max(began + second - time.monotonic(), 0.0))
            stats = json.loads((await fetch(upstream, "/_simulator/stats")).body)
            calls.append(sum(stats["calls"].values()))
            refused.append(stats["throttled"])

    async with asyncio.TaskGroup() as group:
        group.create_task(count())
        for number, task_id in enumerate(tasks):
            group.create_task(poll(task_id, number / _TASKS, hot if number < _HOT else seen))
        for number in range(_HOT * _HOT_POLLERS):
            group.create_task(poll(tasks[number % _HOT], number / (_HOT * _HOT_POLLERS), hot))
    by_second = [later - earlier for earlier, later in itertools.pairwise(calls)]
    settling = int(_SETTLING * seconds)
    return _figures(by_second[settling:], refused[-1] - refused[settling], seen, hot, settling), by_second


def _figures(
    calls: list[int], refused: int, seen: list[Response], hot: list[Response], settling: float
) -> Figures:
    figures: Figures = {
        "settled calls a second, mean": statistics.mean(calls),
        "settled calls a second, min": min(calls),
        "settled calls a second, max": max(calls),
        "settled calls refused, of 100": refused / sum(calls) * 100,
    }
    for name, answers in (("", seen), ("hot, ", hot)):
        settled = [one for one in answers if one.came >= settling]
        told = Counter(one.cache_status if one.status == _OK else str(one.status) for one in settled)
        for cache_status in ("hit", "fetched", "stale, throttled", str(_UNAVAILABLE)):
            figures[f"{name}answers: {cache_status}, %"] = told.pop(cache_status, 0) / len(settled) * 100
        figures[f"{name}answers: other, %"] = told.total() / len(settled) * 100
        figures[f"{name}wait, p99, ms"] = _p99([one.waited for one in settled]) * 1000
        figures[f"{name}age, p99, s"] = _p99([one.age for one in settled if one.status == _OK])
    return figures


def _cache_status(head: bytes) -> str:
    status = re.search(rb"\r\ncache-status: ([^\r]*)", head)
    told = status[1] if status else b""
    if b"detail=upstream-throttled" in told:
        return "stale, throttled"
    return "hit" if b"; hit" in told else "fetched" if b"detail" not in told else "other"


def _age(head: bytes) -> float:
    age = re.search(rb"\r\nage: (\d+)", head)
    return float(age[1]) if age else 0.0


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[-1]
