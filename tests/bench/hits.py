"""Cache hits per second of server CPU time: one hot task, 304, and 1,000 tasks with a lifetime of 1 s.

The gateway runs with its defaults, and with `server.edge` off: the ASGI application serves all requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial

import servers
from client import fetch
from measuring import Bench, Comparison, new_prefix, per_cpu_second, prime, wrk
from servers import Server

NEEDS = ("wrk", "nginx", "njs")
USES = ("varnishd",)

_MANY = 1000
_NOT_MODIFIED = 304


def run(bench: Bench) -> Iterator[Comparison]:
    """Measure the three cases."""
    without_edge = {"SERVER__EDGE": "false"}
    with (
        servers.fast_upstream(bench.cores, bench.folder) as upstream,
        servers.peers(bench.cores, bench.folder, upstream=upstream) as peers,
        bench.gateways(upstream=upstream) as gateways,
        servers.gateway(bench.cores, bench.folder, upstream=upstream, settings=without_edge) as alone,
        servers.plain_asgi(bench.cores, bench.folder) as uvicorn,
    ):
        gateways.append(alone._replace(name="gateway, edge off"))
        compared = [*gateways, peers.nginx.cached, *peers.varnish]
        yield _one(bench, [*gateways, uvicorn, peers.nginx.cached, *peers.varnish])
        yield _unchanged(bench, gateways)
        yield _many(bench, compared)


def _one(bench: Bench, compared: list[Server]) -> Comparison:
    path = f"{new_prefix()}1"
    for server in compared:
        prime(server, [path])
    measure = partial(per_cpu_second, seconds=bench.seconds, path=path, what="hits")
    return Comparison(
        title="hits: one hot task",
        samples=bench.take_turns({server.name: partial(measure, server) for server in compared}),
        baseline="nginx",
        notes=["uvicorn alone: its share of a hit with edge off. The application sends one fixed response."],
    )


def _unchanged(bench: Bench, gateways: list[Server]) -> Comparison:
    path = f"{new_prefix()}1"
    turns = {}
    for server in gateways:
        measure = partial(per_cpu_second, server, seconds=bench.seconds, path=path, what="answers")
        etag = asyncio.run(_etag(server, path))
        turns[f"{server.name}, 200"] = measure
        turns[f"{server.name}, 304"] = partial(measure, headers={"If-None-Match": etag})
    return Comparison(
        title="hits: 304 and 200, one hot task",
        samples=bench.take_turns(turns),
        baseline=f"{gateways[0].name}, 200",
    )


async def _etag(server: Server, path: str) -> str:
    first = await fetch(server.port, path)
    etag = first.head.partition(b"etag: ")[2].partition(b"\r\n")[0].decode()
    again = await fetch(server.port, path, f"If-None-Match: {etag}\r\n")
    if again.status != _NOT_MODIFIED:
        raise RuntimeError(f"{server.name} returned {again.status} for If-None-Match: {etag}")
    return etag


def _many(bench: Bench, compared: list[Server]) -> Comparison:
    prefix = new_prefix()
    paths = [f"{prefix}{number}" for number in range(1, _MANY + 1)]
    for server in compared:
        prime(server, paths)
    measure = partial(per_cpu_second, seconds=bench.seconds, path=prefix, tasks=_MANY, what="hits")

    def warm(server: Server) -> dict[str, float]:
        # The tasks became stale while other servers were measured: one second of warm-up.
        wrk(server, seconds=1, path=prefix, tasks=_MANY)
        return measure(server)

    return Comparison(
        title=f"hits: {_MANY:,} tasks with a lifetime of 1 s",
        samples=bench.take_turns({server.name: partial(warm, server) for server in compared}),
        baseline="nginx",
        notes=["The CPU time includes the upstream calls that keep the tasks fresh."],
    )
