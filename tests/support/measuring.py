"""Pauses coverage.

Coverage doubles the CPU time of Python code, and adds a third of a second to the start of a process.
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from coverage import Coverage

# coverage sets this variable, and starts in each new Python process that has it.
_OF_PROCESSES = "COVERAGE_PROCESS_CONFIG"

_paused: list[Any] = []


@contextmanager
def unmeasured() -> Iterator[None]:
    """Pause coverage of this thread, and of threads and processes that start meanwhile."""
    if Coverage.current() is None:  # another trace function may be a debugger's
        yield
        return
    of_this_thread, of_threads = sys.gettrace(), threading.gettrace()
    of_processes = os.environ.pop(_OF_PROCESSES, None)
    sys.settrace(None)
    threading.settrace(None)  # type: ignore[arg-type]  # None is documented
    _paused.append(of_threads)
    try:
        yield
    finally:
        _paused.pop()
        if of_processes is not None:
            os.environ[_OF_PROCESSES] = of_processes
        threading.settrace(of_threads)  # type: ignore[arg-type]
        sys.settrace(of_this_thread)


@contextmanager
def measured_threads() -> Iterator[None]:
    """Measure threads that start meanwhile, also in a test that is not measured: later tests use them."""
    before = threading.gettrace()
    threading.settrace(_paused[-1] if _paused else before)  # type: ignore[arg-type]
    try:
        yield
    finally:
        threading.settrace(before)  # type: ignore[arg-type]
