"""200 connections that dawdle over their headers and 2,000 idle ones: what they cost a healthy client."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import servers
import steady
from measuring import Bench, Comparison, Figures, prime
from processes import cpu_seconds, many_files
from servers import Server

NEEDS = ()

_SLOW, _IDLE = 200, 2000
_RATE, _CONNECTIONS = 500, 8
_OTHER_FILES = 500
_HEADERS, _LONGER = 2.5, 4  # times the seconds of a measurement: what headers may take, and we
_OK = 200


def run(bench: Bench) -> Iterator[Comparison]:
    """Measure a healthy client by itself and in bad company."""
    seconds, header_seconds = _LONGER * bench.seconds, _HEADERS * bench.seconds
    with (
        many_files(_SLOW + _IDLE + _OTHER_FILES),
        servers.fast_upstream(bench.cores, bench.folder) as upstream,
        bench.gateways(
            upstream=upstream, settings={"SERVER__HEADER_SECONDS": str(header_seconds)}
        ) as gateways,
    ):
        path = f"/v1/progress/{uuid.uuid4().hex}"
        turns = {}
        for server in gateways:
            prime(server, [path])
            turns[f"{server.name}, 0 + 0"] = partial(_alone, server, path, seconds)
            turns[f"{server.name}, {_SLOW} + {_IDLE}"] = partial(
                _in_company, server, path, seconds, opening_seconds=bench.seconds
            )
        yield Comparison(
            title=f"dawdlers: {_RATE} hits a second, beside {_SLOW} slow headers and {_IDLE:,} idle, "
            f"for {seconds:g} s",
            samples=bench.take_turns(turns),
            baseline=f"{gateways[0].name}, 0 + 0",
            notes=[
                "Slow: a byte of its headers a second. Idle: nothing at all. Who is closed comes again.",
                f"Late: from a query's being due to its answer's end. Headers may take {header_seconds:g} s.",
            ],
        )


def _alone(server: Server, path: str, seconds: float) -> Figures:
    before = cpu_seconds(server.pids)
    queries = asyncio.run(
        steady.ask(server.port, [path], rate=_RATE, seconds=seconds, connections=_CONNECTIONS)
    )
    return {
        "late, p50, ms": steady.percentile(queries, 50) * 1000,
        "late, p99, ms": steady.percentile(queries, 99) * 1000,
        "late, max, ms": max(query.late for query in queries) * 1000,
        "queries that failed": sum(query.status != _OK for query in queries),
        "server CPU used, of one core": (cpu_seconds(server.pids) - before) / seconds,
    }


def _in_company(server: Server, path: str, seconds: float, *, opening_seconds: float) -> Figures:
    with _crowd(server.port, opening_seconds) as crowd:
        figures = _alone(server, path, seconds)
        said, _ = crowd.communicate("enough\n")
    seen = json.loads(said)
    if not seen["borne"]:
        raise RuntimeError("no slow connection was closed")
    return figures | {
        "others open at the end": seen["open"],
        "others not let in": seen["refused"],
        "slow ones closed": len(seen["borne"]),
        "closed after, median, s": statistics.median(seen["borne"]),
        "closed after, max, s": max(seen["borne"]),
    }


@contextmanager
def _crowd(port: int, opening_seconds: float) -> Iterator[subprocess.Popen[str]]:
    """Have the crowd connect, from a process of its own: in ours it would delay the healthy client itself."""
    command = [sys.executable, servers.HERE / "crowd.py", *map(str, (port, _SLOW, _IDLE, opening_seconds))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as crowd:
        assert crowd.stdout is not None
        try:
            if crowd.stdout.readline() != "open\n":
                raise RuntimeError("the crowd did not come in")
            yield crowd
        finally:
            crowd.terminate()
