"""Makes calls a few at a time, so that a burst of requests, changes or disconnects does not delay others."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial

# The weight of the calls of one iteration; the last call may exceed it. An eighth of the number of waiting
# calls comes on top of it, so that a short queue does not last, however long the iterations are.
_PER_ITERATION = 2
_MOST_PER_ITERATION = 64
_TASKS_OF_WEIGHT = 8  # work for so many tasks weighs as much as the start of a request

Run = Coroutine[object, object, None]
Tasks = set[asyncio.Task[None]]


class PacedCalls:
    """Makes calls in the order in which they were added, a few per iteration of the event loop.

    A request takes some hundred microseconds to start. The work for a hundred tasks that are not cached takes
    ten milliseconds, and as long again if the client leaves before the response. If all of a burst happened
    in the same iteration, a request that arrives meanwhile would wait for all of them, even if its response
    is cached. `per_iteration`: the weight of the calls of one iteration when no others wait.
    """

    def __init__(self, *, per_iteration: int = _PER_ITERATION) -> None:
        self._per_iteration = per_iteration
        self._used = 0  # weight of the calls of this iteration
        self._allowed = per_iteration
        self._waiting: deque[tuple[Callable[[], object], int]] = deque()

    def start(self, loop: asyncio.AbstractEventLoop, run: Run, tasks: Tasks) -> None:
        """Run a request in a task, after earlier calls; `tasks` has the task while it runs."""
        self.add(loop, partial(_start, loop, run, tasks), weight=1)

    async def turn(self, *, tasks: int) -> None:
        """Wait for earlier calls, and count what the caller does next for so many tasks as one of them."""
        ready = asyncio.get_running_loop().create_future()
        self.resolve(ready, weight=1 + tasks // _TASKS_OF_WEIGHT)
        await ready

    def resolve(self, future: asyncio.Future[None], *, weight: int = 1) -> None:
        """Resolve a future after earlier calls, unless its waiter was cancelled."""
        self.add(future.get_loop(), partial(_resolve, future), weight=weight)

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
        self._allowed = min(self._per_iteration + len(self._waiting) // 8, _MOST_PER_ITERATION)
        while self._waiting and self._used < self._allowed:
            self._make(loop, *self._waiting.popleft())


def _start(loop: asyncio.AbstractEventLoop, run: Run, tasks: Tasks) -> None:
    task = loop.create_task(run)
    tasks.add(task)
    task.add_done_callback(tasks.discard)


def _resolve(ready: asyncio.Future[None]) -> None:
    if not ready.done():  # else the caller was cancelled
        ready.set_result(None)
