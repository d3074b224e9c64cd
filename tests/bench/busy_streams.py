"""5,000 requests per second for 1,000 tasks, alone and next to 5,000 streams of 100 other tasks: delays."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import rush
import servers
from measuring import Bench, Comparison, Figures, metric
from processes import many_files
from servers import Server
from streams import Sight
from watchers import see

NEEDS = ()

_STREAMS, _TASKS = 5000, 100
_OTHER_FILES = 1000
_OPENING_SECONDS = 8.0
_OPEN_SECONDS = 60.0
_PRIMING_SECONDS = 5.0  # the streams stay open while the queried tasks are cached first
_LONGER = 15  # multiple of the measurement: a minute by default


def run(bench: Bench) -> Iterator[Comparison]:
    """Measure the gateway only; nginx has no streams."""
    seconds = _LONGER * bench.seconds
    with (
        many_files(_STREAMS + _OTHER_FILES),
        servers.fast_upstream(
            bench.cores, bench.folder, changing=True, latency_seconds=rush.LATENCY_SECONDS
        ) as upstream,
        bench.gateways(upstream=upstream, settings=rush.ROOM) as gateways,
    ):
        turns: dict[str, Callable[[], Figures]] = {}
        for server in gateways:
            turns[f"{server.name}, no streams"] = partial(rush.measured, server, seconds)
            turns[f"{server.name}, {_STREAMS:,} streams"] = partial(_with_streams, server, seconds)
        yield Comparison(
            title=f"busy_streams: {rush.RATE:,} requests a second for {rush.TASKS:,} tasks of 1 s lifetime, "
            f"next to streams of {_TASKS} other tasks, for {seconds:g} s",
            samples=bench.take_turns(turns),
            baseline=f"{gateways[0].name}, no streams",
            notes=[
                "Late: from the due time of a query to the end of its response.",
                "Changes late: as in the scenario watchers; includes the upstream's latency.",
            ],
        )


def _with_streams(server: Server, seconds: float) -> Figures:
    with ThreadPoolExecutor(1) as pool:
        streams = pool.submit(
            see,
            port=server.port,
            paths=[f"/v1/progress/{uuid.uuid4().hex}/events" for _ in range(_TASKS)],
            how="events",
            count=_STREAMS,
            seconds=_PRIMING_SECONDS + seconds,
            opening_seconds=_OPENING_SECONDS,
            pids=server.pids,
        )
        asyncio.run(_until_open(server, streams))
        figures = rush.measured(server, seconds)
        sight = streams.result()
    return figures | {
        "changes per stream and second": sight.delivered / _STREAMS / sight.seconds,
        "changes late, p50, ms": sight.late_p50 * 1000,
        "changes late, p99, ms": sight.late_p99 * 1000,
        "CPU used to read the streams, of one core": sight.own_cpu / sight.seconds,
    }


async def _until_open(server: Server, streams: Future[Sight]) -> None:
    """Wait until the gateway has all streams. Raises: RuntimeError."""
    began = time.monotonic()
    while await metric(server, "watchers") < _STREAMS:
        if streams.done() or time.monotonic() > began + _OPEN_SECONDS:
            raise RuntimeError("the streams did not open")
        await asyncio.sleep(0.1)
