"""`sd-gateway watch`: its arguments and exit status. The package `cli.watch` follows and shows the tasks."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping

import httpx

from gateway.cli.arguments import timeout
from gateway.cli.exit_status import FAILED, OK, USAGE
from gateway.cli.gateway_access import DEFAULT_GATEWAY, Access
from gateway.cli.standard_streams import print_error
from gateway.cli.watch import argument_types
from gateway.cli.watch.events import StreamRefused
from gateway.cli.watch.session import WatchOptions, display_name, watch
from gateway.domain.task import Operation
from gateway.settings.errors import SettingsError
from gateway.settings.variables import URL_VARIABLE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "task_ids", type=argument_types.task_id, nargs="+", metavar="TASK", help="ID of a task"
    )
    parser.add_argument(
        "--gateway",
        type=argument_types.gateway_url,
        metavar="URL",
        help=f"URL or HOST:PORT of the gateway (default: {URL_VARIABLE}, or {DEFAULT_GATEWAY})",
    )
    parser.add_argument(
        "--api",
        choices=sorted({operation.api for operation in Operation}),
        default="sd",
        help="API that the tasks belong to (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=timeout,
        metavar="SECONDS",
        help="stop with exit status 1 after this time (default: none)",
    )
    parser.add_argument(
        "--save",
        type=argument_types.directory,
        metavar="DIR",
        help="save the images of tasks that have succeeded here; the directory is created",
    )
    parser.add_argument(
        "--header",
        type=argument_types.header,
        action="append",
        default=[],
        dest="headers",
        metavar="'NAME: VALUE'",
        help="send this header to the gateway, for example for a login at a proxy; may be repeated",
    )
    parser.add_argument(
        "--cacert",
        type=argument_types.ca_file,
        metavar="FILE",
        help="accept the certificate authorities in this file",
    )
    parser.add_argument("--json", action="store_true", help="write one line of JSON per event, for scripts")


def run(options: argparse.Namespace) -> int:
    """Show the tasks until all have ended; 0 if all have succeeded."""
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
        return argument_types.gateway_url(environ.get(URL_VARIABLE) or DEFAULT_GATEWAY)
    except argparse.ArgumentTypeError as exc:
        raise SettingsError([f"{URL_VARIABLE}: {exc}"]) from None
