"""Entry point of the `sd-gateway` command and of `python -m gateway`.

It handles signals before it imports a command, which takes up to a second. A container may be stopped during
that time.
"""

from __future__ import annotations

import gc
import sys

from gateway.server import signals

SERVERS = {"serve", "demo", "simulate"}


def main() -> int:
    """Run one command; return the exit status."""
    # Imports create many objects, and no garbage. Without collections, those of `serve` take 12 % less time.
    gc.disable()
    serves = sys.argv[1:2] != [] and sys.argv[1] in SERVERS
    if serves:
        signals.exit_during_start()
        # structlog and httpx import rich, if it is installed, for what a server does not use: a tenth of the
        # time until it is ready.
        sys.modules["rich"] = None  # type: ignore[assignment]
    else:
        signals.exit_during_imports()
    from gateway.cli.main import main as run_command  # noqa: PLC0415  # after signals are handled

    def after_imports() -> None:
        gc.enable()
        if not serves:
            signals.end_command_on_signals()

    try:
        return run_command(after_imports=after_imports)
    finally:
        if serves:
            signals.ignore_all()


if __name__ == "__main__":
    sys.exit(main())
