"""Standard input, output and error of a command: each may be closed, or refuse what is written to it.

A full disk refuses every write, and so does a pipe without a reader.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable
from contextlib import suppress

from gateway.domain.printable import printable


def open_closed_streams() -> None:
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


def print_lines(lines: Iterable[str]) -> None:
    """Write lines to standard output, with control characters escaped. Raises: OSError."""
    for line in lines:
        sys.stdout.write(f"{printable(line)}\n")


def print_error(text: str) -> None:
    """Write a message to standard error. If it cannot be written, it is lost, and the command goes on."""
    with suppress(OSError):
        sys.stderr.write(f"sd-gateway: {printable(text)}\n")


def discard_refused_output() -> None:
    """Discard output that cannot be written.

    At exit, the interpreter would write it again, print a traceback, and replace the exit status by 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
