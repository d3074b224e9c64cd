"""`sd-gateway serve`: runs the gateway."""

from __future__ import annotations

import argparse
import os

from gateway.app import create_app
from gateway.cli.arguments import add_settings_file
from gateway.cli.exit_status import OK
from gateway.cli.traces import create_tracing
from gateway.server import run as server
from gateway.settings.loading import load_with_sources
from gateway.telemetry import logs
from gateway.telemetry.redaction import Redactor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_settings_file(parser)


def run(options: argparse.Namespace) -> int:
    """Serve until a signal stops the gateway; see `server.run`."""
    loaded = load_with_sources(options.config, os.environ)
    redactor = Redactor()
    logs.configure(loaded.settings.log, redactor=redactor)
    with loaded.naming_sources():
        app = create_app(loaded.settings, redactor=redactor, tracing=create_tracing(os.environ))
    server.run(app, loaded.settings)
    return OK
