"""5,000 requests per second for 1,000 tasks with a lifetime of 1 s, upstream latency 50 ms: delays."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import servers
from measuring import Bench, Comparison, Figures, new_prefix, prime
from processes import cpu_seconds
from servers import Server

NEEDS = ("nginx", "njs")

TASKS, RATE = 1000, 5000
LATENCY_SECONDS = 0.05
# 1,000 calls per second of 50 ms are fifty in flight; with the default of 64 every delay would cause a queue.
ROOM = {"UPSTREAM__MAX_IN_FLIGHT": "256"}
_LONGER = 3  # multiple of the measurement, so that every task is refreshed several times


def run(bench: Bench) -> Iterator[Comparison]:
    """Compare the gateway with nginx."""
    seconds = _LONGER * bench.seconds
    with (
        servers.fast_upstream(bench.cores, bench.folder, latency_seconds=LATENCY_SECONDS) as upstream,
        servers.nginx(bench.cores, bench.folder, upstream=upstream) as nginx,
        bench.gateways(upstream=upstream, settings=ROOM) as gateways,
    ):
        turns = {server.name: partial(measured, server, seconds) for server in [*gateways, nginx.cached]}
        yield Comparison(
            title=f"rush: {RATE:,} requests a second for {TASKS:,} tasks of 1 s lifetime, "
            f"upstream {LATENCY_SECONDS * 1000:g} ms, for {seconds:g} s",
            samples=bench.take_turns(turns),
            baseline=nginx.cached.name,
            notes=["Late: from the due time of a query to the end of its response."],
        )


def measured(server: Server, seconds: float) -> Figures:
    """Cache new tasks, and query them at the constant rate for this time."""
    prefix = new_prefix()
    prime(server, [f"{prefix}{number}" for number in range(TASKS)])
    crowd = {"port": server.port, "prefix": prefix, "tasks": TASKS, "rate": RATE, "seconds": seconds}
    before = cpu_seconds(server.pids)
    # The process inherits the load cores.
    command = [sys.executable, servers.HERE / "pacer.py", json.dumps(crowd)]
    result = subprocess.run(command, check=True, capture_output=True)
    late: list[float] = json.loads(result.stdout)
    percent = statistics.quantiles(late, n=100)
    return {
        "late, p50, ms": percent[49] * 1000,
        "late, p99, ms": percent[98] * 1000,
        "late, max, ms": max(late) * 1000,
        "requests a second": len(late) / seconds,
        "server CPU used, of one core": (cpu_seconds(server.pids) - before) / seconds,
    }
