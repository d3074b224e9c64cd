"""Many slow queries in flight at once: each replica keeps its leases, so there is one call for each task.

    python -m tests.replicas.leases --tasks 2000 --upstream-seconds 7 --round-trip 0.005

Two replicas are asked for every task at the same time. Prints the calls, and what the clients received.
"""

import argparse
import asyncio
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from tests.replicas.asking import Reply, ask_all
from tests.replicas.fleet import fleet
from tests.support.fault_proxy import FaultProxy
from tests.support.harness import Json, Simulator, Stage, plain_client, running
from tests.support.storeserver import StoreServer, binary


def hold_leases(
    store: StoreServer, simulator: Simulator, folder: Path, *, tasks: int, seconds: float, round_trip: float
) -> list[Reply]:
    """Query each task at two replicas at once; the upstream takes so many seconds. Return the responses."""
    simulator.reset(latency_seconds=seconds)
    with ExitStack() as stack:
        proxies = [stack.enter_context(FaultProxy(store.port)) for _ in range(2)]
        settings: list[Json] = [
            {
                "upstream": {"endpoint": simulator.url, "max_in_flight": 5000},
                "store": {"url": proxy.url, "timeout_seconds": 1},
                "cache": {"running_seconds": 60},
            }
            for proxy in proxies
        ]
        replicas = stack.enter_context(fleet(folder, *settings))
        for proxy in proxies:
            proxy.delay(round_trip=round_trip)
        ids = [simulator.task() for _ in range(tasks)]
        return asyncio.run(ask_all([one.port for one in replicas], ids))


def main() -> int:
    """Run once with the arguments of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=2000)
    parser.add_argument("--upstream-seconds", type=float, default=7.0)
    parser.add_argument(
        "--round-trip", type=float, default=0.005, help="between replica and store, in seconds"
    )
    given = parser.parse_args()
    stage = Stage()
    with (
        tempfile.TemporaryDirectory() as folder,
        StoreServer(binary("valkey"), Path(folder)) as store,
        running(stage, lifespan="off", date_header=False) as url,
        plain_client(url) as client,
    ):
        simulator = Simulator(stage, client)
        replies = hold_leases(
            store,
            simulator,
            Path(folder),
            tasks=given.tasks,
            seconds=given.upstream_seconds,
            round_trip=given.round_trip,
        )
        calls = simulator.calls()
    statuses = dict(Counter(reply.status for reply in replies))
    slowest = max(reply.seconds for reply in replies)
    print(f"{calls} calls for {given.tasks} tasks; answers: {statuses}; slowest: {slowest:.1f} s")  # noqa: T201
    return int(calls > given.tasks or set(statuses) != {200})


if __name__ == "__main__":
    sys.exit(main())
