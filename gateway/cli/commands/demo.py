"""`sd-gateway demo`: runs a gateway in front of a simulated upstream with running tasks.

The simulator is a separate process. The gateway queries it over HTTP with signed requests, like the
vendor's API.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import secrets
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import httpx

from gateway.app import create_app
from gateway.cli import arguments
from gateway.cli.exit_status import FAILED, OK
from gateway.cli.gateway_access import DEFAULT_GATEWAY
from gateway.cli.invocation import program_name
from gateway.cli.simulator_process import running_simulator
from gateway.cli.standard_streams import print_error
from gateway.server import run as server
from gateway.server import signals
from gateway.server.listen_errors import CannotListen
from gateway.settings.loading import Loaded, load_with_sources
from gateway.settings.model import Settings
from gateway.telemetry import logs
from gateway.telemetry.redaction import Redactor

SIMULATOR_HOST = "127.0.0.1"
_SIMULATOR_PORT = 8081
_PORT_VARIABLE = "SD_GATEWAY_SERVER__PORT"
_KEY = "demo-access-key"
_INTERVAL_SECONDS = 5.0
_CONNECTIONS = 1000  # fits the limit of open files of an ordinary session, so there is no warning

# demo-1 runs for ten minutes; the others show the possible outcomes. The task that vanishes is served stale
# for cache.stale_if_error_seconds, and then as a problem.
_LIVES: tuple[dict[str, Any], ...] = (
    {"waitingSeconds": 3, "runningSeconds": 600, "steps": 1200},
    {"waitingSeconds": 20, "runningSeconds": 40},
    {"waitingSeconds": 600},
    {"waitingSeconds": 2, "runningSeconds": 25, "outcome": "failed"},
    {"waitingSeconds": 2, "runningSeconds": 60, "vanishesAfterSeconds": 15},
    {"waitingSeconds": 0, "runningSeconds": 0},
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    arguments.add_settings_file(parser)
    parser.add_argument(
        "--simulator-port",
        type=arguments.port,
        default=_SIMULATOR_PORT,
        metavar="PORT",
        help="port of the simulated upstream; 0: any free port (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Run the demo until a signal stops it; 1 if it cannot start."""
    loaded = load_with_sources(options.config, os.environ)
    settings = _readable_logs(loaded)
    redactor = Redactor()
    logs.configure(settings.log, redactor=redactor)
    try:
        with loaded.naming_sources():
            _run(settings, redactor=redactor, simulator_port=options.simulator_port)
    except RuntimeError as exc:
        print_error(str(exc))
        return FAILED
    return OK


def _run(settings: Settings, *, redactor: Redactor, simulator_port: int) -> None:
    """Run the simulator and the gateway until a signal stops them.

    The gateway listens on its port, also if `server.uds` is set, because the demo is for browsers.

    Raises: RuntimeError if a port is in use or the simulated upstream does not start; see also `server.run`.
    """
    _check_ports(settings.server.host, settings.server.port, simulator_port)
    signals.exit_cleanly()  # before the simulator starts, so that it is always stopped
    secret = secrets.token_hex(16)
    with (
        running_simulator(simulator_port, key=_KEY, secret=secret) as endpoint,
        httpx.Client(base_url=endpoint, trust_env=False) as control,
    ):
        task_ids = list(_create_tasks(control))

        def announce(url: str) -> None:
            _print(_instructions(f"{url}{settings.server.root_path}", task_ids))

        threading.Thread(target=_keep_creating_tasks, args=(control,), daemon=True).start()
        demo_settings = settings.model_copy(
            update={
                "server": settings.server.model_copy(
                    update={"uds": "", "max_connections": min(settings.server.max_connections, _CONNECTIONS)}
                ),
                "upstream": settings.upstream.model_copy(update={"endpoint": endpoint}),
                "credentials": type(settings.credentials)(access_key=_KEY, secret_key=secret),
            }
        )
        app = create_app(demo_settings, redactor=redactor)
        server.run(app, demo_settings, announce=announce, report=_report)


def _readable_logs(loaded: Loaded) -> Settings:
    """Return the settings with a log for people, except for what the user has set."""
    chosen = {key for key in ("format", "level") if loaded.sources.source_of(("log", key))}
    ours = {"format": "console", "level": "warning"}
    log = {key: value for key, value in ours.items() if key not in chosen}
    settings = loaded.settings
    return settings.model_copy(update={"log": settings.log.model_copy(update=log)})


def _check_ports(host: str, port: int, simulator_port: int) -> None:
    """Raise RuntimeError if a port is in use: one message for both, with the words that choose others."""
    taken = {}
    for name, address in {"port": (host, port), "simulator": (SIMULATOR_HOST, simulator_port)}.items():
        try:
            server.listen(*address, backlog=1).close()
        except CannotListen as exc:
            if exc.port_is_taken:
                taken[name] = exc.url
    if taken:
        # The hint keeps what the user has chosen for the other port.
        chosen = "0" if "port" in taken else os.environ.get(_PORT_VARIABLE, "")
        variable = f"{_PORT_VARIABLE}={shlex.quote(chosen)} " if chosen else ""
        simulator_port = 0 if "simulator" in taken else simulator_port
        option = "" if simulator_port == _SIMULATOR_PORT else f"--simulator-port {simulator_port}"
        by_make = f'{variable}make demo ARGS="{option}"' if option else f"{variable}make demo"
        raise RuntimeError(
            f"cannot listen on {' and '.join(taken.values())}: already in use, perhaps by another demo; "
            f"to use a free port: {f'{variable}sd-gateway demo {option}'.rstrip()}, or {by_make}"
        )


def _instructions(base: str, task_ids: list[str]) -> str:
    page = f"{base}/?{urlencode({'taskId': task_ids, 'api': 'sd'}, doseq=True)}"
    elsewhere = "" if base == DEFAULT_GATEWAY else f" --gateway {base}"
    finishing = [task_ids[1], task_ids[5], f"demo-{len(task_ids) + 1}"]
    watch = f"{shlex.quote(program_name())} watch"
    return f"""\
The demo is ready. It needs no account: the vendor is simulated, and has {len(task_ids)} tasks.
A new task starts every {_INTERVAL_SECONDS:g} seconds.

  Open in a browser:  {page}
  Paste there:        {json.dumps([{"taskId": task_id} for task_id in finishing])}
  Watch here:         {watch} {task_ids[0]} {task_ids[1]}{elsewhere}
  Save the images:    {watch} --save images {" ".join(finishing)}{elsewhere}
  Query:              curl {base}/v1/progress/{task_ids[0]}
  Stop:               Ctrl-C

Use a second terminal for the commands. Warnings and errors of the gateway follow here;
SD_GATEWAY_LOG__LEVEL=info shows each request.
"""


def _create_tasks(control: httpx.Client) -> Iterator[str]:
    for number, life in enumerate(_LIVES, start=1):
        task_id = f"demo-{number}"
        control.post("/_simulator/tasks", json={"taskId": task_id, "life": life}).raise_for_status()
        yield task_id


def _keep_creating_tasks(control: httpx.Client) -> None:
    for number in itertools.count(len(_LIVES) + 1):
        time.sleep(_INTERVAL_SECONDS)
        life = {"waitingSeconds": 4, "runningSeconds": 20 + number % 20}
        try:
            control.post("/_simulator/tasks", json={"taskId": f"demo-{number}", "life": life})
        except (httpx.HTTPError, RuntimeError):  # the demo is being stopped
            return


def _report(exc: CannotListen, hint: str) -> None:
    print_error(f"{exc}; {hint}")


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
