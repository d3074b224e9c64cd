"""CPU time of a hit with 1 to 100,000 cached tasks and 1 to 1,000 connections."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import partial

import servers
from measuring import Bench, Comparison, Figures, metric, new_prefix, per_cpu_second, prime, wrk
from servers import Server

NEEDS = ("wrk", "nginx", "njs")

_TASKS = (1, 100, 10_000, 100_000)
_CONNECTIONS = (1, 100, 1000)
_DEFAULT = 32  # connections, while tasks vary
# Long lifetime, so that there are only hits: the cost of refreshing also grows with the tasks.
_FRESH = {
    "CACHE__MAX_TASKS": "200000",
    "CACHE__MAX_BYTES": str(1 << 30),
    "CACHE__RUNNING_SECONDS": "86400",
}


def run(bench: Bench) -> Iterator[Comparison]:
    """Measure both. nginx keeps a task for one second only, so it is measured by connections."""
    with (
        servers.fast_upstream(bench.cores, bench.folder) as upstream,
        servers.nginx(bench.cores, bench.folder, upstream=upstream) as nginx,
        servers.gateway(bench.cores, bench.folder, upstream=upstream, settings=_FRESH) as gateway,
    ):
        yield _by_tasks(bench, gateway)
        yield _by_connections(bench, [gateway, nginx.cached])


def _by_tasks(bench: Bench, gateway: Server) -> Comparison:
    prefix = new_prefix()
    turns: dict[str, Callable[[], Figures]] = {}
    for count in _TASKS:
        prime(gateway, [f"{prefix}{number}" for number in range(1, count + 1)])
        if (kept := asyncio.run(metric(gateway, "cache_entries"))) < count:
            raise RuntimeError(f"the cache has {kept:,.0f} of {count:,} tasks; the others would be misses")
        turns[f"{count:,} tasks"] = partial(_cost, bench, gateway, prefix, tasks=count, connections=_DEFAULT)
    return Comparison(
        title=f"curve: by cached tasks, {_DEFAULT} connections",
        samples=bench.take_turns(turns),
        baseline=next(iter(turns)),
        notes=["The tasks are queried in turn, so that a task is queried again after all others."],
    )


def _by_connections(bench: Bench, servers_under_test: list[Server]) -> Comparison:
    path = f"{new_prefix()}1"
    turns: dict[str, Callable[[], Figures]] = {}
    for server in servers_under_test:
        prime(server, [path])
        for count in _CONNECTIONS:
            turns[f"{server.name}, {count:,} connections"] = partial(
                _cost, bench, server, path, tasks=None, connections=count
            )
    return Comparison(
        title="curve: by connections, one hot task",
        samples=bench.take_turns(turns),
        baseline=next(iter(turns)),
        notes=["On a single connection each request needs its own iteration of the event loop."],
    )


def _cost(bench: Bench, server: Server, path: str, *, tasks: int | None, connections: int) -> Figures:
    wrk(server, seconds=1, path=path, tasks=tasks, connections=connections)  # warms up connections and caches
    figures = per_cpu_second(
        server, seconds=bench.seconds, path=path, tasks=tasks, connections=connections, what="hits"
    )
    return {"CPU time of a hit, µs": 1e6 / figures.pop("hits per CPU-second"), **figures}
