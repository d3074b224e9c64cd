"""`sd-gateway demo`: a simulated upstream, a gateway in front of it, and tasks in motion.

The simulator is a process of its own and is asked over HTTP, signed, like the real one.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx

from gateway import server
from gateway.app import create_app
from gateway.redaction import Redactor
from gateway.settings import Settings

_KEY = "demo-access-key"
_START_SECONDS = 20.0
_EVERY_SECONDS = 5.0

# demo-1 moves for ten minutes; the others show each way in which a task may go.
_CAST: tuple[dict[str, Any], ...] = (
    {"waitingSeconds": 3, "runningSeconds": 600, "steps": 1200},
    {"waitingSeconds": 20, "runningSeconds": 40},
    {"waitingSeconds": 600},
    {"waitingSeconds": 2, "runningSeconds": 25, "outcome": "failed"},
    {"waitingSeconds": 2, "runningSeconds": 60, "vanishesAfterSeconds": 30},
)


def run(settings: Settings, *, redactor: Redactor, simulator_port: int) -> None:
    """Run both until SIGTERM or SIGINT.

    Raises: RuntimeError when the simulated upstream does not start; see `server.run` for the rest.
    """
    secret = secrets.token_hex(16)
    endpoint = f"http://127.0.0.1:{simulator_port}"
    with (
        _simulator(endpoint, simulator_port, secret),
        httpx.Client(base_url=endpoint, trust_env=False) as control,
    ):
        for task_id in _make_cast(control):
            _say(f"  curl http://{settings.server.host}:{settings.server.port}/v1/progress/{task_id}")
        threading.Thread(target=_keep_making, args=(control,), daemon=True).start()
        wired = settings.model_copy(
            update={
                "upstream": settings.upstream.model_copy(update={"endpoint": endpoint}),
                "credentials": type(settings.credentials)(access_key=_KEY, secret_key=secret),
            }
        )
        server.run(create_app(wired, redactor=redactor), wired.server)


@contextlib.contextmanager
def _simulator(endpoint: str, port: int, secret: str) -> Iterator[None]:
    command = [sys.executable, "-m", "gateway", "simulate", "--port", str(port), "--key", _KEY]
    with subprocess.Popen([*command, "--secret-stdin"], stdin=subprocess.PIPE, text=True) as process:  # noqa: S603
        try:
            assert process.stdin is not None  # noqa: S101  # Popen with PIPE
            process.stdin.write(f"{secret}\n")
            process.stdin.close()
            _wait_for(endpoint, process)
            yield
        finally:
            process.terminate()


def _wait_for(endpoint: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            httpx.get(f"{endpoint}/_simulator/stats", trust_env=False)
            return
        time.sleep(0.05)
    raise RuntimeError(f"the simulated upstream did not start on {endpoint}")


def _make_cast(control: httpx.Client) -> Iterator[str]:
    for number, life in enumerate(_CAST, start=1):
        task_id = f"demo-{number}"
        control.post("/_simulator/tasks", json={"taskId": task_id, "life": life}).raise_for_status()
        yield task_id


def _keep_making(control: httpx.Client) -> None:
    for number in itertools.count(len(_CAST) + 1):
        time.sleep(_EVERY_SECONDS)
        life = {"waitingSeconds": 4, "runningSeconds": 20 + number % 20}
        try:
            control.post("/_simulator/tasks", json={"taskId": f"demo-{number}", "life": life})
        except (httpx.HTTPError, RuntimeError):  # the demo is being stopped
            return


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
