"""Entry point of the `sd-gateway` command and of `python -m gateway`.

It handles signals before it imports the commands, which takes a third of a second. A container may be stopped
during that time.
"""

from __future__ import annotations

import sys

from gateway.server import signals

SERVERS = {"serve", "demo", "simulate"}


def main() -> int:
    """Run one command; return the exit status."""
    if serves := sys.argv[1:2] != [] and sys.argv[1] in SERVERS:
        signals.exit_during_start()
    else:
        signals.exit_during_imports()
    from gateway.cli.main import main as run_command  # noqa: PLC0415  # after signals are handled

    if not serves:
        signals.end_command_on_signals()
    try:
        return run_command()
    finally:
        if serves:
            signals.ignore_all()


if __name__ == "__main__":
    sys.exit(main())
