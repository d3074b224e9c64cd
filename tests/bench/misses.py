"""Signed upstream calls per second of the server's CPU time: nothing but cold tasks, 32 in flight."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import servers
from measuring import Bench, Comparison, Figures, new_prefix, per_cpu_second
from servers import Server

NEEDS = ("wrk", "nginx", "njs")

_IN_FLIGHT = 32  # wrk's connections: each has one request under way


def run(bench: Bench) -> Iterator[Comparison]:
    """Measure the gateway beside nginx, which only signs, or keeps the answer as well."""
    with (
        servers.fast_upstream(bench.cores, bench.folder) as upstream,
        servers.nginx(bench.cores, bench.folder, upstream=upstream) as nginx,
        bench.gateways(upstream=upstream) as gateways,
    ):
        contestants = [*gateways, nginx.signer, nginx.cached]
        turns = {server.name: partial(_measured, bench, server) for server in contestants}
        yield Comparison(
            title=f"misses: distinct cold tasks, {_IN_FLIGHT} in flight",
            samples=bench.take_turns(turns),
            baseline=nginx.signer.name,
            notes=["nginx, uncached, looks nothing up and keeps nothing; the others do."],
        )


def _measured(bench: Bench, server: Server) -> Figures:
    return per_cpu_second(
        server,
        seconds=bench.seconds,
        path=new_prefix(),
        tasks=0,
        connections=_IN_FLIGHT,
        what="signed upstream calls",
    )
