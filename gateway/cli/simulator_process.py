"""Runs the simulated upstream as a child process, for the demo."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

SIMULATOR_PREFIX = "simulated upstream on "  # followed by its URL, once it accepts connections


@contextlib.contextmanager
def running_simulator(port: int, *, key: str, secret: str) -> Iterator[str]:
    """Run the simulated upstream; yield the URL that it prints: another program may listen on the port.

    Raises: RuntimeError if it does not start.
    """
    command = [
        sys.executable,
        "-m",
        "gateway",
        "simulate",
        "--port",
        str(port),
        "--key",
        key,
        "--secret-stdin",
    ]
    with subprocess.Popen(  # noqa: S603
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdin is not None  # noqa: S101  # Popen with PIPE
            assert process.stdout is not None  # noqa: S101
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(f"{secret}\n")
                process.stdin.close()
            line = process.stdout.readline()
            if not line.startswith(SIMULATOR_PREFIX):
                raise RuntimeError(
                    f"the simulated upstream did not start on port {port}; choose another --simulator-port"
                )
            yield line.removeprefix(SIMULATOR_PREFIX).strip()
        finally:
            process.terminate()
            process.wait()  # before its pipes are closed: it may still write to them
