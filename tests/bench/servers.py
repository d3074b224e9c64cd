"""The compared servers and their upstreams; each is ready when its context is entered.

All answer GET /v1/progress/TASK, count a running task's answer as fresh for a second, and sign
with the pair that the simulator knows.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from processes import Cores, children, free_ports, started

HERE = Path(__file__).parent
_MODULES = Path("/usr/lib/nginx/modules")
NJS_MODULE = _MODULES / "ngx_http_js_module.so"
NCHAN_MODULE = _MODULES / "ngx_nchan_module.so"

_KEY, _SECRET = "bench-key", "bench-secret"
_START_SECONDS = 20.0
_LOOK_SECONDS = 0.002
_OK, _CREATED, _NO_CONTENT = 200, 201, 204
_NGINX_NAMES = {"cached": "nginx", "locked": "nginx, lock only", "signer": "nginx, uncached"}


class Server(NamedTuple):
    """A server; `pids` are the processes whose CPU time and memory are measured."""

    name: str
    port: int
    pids: tuple[int, ...]


class Nginx(NamedTuple):
    """One nginx with three ports: stale while updating, cache lock only, uncached."""

    cached: Server
    locked: Server
    signer: Server


class Peers(NamedTuple):
    """The alternatives to the gateway; without Varnish if it is not installed."""

    nginx: Nginx
    varnish: list[Server]


@contextmanager
def gateway(
    cores: Cores,
    folder: Path,
    *,
    upstream: int,
    tree: Path | None = None,
    settings: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Run `sd-gateway serve` for the upstream on this port, from this or another source tree.

    `settings` are environment variables without their prefix.
    """
    (port,) = free_ports(1)
    given = {
        "SERVER__PORT": str(port),
        "UPSTREAM__ENDPOINT": f"http://127.0.0.1:{upstream}",
        "CREDENTIALS__ACCESS_KEY": _KEY,
        "CREDENTIALS__SECRET_KEY": _SECRET,
        **(settings or {}),
    }
    env = environment(tree) | {f"SD_GATEWAY_{name}": value for name, value in given.items()}
    # A separate folder contains no settings file.
    folder = _own(folder)
    command = [sys.executable, "-m", "gateway", "serve"]
    with started(command, cores=cores.server, folder=folder, env=env) as process:
        _wait(process, folder, lambda: _ask(port, "GET", "/readyz")[0] == _OK)
        yield Server(gateway_name(tree), port, (process.pid,))


@contextmanager
def plain_asgi(cores: Cores, folder: Path) -> Iterator[Server]:
    """Run uvicorn with an application that does nothing but send a response."""
    (port,) = free_ports(1)
    folder = _own(folder)
    command = [sys.executable, HERE / "plain_asgi.py", str(port)]
    with started(command, cores=cores.server, folder=folder, env=environment()) as process:
        _wait(process, folder, lambda: _ask(port, "GET", "/")[0] == _OK)
        yield Server("uvicorn alone", port, (process.pid,))


@contextmanager
def nginx(cores: Cores, folder: Path, *, upstream: int) -> Iterator[Nginx]:
    """Run nginx for the upstream on this port."""
    ports = dict(zip(Nginx._fields, free_ports(3), strict=True))
    folder = _own(folder)
    for name in ("sign.js", "signed.inc"):
        (folder / name).write_bytes((HERE / "peers" / name).read_bytes())
    values = {"MODULE": NJS_MODULE, "UPSTREAM": upstream}
    values |= {name.upper(): port for name, port in ports.items()}
    with _nginx_worker(cores, folder, "nginx.conf.in", values, port=ports["cached"]) as worker:
        yield Nginx(*(Server(_NGINX_NAMES[name], port, (worker,)) for name, port in ports.items()))


