"""`sd-gateway simulate`: runs a simulated upstream."""

from __future__ import annotations

import argparse
import shlex
import sys
import time

import uvicorn

from gateway.cli import arguments
from gateway.cli.exit_status import FAILED, OK
from gateway.cli.invocation import program_name
from gateway.cli.simulator_process import SIMULATOR_PREFIX
from gateway.cli.standard_streams import print_error
from gateway.server import run as server
from gateway.server.listen_errors import UNPRIVILEGED_PORT, CannotListen
from gateway.settings.errors import SettingsError
from gateway.settings.secret_files import read_secret_line
from gateway.settings.secret_text import clean_secret
from gateway.simulator import FAULTS, create_simulator
from gateway.simulator.json_bodies import ControlError, parse_object

_DEFAULT_SECRET = "simulated-secret"  # noqa: S105  # accepted by the simulator only


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port",
        type=arguments.port,
        default=8081,
        help="port to listen on; 0: any free port (default: %(default)s)",
    )
    parser.add_argument("--key", default="simulated-key", help="access key to accept (default: %(default)s)")
    secret = parser.add_mutually_exclusive_group()
    secret.add_argument(
        "--secret",
        default=_DEFAULT_SECRET,
        help="secret key of the access key (default: %(default)s)",
    )
    secret.add_argument("--secret-stdin", action="store_true", help="read the secret key from standard input")
    parser.add_argument(
        "--latency", type=arguments.latency, default=0.0, metavar="SECONDS", help="duration of every response"
    )
    parser.add_argument(
        "--clock-offset",
        type=arguments.seconds,
        default=0.0,
        metavar="SECONDS",
        help="offset of the simulator's clock; positive: ahead",
    )
    parser.add_argument(
        "--limit",
        type=arguments.count,
        default=0,
        metavar="CALLS",
        help="maximum calls per second, others are throttled; 0: no limit (default: %(default)s)",
    )
    parser.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="JSON",
        help=f"activate a fault; may be repeated; names: {', '.join(FAULTS)}",
    )


def run(options: argparse.Namespace) -> int:
    """Run the simulator until a signal stops it.

    Raises: SettingsError for invalid arguments, and SystemExit as `server.serve` does.
    """
    try:
        _simulate(options)
    except CannotListen as exc:
        hint = f"; choose {UNPRIVILEGED_PORT}" if exc.is_forbidden else ""
        print_error(f"{exc}; --port 0 uses any free port" if exc.port_is_taken else f"{exc}{hint}")
        return FAILED
    except BrokenPipeError:  # the parent process exited before the start, for example the demo on a signal
        return FAILED
    return OK


def _simulate(options: argparse.Namespace) -> None:
    try:
        key = clean_secret(options.key, source="--key").text
        if options.secret_stdin:
            secret = read_secret_line(sys.stdin.buffer, source="--secret-stdin").text
        else:
            secret = clean_secret(options.secret, source="--secret").text
    except ValueError as exc:
        raise SettingsError([str(exc)]) from None
    faults = [parse_object(text.encode()) for text in options.fault]
    try:
        app = create_simulator(
            pairs={key: secret},
            clock=lambda: time.time() + options.clock_offset,
            latency_seconds=options.latency,
            limit=options.limit,
            faults=faults,
        )
    except ControlError as exc:
        raise SettingsError([f"--fault: {exc}"]) from None
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        log_level="warning",
        access_log=False,
        date_header=False,  # the simulator sends the time of its own clock
        timeout_graceful_shutdown=1,
    )

    def announce(url: str) -> None:
        sys.stdout.write(f"{SIMULATOR_PREFIX}{url}\n")
        if secret == _DEFAULT_SECRET:  # another one may be a real secret
            pair = f"SPEEDPIX_APP_KEY={shlex.quote(key)} SPEEDPIX_APP_SECRET={secret}"
            check = f"{shlex.quote(program_name())} check"
            sys.stdout.write(f"To try it: SPEEDPIX_ENDPOINT={url} {pair} {check}\n")
        create = shlex.join(["curl", f"{url}/_simulator/tasks", "-d", '{"taskId":"task-1"}'])
        sys.stdout.write(f"It has no tasks. To create one: {create}\n")
        sys.stdout.flush()

    server.serve(config, announce=announce)
