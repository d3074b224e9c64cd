"""Starts the reverse proxies of the tests: each in its own folder, on a free port of 127.0.0.1."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from tests.support.harness import PATIENCE_SECONDS, free_port, neutral_environment, until
from tests.support.programs import required

Address = tuple[str, int]

_APACHE_MODULES = Path("/usr/lib/apache2/modules")
_BUFFERING_NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 512; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://{next}; {directives} }}
  }}
  server {{
    listen 127.0.0.1:{inner};
    location / {{ proxy_pass http://{upstream}; }}
  }}
}}
"""
# Each with nginx's other defaults, which are HTTP/1.0 and buffers of 4 KiB.
BUFFERING = {
    # Two in a row: the inner one evaluates X-Accel-Buffering, and does not pass it on.
    "nginx-twice": "",
    "nginx-ignoring": "proxy_ignore_headers X-Accel-Buffering;",
    "nginx-8k": "proxy_ignore_headers X-Accel-Buffering; proxy_buffer_size 8k; proxy_buffers 8 8k;",
}


def nginx(folder: Path, template: str, upstream: str, **more: str) -> AbstractContextManager[Address]:
    """Run nginx with this configuration."""
    file, port = written(folder, template, upstream, **more)
    command = [required("nginx"), "-p", str(folder), "-e", f"{folder}/start.log", "-c", str(file)]
    return running(command, folder, port)


def haproxy(folder: Path, template: str, upstream: str, **more: str) -> AbstractContextManager[Address]:
    """Run HAProxy with this configuration."""
    file, port = written(folder, template, upstream, **more)
    return running([required("haproxy"), "-db", "-f", str(file)], folder, port)


def apache(
    folder: Path, template: str, upstream: str, modules: Sequence[str], **more: str
) -> AbstractContextManager[Address]:
    """Run Apache with this configuration, which has places for the modules and for the user."""
    loaded = "\n".join(f"LoadModule {name}_module {_APACHE_MODULES}/mod_{name}.so" for name in modules)
    user = "User www-data\nGroup www-data" if os.geteuid() == 0 else ""
    file, port = written(folder, template, upstream, modules=loaded, user=user, **more)
    return running([required("apache2"), "-D", "FOREGROUND", "-f", str(file)], folder, port)


@contextmanager
def buffering_nginx(kind: str, folder: Path, upstream: str) -> Iterator[str]:
    """Run an nginx that delivers an event stream only in full buffers; yield its URL."""
    inner = free_port()
    onward = f"127.0.0.1:{inner}" if kind == "nginx-twice" else upstream
    more = {"inner": str(inner), "next": onward, "directives": BUFFERING[kind]}
    with nginx(folder, _BUFFERING_NGINX, upstream, **more) as (host, port):
        yield f"http://{host}:{port}"


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
def running(command: list[str], folder: Path, port: int) -> Iterator[Address]:
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
