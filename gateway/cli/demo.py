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
from urllib.parse import urlencode

import httpx

from gateway.app import create_app
from gateway.server import run as server
from gateway.settings.model import Settings
from gateway.telemetry.redaction import Redactor

SIMULATOR_SAYS = "simulated upstream on "  # and its URL, once it takes connections
_KEY = "demo-access-key"
_EVERY_SECONDS = 5.0

# demo-1 moves for ten minutes; the others show each way in which a task may go. The one that vanishes
# is shown as it was for cache.stale_if_error_seconds, and only then as the problem that it is.
_CAST: tuple[dict[str, Any], ...] = (
    {"waitingSeconds": 3, "runningSeconds": 600, "steps": 1200},
    {"waitingSeconds": 20, "runningSeconds": 40},
    {"waitingSeconds": 600},
    {"waitingSeconds": 2, "runningSeconds": 25, "outcome": "failed"},
    {"waitingSeconds": 2, "runningSeconds": 60, "vanishesAfterSeconds": 15},
    {"waitingSeconds": 0, "runningSeconds": 0},
)


def run(settings: Settings, *, redactor: Redactor, simulator_port: int) -> None:
    """Run both until SIGTERM or SIGINT.

    Raises: RuntimeError when the simulated upstream does not start; see `server.run` for the rest.
    """
    server.exit_cleanly_on_signals()  # from here on, so that no simulator is left behind
    secret = secrets.token_hex(16)
    with (
        _simulator(simulator_port, secret) as endpoint,
        httpx.Client(base_url=endpoint, trust_env=False) as control,
    ):
        cast = list(_make_cast(control))

        def announce(url: str) -> None:
            at = f"{url}{settings.server.root_path}"
            _say(f"  {at}/?{urlencode({'taskId': cast, 'api': 'sd'}, doseq=True)}")
            for task_id in cast:
                _say(f"  curl {at}/v1/progress/{task_id}")

        threading.Thread(target=_keep_making, args=(control,), daemon=True).start()
        wired = settings.model_copy(
            update={
                "upstream": settings.upstream.model_copy(update={"endpoint": endpoint}),
                "credentials": type(settings.credentials)(access_key=_KEY, secret_key=secret),
            }
        )
        server.run(create_app(wired, redactor=redactor), wired, announce=announce)


@contextlib.contextmanager
def _simulator(port: int, secret: str) -> Iterator[str]:
    """Run the simulated upstream; give its URL, which it says itself: a stranger may listen on the port."""
    command = [
        sys.executable,
        "-m",
        "gateway",
        "simulate",
        "--port",
        str(port),
        "--key",
        _KEY,
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
            said = process.stdout.readline()
            if not said.startswith(SIMULATOR_SAYS):
                raise RuntimeError(
                    f"the simulated upstream did not start on port {port}; --simulator-port 0 takes any"
                )
            yield said.removeprefix(SIMULATOR_SAYS).strip()
        finally:
            process.terminate()
            process.wait()  # before its pipes are closed: it may be about to say something


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
