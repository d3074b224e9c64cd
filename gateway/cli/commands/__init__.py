"""The commands of `sd-gateway`, one module each.

A module is imported when its command is used. So `--help` and `--version` import no library, and `watch` does
not import the server.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from importlib import import_module
from typing import Protocol, cast

SUMMARIES: Mapping[str, str] = {
    "serve": "run the gateway",
    "watch": "show the progress of tasks until all have ended",
    "check": "query the upstream, test the store, and report what is wrong",
    "config": "print the settings and where each comes from, without secrets",
    "demo": "run the gateway with a simulated upstream and running tasks",
    "simulate": "run a simulated upstream that verifies signatures",
    "completion": "print the script that completes commands and options in a shell",
}


class Command(Protocol):
    """The functions of a command's module."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments and options to its parser."""

    def run(self, options: argparse.Namespace) -> int:
        """Run the command with its parsed arguments; return the exit status."""


def load(name: str) -> Command:
    """Return the module of a command of `SUMMARIES`, imported."""
    return cast(Command, import_module(f"{__name__}.{name}"))
