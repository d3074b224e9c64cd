"""Real egress proxies as processes of their own: microsocks for SOCKS5, tinyproxy for HTTP."""

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from tests.support.harness import free_port, until
from tests.support.programs import required

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
    port = free_port()
    command = [required("microsocks"), "-i", "127.0.0.1", "-p", str(port), "-u", USER, "-P", PASSWORD]
    with _running(command, folder / "microsocks.log", port):
        yield Proxy("socks5", port, folder / "microsocks.log")


@contextmanager
def http_proxy(folder: Path, *, ports: tuple[int, ...] = ()) -> Iterator[Proxy]:
    """Run tinyproxy. It opens tunnels to these ports, or to all."""
    port = free_port()
    settings = folder / "tinyproxy.conf"
    lines = [f"Port {port}", "Listen 127.0.0.1", f"BasicAuth {USER} {PASSWORD}", "LogLevel Info"]
    lines += [f"ConnectPort {allowed}" for allowed in ports]
    settings.write_text("\n".join(lines) + "\n")
    with _running([required("tinyproxy"), "-d", "-c", str(settings)], folder / "tinyproxy.log", port):
        yield Proxy("http", port, folder / "tinyproxy.log")


@contextmanager
def _running(command: list[str], log: Path, port: int) -> Iterator[None]:
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:

            def listens() -> bool:
                assert process.poll() is None, log.read_text()
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    return True
                return False

            until(listens, f"{command[0]} listens")
            yield
        finally:
            process.terminate()
