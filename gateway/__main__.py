"""Entry point of the `sd-gateway` command and of `python -m gateway`.

It handles signals before it imports a command, which takes up to a second. A container may be stopped during
that time.
"""

from __future__ import annotations

import sys

from gateway.server import signals

SERVERS = {"serve", "demo", "simulate"}


def main() -> int:
    """Run one command; return the exit status."""
    serves = sys.argv[1:2] != [] and sys.argv[1] in SERVERS
    if serves:
        signals.exit_during_start()
        # structlog and httpx import rich, if it is installed, for what a server does not use: a tenth of the
        # time until it is ready.
        sys.modules["rich"] = None  # type: ignore[assignment]
    else:
        signals.exit_during_imports()
    from gateway.cli.main import main as run_command  # noqa: PLC0415  # after signals are handled

    try:
        return run_command(after_imports=None if serves else signals.end_command_on_signals)
    finally:
        if serves:
            signals.ignore_all()


if __name__ == "__main__":
    sys.exit(main())
