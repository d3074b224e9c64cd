"""`sd-gateway simulate`: runs a simulated upstream."""

from __future__ import annotations

import argparse
import shlex
import sys
import time

import uvicorn

from gateway.cli.command_line import DEFAULT_SECRET
from gateway.cli.demo import SIMULATOR_PREFIX
from gateway.server import run as server
from gateway.settings.model import SettingsError
from gateway.settings.secret_files import read_secret_line
from gateway.settings.secret_text import clean_secret
from gateway.simulator import create_simulator
from gateway.simulator.json_bodies import ControlError, parse_object


def simulate(options: argparse.Namespace) -> None:
    """Run the simulator until a signal stops it.

    Raises: SettingsError for invalid arguments, CannotListen, and SystemExit as `server.serve` does.
    """
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
        raise SettingsError([f"--fault: {exc}"]) from None
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        log_level="warning",
        access_log=False,
        date_header=False,  # the simulator sends the time of its own clock
        timeout_graceful_shutdown=1,
    )

    def announce(url: str) -> None:
        sys.stdout.write(f"{SIMULATOR_PREFIX}{url}\n")
        if secret == DEFAULT_SECRET:  # another one may be a real secret
            pair = f"SPEEDPIX_APP_KEY={shlex.quote(key)} SPEEDPIX_APP_SECRET={secret}"
            sys.stdout.write(f"To try it: SPEEDPIX_ENDPOINT={url} {pair} sd-gateway check\n")
        sys.stdout.flush()

    server.serve(config, announce=announce)
