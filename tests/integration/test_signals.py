"""Signals during the start, also as PID 1, and signals that do not stop the gateway."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.harness import (
    COMMAND,
    KEY,
    PATIENCE_SECONDS,
    SECRET,
    HeldUpstream,
    Process,
    fresh_id,
    serving,
    until,
)

SETTINGS = {
    "SD_GATEWAY_SERVER__PORT": "0",
    "SD_GATEWAY_CREDENTIALS__ACCESS_KEY": KEY,
    "SD_GATEWAY_CREDENTIALS__SECRET_KEY": SECRET,
}
# The process sends itself a signal when it imports this module for the first time.
SIGNAL_AT_IMPORT = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ.get("SIGNAL_AT"):
            sys.meta_path.remove(self)
            os.kill(os.getpid(), int(os.environ["SIGNAL_NUMBER"]))
sys.meta_path.insert(0, Finder())
"""
# Modules in the order in which they are imported; uvloop is imported when the gateway listens.
MOMENTS = ("gateway.cli.main", "httpx", "pydantic", "gateway.app", "uvloop")


@pytest.fixture(params=["plain", "pid-1"])
def launcher(request: pytest.FixtureRequest) -> list[str]:
    """Return the start of a command line that runs a program, once as PID 1 of its own namespace."""
    if request.param == "plain":
        return []
    command = ["unshare", "--fork", "--pid", "--mount-proc", "--kill-child"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], check=False).returncode:
        pytest.skip("unshare is not installed or not allowed here")
    return command


@pytest.fixture
def upstream() -> Iterator[HeldUpstream]:
    """Run an upstream that responds when it is released."""
    with HeldUpstream() as running:
        yield running


def start_signalled(folder: Path, launcher: list[str], *arguments: str, at: str, number: int) -> int:
    """Run a command that signals itself at an import; return its exit status."""
    (folder / "sitecustomize.py").write_text(SIGNAL_AT_IMPORT)
    env = {"PYTHONPATH": str(folder), "SIGNAL_AT": at, "SIGNAL_NUMBER": str(int(number))}
    program, *options = [*launcher, str(COMMAND), *arguments]
    with Process(*options, cwd=folder, env=SETTINGS | env, program=Path(program)) as process:
        status = process.exit_status()
    assert "Traceback" not in process.output
    return status


# The start


@pytest.mark.parametrize("moment", MOMENTS)
def test_signals_stop_the_start_with_0(tmp_path: Path, launcher: list[str], moment: str) -> None:
    """SIGTERM during the start ends the gateway with status 0, also as PID 1 of a container."""
    assert start_signalled(tmp_path, launcher, "serve", at=moment, number=signal.SIGTERM) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
@pytest.mark.parametrize("command", ["serve", "simulate"])
def test_signals_of_each_kind_stop_the_start(tmp_path: Path, command: str, number: signal.Signals) -> None:
    """SIGQUIT stops the start in the same way; the status after SIGINT is 130."""
    status = 130 if number == signal.SIGINT else 0
    assert start_signalled(tmp_path, [], command, at="uvicorn", number=number) == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_other_commands_with_a_shells_status(
    tmp_path: Path, launcher: list[str], number: signal.Signals
) -> None:
    """A command that serves nothing ends with 128 plus the signal's number, also as PID 1."""
    assert start_signalled(tmp_path, launcher, "check", at="httpx", number=number) == 128 + number


def test_signals_end_a_running_command(tmp_path: Path, upstream: HeldUpstream) -> None:
    """SIGTERM ends a running `check`."""
    env = SETTINGS | {"SD_GATEWAY_UPSTREAM__ENDPOINT": upstream.url}
    with Process("check", cwd=tmp_path, env=env) as process:
        until(lambda: upstream.requests, "the query has arrived")
        process.signal()
        assert process.exit_status() == 128 + signal.SIGTERM
    assert "Traceback" not in process.output


def test_signals_are_handled_before_libraries_are_imported() -> None:
    """The entry point imports the standard library only, until it handles signals."""
    program = "import sys, gateway.__main__; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    imported = {name.partition(".")[0] for name in ran.stdout.split()}
    assert not imported & {"asyncio", "httpx", "pydantic", "starlette", "structlog", "uvicorn"}
    assert "gateway.cli.main" not in ran.stdout.split()


# While the gateway serves


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGWINCH", "SIGPIPE"])
def test_signals_for_other_programs_are_ignored(tmp_path: Path, upstream: HeldUpstream, name: str) -> None:
    """Signals that make other servers reload or reopen their logs do not disturb a request."""
    with (
        serving(tmp_path, {"SD_GATEWAY_UPSTREAM__ENDPOINT": upstream.url}) as (process, gate),
        ThreadPoolExecutor(1) as pool,
    ):
        in_flight = pool.submit(gate.get, fresh_id())
        until(lambda: upstream.requests, "the request is in flight")
        process.signal(signal.Signals[name])
        if name not in {"SIGWINCH", "SIGPIPE"}:
            assert process.says(rf'"signal": "{name}".*"event": "(signal_ignored)"')
        upstream.released.set()
        assert in_flight.result().status_code == 200
        assert gate.client.get("/readyz").status_code == 200
        process.signal()
        assert process.exit_status() == 0


# systemd


@pytest.mark.parametrize("kind", ["file", "abstract"])
def test_signals_to_systemd(tmp_path: Path, upstream: HeldUpstream, kind: str) -> None:
    """With NOTIFY_SOCKET, systemd learns when the gateway serves, and when it stops."""
    name = str(tmp_path / "notify") if kind == "file" else f"\0sd-gateway-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name)
        manager.settimeout(PATIENCE_SECONDS)
        env = {"NOTIFY_SOCKET": name.replace("\0", "@"), "SD_GATEWAY_UPSTREAM__ENDPOINT": upstream.url}
        with serving(tmp_path, env) as (process, gate):
            assert manager.recv(100) == b"READY=1"
            assert gate.client.get("/readyz").status_code == 200
            process.signal()
            assert manager.recv(100) == b"STOPPING=1"
            assert process.exit_status() == 0


def test_signals_to_a_missing_systemd_are_logged(tmp_path: Path, upstream: HeldUpstream) -> None:
    """A wrong NOTIFY_SOCKET is logged, and the gateway serves."""
    env = {"NOTIFY_SOCKET": "/nowhere/notify", "SD_GATEWAY_UPSTREAM__ENDPOINT": upstream.url}
    with serving(tmp_path, env) as (process, gate):
        assert gate.client.get("/readyz").status_code == 200
        line = json.loads(process.says(r'(\{.*"event": "systemd_not_notified".*\})'))
    assert (line["state"], line["reason"]) == ("READY=1", "[Errno 2] No such file or directory")
