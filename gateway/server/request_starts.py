"""Starts requests of the application a few at a time, so that a burst does not delay cached responses."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine

_PER_ITERATION = 2  # and an eighth of the waiting requests: no queue lasts, however long the iterations are

Run = Coroutine[object, object, None]
Tasks = set[asyncio.Task[None]]


class RequestStarts:
    """Starts requests in the order of their arrival, a few per iteration of the event loop.

    A request takes some hundred microseconds. If all requests of a burst started in the same iteration, a
    request that arrives meanwhile would wait for all of them, even if its response is cached.
    """

    def __init__(self) -> None:
        self._started = 0  # in this iteration
        self._waiting: deque[tuple[Run, Tasks]] = deque()

    def add(self, loop: asyncio.AbstractEventLoop, run: Run, tasks: Tasks) -> None:
        """Run a request in a task after those that were added before; `tasks` has the task while it runs."""
        if self._started < _PER_ITERATION:
            self._start(loop, run, tasks)
        else:
            self._waiting.append((run, tasks))

    def _start(self, loop: asyncio.AbstractEventLoop, run: Run, tasks: Tasks) -> None:
        if not self._started:
            loop.call_soon(self._on_next_iteration, loop)
        self._started += 1
        task = loop.create_task(run)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def _on_next_iteration(self, loop: asyncio.AbstractEventLoop) -> None:
        self._started = 0
        for _ in range(min(len(self._waiting), _PER_ITERATION + len(self._waiting) // 8)):
            self._start(loop, *self._waiting.popleft())
