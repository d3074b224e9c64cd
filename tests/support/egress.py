"""Real egress proxies as processes of their own: microsocks for SOCKS5, tinyproxy for HTTP."""

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.harness import PATIENCE_SECONDS, free_port

USER, PASSWORD = "egress-user", "egress-password-1"


class Proxy(NamedTuple):
    """A running proxy: its scheme and port, and what its log has so far."""

    scheme: str
    port: int
    log: Path

    @property
    def url(self) -> str:
        """The URL with the right credentials."""
        return f"{self.scheme}://{USER}:{PASSWORD}@127.0.0.1:{self.port}"

    def with_password(self, password: str) -> str:
        """Return the URL with another password."""
        return self.url.replace(PASSWORD, password)


@contextmanager
def socks_proxy(folder: Path) -> Iterator[Proxy]:
    """Run microsocks."""
    program = shutil.which("microsocks")
    if program is None:
        pytest.skip("microsocks is not installed")
    port = free_port()
    command = [program, "-i", "127.0.0.1", "-p", str(port), "-u", USER, "-P", PASSWORD]
    with _running(command, folder / "microsocks.log", port):
        yield Proxy("socks5", port, folder / "microsocks.log")


@contextmanager
def http_proxy(folder: Path, *, ports: tuple[int, ...] = ()) -> Iterator[Proxy]:
    """Run tinyproxy. It opens tunnels to these ports, or to all."""
    program = shutil.which("tinyproxy")
    if program is None:
        pytest.skip("tinyproxy is not installed")
    port = free_port()
    settings = folder / "tinyproxy.conf"
    lines = [f"Port {port}", "Listen 127.0.0.1", f"BasicAuth {USER} {PASSWORD}", "LogLevel Info"]
    lines += [f"ConnectPort {allowed}" for allowed in ports]
    settings.write_text("\n".join(lines) + "\n")
    with _running([program, "-d", "-c", str(settings)], folder / "tinyproxy.log", port):
        yield Proxy("http", port, folder / "tinyproxy.log")


@contextmanager
def _running(command: list[str], log: Path, port: int) -> Iterator[None]:
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            until = time.monotonic() + PATIENCE_SECONDS
            while time.monotonic() < until:
                assert process.poll() is None, log.read_text()
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                time.sleep(0.01)
            yield
        finally:
            process.terminate()
