"""Real egress proxies as processes of their own: microsocks for SOCKS5, tinyproxy and squid for HTTP."""

import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import trustme

from tests.support.harness import free_port, until
from tests.support.programs import required

USER, PASSWORD = "egress-user", "egress-password-1"
_SQUID_USER = "proxy"  # Debian's
_SQUID_LOGIN = "/usr/lib/squid/basic_ncsa_auth"


class Proxy(NamedTuple):
    """A running proxy: its scheme and port, and what its log has so far."""

    scheme: str
    port: int
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        """The URL with the right credentials."""
        return f"{self.scheme}://{USER}:{PASSWORD}@127.0.0.1:{self.port}"

    def with_password(self, password: str) -> str:
        """Return the URL with another password."""
        return self.url.replace(PASSWORD, password)

    @property
    def tunnels(self) -> int:
        """The number of tunnels in the log of an HTTP proxy. Squid logs a tunnel when it is closed."""
        return len(re.findall(r"CONNECT \d", self.log.read_text()))

    def freeze(self) -> None:
        """Let it accept connections and do nothing else."""
        self.process.send_signal(signal.SIGSTOP)

    def stop(self) -> None:
        """Stop it: its connections are closed, and its port refuses new ones."""
        self.process.kill()
        self.process.wait()


@contextmanager
def socks_proxy(folder: Path, *, login: bool = True) -> Iterator[Proxy]:
    """Run microsocks, which requires a login or accepts none."""
    port = free_port()
    command = [required("microsocks"), "-i", "127.0.0.1", "-p", str(port)]
    command += ["-u", USER, "-P", PASSWORD] if login else []
    with _running(command, folder / "microsocks.log", port) as process:
        yield Proxy("socks5", port, folder / "microsocks.log", process)


@contextmanager
def http_proxy(folder: Path, *, ports: tuple[int, ...] = ()) -> Iterator[Proxy]:
    """Run tinyproxy. It opens tunnels to these ports, or to all."""
    port = free_port()
    settings = folder / "tinyproxy.conf"
    lines = [f"Port {port}", "Listen 127.0.0.1", f"BasicAuth {USER} {PASSWORD}", "LogLevel Info"]
    lines += [f"ConnectPort {allowed}" for allowed in ports]
    settings.write_text("\n".join(lines) + "\n")
    command = [required("tinyproxy"), "-d", "-c", str(settings)]
    with _running(command, folder / "tinyproxy.log", port) as process:
        yield Proxy("http", port, folder / "tinyproxy.log", process)


@contextmanager
def squid_proxy(
    _: Path, *, ports: tuple[int, ...] = (), certificate: trustme.LeafCert | None = None
) -> Iterator[Proxy]:
    """Run squid. It opens tunnels to these ports, or to all. With a certificate, it speaks TLS itself."""
    program, port = required("squid"), free_port()
    # Started by root, squid becomes another user, who cannot enter the folders of pytest.
    with tempfile.TemporaryDirectory(prefix="squid-") as created:
        folder = Path(created)
        users, settings, log = folder / "users", folder / "squid.conf", folder / "access.log"
        users.write_text(f"{USER}:{hashlib.md5(PASSWORD.encode(), usedforsecurity=False).hexdigest()}\n")
        scheme, listen = "http", f"http_port 127.0.0.1:{port}"
        if certificate is not None:
            scheme, cert, key = "https", folder / "proxy.pem", folder / "proxy.key"
            certificate.cert_chain_pems[0].write_to_path(cert)
            certificate.private_key_pem.write_to_path(key)
            listen = f"https_port 127.0.0.1:{port} tls-cert={cert} tls-key={key}"
        lines = [
            listen,
            f"auth_param basic program {_SQUID_LOGIN} {users}",
            "auth_param basic children 1 startup=1",
            "acl known proxy_auth REQUIRED",
            *([f"acl allowed port {' '.join(map(str, ports))}", "http_access deny !allowed"] * bool(ports)),
            "http_access allow known",
            "http_access deny all",
            f"access_log stdio:{log}",
            f"cache_log {folder}/cache.log",
            "pid_filename none",
            "cache deny all",
            "memory_cache_shared off",
            "pinger_enable off",
            "shutdown_lifetime 0 seconds",
        ]
        settings.write_text("\n".join(lines) + "\n")
        if os.getuid() == 0:
            shutil.chown(folder, _SQUID_USER)
        # Squid has shared memory of this name, which stays when it is killed.
        name = f"test{port}"
        with _running(
            [program, "-N", "-n", name, "-f", str(settings)], folder / "output.log", port
        ) as process:
            yield Proxy(scheme, port, log, process)
        for shared in Path("/dev/shm").glob(f"{name}-*"):  # noqa: S108  # squid decides
            shared.unlink()


@contextmanager
def _running(command: list[str], log: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:

            def listens() -> bool:
                assert process.poll() is None, log.read_text()
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    return True
                return False

            until(listens, f"{command[0]} listens")
            yield process
        finally:
            process.kill()
