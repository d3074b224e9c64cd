"""100 streams without a reader: their effect on the memory of the gateway and on other streams."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from functools import partial

import servers
from measuring import Bench, Comparison, Figures, prime
from processes import many_files
from watchers import see

NEEDS = ()

_SLOW, _READERS = 100, 50
_CHANGES = 20  # per second
_OTHER_FILES = 500
_LONGER = 7.5  # multiple of the measurement, so that unsent data can accumulate
_SETTINGS = {"CACHE__RUNNING_SECONDS": str(0.5 / _CHANGES)}  # shorter than the interval between two queries


def run(bench: Bench) -> Iterator[Comparison]:
    """Measure the gateway with and without unread streams."""
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
            notes=["Late: as in the scenario watchers. Unread sockets have the smallest possible buffers."],
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
