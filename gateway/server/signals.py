"""The signals that a server handles. `gateway/__main__.py` imports this module first: keep its imports cheap.

    SIGTERM, SIGINT, SIGQUIT            graceful shutdown; during the start, exit at once
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
INTERRUPTED = _SIGNALLED + signal.SIGINT


def exit_during_start() -> None:
    """Let a stop signal end the process at once, while modules are imported and the settings are loaded.

    The exit status is that of `_stop_status`.

    `os._exit` is safe here: there is nothing to close yet. An exception could be lost, because Python only
    prints an exception that a handler raises within a finalizer or a weak reference's callback.
    """
    for number in STOP:
        signal.signal(number, lambda number, _: os._exit(_stop_status(number)))
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)


def exit_cleanly() -> None:
    """Let a stop signal raise SystemExit, so that what is already started is closed. See `_stop_status`."""
    for number in STOP:
        signal.signal(number, _stop)


def exit_during_imports() -> None:
    """Let a stop signal end the process without a traceback, while a command's modules are imported.

    The exit status is the one that a shell reports for a process that the signal has ended.
    """
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


def _stop_status(number: int) -> int:
    """Return the exit status of a server: 0, because a requested stop is a success, but 130 after Ctrl-C."""
    return INTERRUPTED if number == signal.SIGINT else 0


def _stop(number: int, _: object) -> None:
    raise SystemExit(_stop_status(number))


def _exit_with_status(number: int, _: object) -> None:
    raise SystemExit(_SIGNALLED + number)
