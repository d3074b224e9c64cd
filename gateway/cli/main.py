"""The `sd-gateway` command.

Exit status: 0 success, 1 failure, 2 invalid usage or settings, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import httpx
import uvicorn

from gateway import __version__
from gateway.app import USER_AGENT, create_app
from gateway.cli import demo, watch_display
from gateway.cli.check import check
from gateway.cli.show_config import config_lines
from gateway.cli.traces import create_tracing
from gateway.cli.watch_events import StreamRefused
from gateway.domain.errors import InvalidTaskId
from gateway.domain.printable import printable
from gateway.domain.task import Operation, check_task_id
from gateway.server import run as server
from gateway.server.listen_errors import CannotListen
from gateway.settings.loading import load, load_with_sources
from gateway.settings.model import Settings, SettingsError
from gateway.settings.secret_files import read_secret_line
from gateway.settings.secret_text import clean_secret
from gateway.simulator import create_simulator
from gateway.simulator.faults import FAULTS
from gateway.simulator.wire import ControlError, parse_object
from gateway.telemetry import logs
from gateway.telemetry.redaction import Redactor

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, server.INTERRUPTED
_MAX_PORT = 65535
_MAX_SECONDS = 1e9  # valid for every event loop and as a date


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    _open_standard_streams()
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()  # at interpreter exit, a closed pipe could not be handled any more
    except BrokenPipeError:
        return _output_closed()
    except OSError as exc:  # not handled by the command, for example a full disk behind standard output
        _print_error(str(exc))
        return FAILED


def _run(arguments: Sequence[str] | None) -> int:
    try:
        options = _parser().parse_args(arguments)
        return int(options.run(options))
    except SettingsError as exc:
        for mistake in exc.mistakes:
            _print_error(mistake)
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED


def _open_standard_streams() -> None:
    """Open /dev/null for standard streams that are closed.

    Python sets those to None, and the next opened file or socket would get their file descriptors.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Like standard error: a character outside of the locale's encoding must not end a command.
        sys.stdout.reconfigure(errors="backslashreplace")


