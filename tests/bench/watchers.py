"""5,000 subscribers of 100 tasks that change every second: event streams, and polling nginx at 1 Hz."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import servers
from measuring import Bench, Comparison, Figures, prime
from processes import many_files
from servers import Server
from streams import Sight

NEEDS = ("nginx", "njs")

_WATCHERS, _TASKS = 5000, 100
_OTHER_FILES = 500  # open files of a server in addition to its subscribers
_OPENING_SECONDS = 8.0
_LONGER = 3  # multiple of the measurement, because there is one change per second
_SETTINGS = {"CACHE__RUNNING_SECONDS": "1"}
_NOTES = [
    "gateway: streams. nginx: keep-alive polls at 1 Hz with spread phases; changed responses count.",
    "Late: from the time upstream sends a change until a subscriber reads it, for every tenth subscriber.",
    "Memory: difference with and without subscribers, per subscriber; a new server for each measurement.",
]


def run(bench: Bench) -> Iterator[Comparison]:
    """Compare the event streams of the gateway with polling of nginx."""
    seconds = _LONGER * bench.seconds
    with (
        many_files(_WATCHERS + _OTHER_FILES),
        servers.fast_upstream(bench.cores, bench.folder, changing=True) as upstream,
    ):
        turns = {
            servers.gateway_name(tree): partial(_streaming, bench, upstream, tree, seconds)
            for tree in (None, *bench.trees)
        }
        turns["nginx"] = partial(_polling, bench, upstream, seconds)
        yield Comparison(
            title=f"watchers: {_WATCHERS:,} subscribers of {_TASKS} tasks that change every second, "
            f"for {seconds:g} s",
            samples=bench.take_turns(turns),
            baseline="nginx",
            notes=_NOTES,
        )


def see(**crowd: Any) -> Sight:
    """Run subscribers in a separate process; see streams.watch."""
    # The process inherits the load cores.
    command = [sys.executable, servers.HERE / "streams.py", json.dumps(crowd)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"the crowd failed:\n{result.stderr[-2000:]}")
    return Sight(*json.loads(result.stdout))


def _streaming(bench: Bench, upstream: int, tree: Path | None, seconds: float) -> Figures:
    with servers.gateway(
        bench.cores, bench.folder, upstream=upstream, tree=tree, settings=_SETTINGS
    ) as server:
        return _measured(server, "events", "/v1/progress/{}/events", seconds)


def _polling(bench: Bench, upstream: int, seconds: float) -> Figures:
    with servers.nginx(bench.cores, bench.folder, upstream=upstream) as nginx:
        return _measured(nginx.cached, "polls", "/v1/progress/{}", seconds)


def _measured(server: Server, how: str, path: str, seconds: float) -> Figures:
    tasks = [uuid.uuid4().hex for _ in range(_TASKS)]
    prime(server, [f"/v1/progress/{task}" for task in tasks])
    sight = see(
        port=server.port,
        paths=[path.format(task) for task in tasks],
        how=how,
        count=_WATCHERS,
        seconds=seconds,
        opening_seconds=_OPENING_SECONDS,
        pids=server.pids,
    )
    return {
        "changes delivered": sight.delivered,
        "changes per subscriber and second": sight.delivered / _WATCHERS / sight.seconds,
        "server CPU per 1,000 changes, s": sight.server_cpu / sight.delivered * 1000,
        "server CPU used, of one core": sight.server_cpu / sight.seconds,
        "late, p50, ms": sight.late_p50 * 1000,
        "late, p99, ms": sight.late_p99 * 1000,
        "late, max, ms": sight.late_max * 1000,
        "memory per subscriber, KB": (sight.open_bytes - sight.idle_bytes) / _WATCHERS / 1000,
        "polls skipped, last response missing": sight.skipped,
        "CPU used by the load, of one core": sight.own_cpu / sight.seconds,
    }
