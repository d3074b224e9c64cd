"""Knows when this process is on its way out.

uvicorn, told to stop, closes its listeners at once and then waits for open connections; nothing
in it tells the application. So the first SIGTERM or SIGINT is ours: it sets the event that readyz
and every long answer look at, and after a moment, in which load balancers see us unready
while we still answer, it is handed on to uvicorn.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import structlog

# Long enough for readyz to be asked and streams to be told, short beside any grace period.
HANDOVER_SECONDS = 0.5

log = structlog.get_logger(__name__)


class GracefulShutdown:
    """The process's way out: `begun` is set once, and never cleared."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []

    def on_begin(self, listener: Callable[[], None]) -> None:
        """Call `listener` on the event loop when draining begins."""
        self._listeners.append(listener)

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Begin to drain on SIGTERM or SIGINT, then call the handlers that were there before."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals belong to the main thread; whoever runs us elsewhere stops us otherwise
            return
        loop = asyncio.get_running_loop()
        previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def handle(number: int, frame: FrameType | None) -> None:
            before = previous[signal.Signals(number)]
            if not callable(before):
                before = signal.default_int_handler
            if self.begun.is_set():
                before(number, frame)  # asked twice: no more waiting
                return
            loop.call_soon_threadsafe(self._begin)
            loop.call_soon_threadsafe(loop.call_later, HANDOVER_SECONDS, before, number, frame)

        for number in previous:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number, before in previous.items():
                signal.signal(number, before)

    def _begin(self) -> None:
        log.info("draining")
        self.begun.set()
        for listener in self._listeners:
            listener()
