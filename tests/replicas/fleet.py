"""Replicas as processes, and a store whose clock can be stepped."""

import os
import signal
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.support.harness import KEY, SECRET, Gateway, Json, Process, plain_client, until
from tests.support.programs import required
from tests.support.storeserver import StoreServer, binary

MOVING: Json = {"waitingSeconds": 0, "runningSeconds": 3600, "jumpBack": False, "steps": 360_000}
"""The life of a simulated task that has changed at each query."""

_SOURCE = Path(__file__).with_name("stepped_clock.c")


@dataclass
class Replica:
    """A running `sd-gateway serve`."""

    process: Process
    gateway: Gateway
    port: int

    @property
    def shares(self) -> bool:
        """Whether it reports that it uses the store."""
        return self.gateway.metric("store_up") == 1

    def freeze(self) -> None:
        """Suspend the process."""
        self.process.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Resume the process."""
        self.process.signal(signal.SIGCONT)


@contextmanager
def fleet(folder: Path, *given: Json, shared: bool = True) -> Iterator[list[Replica]]:
    """Run one replica for each of the given settings (sections, as in the TOML file), started together.

    With `shared`, yield them once each reports that it uses the store.
    """
    with ExitStack() as stack:
        started = [
            stack.enter_context(Process("serve", cwd=folder, env=variables(sections))) for sections in given
        ]
        replicas = [replica(process, stack) for process in started]
        if shared:
            until(lambda: all(one.shares for one in replicas), "every replica uses the store")
        yield replicas
        for process in started:  # together: each takes a while, and a frozen one needs SIGCONT first
            if process.alive:
                process.signal(signal.SIGCONT)
                process.signal(signal.SIGTERM)


def replica(process: Process, stack: ExitStack) -> Replica:
    """Return a replica once it listens; `stack` closes its client."""
    url = process.says(r'"url": "(http://[^"]+)"')
    client = stack.enter_context(plain_client(url))
    return Replica(process, Gateway(client), client.base_url.port or 0)


def variables(sections: Json) -> dict[str, str]:
    """Return the environment for a replica with these settings."""
    defaults: Json = {
        "server": {"port": 0, "trusted_hosts": "*", "drain_seconds": 0.5},
        "credentials": {"access_key": KEY, "secret_key": SECRET},
        # One task's first call after a pause must not decide a test on a busy machine.
        "upstream": {"timeout_seconds": 30, "attempt_timeout_seconds": 15},
    }
    merged = {name: {**defaults.get(name, {}), **sections.get(name, {})} for name in {*defaults, *sections}}
    return {
        f"SD_GATEWAY_{section}__{name}".upper(): str(value)
        for section, values in merged.items()
        for name, value in values.items()
    }


class SteppedStore(StoreServer):
    """A server whose wall clock can be stepped at any time.

    A library of ours is preloaded into it (`stepped_clock.c`). The test is skipped without a C compiler.
    """

    def __init__(self, program: str, folder: Path, *, port: int = 0) -> None:
        compiler = required("cc")
        library = folder / "stepped_clock.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, _SOURCE, "-ldl"], check=True)
        self._shift = folder / "shift"
        self._shift.write_bytes(bytes(8))
        self._environment = os.environ | {"LD_PRELOAD": str(library), "STEPPED_CLOCK": str(self._shift)}
        self._ahead_seconds = 0.0
        super().__init__(program, folder, port=port)

    def start(self) -> None:
        """Start an empty server, and wait until it answers."""
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, cwd=self._folder, env=self._environment
        )
        until(self._answers, "the store's server answers")

    def step(self, seconds: float) -> None:
        """Step the clock; negative: back."""
        self._ahead_seconds += seconds
        with self._shift.open("r+b") as file:  # in place: the server has mapped this file
            file.write(struct.pack("q", int(self._ahead_seconds * 1_000_000)))

    @classmethod
    def valkey(cls, folder: Path) -> Self:
        """Return a Valkey with such a clock."""
        return cls(binary("valkey"), folder)
