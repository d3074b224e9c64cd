"""Three replicas with a shared Valkey, compared with one: hits, upstream calls, order of responses."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import servers
from client import Connection
from measuring import Bench, Comparison, Figures, metric, new_prefix, per_cpu_second, prime, wrk
from processes import many_files
from servers import Server
from watchers import see

from tests.support.storeserver import StoreServer, binary

NEEDS = ("wrk",)

REPLICAS = 3
_MANY = 1000
_WATCHERS, _WATCHED = 3000, 100
_LONGER = 3  # multiple of the measurement: subscribers
_MUCH_LONGER = 15  # order of responses
_TASKS, _CLIENTS, _PAUSE_SECONDS = 10, 30, 0.05
_LIFETIME, _STALE, _LATENCY_SECONDS = 0.2, 2.0, 0.05
_LIFE = {"waitingSeconds": 0, "runningSeconds": 3600, "jumpBack": False, "steps": 360_000}
_SHARING_SECONDS = 20.0
# Long timeout: on a loaded machine a replica would otherwise continue without the store.
_PATIENT = {"STORE__TIMEOUT_SECONDS": "1"}
_OK, _NOT_MODIFIED = 200, 304


def run(bench: Bench) -> Iterator[Comparison]:
    """Measure the three cases."""
    yield from _hits(bench)
    yield _watched(bench)
    yield _in_turn(bench)


@contextmanager
def store(bench: Bench) -> Iterator[StoreServer]:
    """Run a Valkey on the load cores."""
    with StoreServer(binary("valkey"), bench.folder) as server:
        yield server


@contextmanager
def sharing(bench: Bench, *, upstream: int, settings: dict[str, str]) -> Iterator[list[Server]]:
    """Run replicas and wait until all use the store."""
    with ExitStack() as stack:
        replicas = [
            stack.enter_context(
                servers.gateway(bench.cores, bench.folder, upstream=upstream, settings=settings)
            )
            for _ in range(REPLICAS)
        ]
        asyncio.run(until_shared(replicas))
        yield replicas


async def until_shared(replicas: list[Server]) -> float:
    """Wait until all replicas use the store; return the seconds. Raises: RuntimeError."""
    began = time.monotonic()
    for replica in replicas:
        while await metric(replica, "store_up") != 1:
            if time.monotonic() > began + _SHARING_SECONDS:
                raise RuntimeError("the replicas do not share")
            await asyncio.sleep(0.02)
    return time.monotonic() - began


def _hits(bench: Bench) -> Iterator[Comparison]:
    with (
        store(bench) as shared,
        servers.fast_upstream(bench.cores, bench.folder) as upstream,
        servers.gateway(bench.cores, bench.folder, upstream=upstream) as alone,
        servers.gateway(
            bench.cores, bench.folder, upstream=upstream, settings={"STORE__URL": shared.url}
        ) as one,
    ):
        contestants = {"memory": alone, "valkey": one}
        asyncio.run(until_shared([one]))
        path = f"{new_prefix()}1"
        for server in contestants.values():
            prime(server, [path])
        measure = partial(per_cpu_second, seconds=bench.seconds, what="hits")
        yield Comparison(
            title="replicas: hits, one hot task",
            samples=bench.take_turns(
                {name: partial(measure, server, path=path) for name, server in contestants.items()}
            ),
            baseline="memory",
        )
        prefix = new_prefix()

        def warm(server: Server) -> Figures:
            wrk(server, seconds=1, path=prefix, tasks=_MANY)
            return measure(server, path=prefix, tasks=_MANY)

        yield Comparison(
            title=f"replicas: hits, {_MANY} tasks with a lifetime of 1 s",
            samples=bench.take_turns({name: partial(warm, server) for name, server in contestants.items()}),
            baseline="memory",
            notes=["The CPU time includes the upstream calls, and two commands to the store for each."],
        )


def _watched(bench: Bench) -> Comparison:
    seconds = _LONGER * bench.seconds
    with (
        many_files(_WATCHERS + 500),
        store(bench) as shared,
        servers.fast_upstream(bench.cores, bench.folder, changing=True) as upstream,
    ):

        def alone() -> Figures:
            with servers.gateway(bench.cores, bench.folder, upstream=upstream) as server:
                return _seen([server], seconds)

        def together() -> Figures:
            settings = {"STORE__URL": shared.url, "STORE__KEY_PREFIX": uuid.uuid4().hex, **_PATIENT}
            with sharing(bench, upstream=upstream, settings=settings) as replicas:
                return _seen(replicas, seconds)

        return Comparison(
            title=f"replicas: {_WATCHERS:,} subscribers of {_WATCHED} tasks that change every second, "
            f"{seconds:g} s",
            samples=bench.take_turns({"one": alone, "three": together}),
            baseline="one",
            notes=[
                "Calls: from the first connection to the last measurement, including opening and settling."
            ],
        )


def _seen(replicas: list[Server], seconds: float) -> Figures:
    tasks = [uuid.uuid4().hex for _ in range(_WATCHED)]
    paths = [f"/v1/progress/{task}/events" for task in tasks]
    began = time.monotonic()
    with ThreadPoolExecutor(len(replicas)) as pool:
        crowds = [
            pool.submit(
                see,
                port=replica.port,
                paths=paths,
                how="events",
                count=_WATCHERS // len(replicas),
                seconds=seconds,
                opening_seconds=2.0,
                pids=replica.pids,
            )
            for replica in replicas
        ]
        sights = [crowd.result() for crowd in crowds]
    elapsed = time.monotonic() - began
    calls = sum(asyncio.run(metric(replica, "upstream_requests_total")) for replica in replicas)
    return {
        "upstream calls per task and second": calls / _WATCHED / elapsed,
        "changes per subscriber and second": sum(sight.delivered for sight in sights) / _WATCHERS / seconds,
        "late, p50, ms": max(sight.late_p50 for sight in sights) * 1000,
        "late, p99, ms": max(sight.late_p99 for sight in sights) * 1000,
    }


class _Shown(NamedTuple):
    """A response: the time upstream created it, its progress and its age."""

    made: float
    progress: float
    age: float


def _in_turn(bench: Bench) -> Comparison:
    seconds = _MUCH_LONGER * bench.seconds
    settings = {"CACHE__RUNNING_SECONDS": str(_LIFETIME), **_PATIENT}
    with (
        store(bench) as shared,
        servers.simulator(bench.cores, bench.folder, latency_seconds=_LATENCY_SECONDS) as upstream,
        sharing(bench, upstream=upstream, settings=settings | {"STORE__URL": shared.url}) as replicas,
    ):
        figures = asyncio.run(_polled(replicas, upstream, seconds))
    if figures["responses that went back"]:
        raise RuntimeError(f"{figures['responses that went back']:g} answers were older than the one before")
    return Comparison(
        title=f"replicas: {_CLIENTS} clients send requests to {REPLICAS} replicas in turn for {seconds:g} s",
        samples={"three": [figures]},
        baseline="three",
        notes=[
            f"{_TASKS} tasks, lifetime {_LIFETIME} s, then stale for {_STALE:g} s. Upstream latency:",
            f"{_LATENCY_SECONDS} s. Clients return their last tag. Went back: older than the previous",
            "response, or with less progress. Age: time since upstream created the response, with transfer.",
        ],
    )


async def _polled(replicas: list[Server], upstream: int, seconds: float) -> Figures:
    tasks: list[tuple[str, float]] = []
    for _ in range(_TASKS):
        task = uuid.uuid4().hex
        before = time.time()
        servers.create_task(upstream, taskId=task, life=_LIFE)
        tasks.append((task, (before + time.time()) / 2 + float(_LIFE["runningSeconds"])))
    ends = time.monotonic() + seconds
    shown: list[_Shown] = []
    back: list[tuple[_Shown, _Shown]] = []
    chance = random.Random(1)

    async def ask(number: int) -> None:
        task, done = tasks[number % _TASKS]
        last, tag = _Shown(0.0, 0.0, 0.0), ""
        async with AsyncExitStack() as stack:
            connections = [await stack.enter_async_context(Connection(one.port)) for one in replicas]
            for connection in itertools.cycle(connections):
                if time.monotonic() > ends:
                    return
                reply = await connection.get(f"/v1/progress/{task}", tag)
                if reply.status not in {_OK, _NOT_MODIFIED}:
                    raise RuntimeError(f"{reply.status} {reply.body!r}")
                etag = reply.head.partition(b"etag: ")[2].partition(b"\r\n")[0].decode()
                tag = f"If-None-Match: {etag}\r\n"
                made, progress = last.made, last.progress
                if reply.status == _OK:
                    told = json.loads(reply.body)
                    made, progress = done - told["etaSeconds"], told["progress"]
                now = _Shown(made, progress, time.time() - made)
                shown.append(now)
                if now.made < last.made or now.progress < last.progress:
                    back.append((last, now))
                last = now
                await asyncio.sleep(chance.uniform(0, _PAUSE_SECONDS))

    async with asyncio.TaskGroup() as group:
        for number in range(_CLIENTS):
            group.create_task(ask(number))
    ages = sorted(one.age for one in shown)
    for last, now in back[:5]:
        sys.stderr.write(f"  went back from {last} to {now}\n")
    return {
        "answers": len(shown),
        "responses that went back": len(back),
        "changes of a task a second": len({one.made for one in shown}) / _TASKS / seconds,
        "age, p50, s": ages[len(ages) // 2],
        "age, p99, s": ages[int(len(ages) * 0.99)],
        "age, max, s": ages[-1],
        "store's errors": sum([await metric(one, "store_errors_total") for one in replicas]),
        "upstream calls a second": sum([await metric(one, "upstream_requests_total") for one in replicas])
        / seconds,
    }
