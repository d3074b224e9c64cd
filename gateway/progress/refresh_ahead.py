"""Refresh-ahead: fetches a task that is read often so early that its snapshot is replaced in time.

    schedule -> timer: lifetime - age - average latency -> queue of due refreshes, a few at a time -> refresh

Tasks that were fetched together are due together, and starting a thousand requests in one iteration of the
event loop would delay every response. So due refreshes are queued and started a few per iteration, and
other work runs in between. This also spreads the later refreshes of these tasks.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from gateway.domain.snapshot import Snapshot
from gateway.domain.task import Operation, TaskKey

_LATENCY_WEIGHT = 0.3  # of the newest latency in the moving average
# Requests started per iteration of the event loop. Each runs for some 0.1 ms before it waits.
_PER_ITERATION = 4


class RefreshAhead:
    """Schedules refreshes.

    `refresh` is called with a task and the version of its snapshot. It must do nothing if the snapshot has
    been replaced meanwhile. The schedule refers to versions, not to snapshots: an evicted snapshot is freed.
    """

    def __init__(self, refresh: Callable[[TaskKey, int], None]) -> None:
        self._refresh = refresh
        self._latency = dict.fromkeys(Operation, 0.0)  # moving averages, in seconds
        self._timers: dict[TaskKey, asyncio.TimerHandle] = {}
        self._due: deque[tuple[TaskKey, int]] = deque()

    def observe_latency(self, operation: Operation, seconds: float) -> None:
        """Record how long a query took that succeeded with one call."""
        self._latency[operation] += _LATENCY_WEIGHT * (seconds - self._latency[operation])

    def schedule(self, snapshot: Snapshot, age: float, *, start_early: bool = True) -> None:
        """Schedule a refresh for when the snapshot, which is `age` seconds old, becomes stale.

        An earlier schedule of the same task is replaced. Without `start_early`, the average latency is not
        subtracted: another replica has fetched the snapshot, and refreshes it first.
        """
        if (timer := self._timers.pop(snapshot.key, None)) is not None:
            timer.cancel()
        delay = snapshot.lifetime - age - (self._latency[snapshot.key.operation] if start_early else 0.0)
        loop = asyncio.get_running_loop()
        self._timers[snapshot.key] = loop.call_later(
            max(delay, 0.0), self._enqueue, snapshot.key, snapshot.version
        )

    def close(self) -> None:
        """Cancel all scheduled refreshes."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._due.clear()

    def _enqueue(self, key: TaskKey, version: int) -> None:
        del self._timers[key]
        self._due.append((key, version))
        if len(self._due) == 1:
            asyncio.get_running_loop().call_soon(self._start_due)

    def _start_due(self) -> None:
        for _ in range(min(_PER_ITERATION, len(self._due))):
            self._refresh(*self._due.popleft())
        if self._due:
            # In the next iteration, so that requests that arrived meanwhile are answered first.
            asyncio.get_running_loop().call_soon(self._start_due)
