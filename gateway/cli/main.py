"""The `sd-gateway` command.

Exit status: 0 success, 1 failure, 2 invalid usage or settings, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
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
from gateway.cli.standard_streams import discard_refused_output, open_closed_streams, print_error
from gateway.cli.traces import create_tracing
from gateway.cli.watch import WatchOptions, display_name, watch
from gateway.cli.watch_events import StreamRefused
from gateway.domain.printable import printable
from gateway.server import run as server
from gateway.server.listen_errors import UNPRIVILEGED_PORT, CannotListen
from gateway.settings.loading import load_with_sources
from gateway.settings.model import SettingsError
from gateway.settings.variables import URL_VARIABLE
from gateway.telemetry import logs
from gateway.telemetry.redaction import Redactor

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, server.INTERRUPTED


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    open_closed_streams()
    try:
        try:
            return _run(words)
        finally:
            sys.stdout.flush()  # at interpreter exit, a closed pipe could not be handled any more
    except BrokenPipeError:
        return FAILED
    except OSError as exc:  # not handled by the command, for example a full disk behind standard output
        print_error(str(exc))
        return FAILED
    finally:
        discard_refused_output()


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
            print_error(mistake)
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED


def _serve(options: argparse.Namespace) -> int:
    loaded = load_with_sources(options.config, os.environ)
    redactor = Redactor()
    logs.configure(loaded.settings.log, redactor=redactor)
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
        print_error(str(exc))
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
        print_error(f"{display_name(gateway)}: {exc}")
        return USAGE
    except BrokenPipeError:
        return FAILED
    return OK if succeeded else FAILED


def _default_gateway(environ: Mapping[str, str]) -> httpx.URL:
    try:
        return arguments.gateway_url(environ.get(URL_VARIABLE) or DEFAULT_GATEWAY)
    except argparse.ArgumentTypeError as exc:
        raise SettingsError([f"{URL_VARIABLE}: {exc}"]) from None


def _check(options: argparse.Namespace) -> int:
    loaded = load_with_sources(options.config, os.environ)
    redactor = Redactor()
    # The command prints all that the log would say.
    logs.configure(loaded.settings.log.model_copy(update={"level": "error"}), redactor=redactor)
    with loaded.naming_sources():
        source_of = loaded.sources.source_of
        finding = asyncio.run(
            check(loaded.settings, source_of=source_of, redactor=redactor, user_agent=USER_AGENT)
        )
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
        print_error(f"{exc}; --port 0 uses any free port" if exc.port_is_taken else f"{exc}{hint}")
        return FAILED
    except BrokenPipeError:  # the parent process exited before the start, for example the demo on a signal
        return FAILED
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


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        sys.stdout.write(f"{printable(line)}\n")
