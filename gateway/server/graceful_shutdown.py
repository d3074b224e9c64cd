"""Starts the graceful shutdown on SIGTERM or SIGINT.

On a signal, uvicorn closes its listeners immediately, and then waits for open connections. It does not notify
the application. So this module handles the first SIGTERM or SIGINT. It sets the event `begun`: /readyz then
fails, and streams end. It passes the signal on to uvicorn `HANDOVER_SECONDS` later. During this time, the
gateway still answers requests, and load balancers see that it is not ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import structlog

# Long enough for a readiness probe and for the last events of streams, but short compared with a grace
# period.
HANDOVER_SECONDS = 0.5

log = structlog.get_logger(__name__)


class GracefulShutdown:
    """State of the shutdown: `begun` is set once, and never cleared."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []

    def on_begin(self, listener: Callable[[], None]) -> None:
        """Call `listener` on the event loop when the shutdown begins."""
        self._listeners.append(listener)

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Begin the shutdown on SIGTERM or SIGINT, then call the previously installed handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python handles signals in the main thread only; other threads are stopped in other ways
            return
        loop = asyncio.get_running_loop()
        previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def handle(number: int, frame: FrameType | None) -> None:
            before = previous[signal.Signals(number)]
            if not callable(before):
                before = signal.default_int_handler
            if self.begun.is_set():
                before(number, frame)  # the second signal is passed on immediately
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
        log.info("shutdown_started")
        self.begun.set()
        for listener in self._listeners:
            listener()
