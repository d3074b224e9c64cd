"""Time from start to ready, and memory of an idle server and of a cached task."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import servers
from measuring import Bench, Comparison, Figures, new_prefix, prime, wrk
from processes import pinned, resident_bytes
from servers import Server

NEEDS = ("nginx", "njs", "wrk")

_WARM, _TASKS = 1000, 10_000
_HOT_SECONDS = 3.0  # duration of hits on all tasks; each is queried many times
_FRESH = {"CACHE__MAX_TASKS": str(2 * _TASKS), "CACHE__RUNNING_SECONDS": "86400"}
_KIB, _MIB = 1 << 10, 1 << 20


def run(bench: Bench) -> Iterator[Comparison]:
    """Measure the gateway and nginx."""
    with servers.fast_upstream(bench.cores, bench.folder) as upstream:
        gateways = {servers.gateway_name(tree): tree for tree in (None, *bench.trees)}
        turns: dict[str, Callable[[], Figures]] = {
            name: partial(_gateway, bench, upstream, tree) for name, tree in gateways.items()
        }
        turns["nginx"] = lambda: _measured(_nginx(bench, upstream))
        yield Comparison(
            title=f"start: to ready, memory idle and for {_TASKS} tasks",
            samples=bench.take_turns(turns),
            baseline="nginx",
            notes=["nginx: its worker only, which caches bodies in files."],
        )


def _gateway(bench: Bench, upstream: int, tree: Path | None) -> Figures:
    env = servers.environment(tree)
    # Excludes interpreter shutdown, which is not part of the start of a server.
    imports = "import os, gateway.cli.main; os._exit(0)"
    began = time.perf_counter()
    with pinned(bench.cores.server):
        subprocess.run([sys.executable, "-c", imports], env=env, cwd=bench.folder, check=True)
    imports_ms = (time.perf_counter() - began) * 1000
    figures = _measured(
        servers.gateway(bench.cores, bench.folder, upstream=upstream, tree=tree, settings=_FRESH)
    )
    return figures | {
        "interpreter and imports, ms": imports_ms,
        "start to ready without those, ms": figures["start to ready, ms"] - imports_ms,
    }


@contextmanager
def _nginx(bench: Bench, upstream: int) -> Iterator[Server]:
    with servers.nginx(bench.cores, bench.folder, upstream=upstream) as nginx:
        yield nginx.cached


def _measured(starting: AbstractContextManager[Server]) -> Figures:
    began = time.perf_counter()
    with starting as server:
        ready_ms = (time.perf_counter() - began) * 1000
        idle = resident_bytes(server.pids)
        # Excludes connections, buffers and the first arenas of the allocator.
        prime(server, _paths(new_prefix(), _WARM))
        warm = resident_bytes(server.pids)
        prefix = new_prefix()
        prime(server, _paths(prefix, _TASKS))
        kept = resident_bytes(server.pids)
        wrk(server, seconds=_HOT_SECONDS, path=prefix, tasks=_TASKS)
        hot = resident_bytes(server.pids)
    return {
        "start to ready, ms": ready_ms,
        "resident when ready, MiB": idle / _MIB,
        "resident per cached task, KiB": (kept - warm) / _TASKS / _KIB,
        "more when all are hot, KiB": (hot - kept) / _TASKS / _KIB,
    }


def _paths(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{number}" for number in range(1, count + 1)]
