"""Ten minutes of mixed load with upstream faults switched on and off: no 500 and no leaks."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import servers
from client import Connection
from measuring import Bench, Comparison, Figures
from mixture import Crowd, Tally
from processes import connections_to, descriptors, many_files, resident_bytes
from servers import Server

NEEDS = ()

_LONGER = 150  # multiple of the measurement
_QUARTERS = 4
_REST_SECONDS = 10.0  # longer than a call plus the idle timeout of the upstream
_SLACK = 4  # tolerance for short-lived descriptors
# Maximum ratio of memory at rest between the halves. The allocator's reserve varies by 3 %.
_GROWTH = 1.05
_BUG = 500
# Few cached tasks, so that the cache is full and memory constant within the first quarter. Short timeouts, so
# that an upstream that is silent for some seconds causes failures.
_SETTINGS = {
    "CACHE__MAX_TASKS": "300",
    "UPSTREAM__TIMEOUT_SECONDS": "2",
    "UPSTREAM__ATTEMPT_TIMEOUT_SECONDS": "1",
    "UPSTREAM__MAX_IN_FLIGHT": "32",
    "LOG__LEVEL": "warning",
}
_FAULTS: tuple[dict[str, Any], ...] = (
    {"name": "status", "status": 502},
    {"name": "silent", "probability": 0.3},
    {"name": "refuse", "code": "T429ID", "message": "Throttled by API Flow Control", "retryAfter": 1},
    {"name": "cut", "probability": 0.5},
    {"name": "status", "status": 503, "retryAfter": 1},
    {"name": "drip", "probability": 0.3},
    {"name": "body", "body": "<html>well?</html>"},
    {"name": "slow", "seconds": 0.7},
    {"name": "large", "bytes": 4_000_000, "probability": 0.1},
    {"name": "gzip_bomb", "bytes": 50_000_000, "probability": 0.02},
    {"name": "deep", "probability": 0.3},
    {"name": "redirect"},
    {"name": "cookie"},
    {"name": "reject"},
    {"name": "refuse", "code": "A403IS", "message": "Invalid Signature"},
)


def run(bench: Bench) -> Iterator[Comparison]:
    """Load the gateway and measure it at rest between the quarters.

    Raises: RuntimeError for a 500, an error in the log, or a leak.
    """
    seconds = _LONGER * bench.seconds
    with (
        many_files(1000),
        servers.simulator(bench.cores, bench.folder, latency_seconds=0.02) as simulator,
        bench.gateways(upstream=simulator, settings=_SETTINGS) as gateways,
    ):
        soaked = [asyncio.run(_soak(server, simulator, seconds)) for server in gateways]
    bugs = sum(log.read_bytes().count(b'"level": "error"') for log in bench.folder.rglob("*.log"))
    for server, (moments, tally) in zip(gateways, soaked, strict=True):
        yield Comparison(
            title=f"soak: {server.name}, {seconds:g} s of mixed load, faults on and off",
            samples={name: [figures] for name, figures in moments.items()},
            baseline="after 1/4",
            notes=[*_notes(tally), f"errors in the log: {bugs}"],
        )
    for moments, tally in soaked:
        _check(moments, tally, bugs)


async def _soak(server: Server, simulator: int, seconds: float) -> tuple[dict[str, Figures], Tally]:
    crowd = Crowd(server.port, simulator=simulator, chance=random.Random(1))
    faults = itertools.cycle(_FAULTS)
    turn = (
        seconds / _QUARTERS / len(_FAULTS) / 2
    )  # each fault is on and then off for this time, in each quarter
    # Warm up: memory that is allocated on first use is not a leak.
    await crowd.run(min(2.0, seconds / 4))
    moments = {"at the start": await _at_rest(server, simulator)}
    tally = Tally()
    for quarter in range(1, _QUARTERS + 1):
        switching = asyncio.create_task(_switch_faults(simulator, faults, turn))
        seen = await crowd.run(seconds / _QUARTERS)
        switching.cancel()
        with suppress(asyncio.CancelledError):
            await switching
        tally.add(seen)
        figures = await _at_rest(server, simulator)
        figures["answers a second"] = seen.statuses.total() / (seconds / _QUARTERS)
        moments[f"after {quarter}/{_QUARTERS}"] = figures
    return moments, tally


async def _switch_faults(simulator: int, faults: Iterator[Mapping[str, Any]], turn: float) -> None:
    while True:
        await asyncio.sleep(turn)
        await _control(simulator, "PUT", json.dumps(next(faults)).encode())
        await asyncio.sleep(turn)
        await _control(simulator, "DELETE")


async def _control(simulator: int, method: str, body: bytes = b"") -> None:
    async with Connection(simulator) as control:
        reply = await control.ask(method, "/_simulator/faults", f"Content-Length: {len(body)}\r\n", body)
    if reply.status not in {200, 204}:
        raise RuntimeError(f"the simulator refused a fault: {reply.body!r}")


async def _at_rest(server: Server, simulator: int) -> Figures:
    """Measure a server without load, after all requests have ended."""
    await _control(simulator, "DELETE")
    await asyncio.sleep(_REST_SECONDS)
    upstream = connections_to(simulator, server.pids)
    return {
        "memory at rest, MB": resident_bytes(server.pids) / 1e6,
        "descriptors at rest": descriptors(server.pids) - upstream,
        "connections to upstream": upstream,
    }


def _notes(tally: Tally) -> list[str]:
    faults = ", ".join(str(fault["name"]) for fault in _FAULTS)
    return [
        f"faults: {faults}",
        f"answers by status: {_counts(tally.statuses)}",
        f"problems by code: {_counts(tally.codes)}",
        f"failures that a stale answer covered: {_counts(tally.covered)}",
        f"connections that broke: {_counts(tally.broken)}",
    ]


def _counts(counter: Counter[Any]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counter.most_common()) or "none"


def _check(moments: Mapping[str, Figures], tally: Tally, bugs: int) -> None:
    start, *quarters = moments.values()
    end = quarters[-1]
    memory = [figures["memory at rest, MB"] for figures in quarters]
    half = len(memory) // 2
    grown = {
        "memory": max(memory[half:]) > _GROWTH * max(memory[:half]),
        "descriptors": end["descriptors at rest"] > start["descriptors at rest"] + _SLACK,
        "connections to upstream": end["connections to upstream"] > _SLACK,
    }
    mistakes = [f"{what} grew" for what, grew in grown.items() if grew]
    if tally.statuses[_BUG] or bugs:
        mistakes.append(f"{tally.statuses[_BUG]} answers were 500, {bugs} errors were logged")
    if mistakes:
        raise RuntimeError("; ".join(mistakes))
