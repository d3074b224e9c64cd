"""Makes calls a few at a time, so that a burst of requests or disconnects does not delay cached responses."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial

# The weight of the calls of one iteration; the last call may exceed it. An eighth of the number of waiting
# calls comes on top of it, so that no queue lasts, however long the iterations are.
_PER_ITERATION = 2
_BYTES_OF_WEIGHT = 256

Run = Coroutine[object, object, None]
Tasks = set[asyncio.Task[None]]


def weight_of(query: bytes) -> int:
    """Return the weight of a request with this query string: 14 for 100 task IDs of the usual length."""
    return 1 + len(query) // _BYTES_OF_WEIGHT


class PacedCalls:
    """Makes calls in the order in which they were added, a few per iteration of the event loop.

    A request takes some hundred microseconds to start, and one for a hundred tasks ten milliseconds. It takes
    as long again if the client leaves before the response. If all of a burst happened in the same iteration,
    a request that arrives meanwhile would wait for all of them, even if its response is cached.
    """

    def __init__(self) -> None:
        self._used = 0  # weight of the calls of this iteration
        self._allowed = _PER_ITERATION
        self._waiting: deque[tuple[Callable[[], object], int]] = deque()

    def start(self, loop: asyncio.AbstractEventLoop, run: Run, tasks: Tasks, *, weight: int) -> None:
        """Run a request in a task, after earlier calls; `tasks` has the task while it runs."""
        self.add(loop, partial(_start, loop, run, tasks), weight=weight)

    def add(self, loop: asyncio.AbstractEventLoop, call: Callable[[], object], *, weight: int) -> None:
        """Make a call after those that were added before."""
        if self._used < self._allowed:
            self._make(loop, call, weight)
        else:
            self._waiting.append((call, weight))

    def _make(self, loop: asyncio.AbstractEventLoop, call: Callable[[], object], weight: int) -> None:
        if not self._used:
            loop.call_soon(self._on_next_iteration, loop)
        self._used += weight
        call()

    def _on_next_iteration(self, loop: asyncio.AbstractEventLoop) -> None:
        self._used = 0
        self._allowed = _PER_ITERATION + len(self._waiting) // 8
        while self._waiting and self._used < self._allowed:
            self._make(loop, *self._waiting.popleft())


def _start(loop: asyncio.AbstractEventLoop, run: Run, tasks: Tasks) -> None:
    task = loop.create_task(run)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
