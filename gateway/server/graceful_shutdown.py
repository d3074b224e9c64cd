"""The state of a graceful shutdown, which the server begins when a signal asks it to stop.

uvicorn's shutdown closes the listeners first and then waits for open connections. It does not notify the
application. So `run.py` first sets the event `begun`: /readyz then fails, and streams end. uvicorn's shutdown
follows `HANDOVER_SECONDS` later. During this time, the gateway still answers requests, and load balancers see
that it is not ready and hand its clients over to other replicas.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

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

    def begin(self) -> None:
        """Begin the shutdown. Called on the event loop, once."""
        log.info("shutdown_started")
        self.begun.set()
        for listener in self._listeners:
            listener()
