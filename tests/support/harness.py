"""Test support with real sockets: servers in threads, the command as a process, a faulty TCP upstream.

No helper sleeps for a fixed time: each waits for an event, or polls a condition until it holds.
"""

import asyncio
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import SystemRandom
from typing import Any, Self

import httpx
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.app import create_app
from gateway.server.connection_limits import make_connection_limits
from gateway.server.protocol_class import make_protocol_class
from gateway.settings.model import Settings
from gateway.simulator import Life, create_simulator, new_task_id
from gateway.telemetry.redaction import Redactor
from gateway.telemetry.tracing import Tracing
from tests.support.fork_server import ForkedCommand, can_fork, fork_command

KEY, SECRET = "harness-access-key", "harness-secret-key"
COMMAND = Path(sys.executable).with_name("sd-gateway")
# One certificate for gateways that do not use TLS: to load the public ones would take 20 ms in each test.
CA_FILE = Path(__file__).parents[1] / "data" / "ca.pem"
PATIENCE_SECONDS = 60.0

Json = dict[str, Any]


def until(condition: Callable[[], Any], what: str) -> Any:
    """Poll `condition` until it is true, and return its value; `what` describes it if the wait times out."""
    began = polled = time.monotonic()
    while not (value := condition()):
        assert time.monotonic() < began + PATIENCE_SECONDS, f"never: {what}"
        time.sleep(_pause_after(time.monotonic() - polled))
        polled = time.monotonic()
    return value


async def eventually(condition: Callable[[], Any], what: str) -> Any:
    """Like `until`, without blocking the event loop."""
    began = polled = time.monotonic()
    while not (value := condition()):
        assert time.monotonic() < began + PATIENCE_SECONDS, f"never: {what}"
        await asyncio.sleep(_pause_after(time.monotonic() - polled))
        polled = time.monotonic()
    return value


def _pause_after(seconds: float) -> float:
    """Return how many seconds to wait after a poll that took so long, which may be CPU time.

    Rendering the metrics takes about 10 ms of it, for example, and a hundred tests wait for a metric.
    """
    return min(max(0.01, 3 * seconds), 0.1)


