"""The signals that a server handles. `gateway/__main__.py` imports this module first: keep its imports cheap.

    SIGTERM, SIGINT, SIGQUIT            graceful shutdown; during the start, exit at once with status 0
    SIGHUP, SIGUSR1, SIGUSR2, SIGALRM   ignored, with a line in the log

The default action of all of them would end the process in the middle of its requests. As PID 1 of a container
it is the opposite: the kernel drops a signal that has no handler, so that SIGTERM would have no effect.
helm/OPERATING.md has the table for operators.
"""

from __future__ import annotations

import os
import signal

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
IGNORED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)

_SIGNALLED = 128  # a shell's exit status for a process that a signal ended is this number plus the signal's


def exit_during_start() -> None:
    """Make a stop exit with status 0 while modules are imported and the settings are loaded.

    `os._exit` is safe here: there is nothing to close yet. An exception could be lost, because Python only
    prints an exception that a handler raises within a finalizer or a weak reference's callback.
    """
    for number in STOP:
        signal.signal(number, lambda *_: os._exit(0))
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)


def exit_cleanly() -> None:
    """Make a stop raise SystemExit with status 0, so that what is already started is closed."""
    for number in STOP:
        signal.signal(number, _exit_with_0)


def exit_during_imports() -> None:
    """Make a stop exit without a traceback, with a shell's status, while a command's modules are imported."""
    for number in STOP:
        signal.signal(number, lambda number, _: os._exit(_SIGNALLED + number))


def end_command_on_signals() -> None:
    """Let a command that serves nothing clean up: SIGINT raises KeyboardInterrupt, the others SystemExit."""
    for number in STOP:
        signal.signal(number, _exit_with_status)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def ignore_all() -> None:
    """Ignore signals while the interpreter ends, so that a second SIGTERM does not change the exit status.

    While it ends, Python resets its own handlers to the default action. It does not reset ignored signals.
    """
    for number in (*STOP, *IGNORED):
        signal.signal(number, signal.SIG_IGN)


def _exit_with_0(_number: int, _frame: object) -> None:
    raise SystemExit(0)


def _exit_with_status(number: int, _: object) -> None:
    raise SystemExit(_SIGNALLED + number)
