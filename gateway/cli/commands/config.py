"""`sd-gateway config`: prints the effective settings, and where each of them comes from.

server.port = 9000                                   # config/gateway.toml:3
log.level = "debug"                                  # SD_GATEWAY_LOG__LEVEL
# credentials.secret_key = "(hidden)"                # SPEEDPIX_APP_SECRET

The output is a settings file. Settings with a hidden part are comments, because a gateway that read
"(hidden)" would use it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

from gateway.cli.arguments import add_settings_file
from gateway.cli.exit_status import OK
from gateway.cli.standard_streams import print_lines
from gateway.settings.known_settings import ALL
from gateway.settings.loading import DEFAULT_FILE, Loaded, load_with_sources
from gateway.settings.value_text import HIDDEN, effective_value

_WIDTH = 52  # of a setting and its value, before the comment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_settings_file(parser)


def run(options: argparse.Namespace) -> int:
    """Print the settings."""
    print_lines(_lines(load_with_sources(options.config, os.environ)))
    return OK


def _lines(loaded: Loaded) -> Iterator[str]:
    """Yield a line for each setting, without secrets."""
    file = loaded.sources.file
    yield f"# settings file: {file if file is not None else f'none; {DEFAULT_FILE} does not exist'}"
    for section, key in ALL:
        value = effective_value(section, getattr(getattr(loaded.settings, section), key))
        source = loaded.sources.source_of((section, key)) or "default"
        setting = f"{section}.{key} = {value}"
        if HIDDEN in value:
            setting = f"# {setting}"
        yield f"{setting:{_WIDTH}} # {source}"
    if loaded.ignored:
        yield f"# ignored, because Kubernetes sets them for services: {', '.join(loaded.ignored)}"
