"""The command line: commands, options and their help.

`--help` of each command has examples, the environment variables that it reads, and its exit statuses. A
misspelled command or option is answered with a similar one.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from gateway import __version__
from gateway.cli import commands
from gateway.cli.help_texts import HELP
from gateway.domain.printable import printable
from gateway.settings.errors import did_you_mean


class Parser(argparse.ArgumentParser):
    """An argparse parser that suggests similar commands and options.

    Error messages have no control characters of the arguments, because terminals interpret them.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.commands: dict[str, Parser] = {}
        self._loaded: set[str] = set()

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
            self.load(words[index]).check_options(words[index + 1 :])
        return self.parse_args(words)

    def load(self, name: str) -> Parser:
        """Import a command and add its arguments to its parser; return the parser."""
        if name not in self._loaded:
            self._loaded.add(name)
            commands.load(name).add_arguments(self.commands[name])
        return self.commands[name]

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
    subparsers = parser.add_subparsers(metavar="COMMAND", parser_class=Parser)
    for name, summary in commands.SUMMARIES.items():
        parser.commands[name] = subparsers.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=HELP[name],
        )
        parser.commands[name].set_defaults(command=name)
    return parser