@contextmanager
def nchan(cores: Cores, folder: Path) -> Iterator[Server]:
    """Run nginx with nchan, which sends published changes to its subscribers."""
    (port,) = free_ports(1)
    values = {"MODULE": NCHAN_MODULE, "PORT": port}
    with _nginx_worker(cores, _own(folder), "nchan.conf.in", values, port=port) as worker:
        yield Server("nchan", port, (worker,))


@contextmanager
def published(cores: Cores, folder: Path, *, nchan_port: int, tasks: Sequence[str]) -> Iterator[None]:
    """Publish a change of every task once a second; entered when every task is published."""
    folder = _own(folder)
    command = [sys.executable, HERE / "publisher.py", json.dumps({"port": nchan_port, "tasks": tasks})]
    with started(command, cores=cores.load, folder=folder, env=environment()) as process:
        _wait(
            process,
            folder,
            lambda: all(_ask(nchan_port, "GET", f"/publish/{task_id}")[0] == _OK for task_id in tasks),
        )
        yield


@contextmanager
def _nginx_worker(
    cores: Cores, folder: Path, template: str, values: Mapping[str, object], *, port: int
) -> Iterator[int]:
    """Run nginx with this configuration in `folder`; yield the process ID of its worker."""
    config = _filled(template, folder, {"FOLDER": folder, **values})
    env = environment() | {"SPEEDPIX_APP_KEY": _KEY, "SPEEDPIX_APP_SECRET": _SECRET}
    command = ["nginx", "-p", folder, "-e", folder / "nginx.err", "-c", config]
    with started(command, cores=cores.server, folder=folder, env=env) as process:
        _wait(process, folder, lambda: _ask(port, "GET", "/")[0] > 0)
        # The cache loader and manager are child processes, too; their names tell them apart.
        (worker,) = [pid for pid in children(process.pid) if "worker" in _title(pid)]
        yield worker


@contextmanager
def varnish(cores: Cores, folder: Path, *, signer: Server) -> Iterator[Server]:
    """Run Varnish in front of the uncached nginx server, whose CPU time is included."""
    (port,) = free_ports(1)
    folder = _own(folder)
    config = _filled("varnish.vcl.in", folder, {"SIGNER": signer.port})
    command: list[str | Path] = ["varnishd", "-F", "-j", "none", "-n", folder / "varnish", "-f", config]
    command += ["-a", f"127.0.0.1:{port}", "-s", "malloc,256m"]
    command += [
        "-p",
        "thread_pools=1",
        "-p",
        "thread_pool_min=200",
    ]  # one core, with threads ready for a burst
    with started(command, cores=cores.server, folder=folder, env=environment()) as process:
        _wait(process, folder, lambda: _ask(port, "GET", "/")[0] > 0)
        (worker,) = children(process.pid)
        yield Server("varnish", port, (worker, *signer.pids))


@contextmanager
def peers(cores: Cores, folder: Path, *, upstream: int) -> Iterator[Peers]:
    """Run nginx, and Varnish in front of it if it is installed."""
    with ExitStack() as stack:
        first = stack.enter_context(nginx(cores, folder, upstream=upstream))
        found = shutil.which("varnishd")
        second = stack.enter_context(varnish(cores, folder, signer=first.signer)) if found else None
        yield Peers(first, [second] if second else [])


@contextmanager
def simulator(cores: Cores, folder: Path, *, latency_seconds: float = 0.0) -> Iterator[int]:
    """Run the simulated upstream, which verifies every signature; yield its port."""
    (port,) = free_ports(1)
    folder = _own(folder)
    command = [sys.executable, "-m", "gateway", "simulate", "--port", str(port)]
    command += ["--key", _KEY, "--secret", _SECRET, "--latency", str(latency_seconds)]
    with started(command, cores=cores.load, folder=folder, env=environment()) as process:
        _wait(process, folder, lambda: _ask(port, "GET", "/_simulator/stats")[0] == _OK)
        yield port


