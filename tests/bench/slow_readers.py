"""100 streams that nobody reads: what they cost the gateway's memory, and those who do read."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from functools import partial

import servers
from measuring import Bench, Comparison, Figures, prime
from processes import many_files
from subscribers import see

NEEDS = ()

_SLOW, _READERS = 100, 50
_CHANGES = 20  # a second
_OTHER_FILES = 500
_LONGER = 7.5  # times the seconds of a measurement: what piles up needs time to do so
_SETTINGS = {"CACHE__RUNNING_SECONDS": str(0.5 / _CHANGES)}  # gone by when the next poke comes


def run(bench: Bench) -> Iterator[Comparison]:
    """Measure the gateway with and without streams that nobody reads."""
    seconds = _LONGER * bench.seconds
    with (
        many_files(_SLOW + _READERS + _OTHER_FILES),
        servers.fast_upstream(bench.cores, bench.folder, changing=True) as upstream,
    ):
        turns = {
            f"{slow} never read": partial(_measured, bench, upstream, slow, seconds) for slow in (0, _SLOW)
        }
        yield Comparison(
            title=f"slow_readers: {_READERS} read one task's events, {_CHANGES} changes a second, "
            f"for {seconds:g} s",
            samples=bench.take_turns(turns),
            baseline="0 never read",
            notes=["Late: as for watchers. The sockets of those who never read are as small as can be."],
        )


def _measured(bench: Bench, upstream: int, slow: int, seconds: float) -> Figures:
    with servers.gateway(bench.cores, bench.folder, upstream=upstream, settings=_SETTINGS) as server:
        path = f"/v1/progress/{uuid.uuid4().hex}"
        prime(server, [path])
        sight = see(
            port=server.port,
            paths=[f"{path}/events"],
            how="events",
            count=_READERS,
            seconds=seconds,
            opening_seconds=0.0,
            pids=server.pids,
            slow=slow,
            poked=path,
            pokes=_CHANGES,
        )
    return {
        "changes a reader and second": sight.delivered / _READERS / sight.seconds,
        "late, p50, ms": sight.late_p50 * 1000,
        "late, p99, ms": sight.late_p99 * 1000,
        "late, max, ms": sight.late_max * 1000,
        "memory at the start, MB": sight.open_bytes / 1e6,
        "memory half way, MB": sight.half_way_bytes / 1e6,
        "memory at the end, MB": sight.end_bytes / 1e6,
    }
