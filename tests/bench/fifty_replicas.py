"""Fifty replicas on one Valkey: what they cost the store and each replica, idle and under load."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import servers
from client import fetch
from measuring import Bench, Comparison, Figures, metric, new_prefix
from processes import cpu_seconds
from replicas import store, until_shared
from servers import Server

from tests.support.storeserver import StoreServer

NEEDS = ()

REPLICAS = 50
_RATE, _TASKS = 300, 100
_LONGER = 5  # multiple of the measurement
_SETTLING_SECONDS = 5.0
# Long timeout: on a loaded machine a replica would otherwise continue without the store.
_PATIENT = {"STORE__TIMEOUT_SECONDS": "1"}
_OK = 200
_PERCENTS, _MIB = 100, 1 << 20


def run(bench: Bench) -> Iterator[Comparison]:
    """Measure once, because the start of the replicas takes most of the time."""
    with (
        store(bench) as shared,
        servers.fast_upstream(bench.cores, bench.folder, changing=True) as upstream,
        ExitStack() as stack,
    ):
        settings = {"STORE__URL": shared.url, **_PATIENT}
        replicas = [
            stack.enter_context(
                servers.gateway(bench.cores, bench.folder, upstream=upstream, settings=settings)
            )
            for _ in range(REPLICAS)
        ]
        asyncio.run(until_shared(replicas))
        time.sleep(_SETTLING_SECONDS)
        seconds = _LONGER * bench.seconds
        idle = _measured(shared, replicas, lambda: time.sleep(seconds))
        loaded = _measured(shared, replicas, lambda: asyncio.run(_poll(replicas, seconds)))
    yield Comparison(
        title=f"{REPLICAS} replicas on one Valkey, {seconds:g} s idle and {seconds:g} s under load",
        samples={"idle": [idle], "under load": [loaded]},
        baseline="idle",
        notes=[
            f"Load: {_RATE} requests per second for {_TASKS} running tasks with a lifetime of 1 s, each sent",
            "to a random replica on a new connection.",
        ],
    )


def _measured(shared: StoreServer, replicas: Sequence[Server], work: Callable[[], Figures | None]) -> Figures:
    """Return what the work costs the store and each replica, and the figures of the work."""
    store_pids = [int(shared.client.info("server")["process_id"])]
    pids = [pid for replica in replicas for pid in replica.pids]
    began = time.monotonic()
    commands = shared.client.info("stats")["total_commands_processed"]
    store_cpu, replicas_cpu = cpu_seconds(store_pids), cpu_seconds(pids)
    figures = work() or {}
    elapsed = time.monotonic() - began
    store_cpu, replicas_cpu = cpu_seconds(store_pids) - store_cpu, cpu_seconds(pids) - replicas_cpu
    info = shared.client.info()
    return {
        "connections to the store": info["connected_clients"],
        "CPU of the store, % of a core": store_cpu / elapsed * _PERCENTS,
        "commands per second": (info["total_commands_processed"] - commands) / elapsed,
        "memory of the store, MiB": info["used_memory"] / _MIB,
        "CPU of a replica, % of a core": replicas_cpu / elapsed / len(replicas) * _PERCENTS,
    } | figures


async def _poll(replicas: Sequence[Server], seconds: float) -> Figures:
    """Send requests at a constant rate, independent of earlier responses."""
    prefix, chance = new_prefix(), random.Random(1)
    loop = asyncio.get_running_loop()
    delays: list[float] = []
    failed = 0

    async def ask(due: float) -> None:
        nonlocal failed
        await asyncio.sleep(max(due - loop.time(), 0))
        reply = await fetch(chance.choice(replicas).port, f"{prefix}{chance.randrange(_TASKS)}")
        delays.append(loop.time() - due)
        failed += reply.status != _OK

    calls = [await metric(replica, "upstream_requests_total") for replica in replicas]
    began = loop.time()
    async with asyncio.TaskGroup() as group:
        for number in range(round(_RATE * seconds)):
            group.create_task(ask(began + number / _RATE))
    calls = [
        await metric(replica, "upstream_requests_total") - before
        for replica, before in zip(replicas, calls, strict=True)
    ]
    percentiles = statistics.quantiles(delays, n=_PERCENTS)
    return {
        "requests that failed": failed,
        "late, p50, ms": percentiles[49] * 1000,
        "late, p99, ms": percentiles[98] * 1000,
        "upstream calls per task and second": sum(calls) / _TASKS / seconds,
    }
