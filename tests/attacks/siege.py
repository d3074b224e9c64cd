"""A siege: attackers of every kind at once against `sd-gateway serve`, together with a healthy client.

    python -m tests.attacks.siege                             # 200 of each kind, for 60 seconds
    python -m tests.attacks.siege --attackers 20 --seconds 5 --kinds trailers,silent

It prints the gateway's memory and descriptors before, during and 3 s after the siege, the latency of the
healthy client, and the number of connections that each kind of attacker opened. Upstream, attackers and
gateway are separate processes on 127.0.0.1. An attacker sends a few KB at most ten times a second, and
reconnects when its connection is closed.

The attackers have one processor, and all other processes have the rest, because real attackers use their own
machines. With a single processor, all share it, and the healthy client is slower than it would be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.attacks.wire import request
from tests.bench.processes import pinned
from tests.support.harness import KEY, SECRET, Gateway, Process, plain_client, serving, until

TASK = "besieged"
PAUSE_SECONDS = 0.1
HEALTHY_PER_SECOND = 50
SETTLE_SECONDS = 3.0  # until the gateway has returned the memory of closed connections to the system
MEGABYTE = 1_048_576
_CHUNKED = request("/nothing", "Transfer-Encoding: chunked", method="POST")
_STREAM = request(f"/v1/events?taskId={TASK}")
_OK = b" 200 "


@dataclass(frozen=True)
class Kind:
    """The bytes that an attacker sends first and then repeatedly, and whether it reads."""

    first: bytes = b""
    again: bytes = b""
    reads: bool = True
    leaves: bool = False


KINDS = {
    "silent": Kind(),
    "slow-head": Kind(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: ", b"a"),
    "slow-body": Kind(request("/scc/sd_get_progress", "Content-Length: 60000", method="POST"), b" "),
    "trailers": Kind(_CHUNKED + b"0\r\n", b"a: b\r\n" * 700),
    "endless-trailer": Kind(_CHUNKED + b"0\r\na: ", b"b" * 4096),
    "endless-extension": Kind(_CHUNKED + b"1;", b"b" * 4096),
    "pipelined-behind-a-stream": Kind(_STREAM, request("/openapi.json") * 100, reads=False),
    "byte-after-answer": Kind(request("/healthz", "Content-Length: 10"), b"x"),
    "many-fields": Kind(request(f"/v1/events?taskId={TASK}", *[b"a:"] * 6_500), b""),
    "unread-answers": Kind(request("/openapi.json") * 20 + _STREAM, b"", reads=False, leaves=True),
    "empty-lines": Kind(b"", b"\r\n"),
    "http10-stream": Kind(request(f"/v1/events?taskId={TASK}", version="1.0"), b""),
}


@dataclass
class Report:
    """The results of a siege, in bytes and seconds."""

    resident: dict[str, int] = field(default_factory=dict)
    descriptors: dict[str, int] = field(default_factory=dict)
    waits: dict[str, list[float]] = field(default_factory=dict)
    failures: int = 0
    opened: dict[str, int] = field(default_factory=dict)
    connections_after: float = 0.0
    watchers_after: float = 0.0

    def percentile(self, phase: str, percent: int) -> float:
        """Return the waiting times of the healthy client, in seconds."""
        return statistics.quantiles(self.waits[phase], n=100)[percent - 1]

    def __str__(self) -> str:
        lines = [
            f"{phase:>6}: RSS {self.resident[phase] / MEGABYTE:6.1f} MiB, {self.descriptors[phase]} files"
            + (
                f", healthy client p50 {self.percentile(phase, 50) * 1000:6.2f} ms, "
                f"p99 {self.percentile(phase, 99) * 1000:6.2f} ms over {len(self.waits[phase])} requests"
                if phase in self.waits
                else ""
            )
            for phase in self.resident
        ]
        lines.append(f"failed requests of the healthy client: {self.failures}")
        lines.append(
            f"connections after: {self.connections_after:g}, subscribers after: {self.watchers_after:g}"
        )
        lines.append(
            "connections opened: " + ", ".join(f"{kind} {count}" for kind, count in self.opened.items())
        )
        return "\n".join(lines)


def besiege(*, attackers: int, seconds: float, kinds: Sequence[str], folder: Path) -> Report:
    """Run a siege with this number of attackers of each kind; return the results."""
    report = Report()
    processors = sorted(os.sched_getaffinity(0))
    attack = _Attack(attackers, seconds, kinds, processors[-1:])
    with (
        pinned(processors[:-1] or processors),
        Process(
            "simulate", "--port", "0", "--key", KEY, "--secret", SECRET, cwd=folder, real=True
        ) as simulator,
    ):
        upstream = simulator.says(r"(http://[0-9.]+:\d+)")
        with plain_client(upstream) as control:
            life = {"waitingSeconds": 0, "runningSeconds": 3600}
            control.post("/_simulator/tasks", json={"taskId": TASK, "life": life}).raise_for_status()
        settings = {"SD_GATEWAY_UPSTREAM__ENDPOINT": upstream}
        with serving(folder, settings, real=True) as (process, gate):
            _play(report, process, gate, attack)
    return report


@dataclass(frozen=True)
class _Attack:
    """A number of attackers of each of these kinds, for a time, in a process on these processors."""

    attackers: int
    seconds: float
    kinds: Sequence[str]
    processors: Sequence[int]

    def start(self, port: int) -> subprocess.Popen[str]:
        """Start the process. It prints the number of connections that it has opened, by kind."""
        command = [sys.executable, "-m", "tests.attacks.siege", "--crowd", str(port)]
        command += ["--attackers", str(self.attackers), "--seconds", str(self.seconds)]
        with pinned(self.processors):
            return subprocess.Popen(
                [*command, "--kinds", ",".join(self.kinds)], stdout=subprocess.PIPE, text=True
            )


def _play(report: Report, process: Process, gate: Gateway, attack: _Attack) -> None:
    host, port = gate.address
    parts = 4  # of a phase: the memory is measured after each

    def look(phase: str) -> None:
        report.resident[phase] = process.resident_bytes()
        report.descriptors[phase] = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))

    asyncio.run(_healthy(host, port, 1.0, []))  # warms up both
    report.waits = {"before": [], "during": []}
    report.failures += asyncio.run(_healthy(host, port, attack.seconds / 2, report.waits["before"]))
    look("before")
    most = 0
    with attack.start(port) as crowd:
        try:
            for _ in range(parts):
                seconds = attack.seconds / parts
                report.failures += asyncio.run(_healthy(host, port, seconds, report.waits["during"]))
                look("during")
                most = max(most, report.resident["during"])
            said, _ = crowd.communicate()
        finally:
            crowd.kill()
    report.opened = json.loads(said)
    report.resident["during"] = most
    with suppress(AssertionError):
        until(lambda: gate.metric("watchers") == 0, "all have left")
    report.watchers_after = gate.metric("watchers")
    report.connections_after = gate.metric("http_connections")
    time.sleep(SETTLE_SECONDS)
    look("after")


async def _healthy(host: str, port: int, seconds: float, waits: list[float]) -> int:
    """Query a task at this rate; record the latency of each response, and return the number of failures."""
    failures = 0
    reader, writer = await asyncio.open_connection(host, port)
    asked = request(f"/v1/progress/{TASK}")
    start = time.perf_counter()
    for number in range(int(seconds * HEALTHY_PER_SECOND)):
        due = start + number / HEALTHY_PER_SECOND
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        sent = time.perf_counter()
        try:
            writer.write(asked)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
            failures += _OK not in head.partition(b"\r\n")[0]
        except (OSError, EOFError, ValueError):
            failures += 1
            writer.close()
            reader, writer = await asyncio.open_connection(host, port)
        waits.append(time.perf_counter() - sent)
    writer.close()
    return failures


# The attackers, in a separate process


async def _crowd(port: int, *, attackers: int, seconds: float, kinds: Sequence[str]) -> dict[str, int]:
    opened = dict.fromkeys(kinds, 0)

    async def attack(name: str, number: int) -> None:
        await asyncio.sleep(PAUSE_SECONDS * number / attackers)
        while True:
            with suppress(OSError, asyncio.LimitOverrunError):
                await _attack_once(port, KINDS[name], lambda: opened.update({name: opened[name] + 1}))
            # Random, or all of them would reconnect in the same tenth of a second each time.
            await asyncio.sleep(PAUSE_SECONDS * 10 * random.random())

    tasks: list[Awaitable[None]] = [
        asyncio.ensure_future(attack(name, number)) for name in kinds for number in range(attackers)
    ]
    await asyncio.wait([asyncio.ensure_future(task) for task in tasks], timeout=seconds)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    return opened


async def _attack_once(port: int, kind: Kind, opened: Callable[[], None]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=16_384)
    opened()
    try:
        writer.write(kind.first)
        for _ in range(10 if kind.leaves else 1_000_000):
            if writer.transport.get_write_buffer_size() < MEGABYTE // 4:  # the gateway reads no more: wait
                writer.write(kind.again)
            if not kind.reads:
                await asyncio.sleep(PAUSE_SECONDS)
                if writer.is_closing():
                    return
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(PAUSE_SECONDS):
                    if not await reader.read(65536):
                        return
                await asyncio.sleep(PAUSE_SECONDS)
    finally:
        writer.transport.abort()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a siege from the command line."""
    parser = argparse.ArgumentParser(description="Attackers of every kind at once, and a healthy client.")
    parser.add_argument("--attackers", type=int, default=200, help="of each kind (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="how long (default: %(default)s)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="default: %(default)s")
    parser.add_argument("--crowd", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    kinds = given.kinds.split(",")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if given.crowd:
        opened = asyncio.run(
            _crowd(given.crowd, attackers=given.attackers, seconds=given.seconds, kinds=kinds)
        )
        sys.stdout.write(json.dumps(opened))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        report = besiege(attackers=given.attackers, seconds=given.seconds, kinds=kinds, folder=Path(folder))
    sys.stdout.write(f"{len(kinds)} kinds, {given.attackers} of each, {given.seconds:g} s\n{report}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
