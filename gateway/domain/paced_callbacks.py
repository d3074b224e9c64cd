"""Makes calls a few at a time, so that a burst of requests, changes or disconnects does not delay others."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine
from functools import partial

# The weight of the calls of one iteration; the last call may exceed it. An eighth of the number of waiting
# calls comes on top of it, so that a short queue does not last, however long the iterations are.
_PER_ITERATION = 2
_MOST_PER_ITERATION = 64
_TASKS_OF_WEIGHT = 8  # work for so many tasks weighs as much as the start of a request

Run = Coroutine[object, object, None]
Tasks = set[asyncio.Task[None]]


class PacedCallbacks:
    """Makes a few calls per iteration of the event loop: of each client in their order, of all in turn.

    A request takes some hundred microseconds to start. The work for a hundred tasks that are not cached takes
    ten milliseconds, and as long again if the client leaves before the response. If all of a burst happened
    in the same iteration, a request that arrives meanwhile would wait for all of them, even if its response
    is cached. The clients take turns, so a burst of one client delays a request of another by one call.

    `per_iteration`: the weight of the calls of one iteration when no others wait. A client is a key of
    `api/client_limits.py`.
    """

    def __init__(self, *, per_iteration: int = _PER_ITERATION) -> None:
        self._per_iteration = per_iteration
        self._used = 0  # weight of the calls of this iteration
        self._allowed = per_iteration
        self._waiting = 0
        self._queues: OrderedDict[bytes, deque[tuple[Callable[[], object], int]]] = OrderedDict()

    def start(self, loop: asyncio.AbstractEventLoop, run: Run, tasks: Tasks, *, client: bytes) -> None:
        """Run a request in a task, after earlier calls; `tasks` has the task while it runs."""
        self.add(loop, partial(_start, loop, run, tasks), weight=1, client=client)

    async def turn(self, *, tasks: int, client: bytes) -> None:
        """Wait for earlier calls, and count what the caller does next for so many tasks as one of them."""
        ready = asyncio.get_running_loop().create_future()
        self.resolve(ready, weight=1 + tasks // _TASKS_OF_WEIGHT, client=client)
        await ready

    def resolve(self, future: asyncio.Future[None], *, weight: int = 1, client: bytes = b"") -> None:
        """Resolve a future after earlier calls, unless its waiter was cancelled."""
        self.add(future.get_loop(), partial(_resolve, future), weight=weight, client=client)

    def add(
        self, loop: asyncio.AbstractEventLoop, call: Callable[[], object], *, weight: int, client: bytes
    ) -> None:
        """Make a call after those that this client added before."""
        if self._used < self._allowed:
            self._make(loop, call, weight)
            return
        self._waiting += 1
        queue = self._queues.get(client)
        if queue is None:
            queue = self._queues[client] = deque()
        queue.append((call, weight))

    def _make(self, loop: asyncio.AbstractEventLoop, call: Callable[[], object], weight: int) -> None:
        if not self._used:
            loop.call_soon(self._on_next_iteration, loop)
        self._used += weight
        call()

    def _on_next_iteration(self, loop: asyncio.AbstractEventLoop) -> None:
        self._used = 0
        self._allowed = min(self._per_iteration + self._waiting // 8, _MOST_PER_ITERATION)
        while self._queues and self._used < self._allowed:
            client, queue = self._queues.popitem(last=False)
            call, weight = queue.popleft()
            self._waiting -= 1
            if queue:
                self._queues[client] = queue  # the last one of the next round
            self._make(loop, call, weight)


def _start(loop: asyncio.AbstractEventLoop, run: Run, tasks: Tasks) -> None:
    task = loop.create_task(run)
    tasks.add(task)
    task.add_done_callback(tasks.discard)


def _resolve(ready: asyncio.Future[None]) -> None:
    if not ready.done():  # else the caller was cancelled
        ready.set_result(None)
