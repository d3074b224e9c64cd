"""5,000 subscribers of 100 tasks that change every second: event streams, nchan, and nginx polled at 1 Hz."""

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
USES = ("nchan",)

_WATCHERS, _TASKS = 5000, 100
_OTHER_FILES = 500  # open files of a server in addition to its subscribers
_OPENING_SECONDS = 8.0
_LONGER = 3  # multiple of the measurement, because there is one change per second
_SETTINGS = {"CACHE__RUNNING_SECONDS": "1"}
_POLLING = "gateway: streams. nginx: keep-alive polls at 1 Hz with spread phases; changed responses count."
_PUSHING = [
    "nchan: an nginx module. A publisher posts a change of each task every second; nchan does not query",
    "or sign. The gateway's CPU time includes its upstream calls.",
]
_NOTES = [
    "Late: from the time upstream (or the publisher) sends a change until a subscriber reads it, for every",
    "tenth subscriber.",
    "Memory: difference with and without subscribers, per subscriber; a new server for each measurement.",
]


def run(bench: Bench) -> Iterator[Comparison]:
    """Compare the event streams of the gateway with those of nchan and with polling of nginx."""
    seconds = _LONGER * bench.seconds
    with (
        many_files(_WATCHERS + _OTHER_FILES),
        servers.fast_upstream(bench.cores, bench.folder, changing=True) as upstream,
    ):
        turns = {
            servers.gateway_name(tree): partial(_streaming, bench, upstream, tree, seconds)
            for tree in (None, *bench.trees)
        }
        gateways = list(turns)
        if servers.NCHAN_MODULE.exists():
            turns["nchan"] = partial(_publishing, bench, seconds)
        turns["nginx"] = partial(_polling, bench, upstream, seconds)
        samples = bench.take_turns(turns)
    title = f"{_WATCHERS:,} subscribers of {_TASKS} tasks that change every second, for {seconds:g} s"
    notes = {"nginx": [_POLLING, *_NOTES], "nchan": [*_PUSHING, *_NOTES]}
    for peer in ("nginx", "nchan"):
        if peer in samples:
            yield Comparison(
                title=f"watchers: beside {peer}, {title}",
                samples={name: samples[name] for name in (*gateways, peer)},
                baseline=peer,
                notes=notes[peer],
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
        tasks = _new_tasks()
        prime(server, _poll_paths(tasks))
        return _measured(server, "events", _stream_paths(tasks), seconds)


def _polling(bench: Bench, upstream: int, seconds: float) -> Figures:
    with servers.nginx(bench.cores, bench.folder, upstream=upstream) as nginx:
        paths = _poll_paths(_new_tasks())
        prime(nginx.cached, paths)
        return _measured(nginx.cached, "polls", paths, seconds)


def _publishing(bench: Bench, seconds: float) -> Figures:
    tasks = _new_tasks()
    with (
        servers.nchan(bench.cores, bench.folder) as nchan,
        servers.published(bench.cores, bench.folder, nchan_port=nchan.port, tasks=tasks),
    ):
        return _measured(nchan, "events", _stream_paths(tasks), seconds)


def _new_tasks() -> list[str]:
    return [uuid.uuid4().hex for _ in range(_TASKS)]


def _poll_paths(tasks: list[str]) -> list[str]:
    return [f"/v1/progress/{task}" for task in tasks]


def _stream_paths(tasks: list[str]) -> list[str]:
    return [f"/v1/progress/{task}/events" for task in tasks]


def _measured(server: Server, how: str, paths: list[str], seconds: float) -> Figures:
    sight = see(
        port=server.port,
        paths=paths,
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
