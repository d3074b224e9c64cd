"""Shared by scenarios: servers and durations, load by wrk, and interleaved measurements."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import servers
from client import fetch, fetch_all
from processes import Cores, cpu_seconds
from servers import Server

Figures = dict[str, float]

_FAILURES = 0.05


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One run: `seconds` per measurement, `rounds` measurements of each server.

    `trees` are other source trees of the gateway, measured beside this one: a before and an after.
    `folder` is for whatever the servers write.
    """

    cores: Cores
    seconds: float
    rounds: int
    folder: Path
    trees: tuple[Path, ...] = ()

    @contextmanager
    def gateways(self, *, upstream: int, settings: Mapping[str, str] | None = None) -> Iterator[list[Server]]:
        """Run the gateway of this source tree and of each other tree."""
        with ExitStack() as stack:
            yield [
                stack.enter_context(
                    servers.gateway(self.cores, self.folder, upstream=upstream, tree=tree, settings=settings)
                )
                for tree in (None, *self.trees)
            ]

    def take_turns(self, compared: Mapping[str, Callable[[], Figures]]) -> dict[str, list[Figures]]:
        """Measure in the order A B A B, so that adjacent measurements share the load of the machine."""
        samples: dict[str, list[Figures]] = {name: [] for name in compared}
        for number in range(1, self.rounds + 1):
            for name, measure in compared.items():
                sys.stderr.write(f"  round {number} of {self.rounds}: {name}\n")
                samples[name].append(measure())
        return samples


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The results: one set of figures per server and round. Ratios refer to `baseline`."""

    title: str
    samples: dict[str, list[Figures]]
    baseline: str
    notes: list[str] = field(default_factory=list)


class Load(NamedTuple):
    """Result of wrk."""

    requests: int
    failed: int
    seconds: float


def wrk(
    server: Server,
    *,
    seconds: float,
    path: str,
    tasks: int | None = None,
    connections: int = 32,
    headers: Mapping[str, str] | None = None,
) -> Load:
    """Load a server from one wrk thread; load.lua describes `tasks`.

    Raises: RuntimeError when more requests fail than a burst of refreshes could explain.
    """
    command = [
        "wrk",
        "-t1",
        f"-c{connections}",
        f"-d{seconds:g}s",
        "--timeout",
        "20s",
        "-s",
        str(servers.HERE / "load.lua"),
    ]
    for name, value in (headers or {}).items():
        command += ["-H", f"{name}: {value}"]
    command.append(f"http://127.0.0.1:{server.port}{path}")
    env = os.environ | {"TASKS": "" if tasks is None else str(tasks)}
    result = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    load = Load(**json.loads(result.stdout.splitlines()[-1]))
    if load.failed >= _FAILURES * load.requests:
        raise RuntimeError(
            f"{server.name}: {load.failed} of {load.requests} requests failed\n{result.stdout}"
        )
    return load


def per_cpu_second(
    server: Server,
    *,
    seconds: float,
    path: str,
    what: str,
    tasks: int | None = None,
    connections: int = 32,
    headers: Mapping[str, str] | None = None,
) -> Figures:
    """Return the number of requests that a server handles per second of its CPU time."""
    before = cpu_seconds(server.pids)
    load = wrk(server, seconds=seconds, path=path, tasks=tasks, connections=connections, headers=headers)
    used = cpu_seconds(server.pids) - before
    return {
        f"{what} per CPU-second": (load.requests - load.failed) / used,
        "CPU used, of one core": used / load.seconds,
        "failed, of 1,000": load.failed / load.requests * 1000,
    }


def prime(server: Server, paths: list[str]) -> None:
    """Query these tasks once, so that they are cached."""
    asyncio.run(fetch_all(server.port, paths, connections=16))


async def metric(server: Server, name: str) -> float:
    """Return the sum of the samples of a metric of the gateway."""
    text = (await fetch(server.port, "/metrics")).body.decode()
    return sum(
        float(value) for value in re.findall(rf"^sd_gateway_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
    )


def new_prefix() -> str:
    """Return a path prefix of unused task IDs; append a number."""
    return f"/v1/progress/{uuid.uuid4().hex[:20]}-"
