"""Starts `sd-gateway` in a forked process, whose modules are imported already.

Most tests of the command need a new process, but not another second of CPU time for the same imports. Each
test process has one server, which imports the modules once and forks for each command. A command ends as any
Python program does.

What happens during the imports is tested with the real program: see `real` of `harness.Process`. So is
memory, because a forked process shares it with the server.
"""

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import coverage

# The C library, Python, or another library reads these variables only once, when it starts.
_READ_AT_START = ("PYTHON", "LC_", "LANG", "LD_", "MALLOC_", "GLIBC_", "OPENSSL_", "TZ", "UV_")
_COVERAGE = "COVERAGE_PROCESS_CONFIG"  # coverage measures each new process that has this variable
_STANDARD_INPUT, _STANDARD_OUTPUT, _STANDARD_ERROR = range(3)

# --- the side of the tests --------------------------------------------------------------------------------


class ForkedCommand:
    """A process of the fork server, with the methods of `subprocess.Popen` that the tests use."""

    def __init__(self, connection: socket.socket, output: int) -> None:
        self.stdout = os.fdopen(output)
        self._connection = connection
        self._reports = connection.makefile("r")
        self.pid = int(self._reports.readline())
        self._ended = select.poll()  # select.select refuses large file descriptors
        self._ended.register(connection, select.POLLIN)
        self._lock = threading.Lock()  # several threads may wait
        self._status: int | None = None

    def wait(self, timeout: float) -> int:
        """Return the exit status, negative after a signal; raise TimeoutExpired after `timeout` seconds."""
        if self._status is None and not self._ended.poll(timeout * 1000):
            raise subprocess.TimeoutExpired("sd-gateway", timeout)
        with self._lock:
            if self._status is None:
                self._status = int(self._reports.readline())
                self._reports.close()
                self._connection.close()
        return self._status

    def poll(self) -> int | None:
        """Return the exit status, or None while the process runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it ends at this moment
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process at once."""
        self.send_signal(signal.SIGKILL)


def can_fork(env: Mapping[str, str]) -> bool:
    """Whether a process with these variables may share the start of the fork server."""
    return sys.platform == "linux" and read_at_start(env) == _server().read_at_start


def fork_command(arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> ForkedCommand:
    """Run `sd-gateway` with these arguments; its standard input is empty, and both outputs are one pipe."""
    reading, writing = os.pipe()
    request = {"arguments": arguments, "cwd": str(cwd), "env": dict(env)}
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(_server().address)
    socket.send_fds(connection, [b"\0"], [writing])
    os.close(writing)
    connection.sendall(json.dumps(request).encode())
    connection.shutdown(socket.SHUT_WR)
    return ForkedCommand(connection, reading)


def read_at_start(env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that have an effect only when a process starts."""
    return {name: value for name, value in env.items() if name.startswith(_READ_AT_START)}


@dataclass(frozen=True)
class _Server:
    """A running server; the pipe to its standard input keeps it running."""

    address: bytes
    read_at_start: Mapping[str, str]
    process: subprocess.Popen[bytes]


@cache
def _server() -> _Server:
    """Return the server of this test process, started by the first call."""
    env = {name: value for name, value in os.environ.items() if name != _COVERAGE}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")  # Linux chooses an address without a file
        listener.listen(64)
        process = subprocess.Popen(
            [sys.executable, "-P", __file__, str(listener.fileno())],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,  # as for a command: Python's streams depend on the kind of file
            stderr=subprocess.STDOUT,
            pass_fds=[listener.fileno()],
        )
        return _Server(listener.getsockname(), read_at_start(env), process)


# --- the server -------------------------------------------------------------------------------------------


def main() -> int:
    """Import the modules and fork for each request; in the new process, run the command."""
    from gateway.cli import commands, main  # noqa: F401, PLC0415  # in the server only

    for name in commands.SUMMARIES:
        commands.load(name)

    gc.freeze()  # a collection in a forked process would copy the memory of all modules
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    request = _next_request(socket.socket(fileno=int(sys.argv[1])))
    if request is None:
        return 0
    _become(request)
    from gateway.__main__ import main as run_command  # noqa: PLC0415

    return run_command()


def _next_request(listener: socket.socket) -> dict[str, Any] | None:
    """Return a request in the process that was forked for it; in the server, return None at its end."""
    while True:
        ready, _, _ = select.select([listener, _STANDARD_INPUT], [], [])
        if listener not in ready:
            return None
        connection, _ = listener.accept()
        if os.fork() == 0:
            break
        connection.close()
    listener.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, [output], _, _ = socket.recv_fds(connection, 1, 1)
    with connection.makefile("rb") as stream:
        request: dict[str, Any] = json.load(stream)
    pid = os.fork()
    if pid:
        _report_end(connection, pid, output)
    os.dup2(output, _STANDARD_OUTPUT)
    os.dup2(output, _STANDARD_ERROR)
    os.close(output)
    connection.close()
    return request


def _report_end(connection: socket.socket, pid: int, output: int) -> NoReturn:
    """Send the process ID of the command, wait for its end, and send its exit status."""
    os.close(output)
    connection.sendall(f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _become(request: dict[str, Any]) -> None:
    """Give this process the surroundings of a new one."""
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, _STANDARD_INPUT)
    os.close(empty)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    sys.argv = [str(Path(sys.executable).with_name("sd-gateway")), *request["arguments"]]
    if _COVERAGE in os.environ:
        coverage.process_startup()


if __name__ == "__main__":
    sys.exit(main())
