"""`sd-gateway completion`: prints the script that completes commands and options in a shell."""

from __future__ import annotations

import argparse
import sys

from gateway.cli.completion import SHELLS, completion_script
from gateway.cli.exit_status import OK


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))


def run(options: argparse.Namespace) -> int:
    """Print the script."""
    sys.stdout.write(completion_script(options.shell))
    return OK
