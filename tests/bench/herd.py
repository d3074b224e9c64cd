"""200 pollers of one task at 1 Hz, upstream latency 300 ms: upstream calls, wait times, ages."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from functools import partial
from typing import Any

import servers
from measuring import Bench, Comparison, Figures
from pollers import Response
from processes import cpu_seconds
from servers import Server

NEEDS = ("nginx", "njs")
USES = ("varnishd",)

_POLLERS = 200
_LATENCY_SECONDS = 0.3
_LONGER = 5  # multiple of the measurement, so that there are enough upstream calls at one per second
_LIFE: dict[str, Any] = {"waitingSeconds": 0, "runningSeconds": 3600, "jumpBack": False}


def run(bench: Bench) -> Iterator[Comparison]:
    """Compare the gateway with nginx in its best configuration and with the cache lock only."""
    seconds = _LONGER * bench.seconds
    with (
        servers.simulator(bench.cores, bench.folder, latency_seconds=_LATENCY_SECONDS) as upstream,
        servers.peers(bench.cores, bench.folder, upstream=upstream) as peers,
        bench.gateways(upstream=upstream) as gateways,
    ):
        compared = [*gateways, peers.nginx.cached, peers.nginx.locked, *peers.varnish]
        yield Comparison(
            title=f"herd: {_POLLERS} pollers of one task at 1 Hz for {seconds:g} s, "
            f"upstream {_LATENCY_SECONDS * 1000:g} ms, lifetime 1 s",
            samples=bench.take_turns(
                {server.name: partial(_measured, server, upstream, seconds) for server in compared}
            ),
            baseline="nginx",
            notes=[
                "Age: time since upstream created the response, including its latency.",
                "Warm: requests after the first response had arrived. Cold: earlier requests.",
            ],
        )


def _measured(server: Server, upstream: int, seconds: float) -> Figures:
    task_id = uuid.uuid4().hex
    before = time.time()
    servers.create_task(upstream, taskId=task_id, life=_LIFE)
    born = (before + time.time()) / 2
    cpu = cpu_seconds(server.pids)
    crowd = {
        "port": server.port,
        "path": f"/v1/progress/{task_id}",
        "count": _POLLERS,
        "seconds": seconds,
        "ends": born + _LIFE["runningSeconds"],
    }
    # The process inherits the load cores.
    command = [sys.executable, servers.HERE / "pollers.py", json.dumps(crowd)]
    result = subprocess.run(command, check=True, capture_output=True)
    cpu = cpu_seconds(server.pids) - cpu
    calls = servers.upstream_calls(upstream, task_id)
    return _figures([Response(*row) for row in json.loads(result.stdout)], calls, seconds) | {
        "server CPU per answer, ms": cpu / (_POLLERS * seconds) * 1000
    }


def _figures(seen: list[Response], calls: int, seconds: float) -> Figures:
    first = min(one.arrived for one in seen)
    cold = [one.arrived - one.requested for one in seen if one.requested < first]
    warm = [one.arrived - one.requested for one in seen if one.requested >= first]
    return {
        "upstream calls": calls,
        "upstream calls a lifetime": calls / seconds,
        "warm wait, p50, ms": statistics.median(warm) * 1000,
        "warm wait, p99, ms": _p99(warm) * 1000,
        "cold wait beyond upstream's, max, ms": (max(cold) - _LATENCY_SECONDS) * 1000,
        "age, p99, s": _p99([one.age for one in seen]),
    }


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[-1]
