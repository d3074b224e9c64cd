"""Credential rotation at 200 requests per second: a mounted secret replaced, a next key pair promoted."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import servers
import steady
from measuring import Bench, Comparison, Figures, prime

NEEDS = ()

_RATE, _TASKS = 200, 400
_LATENCY_SECONDS = 0.05  # ten calls are in flight whenever a key pair is revoked
_LONGER = 5  # multiple of the measurement: the gateway checks the files every two seconds
_OK = 200
_FILES = ("access_key", "secret_key", "next_access_key", "next_secret_key")
_SETTINGS = {
    "CREDENTIALS__ACCESS_KEY": "",
    "CREDENTIALS__SECRET_KEY": "",
    # Every request makes one upstream call, and no stale response replaces a failure.
    "UPSTREAM__RETRIES": "0",
    "CACHE__RUNNING_SECONDS": "0",
    "CACHE__STALE_WHILE_REVALIDATE_SECONDS": "0",
    "CACHE__STALE_IF_ERROR_SECONDS": "0",
    "LOG__LEVEL": "debug",
}


def run(bench: Bench) -> Iterator[Comparison]:
    """Rotate credentials under load."""
    seconds = _LONGER * bench.seconds
    yield Comparison(
        title=f"rotation: {_RATE} requests a second over {_TASKS} tasks, for {seconds:g} s",
        samples=bench.take_turns({"gateway": partial(_measured, bench, seconds)}),
        baseline="gateway",
        notes=[
            f"Upstream latency {_LATENCY_SECONDS * 1000:g} ms. No retries or stale responses hide failures.",
            "Swapped: both pairs are valid for a fifth of the time. At once: the old one is revoked",
            "with the swap. Promoted: the active one is revoked without warning. Refused calls were in",
            "flight; they are signed again.",
        ],
    )


class _Rotation:
    """The operator: replaces the mounted secret and sets the accepted key pairs. All methods block."""

    def __init__(self, folder: Path, upstream: int) -> None:
        self.token = uuid.uuid4().hex  # part of every key and secret; no output may contain it
        self.folder = folder
        self._upstream = upstream

    def accept(self, *numbers: int) -> None:
        servers.accept(self._upstream, {self._key(number): self._secret(number) for number in numbers})

    def mount(self, active: int, following: int) -> None:
        """Replace the mounted files like Kubernetes: by renaming a link to a directory."""
        data = self.folder / f"..{active}-{following}"
        data.mkdir()
        contents = (self._key(active), self._secret(active), self._key(following), self._secret(following))
        for name, content in zip(_FILES, contents, strict=True):
            (data / name).write_text(content)
        link = self.folder / "..data_tmp"
        link.symlink_to(data.name)
        link.rename(self.folder / "..data")

    def play(self, seconds: float) -> Figures:
        """Rotate three times within this time; return the number of refused calls for each."""
        began = time.monotonic()

        def at(share: float) -> int:
            time.sleep(max(began + share * seconds - time.monotonic(), 0))
            return servers.refused_calls(self._upstream)

        at(0.15)
        self.accept(0, 1)
        self.mount(1, 2)
        at(0.35)
        self.accept(1)
        swapped = at(0.5)
        self.accept(1, 3)
        self.mount(3, 4)
        self.accept(3)
        at_once = at(0.7)
        self.accept(4)
        promoted = at(0.85)
        self.mount(4, 5)
        return {
            "refused as the secret was swapped": swapped,
            "refused as it was swapped at once": at_once - swapped,
            "refused as the next was promoted": promoted - at_once,
            "refused after that": at(1) - promoted,
        }

    def _key(self, number: int) -> str:
        return f"{self.token}-key-{number}"

    def _secret(self, number: int) -> str:
        return f"{self.token}-secret-{number}"


def _measured(bench: Bench, seconds: float) -> Figures:
    with servers.simulator(bench.cores, bench.folder, latency_seconds=_LATENCY_SECONDS) as upstream:
        tasks = [uuid.uuid4().hex for _ in range(_TASKS)]
        for task in tasks:
            servers.create_task(upstream, taskId=task, life={"waitingSeconds": 0, "runningSeconds": 1e6})
        rotation = _Rotation(bench.folder / uuid.uuid4().hex, upstream)
        rotation.folder.mkdir()
        rotation.accept(0)
        rotation.mount(0, 9)
        for name in _FILES:
            (rotation.folder / name).symlink_to(Path("..data") / name)
        files = {f"CREDENTIALS__{name.upper()}_FILE": str(rotation.folder / name) for name in _FILES}
        with servers.gateway(
            bench.cores, bench.folder, upstream=upstream, settings=_SETTINGS | files
        ) as server:
            paths = [f"/v1/progress/{task}" for task in tasks]
            prime(server, paths)
            queries, refused = asyncio.run(_under_load(server.port, paths, rotation, seconds))
        logs = [log.read_bytes() for log in bench.folder.rglob("*.log")]
    token = rotation.token.encode()
    return {
        "requests": len(queries),
        "requests that failed": sum(query.status != _OK for query in queries),
        **refused,
        "late, p50, ms": steady.percentile(queries, 50) * 1000,
        "late, p99, ms": steady.percentile(queries, 99) * 1000,
        "late, max, ms": max(query.late for query in queries) * 1000,
        "keys in any output": sum(text.count(token) for text in (*logs, *(query.text for query in queries))),
    }


async def _under_load(
    port: int, paths: list[str], rotation: _Rotation, seconds: float
) -> tuple[list[steady.Query], Figures]:
    return await asyncio.gather(
        steady.ask(port, paths, rate=_RATE, seconds=seconds), asyncio.to_thread(rotation.play, seconds)
    )
