"""The `sd-gateway` command.

Exit status: 0 success, 1 failure, 2 invalid usage or settings, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

import httpx

from gateway.app import USER_AGENT, create_app
from gateway.cli import arguments, demo
from gateway.cli.check import check
from gateway.cli.command_line import create_parser
from gateway.cli.completion import completion_script
from gateway.cli.gateway_access import DEFAULT_GATEWAY, Access
from gateway.cli.show_config import config_lines
from gateway.cli.simulate import simulate
from gateway.cli.traces import create_tracing
from gateway.cli.watch import WatchOptions, display_name, watch
from gateway.cli.watch_events import StreamRefused
from gateway.domain.printable import printable
from gateway.server import run as server
from gateway.server.listen_errors import UNPRIVILEGED_PORT, CannotListen
from gateway.settings.loading import Loaded, load_with_sources
from gateway.settings.model import SettingsError
from gateway.settings.variables import URL_VARIABLE
from gateway.telemetry import logs
from gateway.telemetry.redaction import Redactor

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, server.INTERRUPTED


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    _open_standard_streams()
    try:
        try:
            return _run(words)
        finally:
            sys.stdout.flush()  # at interpreter exit, a closed pipe could not be handled any more
    except BrokenPipeError:
        return _output_closed()
    except OSError as exc:  # not handled by the command, for example a full disk behind standard output
        _print_error(str(exc))
        return FAILED


def _run(words: Sequence[str] | None) -> int:
    try:
        parser = create_parser()
        options = parser.parse(sys.argv[1:] if words is None else words)
        if not options.command:
            parser.print_help()
            return OK
        return _COMMANDS[options.command](options)
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


def _load(options: argparse.Namespace) -> tuple[Loaded, Redactor]:
    loaded = load_with_sources(options.config, os.environ)
    redactor = Redactor()
    logs.configure(loaded.settings.log, redactor=redactor)
    return loaded, redactor


def _serve(options: argparse.Namespace) -> int:
    loaded, redactor = _load(options)
    with loaded.naming_sources():
        app = create_app(loaded.settings, redactor=redactor, tracing=create_tracing(os.environ))
    server.run(app, loaded.settings)
    return OK


def _demo(options: argparse.Namespace) -> int:
    loaded = load_with_sources(options.config, os.environ)
    settings = demo.readable_logs(loaded)
    redactor = Redactor()
    logs.configure(settings.log, redactor=redactor)
    try:
        with loaded.naming_sources():
            demo.run(settings, redactor=redactor, simulator_port=options.simulator_port)
    except RuntimeError as exc:
        _print_error(str(exc))
        return FAILED
    return OK


def _watch(options: argparse.Namespace) -> int:
    gateway = options.gateway or _default_gateway(os.environ)
    try:
        succeeded = watch(
            WatchOptions(
                gateway,
                options.task_ids,
                options.api,
                as_json=options.json,
                timeout_seconds=options.timeout,
                access=Access(tuple(options.headers), options.cacert),
                save=options.save,
                default_gateway=options.gateway is None,
            )
        )
    except StreamRefused as exc:
        _print_error(f"{display_name(gateway)}: {exc}")
        return USAGE
    except BrokenPipeError:
        return _output_closed()
    return OK if succeeded else FAILED


def _default_gateway(environ: Mapping[str, str]) -> httpx.URL:
    try:
        return arguments.gateway_url(environ.get(URL_VARIABLE) or DEFAULT_GATEWAY)
    except argparse.ArgumentTypeError as exc:
        raise SettingsError([f"{URL_VARIABLE}: {exc}"]) from None


def _check(options: argparse.Namespace) -> int:
    loaded, redactor = _load(options)
    with loaded.naming_sources():
        finding = asyncio.run(check(loaded.settings, redactor=redactor, user_agent=USER_AGENT))
    _print_lines(finding.lines)
    return OK if finding.ok else FAILED


def _config(options: argparse.Namespace) -> int:
    _print_lines(config_lines(load_with_sources(options.config, os.environ)))
    return OK


def _simulate(options: argparse.Namespace) -> int:
    try:
        simulate(options)
    except CannotListen as exc:
        hint = f"; choose {UNPRIVILEGED_PORT}" if exc.is_forbidden else ""
        _print_error(f"{exc}; --port 0 uses any free port" if exc.port_is_taken else f"{exc}{hint}")
        return FAILED
    except BrokenPipeError:  # the parent process exited before the start, for example the demo on a signal
        return _output_closed()
    return OK


def _completion(options: argparse.Namespace) -> int:
    sys.stdout.write(completion_script(options.shell))
    return OK


_COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "serve": _serve,
    "watch": _watch,
    "check": _check,
    "config": _config,
    "demo": _demo,
    "simulate": _simulate,
    "completion": _completion,
}


def _output_closed() -> int:
    # The reader has closed the pipe: the interpreter must not flush the rest of the output at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return FAILED


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        sys.stdout.write(f"{printable(line)}\n")


def _print_error(line: str) -> None:
    sys.stderr.write(f"sd-gateway: {printable(line)}\n")
