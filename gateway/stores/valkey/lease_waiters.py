"""The in-flight requests that wait for a message, because another replica holds the lease of their task."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from gateway.domain.task import TaskKey


class LeaseWaiters:
    """The waiting in-flight requests: one per task."""

    def __init__(self) -> None:
        self._waiting: dict[TaskKey, asyncio.Future[None]] = {}

    def __contains__(self, key: TaskKey) -> bool:
        """Tell whether an in-flight request waits for a message about this task."""
        return key in self._waiting

    @contextmanager
    def next_message(self, key: TaskKey) -> Iterator[asyncio.Future[None]]:
        """Return a future that completes when the next message about this task arrives."""
        message = self._waiting[key] = asyncio.get_running_loop().create_future()
        try:
            yield message
        finally:
            if self._waiting.get(key) is message:
                del self._waiting[key]

    def wake(self, key: TaskKey) -> None:
        """Complete the future of a task, if there is one."""
        message = self._waiting.get(key)
        if message is not None and not message.done():
            message.set_result(None)

    def wake_all(self) -> None:
        """Complete all futures: messages may have been missed, or no more messages arrive."""
        for key in tuple(self._waiting):
            self.wake(key)
