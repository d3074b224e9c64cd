"""The option `--config`, and the numbers of the command line.

Each function for a type of argument returns the value of a text, or raises the reason.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

MAX_PORT = 65535
_MAX_SECONDS = 1e9  # valid for every event loop and as a date


def add_settings_file(parser: argparse.ArgumentParser) -> None:
    """Add the option for the settings file."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="settings file (default: config/gateway.toml, when it exists)",
    )


def count(text: str) -> int:
    """Return a whole number without a sign."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number without a sign")
    return int(text)


def port(text: str) -> int:
    """Return a port; 0 is allowed."""
    number = count(text)
    if number > MAX_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (0 to {MAX_PORT})")
    return number


def seconds(text: str) -> float:
    """Return a number of seconds, which may be negative."""
    try:
        number = float(text if text.isascii() and "_" not in text else "nan")
    except ValueError:
        number = math.nan
    if not abs(number) <= _MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return number


def latency(text: str) -> float:
    """Return a number of seconds that is not negative."""
    number = seconds(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is negative")
    return number


def timeout(text: str) -> float:
    """Return a number of seconds above 0."""
    number = seconds(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return number
