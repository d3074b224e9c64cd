"""Signed upstream calls per second of server CPU time: cold tasks only, 32 in flight."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import servers
from measuring import Bench, Comparison, Figures, new_prefix, per_cpu_second
from processes import pinned
from servers import Server

NEEDS = ("wrk", "nginx", "njs")

_CALLS = "signed upstream calls"
_IN_FLIGHT = 32  # connections of wrk, each with one request in flight


def run(bench: Bench) -> Iterator[Comparison]:
    """Compare the gateway with nginx, which signs only, or also caches."""
    with (
        servers.fast_upstream(bench.cores, bench.folder) as upstream,
        servers.nginx(bench.cores, bench.folder, upstream=upstream) as nginx,
        bench.gateways(upstream=upstream) as gateways,
    ):
        contestants = [*gateways, nginx.signer, nginx.cached]
        turns = {server.name: partial(_measured, bench, server) for server in contestants}
        turns["httpx alone"] = partial(_alone, bench, upstream)
        yield Comparison(
            title=f"misses: distinct cold tasks, {_IN_FLIGHT} in flight",
            samples=bench.take_turns(turns),
            baseline=nginx.signer.name,
            notes=[
                "nginx, uncached: no cache lookup and no caching. httpx alone: its client in a",
                "program without clients; the gateway also responds to a client for every call.",
            ],
        )


def _measured(bench: Bench, server: Server) -> Figures:
    return per_cpu_second(
        server,
        seconds=bench.seconds,
        path=new_prefix(),
        tasks=0,
        connections=_IN_FLIGHT,
        what=_CALLS,
    )


def _alone(bench: Bench, upstream: int) -> Figures:
    command = [sys.executable, servers.HERE / "plain_httpx.py"]
    command += map(str, (upstream, _IN_FLIGHT, bench.seconds))
    with pinned(bench.cores.server):
        result = subprocess.run(command, check=True, capture_output=True, env=servers.environment())
    made, used = json.loads(result.stdout)
    return {f"{_CALLS} per CPU-second": made / used, "CPU used, of one core": used / bench.seconds}
