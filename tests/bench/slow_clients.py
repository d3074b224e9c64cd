"""A healthy client next to 200 connections with slow headers and 2,000 idle ones."""

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
_HEADERS, _LONGER = 2.5, 4  # multiples of the measurement: header timeout and duration
_OK = 200


def run(bench: Bench) -> Iterator[Comparison]:
    """Measure a healthy client alone and next to slow and idle connections."""
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
                _with_crowd, server, path, seconds, opening_seconds=bench.seconds
            )
        yield Comparison(
            title=f"slow_clients: {_RATE} hits a second, next to {_SLOW} slow headers and {_IDLE:,} idle, "
            f"for {seconds:g} s",
            samples=bench.take_turns(turns),
            baseline=f"{gateways[0].name}, 0 + 0",
            notes=[
                "Slow: one byte of headers per second. Idle: no bytes. Closed connections are opened again.",
                "Late: from the due time of a query to the end of its response.",
                f"Header timeout: {header_seconds:g} s.",
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
        "requests that failed": sum(query.status != _OK for query in queries),
        "server CPU used, of one core": (cpu_seconds(server.pids) - before) / seconds,
    }


def _with_crowd(server: Server, path: str, seconds: float, *, opening_seconds: float) -> Figures:
    with _crowd(server.port, opening_seconds) as crowd:
        figures = _alone(server, path, seconds)
        said, _ = crowd.communicate("stop\n")
    seen = json.loads(said)
    if not seen["lifetimes"]:
        raise RuntimeError("no slow connection was closed")
    return figures | {
        "other connections open at the end": seen["open"],
        "other connections refused": seen["refused"],
        "slow connections closed": len(seen["lifetimes"]),
        "closed after, median, s": statistics.median(seen["lifetimes"]),
        "closed after, max, s": max(seen["lifetimes"]),
    }


@contextmanager
def _crowd(port: int, opening_seconds: float) -> Iterator[subprocess.Popen[str]]:
    """Open the crowd from a separate process, because in this one it would delay the healthy client."""
    command = [sys.executable, servers.HERE / "crowd.py", *map(str, (port, _SLOW, _IDLE, opening_seconds))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as crowd:
        assert crowd.stdout is not None
        try:
            if crowd.stdout.readline() != "open\n":
                raise RuntimeError("the crowd did not connect")
            yield crowd
        finally:
            crowd.terminate()