@contextmanager
def fast_upstream(
    cores: Cores, folder: Path, *, changing: bool = False, latency_seconds: float = 0.0
) -> Iterator[int]:
    """Run the minimal upstream; yield its port. With `changing`, all responses differ."""
    (port,) = free_ports(1)
    folder = _own(folder)
    command = [sys.executable, HERE / "upstream.py", str(port), str(latency_seconds)]
    command += ["changing"] if changing else []
    with started(command, cores=cores.load, folder=folder, env=environment()) as process:
        _wait(process, folder, lambda: socket.create_connection(("127.0.0.1", port)).close() is None)
        yield port


def gateway_name(tree: Path | None) -> str:
    """Return the name of the gateway of a source tree in tables; None for this tree."""
    return "gateway" if tree is None else f"gateway ({tree.name})"


def environment(tree: Path | None = None) -> dict[str, str]:
    """Return the environment without gateway settings and keys of the user.

    Python imports the gateway from `tree` there; None: the one that is installed.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SD_GATEWAY_", "SPEEDPIX_", "PYTHON"))}
    return kept if tree is None else kept | {"PYTHONPATH": str(tree.resolve())}


def create_task(simulator_port: int, **task: Any) -> None:
    """Create a task with the control API of the simulator. Raises: RuntimeError."""
    status, text = _ask(simulator_port, "POST", "/_simulator/tasks", json.dumps(task))
    if status != _CREATED:
        raise RuntimeError(f"the simulator refused a task: {status} {text!r}")


def accept(simulator_port: int, pairs: Mapping[str, str]) -> None:
    """Set the key pairs that the simulator accepts. Raises: RuntimeError."""
    status, text = _ask(simulator_port, "PUT", "/_simulator/pairs", json.dumps({"pairs": pairs}))
    if status != _NO_CONTENT:
        raise RuntimeError(f"the simulator refused the pairs: {status} {text!r}")


def refused_calls(simulator_port: int) -> int:
    """Return the number of calls that the simulator has refused."""
    return int(json.loads(_ask(simulator_port, "GET", "/_simulator/stats")[1])["refused"])


def limit_calls(simulator_port: int, calls: int, *, retry_after: int | None = None) -> None:
    """Let the simulator throttle calls above this rate per second. Raises: RuntimeError."""
    told = {} if retry_after is None else {"retryAfter": retry_after}
    status, text = _ask(simulator_port, "PUT", "/_simulator/limit", json.dumps({"calls": calls} | told))
    if status != _OK:
        raise RuntimeError(f"the simulator refused a limit: {status} {text!r}")


def upstream_calls(simulator_port: int, task_id: str) -> int:
    """Return the number of calls for a task. Raises: RuntimeError if the simulator refused a call."""
    _, text = _ask(simulator_port, "GET", "/_simulator/stats")
    stats = json.loads(text)
    if stats["refused"]:
        raise RuntimeError("the simulator refused calls: they were signed wrongly")
    return int(stats["callsByTask"].get(task_id, 0))


def _filled(name: str, folder: Path, values: Mapping[str, object]) -> Path:
    text = (HERE / "peers" / name).read_text()
    for key, value in values.items():
        text = text.replace(f"@{key}@", str(value))
    target = folder / name.removesuffix(".in")
    target.write_text(text)
    return target


def _own(folder: Path) -> Path:
    own = Path(tempfile.mkdtemp(dir=folder))
    own.chmod(0o755)  # nginx started by root runs its worker as another user
    return own


def _wait(process: subprocess.Popen[bytes], folder: Path, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError, http.client.HTTPException):
            if ready():
                return
        time.sleep(_LOOK_SECONDS)
    said = b"".join(log.read_bytes() for log in folder.glob("*.log")).decode(errors="replace")
    raise RuntimeError(f"{process.args} did not start:\n{said[-2000:]}")


def _title(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")


def _ask(port: int, method: str, path: str, body: str | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_START_SECONDS)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()
