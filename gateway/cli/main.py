"""The `sd-gateway` command.

Exit status: 0 success, 1 failure, 2 invalid usage or settings, 130 after Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from gateway.cli import commands
from gateway.cli.command_line import create_parser
from gateway.cli.exit_status import FAILED, OK, USAGE
from gateway.cli.standard_streams import discard_refused_output, open_closed_streams, print_error
from gateway.server.signals import INTERRUPTED
from gateway.settings.errors import SettingsError


def main(words: Sequence[str] | None = None, *, after_imports: Callable[[], None] = lambda: None) -> int:
    """Run one command; return the exit status. `after_imports` is called before the command runs."""
    open_closed_streams()
    try:
        try:
            return _run(words, after_imports)
        finally:
            sys.stdout.flush()  # at interpreter exit, a closed pipe could not be handled any more
    except BrokenPipeError:
        return FAILED
    except OSError as exc:  # not handled by the command, for example a full disk behind standard output
        print_error(str(exc))
        return FAILED
    finally:
        discard_refused_output()


def _run(words: Sequence[str] | None, after_imports: Callable[[], None]) -> int:
    try:
        parser = create_parser()
        options = parser.parse(sys.argv[1:] if words is None else words)
        if not options.command:
            parser.print_help()
            return OK
        command = commands.load(options.command)
        after_imports()
        return command.run(options)
    except SettingsError as exc:
        for mistake in exc.mistakes:
            print_error(mistake)
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
