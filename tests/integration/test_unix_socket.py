"""`server.uds`: the gateway on a Unix socket, and what happens to the socket's file."""

import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import Mock

import httpx
import pytest

from gateway.server.unix_socket import UnixSocket
from gateway.settings.model import Server, Settings
from tests.support.harness import (
    KEY,
    SECRET,
    Gateway,
    Process,
    Simulator,
    free_port,
    neutral_environment,
    plain_client,
    until,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of a socket."""
    return tmp_path / "gateway.sock"


def environment(path: Path, simulator: Simulator, **more: str) -> dict[str, str]:
    """Return the settings of a gateway on this socket."""
    return {
        "SD_GATEWAY_SERVER__UDS": str(path),
        "SD_GATEWAY_UPSTREAM__ENDPOINT": simulator.url,
        "SD_GATEWAY_CREDENTIALS__ACCESS_KEY": KEY,
        "SD_GATEWAY_CREDENTIALS__SECRET_KEY": SECRET,
    } | {f"SD_GATEWAY_{name}": value for name, value in more.items()}


def start(path: Path, simulator: Simulator, **more: str) -> Process:
    """Start a gateway on this socket."""
    return Process("serve", cwd=path.parent, env=environment(path, simulator, **more))


@contextmanager
def serving(path: Path, simulator: Simulator, **more: str) -> Iterator[tuple[Process, Gateway]]:
    """Run a gateway on this socket; yield its process and a client."""
    transport = httpx.HTTPTransport(uds=str(path))
    with start(path, simulator, **more) as process:
        assert process.says(r'"url": "unix:([^"]+)"') == str(path)
        with httpx.Client(base_url="http://progress.example.com", transport=transport, timeout=30) as client:
            yield process, Gateway(client)


@pytest.mark.parametrize("edge", ["true", "false"])
def test_unix_socket_serves(path: Path, simulator: Simulator, edge: str) -> None:
    """Queries, cache hits and streams work under any host name; the file is removed at the end."""
    task = simulator.task()
    with serving(path, simulator, SERVER__EDGE=edge) as (process, gate):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
        first, second = gate.get(task), gate.get(task)
        assert (first.status_code, second.status_code) == (200, 200)
        assert "hit" in second.headers["cache-status"]
        with gate.client.stream("GET", f"/v1/progress/{task}/events") as stream:
            assert any("event: progress" in line for line in stream.iter_lines())
        process.signal()
        assert process.exit_status() == 0
    assert not path.exists()


def test_unix_socket_leaves_the_metrics_port(path: Path, simulator: Simulator) -> None:
    """The metrics port is a TCP port as before, and the health check uses the socket."""
    port = free_port()
    with serving(path, simulator, SERVER__METRICS_PORT=str(port)) as (_, gate):
        assert gate.client.get("/metrics").status_code == 404
        with plain_client(f"http://127.0.0.1:{port}") as scraper:
            assert "sd_gateway_build_info" in scraper.get("/metrics").text
        assert health(path, simulator) == (0, "")
    assert health(path, simulator) == (1, "unhealthy: [Errno 2] No such file or directory\n")


@pytest.mark.parametrize("edge", ["true", "false"])
@pytest.mark.parametrize("last", ["progress/{}", "progress/{}/events"])
def test_unix_socket_half_closed_clients_that_do_not_read_are_dropped(
    path: Path, simulator: Simulator, edge: str, last: str
) -> None:
    """Some responses do not fit into the kernel's buffer when a client half-closes its connection."""
    port = free_port()
    settings = {"METRICS_PORT": str(port), "EDGE": edge, "KEEP_ALIVE_SECONDS": "1", "HEADER_SECONDS": "1"}
    with (
        serving(path, simulator, **{f"SERVER__{name}": value for name, value in settings.items()}) as (
            _,
            gate,
        ),
        plain_client(f"http://127.0.0.1:{port}") as scraper,
        ExitStack() as stack,
    ):
        task = simulator.task()
        size = len(gate.get(task).content) + 600  # with the head, about
        for responses in range(150_000 // size, 300_000 // size, 4):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(path))
            requests = [f"progress/{task}"] * responses + [last.format(task)]
            client.sendall(
                "".join(f"GET /v1/{each} HTTP/1.1\r\nHost: x\r\n\r\n" for each in requests).encode()
            )
            for _ in range(2 + responses // 8):  # the gateway sends 8 responses in each turn
                gate.client.get("/healthz")
            client.shutdown(socket.SHUT_WR)
        metrics = Gateway(scraper)
        until(lambda: metrics.metric("http_connections") <= 2, "only the two clients that read are connected")
        assert metrics.metric("watchers") == 0


def health(path: Path, simulator: Simulator) -> tuple[int, str]:
    """Run the image's health check; return its exit status and its output."""
    ran = subprocess.run(
        [sys.executable, "-m", "gateway.cli.health_check"],
        capture_output=True,
        check=False,
        text=True,
        cwd=path.parent,
        env=neutral_environment()
        | environment(path, simulator)
        | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    return ran.returncode, ran.stdout + ran.stderr


def test_unix_socket_trusts_its_peers(path: Path, simulator: Simulator) -> None:
    """The peer is a proxy: X-Forwarded-For identifies its clients, whatever server.trusted_proxies says."""
    settings = {"LIMITS__REQUESTS_PER_SECOND": "0.001", "SERVER__TRUSTED_PROXIES": "192.0.2.0/24"}
    with serving(path, simulator, **settings) as (_, gate):

        def ask(*client: str) -> int:
            return gate.get(
                simulator.task(), headers=[("x-forwarded-for", each) for each in client]
            ).status_code

        assert [ask("198.51.100.1"), ask("198.51.100.1"), ask("198.51.100.2")] == [200, 429, 200]
        assert ask("198.51.100.3", "198.51.100.1") == 429  # the proxy appends the address that it sees


def test_unix_socket_of_a_killed_process_is_replaced(path: Path, simulator: Simulator) -> None:
    """The file of a process that was killed does not stop the next start."""
    with start(path, simulator) as process:
        process.says('"event": "started"')
        process.signal(signal.SIGKILL)
        process.exit_status()
    assert path.is_socket()
    with serving(path, simulator) as (_, gate):
        assert gate.client.get("/healthz").status_code == 200


def test_unix_socket_in_use_is_refused(path: Path, simulator: Simulator) -> None:
    """A second gateway does not take the socket of the first, and says why."""
    with serving(path, simulator) as (_, gate):
        with start(path, simulator) as second:
            assert second.exit_status() == 1
        told = json.loads(second.output)
        assert (told["event"], told["uds"], told["level"]) == ("listen_failed", str(path), "error")
        assert told["reason"] == "another process listens on this socket"
        assert gate.client.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file", "the file exists and is not a socket"),
        ("missing/gateway.sock", "No such file or directory"),
        ("n" * 90 + ".sock", "AF_UNIX path too long"),
    ],
)
def test_unix_socket_that_cannot_be_created(
    tmp_path: Path, simulator: Simulator, name: str, reason: str
) -> None:
    """A file is never overwritten; every reason is one line."""
    (tmp_path / "file").write_text("precious")
    env = environment(Path(name), simulator)
    with Process("serve", cwd=tmp_path, env=env) as process:
        assert process.exit_status() == 1
    assert json.loads(process.output)["reason"] == reason
    assert (tmp_path / "file").read_text() == "precious"


def test_unix_socket_keeps_the_file_of_its_successor(path: Path) -> None:
    """A process that stops late does not remove the socket that replaced its own."""
    old = UnixSocket(str(path), backlog=1)
    path.unlink()
    new = UnixSocket(str(path), backlog=1)
    with old.socket, new.socket:
        old.remove()
        assert path.is_socket()
        new.remove()
        assert not path.exists()
        new.remove()


def test_unix_socket_with_a_full_queue_is_in_use(path: Path) -> None:
    """A server that is too busy to accept connections counts as alive."""
    busy = UnixSocket(str(path), backlog=0)
    with busy.socket, socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(str(path))
        with pytest.raises(OSError, match="another process listens"):
            UnixSocket(str(path), backlog=1)


def test_unix_socket_in_a_directory_that_cannot_be_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that cannot be opened cannot be locked: the socket is created without a lock."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", Mock(side_effect=PermissionError))
        listening = UnixSocket(str(path), backlog=1)
    with listening.socket:
        assert path.is_socket()


def test_unix_socket_in_a_locked_directory(path: Path) -> None:
    """A directory that another program keeps locked stops the start after a second, with the reason."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another process has locked the directory"):
            UnixSocket(str(path), backlog=1)
    finally:
        os.close(folder)


def test_unix_socket_setting() -> None:
    """A path that no socket can have is a mistake in the settings; the default accepts any host."""
    with pytest.raises(ValueError, match="at most 107 bytes"):
        Server(uds="/" + "é" * 60)
    assert Settings.model_validate({"server": {"uds": "/run/x"}}).server.allowed_hosts == ["*"]
