"""Three replicas under load while their store is killed, stopped, filled, and so on."""

from __future__ import annotations

import asyncio
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import redis
import servers
import steady
from measuring import Bench, Comparison, Figures
from replicas import REPLICAS, sharing, until_shared
from servers import Server

from tests.support.storeserver import Guarded, StoreServer, binary, cluster, guarded, migrate

NEEDS = ()

_RATE, _TASKS = 150, 60
_FIRST_SECONDS = 1.0
_OVERWRITE_SECONDS = 0.05
_BEYOND_SECONDS = 0.1  # maximum additional delay
_OK = 200


class _Outage(NamedTuple):
    """A store failure: how it starts and how it ends."""

    settings: dict[str, str]
    cause: Callable[[], None]
    repair: Callable[[], None]


def run(bench: Bench) -> Iterator[Comparison]:
    """Cause each failure. Raises: RuntimeError if a request failed."""
    samples: dict[str, list[Figures]] = {}
    for number in range(1, bench.rounds + 1):
        for name, outage in _OUTAGES.items():
            sys.stderr.write(f"  round {number} of {bench.rounds}: {name}\n")
            samples.setdefault(name, []).append(_measured(bench, outage))
    yield Comparison(
        title=f"outages: {_RATE} requests a second over {REPLICAS} replicas and {_TASKS} tasks",
        samples=samples,
        baseline=next(iter(samples)),
        notes=[
            f"Late, p99: {bench.seconds:g} s before the failure, its first second, {bench.seconds:g} s",
            f"after that, and {bench.seconds:g} s after the repair. Expected, except in the first second:",
            f"at most {_BEYOND_SECONDS * 1000:g} ms more than before.",
        ],
    )
    if failed := [
        name for name, rounds in samples.items() if any(one["requests that failed"] for one in rounds)
    ]:
        raise RuntimeError(f"requests failed: {', '.join(failed)}")


def _measured(bench: Bench, outage: Callable[[Path], Iterator[_Outage]]) -> Figures:
    folder = bench.folder / uuid.uuid4().hex
    folder.mkdir()
    with (
        contextmanager(outage)(folder) as started,
        servers.fast_upstream(bench.cores, bench.folder, changing=True) as upstream,
        sharing(bench, upstream=upstream, settings=started.settings) as replicas,
    ):
        return asyncio.run(_under_load(replicas, started, bench.seconds))


async def _under_load(replicas: list[Server], outage: _Outage, seconds: float) -> Figures:
    paths = [f"/v1/progress/{uuid.uuid4().hex}" for _ in range(_TASKS)]
    await _query(replicas, paths, seconds / 2)
    before = await _query(replicas, paths, seconds)
    causing = asyncio.create_task(asyncio.to_thread(outage.cause))
    first = await _query(replicas, paths, _FIRST_SECONDS)
    during = await _query(replicas, paths, seconds)
    await causing
    await asyncio.to_thread(outage.repair)
    again, after = await asyncio.gather(until_shared(replicas), _query(replicas, paths, seconds))
    return {
        "requests": len(before + first + during + after),
        "requests that failed": sum(query.status != _OK for query in before + first + during + after),
        "late before, ms": steady.percentile(before, 99) * 1000,
        "late in the first second, ms": steady.percentile(first, 99) * 1000,
        "additional delay, ms": (steady.percentile(during, 99) - steady.percentile(before, 99)) * 1000,
        "late after the repair, ms": steady.percentile(after, 99) * 1000,
        "seconds until all replicas share again": again,
    }


async def _query(replicas: list[Server], paths: list[str], seconds: float) -> list[steady.Query]:
    rate = _RATE / len(replicas)
    asked = await asyncio.gather(
        *(steady.ask(replica.port, paths, rate=rate, seconds=seconds) for replica in replicas)
    )
    return [query for queries in asked for query in queries]


def _nothing() -> None:
    pass


def _one(
    cause: Callable[[StoreServer], None], repair: Callable[[StoreServer], None]
) -> Callable[[Path], Iterator[_Outage]]:
    def outage(folder: Path) -> Iterator[_Outage]:
        with StoreServer(binary("valkey"), folder) as server:
            yield _Outage({"STORE__URL": server.url}, lambda: cause(server), lambda: repair(server))

    return outage


def _restarted(server: StoreServer) -> None:
    server.kill()
    server.start()


def _read_only(server: StoreServer) -> None:
    server.client.replicaof("127.0.0.1", "1")


def _writable(server: StoreServer) -> None:
    server.client.replicaof("NO", "ONE")


def _overwritten(folder: Path) -> Iterator[_Outage]:
    over = threading.Event()

    def overwrite() -> None:
        while not over.wait(_OVERWRITE_SECONDS):
            for name in server.client.scan_iter("*", count=1000):
                with suppress(redis.ResponseError):
                    server.client.set(name, b"garbage", keepttl=True)

    with StoreServer(binary("valkey"), folder) as server:
        work = threading.Thread(target=overwrite)
        yield _Outage({"STORE__URL": server.url}, work.start, over.set)
        over.set()
        work.join()


def _failed_over(folder: Path) -> Iterator[_Outage]:
    def kill(servers: Guarded) -> None:
        servers.primary.kill()

    with guarded(folder) as guard:
        settings = {"STORE__URL": guard.sentinel.url, "STORE__SENTINEL_SERVICE": "main"}
        yield _Outage(settings, lambda: kill(guard), _nothing)


def _moved(folder: Path) -> Iterator[_Outage]:
    with cluster(folder) as nodes:
        settings = {"STORE__URL": nodes[0].url, "STORE__CLUSTER": "true"}
        yield _Outage(settings, lambda: migrate(nodes[0], nodes[1]), _nothing)


_OUTAGES: dict[str, Callable[[Path], Iterator[_Outage]]] = {
    "killed": _one(StoreServer.kill, StoreServer.start),
    "stopped": _one(StoreServer.freeze, StoreServer.thaw),
    "restarted, empty": _one(_restarted, lambda _: None),
    "read-only": _one(_read_only, _writable),
    "full": _one(lambda server: server.configure(maxmemory=1), lambda server: server.configure(maxmemory=0)),
    "overwritten": _overwritten,
    "failed over": _failed_over,
    "slots moved": _moved,
}