def free_port() -> int:
    """Return an unused port.

    It is outside of the range of ephemeral ports, so that no outgoing connection takes it before the
    server. The port 10,000 above it, which cluster nodes use as well, is outside of that range, too.
    """
    while True:
        port = random.randint(12_000, 22_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class _Server(uvicorn.Server):
    """uvicorn's server, which stops immediately instead of at its next tick."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()

    async def main_loop(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self.on_tick(0)  # sets the Date header
        self._started.set()
        await self._stop.wait()

    def wait_until_started(self) -> None:
        assert self._started.wait(PATIENCE_SECONDS), "the server did not start"

    def stop(self) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._stop.set)


@contextmanager
def running(
    app: ASGIApp, *, leftovers: list[threading.Thread] | None = None, **options: Any
) -> Iterator[str]:
    """Run a server for `app` on a free port; yield its URL, and stop it at the end.

    uvicorn takes a tenth of a second to stop: with `leftovers`, the caller joins the thread later.
    """
    defaults = {
        "loop": "uvloop",
        "ws": "none",
        "log_config": None,
        "access_log": False,
        "log_level": "critical",
        "server_header": False,
        "timeout_graceful_shutdown": 5,
        # With uvicorn's 5 s, a server could close a connection just when a test on a busy machine uses it.
        "timeout_keep_alive": 600,
    }
    config = uvicorn.Config(app, **(defaults | options))
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        server = _Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener.dup()]})
        thread.start()
        server.wait_until_started()
        try:
            scheme = "https" if config.is_ssl else "http"
            yield f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.stop()
            if leftovers is None:
                thread.join()
            else:
                leftovers.append(thread)


def plain_client(url: str) -> httpx.Client:
    """Return a client for plain HTTP.

    It does not verify certificates, because creating a TLS context would take 25 ms in each test. It reuses a
    connection only long before the gateways of `gateway` close it, which is after 5 s.
    """
    return httpx.Client(
        base_url=url,
        trust_env=False,
        verify=False,  # noqa: S501  # nothing to verify
        timeout=30,
        limits=httpx.Limits(keepalive_expiry=2),
    )


@dataclass
class Stage:
    """A replaceable application, so that the server keeps running between tests."""

    app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self.app is not None
        await self.app(scope, receive, send)


@dataclass
class Simulator:
    """A simulated upstream and its control API. `ahead_seconds` moves its clock."""

    stage: Stage
    client: httpx.Client
    ahead_seconds: float = 0.0
    pairs: dict[str, str] = field(default_factory=lambda: {KEY: SECRET})

    def __post_init__(self) -> None:
        self.reset()

    @property
    def url(self) -> str:
        return str(self.client.base_url).rstrip("/")

    def reset(self, **options: Any) -> None:
        """Replace the simulator by a new one with these `options` of create_simulator."""
        life = Life(waiting_seconds=0, running_seconds=1000)
        defaults = {"pairs": self.pairs, "clock": self.now, "life": life}
        self.stage.app = create_simulator(**(defaults | options))

    def now(self) -> float:
        return time.time() + self.ahead_seconds

    def control(self, method: str, path: str, **given: Any) -> Any:
        """Send a control request that must succeed; return its JSON, if any."""
        answer = self.client.request(method, f"/_simulator{path}", json=given)
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    def task(self, task_id: str = "", **more: Any) -> str:
        """Create a task (running, unless `life` or `data` are given); return its ID."""
        given = {"taskId": task_id} if task_id else {}
        created: str = self.control("POST", "/tasks", **given, **more)["taskId"]
        return created

    def finished(self) -> str:
        """Create a task that has succeeded."""
        return self.task(life={"waitingSeconds": 0, "runningSeconds": 0})

    def script(self, task_id: str, **data: Any) -> None:
        """Set the `data` of a task's responses."""
        self.control("PUT", f"/tasks/{task_id}", data=data)

    def fault(self, name: str, **given: Any) -> None:
        """Activate a fault."""
        self.control("PUT", "/faults", name=name, **given)

    def heal(self) -> None:
        """Clear all faults."""
        self.control("DELETE", "/faults")

    def stats(self) -> Json:
        stats: Json = self.control("GET", "/stats")
        return stats

    def calls(self, task_id: str | None = None) -> int:
        """Return the number of calls, for this task or in total."""
        stats = self.stats()
        counts = stats["calls"].values() if task_id is None else [stats["callsByTask"].get(task_id, 0)]
        return sum(counts)

    def requests(self) -> list[Json]:
        """Return the last vendor requests, with their headers as a dict."""
        return [
            request | {"headers": {name: value for name, value in request["headers"]}}  # noqa: C416 - pairs
            for request in self.control("GET", "/requests")
        ]


@dataclass
class Gateway:
    """A running gateway and a client for it."""

    client: httpx.Client

    @property
    def url(self) -> str:
        return str(self.client.base_url).rstrip("/")

    @property
    def address(self) -> tuple[str, int]:
        return self.client.base_url.host, self.client.base_url.port or 80

    def get(self, task_id: str, **more: Any) -> httpx.Response:
        """Query the progress of a task through the simplified API."""
        return self.client.get(f"/v1/progress/{task_id}", **more)

    def native(self, task_id: str, operation: str = "sd_get_progress", **more: Any) -> httpx.Response:
        """Query a task through the vendor-compatible API."""
        return self.client.post(f"/scc/{operation}", json={"taskId": task_id}, **more)

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of the samples of `sd_gateway_{name}` with these labels."""
        return sum_of_samples(self.client.get("/metrics").text, name, **labels)

    def connect(self) -> socket.socket:
        """Open a TCP connection."""
        return socket.create_connection(self.address, timeout=PATIENCE_SECONDS)

    def listens(self) -> bool:
        """Return whether the gateway accepts a new connection."""
        with socket.socket() as probe:
            return probe.connect_ex(self.address) == 0

    def raw(self, data: bytes, *, disconnect: bool = False) -> bytes:
        """Send these bytes on a new connection; return everything received until the gateway closes it."""
        with self.connect() as connection:
            with suppress(OSError):  # the gateway may close the connection before it has read everything
                connection.sendall(data)
                if disconnect:
                    connection.shutdown(socket.SHUT_WR)
            return drained(connection)


@contextmanager
def gateway(
    endpoint: str,
    *,
    leftovers: list[threading.Thread] | None = None,
    tracing: Tracing | None = None,
    **sections: Json,
) -> Iterator[Gateway]:
    """Run a gateway in front of `endpoint`; `sections` override the default settings."""
    given: dict[str, Json] = {
        # Most raw requests have the host "x", and wait for the end of their connection.
        "server": {"trusted_hosts": ["*"], "keep_alive_seconds": 5},
        "upstream": {
            "endpoint": endpoint,
            # Long, so that no attempt times out on a busy machine.
            "timeout_seconds": 30,
            "attempt_timeout_seconds": 15,
            **({"ca_file": CA_FILE} if endpoint.startswith("http:") else {}),
        },
        "credentials": {"access_key": KEY, "secret_key": SECRET},
    }
    for section, values in sections.items():
        given[section] = given.get(section, {}) | values
    settings = Settings.model_validate(given)
    server = settings.server
    app = create_app(settings, redactor=Redactor(), tracing=tracing)
    hits, asgi = (None, app.asgi) if app.fast_path is None else app.fast_path
    protocol = make_protocol_class(make_connection_limits(server, app.metrics), hits=hits)
    with (
        running(
            asgi,
            leftovers=leftovers,
            http=protocol,
            lifespan="on",
            proxy_headers=False,
        ) as url,
        plain_client(url) as client,
    ):
        yield Gateway(client)


def sum_of_samples(metrics: str, name: str, **labels: str) -> float:
    """Return the sum of the samples of `sd_gateway_{name}` with these labels, in a response of `/metrics`."""
    wanted = {f'{key}="{value}"' for key, value in labels.items()}
    found = re.findall(rf"^sd_gateway_{name}(?:{{(.*)}})? (\S+)$", metrics, re.MULTILINE)
    return sum(float(value) for given, value in found if wanted <= set(given.split(",")))


def drained(connection: socket.socket) -> bytes:
    """Return everything received until the peer closes the connection."""
    received = bytearray()
    with suppress(ConnectionResetError):
        while part := connection.recv(65536):
            received += part
    return bytes(received)


# --- a TCP upstream ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """A request as received."""

    head: bytes
    body: bytes

    @property
    def headers(self) -> dict[str, str]:
        lines = self.head.decode().split("\r\n")[1:]
        return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}

    @property
    def task_id(self) -> str:
        task_id: str = json.loads(self.body)["taskId"]
        return task_id

    def envelope(self, **data: Any) -> bytes:
        """Return the body of a valid response."""
        return json.dumps(
            {"status": 10, "data": {"taskId": self.task_id, "status": "running", "progress": 0.5} | data}
        ).encode()


Behaviour = Callable[[socket.socket, Request], None]


class RawUpstream:
    """An upstream at the level of TCP: `behaviour` handles each request of each connection."""

    def __init__(self, behaviour: Behaviour, *, port: int = 0) -> None:
        self.requests: list[Request] = []
        self.behaviour = behaviour
        self._listener = socket.create_server(("127.0.0.1", port))
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the accept
        self._threads[0].join()
        self._listener.close()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()
        for connection in self._connections:
            connection.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._connections.append(connection)
                thread = threading.Thread(target=self._serve, args=(connection,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError):
            while request := read_request(connection):
                self.requests.append(request)
                self.behaviour(connection, request)


class HeldUpstream(RawUpstream):
    """An upstream that responds when `released` is set."""

    def __init__(self) -> None:
        self.released = threading.Event()
        super().__init__(self._respond)

    def __exit__(self, *exc: object) -> None:
        self.released.set()
        super().__exit__(*exc)

    def _respond(self, connection: socket.socket, request: Request) -> None:
        self.released.wait(PATIENCE_SECONDS)
        respond_ok(connection, request)


def read_request(connection: socket.socket) -> Request | None:
    """Read one request with a Content-Length; return None if the peer closes the connection instead."""
    received = b""
    while b"\r\n\r\n" not in received:
        part = connection.recv(65536)
        if not part:
            return None
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(Request(head, b"").headers.get("content-length", "0"))
    while len(body) < length:
        part = connection.recv(65536)
        if not part:
            return None
        body += part
    return Request(head, body)


def answer(body: bytes, *headers: str, status: str = "HTTP/1.1 200 OK") -> bytes:
    """Return the bytes of a response with exactly these headers."""
    return "\r\n".join([status, *headers, "", ""]).encode() + body


def framed(body: bytes, *headers: str, status: str = "HTTP/1.1 200 OK") -> bytes:
    """Return the bytes of a response with Content-Length."""
    return answer(body, f"content-length: {len(body)}", *headers, status=status)


def reset(connection: socket.socket) -> None:
    """Close a connection with a TCP reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def respond_ok(connection: socket.socket, request: Request) -> None:
    """Send a valid response."""
    connection.sendall(framed(request.envelope()))


def relay(url: str, request: Request, head: bytes | None = None) -> bytes:
    """Forward a request, optionally with another head; return the response."""
    target = httpx.URL(url)
    with socket.create_connection((target.host, target.port or 80), timeout=PATIENCE_SECONDS) as onward:
        onward.sendall((head or request.head) + b"\r\nconnection: close\r\n\r\n" + request.body)
        return drained(onward)


# --- the command ------------------------------------------------------------------------------------------


def neutral_environment() -> dict[str, str]:
    """Return the environment without settings of the gateway, OpenTelemetry, make and systemd."""
    theirs = ("SD_GATEWAY_", "SPEEDPIX_", "OTEL_", "MAKE", "MFLAGS", "ARGS", "NOTIFY_SOCKET")
    return {name: value for name, value in os.environ.items() if not name.startswith(theirs)}


class Process:
    """A command in a process, by default `sd-gateway`; its output is recorded.

    `real`: start the program itself, and do not fork a process that has already imported its modules.
    """

    def __init__(
        self,
        *arguments: str,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        program: Path = COMMAND,
        real: bool = False,
    ) -> None:
        variables = neutral_environment() | dict(env or {})
        self._process: subprocess.Popen[str] | ForkedCommand
        if program == COMMAND and not real and can_fork(variables):
            self._process = fork_command(arguments, cwd=cwd, env=variables)
        else:
            self._process = subprocess.Popen(
                [program, *arguments],
                cwd=cwd,
                env=variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        self.lines: list[str] = []
        self.url = ""  # of the gateway, if the test sets it
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(PATIENCE_SECONDS)
        self._reader.join()

    @property
    def output(self) -> str:
        """The output so far, of both streams."""
        return "\n".join(self.lines)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process ID."""
        return self._process.pid

    def resident_bytes(self) -> int:
        """Return the resident memory of the process."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def children(self) -> list[int]:
        """Return the process IDs of the children."""
        tasks = Path(f"/proc/{self.pid}/task")
        return [int(child) for child in (tasks / f"{self.pid}/children").read_text().split()]

    def says(self, pattern: str) -> str:
        """Wait until the output matches this pattern; return the first group, or the match."""

        def found() -> re.Match[str] | None:
            return re.search(pattern, self.output)

        def found_or_gone() -> re.Match[str] | bool | None:
            return found() or not self._reader.is_alive()

        until(found_or_gone, f"{pattern!r} in {self.output}")
        match = found()
        assert match, self.output
        return match[1] if match.re.groups else match[0]

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def exit_status(self) -> int:
        """Wait for the end of the process; return its exit status."""
        status = self._process.wait(PATIENCE_SECONDS)
        self._reader.join()
        return status

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            self.lines.extend(line.rstrip("\n") for line in stream)


class Mount:
    """A secret mounted as in Kubernetes: files are links through one directory link, swapped atomically."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._generation = 0

    def file(self, name: str) -> Path:
        """Return the path of a file of the secret."""
        return self._folder / name

    def publish(self, **files: str) -> None:
        """Replace all files atomically."""
        self._generation += 1
        data = self._folder / f"..{self._generation}"
        data.mkdir()
        for name, content in files.items():
            (data / name).write_text(content)
            if not self.file(name).is_symlink():
                self.file(name).symlink_to(Path("..data") / name)
        link = self._folder / "..data_tmp"
        link.symlink_to(data.name)
        link.rename(self._folder / "..data")


@contextmanager
def serving(
    cwd: Path, env: Mapping[str, str], *, descriptors: str = "", real: bool = False
) -> Iterator[tuple[Process, Gateway]]:
    """Run `sd-gateway serve` with these variables; yield the process, once it listens, and a gateway.

    `descriptors`: soft and hard limit of open files, as SOFT:HARD. `real`: see `Process`.
    """
    variables = {
        "SD_GATEWAY_SERVER__PORT": "0",
        "SD_GATEWAY_SERVER__TRUSTED_HOSTS": "*",
        "SD_GATEWAY_CREDENTIALS__ACCESS_KEY": KEY,
        "SD_GATEWAY_CREDENTIALS__SECRET_KEY": SECRET,
    } | dict(env)
    if variables.get("SD_GATEWAY_UPSTREAM__ENDPOINT", "").startswith("http:"):
        variables.setdefault("SD_GATEWAY_UPSTREAM__CA_FILE", str(CA_FILE))
    if descriptors:
        command = (f"--nofile={descriptors}", str(COMMAND), "serve")
        started = Process(
            *command, cwd=cwd, env=variables, program=Path(shutil.which("prlimit") or "prlimit")
        )
    else:
        started = Process("serve", cwd=cwd, env=variables, real=real)
    with started as process:
        url = process.says(r'"url": "(http://[^"]+)"')
        with plain_client(url) as client:
            yield process, Gateway(client)


def run(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run a command to its end; return its exit status and its output."""
    with Process(*arguments, cwd=cwd, env=env) as process:
        status = process.exit_status()
    return status, process.output


def fresh_id() -> str:
    """Return an unused task ID."""
    return new_task_id(time.time, SystemRandom())
