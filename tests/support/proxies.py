"""Starts the reverse proxies of the tests: each in its own folder, on a free port of 127.0.0.1."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.harness import PATIENCE_SECONDS, free_port, neutral_environment, until

APACHE_MODULES = Path("/usr/lib/apache2/modules")


def packaged(name: str) -> str | None:
    """Return the path of a program: from a package in this environment, from PATH, or from /usr/sbin."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    return found or shutil.which(name, path="/usr/sbin")


def written(folder: Path, template: str, upstream: str, **more: str) -> tuple[Path, int]:
    """Write a proxy's configuration; return its file, and the port that it listens on."""
    for above in (folder, *folder.parents[:3]):  # a worker of another user must be able to read it
        with suppress(OSError):
            above.chmod(0o755)
    folder.chmod(0o777)
    port = free_port()
    file = folder / "proxy.conf"
    file.write_text(template.format(folder=folder, port=port, upstream=upstream, **more))
    return file, port


@contextmanager
def running(command: list[str], folder: Path, port: int) -> Iterator[tuple[str, int]]:
    """Run a proxy until the context is left; yield its address once it listens."""
    log = folder / "output.log"
    env = neutral_environment() | {
        "HOME": str(folder),
        "XDG_DATA_HOME": str(folder),
        "XDG_CONFIG_HOME": str(folder),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=output)
    try:

        def listens() -> bool:
            assert process.poll() is None, log.read_text() + "".join(
                file.read_text() for file in folder.glob("error.log")
            )
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                return True
            return False

        until(listens, f"{command[0]} listens")
        yield "127.0.0.1", port
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