class _Parser(argparse.ArgumentParser):
    """Removes control characters of arguments from error messages, because terminals interpret them."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sd-gateway", description="Signs, coalesces, caches and measures progress queries.")
    parser.add_argument("--version", action="version", version=f"sd-gateway {__version__}")
    parser.set_defaults(run=lambda _: _help(parser))  # without a command
    commands = parser.add_subparsers(metavar="COMMAND")

    with_settings = _Parser(add_help=False)
    with_settings.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="settings file (default: config/gateway.toml, when it exists)",
    )
    serve = commands.add_parser("serve", parents=[with_settings], help="run the gateway")
    serve.set_defaults(run=_serve)

    watch = commands.add_parser("watch", help="show the progress of tasks until all have ended")
    watch.add_argument("task_ids", type=_task_id, nargs="+", metavar="TASK", help="ID of a task")
    watch.add_argument(
        "--gateway",
        type=_gateway_url,
        default="http://127.0.0.1:8080",
        metavar="URL",
        help="URL of the gateway (default: %(default)s)",
    )
    watch.add_argument(
        "--api",
        choices=sorted({operation.api for operation in Operation}),
        default="sd",
        help="API that the tasks belong to (default: %(default)s)",
    )
    watch.add_argument("--json", action="store_true", help="write one line of JSON per event, for scripts")
    watch.set_defaults(run=_watch)

    check_parser = commands.add_parser(
        "check", parents=[with_settings], help="query the upstream, test the store, and report what is wrong"
    )
    check_parser.set_defaults(run=_check)

    config = commands.add_parser(
        "config",
        parents=[with_settings],
        help="print the settings and where each comes from, without secrets",
    )
    config.set_defaults(run=_config)

    demo_parser = commands.add_parser(
        "demo",
        parents=[with_settings],
        help="run the gateway with a simulated upstream and running tasks",
    )
    demo_parser.add_argument(
        "--simulator-port",
        type=_port,
        default=8081,
        metavar="PORT",
        help="port of the simulated upstream; 0: any free port (default: %(default)s)",
    )
    demo_parser.set_defaults(run=_demo)

    simulate = commands.add_parser("simulate", help="run a simulated upstream that verifies signatures")
    simulate.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    simulate.add_argument(
        "--port", type=_port, default=8081, help="port to listen on; 0: any free port (default: %(default)s)"
    )
    simulate.add_argument(
        "--key", default="simulated-key", help="access key to accept (default: %(default)s)"
    )
    secret = simulate.add_mutually_exclusive_group()
    secret.add_argument(
        "--secret",
        default="simulated-secret",
        help="secret key of the access key (default: %(default)s)",
    )
    secret.add_argument("--secret-stdin", action="store_true", help="read the secret key from standard input")
    simulate.add_argument(
        "--latency", type=_latency, default=0.0, metavar="SECONDS", help="duration of every response"
    )
    simulate.add_argument(
        "--clock-offset",
        type=_seconds,
        default=0.0,
        metavar="SECONDS",
        help="offset of the simulator's clock; positive: ahead",
    )
    simulate.add_argument(
        "--limit",
        type=_count,
        default=0,
        metavar="CALLS",
        help="maximum calls per second, others are throttled; 0: no limit (default: %(default)s)",
    )
    simulate.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="JSON",
        help=f"activate a fault; may be repeated; names: {', '.join(FAULTS)}",
    )
    simulate.set_defaults(run=_simulate)
    return parser


def _settings(options: argparse.Namespace) -> tuple[Settings, Redactor]:
    settings = load(options.config, os.environ)
    redactor = Redactor()
    logs.configure(settings.log, redactor=redactor)
    return settings, redactor


def _help(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return OK


def _serve(options: argparse.Namespace) -> int:
    settings, redactor = _settings(options)
    server.run(create_app(settings, redactor=redactor, tracing=create_tracing(os.environ)), settings)
    return OK


def _demo(options: argparse.Namespace) -> int:
    settings, redactor = _settings(options)
    try:
        demo.run(settings, redactor=redactor, simulator_port=options.simulator_port)
    except RuntimeError as exc:
        _print_error(str(exc))
        return FAILED
    return OK


def _watch(options: argparse.Namespace) -> int:
    try:
        succeeded = watch_display.watch(
            options.gateway, options.task_ids, api=options.api, as_json=options.json
        )
    except StreamRefused as exc:
        _print_error(f"{watch_display.name(options.gateway)}: {exc}")
        return USAGE
    except BrokenPipeError:
        return _output_closed()
    return OK if succeeded else FAILED


def _check(options: argparse.Namespace) -> int:
    settings, redactor = _settings(options)
    finding = asyncio.run(check(settings, redactor=redactor, user_agent=USER_AGENT))
    for line in finding.lines:
        sys.stdout.write(f"{printable(line)}\n")
    return OK if finding.ok else FAILED


def _config(options: argparse.Namespace) -> int:
    for line in config_lines(load_with_sources(options.config, os.environ)):
        sys.stdout.write(f"{printable(line)}\n")
    return OK


def _simulate(options: argparse.Namespace) -> int:
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
        _print_error(f"--fault: {exc}")
        return USAGE
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        log_level="warning",
        access_log=False,
        date_header=False,  # the simulator sends the time of its own clock
        timeout_graceful_shutdown=1,
    )
    try:
        server.serve(config, announce=_announce_simulator)
    except CannotListen as exc:
        _print_error(f"{exc}; --port 0 uses any free port" if exc.port_is_taken else str(exc))
        return FAILED
    except BrokenPipeError:  # the parent process exited before the start, for example the demo on a signal
        return _output_closed()
    return OK


def _announce_simulator(url: str) -> None:
    sys.stdout.write(f"{demo.SIMULATOR_PREFIX}{url}\n")
    sys.stdout.flush()


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number without a sign")
    return int(text)


def _port(text: str) -> int:
    port = _count(text)
    if port > _MAX_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (0 to {_MAX_PORT})")
    return port


def _seconds(text: str) -> float:
    try:
        seconds = float(text if text.isascii() and "_" not in text else "nan")
    except ValueError:
        seconds = math.nan
    if not abs(seconds) <= _MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds


def _latency(text: str) -> float:
    seconds = _seconds(text)
    if seconds < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is negative")
    return seconds


def _task_id(text: str) -> str:
    try:
        return check_task_id(text)
    except InvalidTaskId as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def _gateway_url(text: str) -> httpx.URL:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as exc:
        raise argparse.ArgumentTypeError(f"not a URL: {exc}") from None
    right = url.scheme in {"http", "https"} and url.host and not url.query and not url.fragment
    if not right or not (url.port is None or 0 < url.port <= _MAX_PORT):
        raise argparse.ArgumentTypeError("must be http://HOST[:PORT] or https://…, optionally with a path")
    return url


def _output_closed() -> int:
    # The reader has closed the pipe: the interpreter must not flush the rest of the output at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return FAILED


def _print_error(line: str) -> None:
    sys.stderr.write(f"sd-gateway: {printable(line)}\n")
