"""The command line: commands, options and their help.

`--help` of each command has examples, the environment variables that it reads, and its exit statuses. A
misspelled command or option is answered with a similar one.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from gateway import __version__
from gateway.cli import arguments
from gateway.cli.completion import SHELLS
from gateway.cli.gateway_access import DEFAULT_GATEWAY
from gateway.cli.help_texts import HELP
from gateway.domain.printable import printable
from gateway.domain.task import Operation
from gateway.settings.error_messages import did_you_mean
from gateway.settings.variables import URL_VARIABLE
from gateway.simulator.faults import FAULTS

DEFAULT_SECRET = "simulated-secret"  # noqa: S105  # of the simulated upstream


class Parser(argparse.ArgumentParser):
    """An argparse parser that suggests similar commands and options.

    Error messages have no control characters of the arguments, because terminals interpret them.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.commands: dict[str, Parser] = {}

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and exit with status 2."""
        super().error(printable(message))

    def _print_message(self, message: str, file: Any = None) -> None:
        """Let help and version fail if they cannot be written: with PYTHONUNBUFFERED, argparse hides it."""
        if file is sys.stdout:
            file.write(message)
        else:
            super()._print_message(message, file)

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse the arguments; first look for a misspelled command or option, with a better message."""
        index = next((i for i, word in enumerate(words) if not word.startswith("-")), len(words))
        self.check_options(words[:index])
        if self.commands and index < len(words):
            if words[index] not in self.commands:
                close = difflib.get_close_matches(words[index], self.commands, n=2)
                hint = did_you_mean(close) if close else f"the commands are {', '.join(self.commands)}"
                self.error(f"unknown command {words[index]!r}; {hint}")
            self.commands[words[index]].check_options(words[index + 1 :])
        return self.parse_args(words)

    def check_options(self, words: Sequence[str]) -> None:
        """Report the first long option that does not exist. Options may be abbreviated."""
        known = [option for option in self._option_string_actions if option.startswith("--")]
        for word in words:
            name = word.partition("=")[0]
            if word == "--":
                return
            is_option = word.startswith("--") and " " not in word  # as argparse decides
            if is_option and not any(option.startswith(name) for option in known):
                close = difflib.get_close_matches(name, known, n=2)
                close = close or [option for option in known if option.endswith(name[1:])]
                hint = did_you_mean(close) if close else f"the options are {', '.join(known)}"
                self.error(f"unknown option {name}; {hint}")


def create_parser() -> Parser:
    """Return the parser. The parsed arguments have the name of the command as `command`, or "" for none."""
    parser = Parser(
        prog="sd-gateway",
        description="Signs, coalesces, caches and measures progress queries.",
        epilog=HELP[""],
    )
    parser.add_argument("--version", action="version", version=f"sd-gateway {__version__}")
    parser.set_defaults(command="")
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=Parser)

    with_settings = Parser(add_help=False)
    with_settings.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="settings file (default: config/gateway.toml, when it exists)",
    )

    def add(name: str, help_text: str, *, settings: bool = False) -> Parser:
        command: Parser = commands.add_parser(
            name,
            help=help_text,
            description=f"{help_text[0].upper()}{help_text[1:]}.",
            epilog=HELP[name],
            parents=[with_settings] if settings else [],
        )
        command.set_defaults(command=name)
        parser.commands[name] = command
        return command

    add("serve", "run the gateway", settings=True)
    _add_watch(add("watch", "show the progress of tasks until all have ended"))
    add("check", "query the upstream, test the store, and report what is wrong", settings=True)
    add("config", "print the settings and where each comes from, without secrets", settings=True)
    demo = add("demo", "run the gateway with a simulated upstream and running tasks", settings=True)
    demo.add_argument(
        "--simulator-port",
        type=arguments.port,
        default=8081,
        metavar="PORT",
        help="port of the simulated upstream; 0: any free port (default: %(default)s)",
    )
    _add_simulate(add("simulate", "run a simulated upstream that verifies signatures"))
    completion = add("completion", "print the script that completes commands and options in a shell")
    completion.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    return parser


def _add_watch(watch: Parser) -> None:
    watch.add_argument("task_ids", type=arguments.task_id, nargs="+", metavar="TASK", help="ID of a task")
    watch.add_argument(
        "--gateway",
        type=arguments.gateway_url,
        metavar="URL",
        help=f"URL or HOST:PORT of the gateway (default: {URL_VARIABLE}, or {DEFAULT_GATEWAY})",
    )
    watch.add_argument(
        "--api",
        choices=sorted({operation.api for operation in Operation}),
        default="sd",
        help="API that the tasks belong to (default: %(default)s)",
    )
    watch.add_argument(
        "--timeout",
        type=arguments.timeout,
        metavar="SECONDS",
        help="stop with exit status 1 after this time (default: none)",
    )
    watch.add_argument(
        "--save",
        type=arguments.directory,
        metavar="DIR",
        help="save the images of tasks that have succeeded here; the directory is created",
    )
    watch.add_argument(
        "--header",
        type=arguments.header,
        action="append",
        default=[],
        dest="headers",
        metavar="'NAME: VALUE'",
        help="send this header to the gateway, for example for a login at a proxy; may be repeated",
    )
    watch.add_argument(
        "--cacert",
        type=arguments.ca_file,
        metavar="FILE",
        help="accept the certificate authorities in this file",
    )
    watch.add_argument("--json", action="store_true", help="write one line of JSON per event, for scripts")


def _add_simulate(simulate: Parser) -> None:
    simulate.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    simulate.add_argument(
        "--port",
        type=arguments.port,
        default=8081,
        help="port to listen on; 0: any free port (default: %(default)s)",
    )
    simulate.add_argument(
        "--key", default="simulated-key", help="access key to accept (default: %(default)s)"
    )
    secret = simulate.add_mutually_exclusive_group()
    secret.add_argument(
        "--secret",
        default=DEFAULT_SECRET,
        help="secret key of the access key (default: %(default)s)",
    )
    secret.add_argument("--secret-stdin", action="store_true", help="read the secret key from standard input")
    simulate.add_argument(
        "--latency", type=arguments.latency, default=0.0, metavar="SECONDS", help="duration of every response"
    )
    simulate.add_argument(
        "--clock-offset",
        type=arguments.seconds,
        default=0.0,
        metavar="SECONDS",
        help="offset of the simulator's clock; positive: ahead",
    )
    simulate.add_argument(
        "--limit",
        type=arguments.count,
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
