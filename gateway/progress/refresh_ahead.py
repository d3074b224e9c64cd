"""Refreshing ahead: a hot task's flight takes off so early that it lands when the snapshot goes stale.

    hot -> a timer, for lifetime - age - the usual latency -> the runway, a few at a time -> take off

Tasks that were fetched together are due together, and a thousand flights that begin in one turn of the
event loop hold up every answer. So those that are due queue on a runway, and callers are answered
between one few and the next; which also spreads what they do from then on.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from gateway.domain.snapshot import Snapshot
from gateway.domain.task import Operation, TaskKey

_LATENCY_WEIGHT = 0.3  # of the newest latency in the moving average
_AT_ONCE = 4  # flights that begin in one turn of the loop: each takes some 0.1 ms until it waits


class RefreshAhead:
    """Plans the flights of hot tasks.

    `acquire` begins one, unless the snapshot with this stamp was renewed meanwhile. No plan holds a
    snapshot, which may have had to make room.
    """

    def __init__(self, acquire: Callable[[TaskKey, int], None]) -> None:
        self._take_off = acquire
        self._latency = dict.fromkeys(Operation, 0.0)  # moving averages, in seconds
        self._timers: dict[TaskKey, asyncio.TimerHandle] = {}
        self._runway: deque[tuple[TaskKey, int]] = deque()

    def learn(self, operation: Operation, seconds: float) -> None:
        """Note how long a flight took to get its answer."""
        self._latency[operation] += _LATENCY_WEIGHT * (seconds - self._latency[operation])

    def plan(self, snapshot: Snapshot, age: float) -> None:
        """Have this snapshot, so many seconds old, renewed when it goes stale, in place of an older one."""
        if (timer := self._timers.pop(snapshot.key, None)) is not None:
            timer.cancel()
        delay = snapshot.lifetime - age - self._latency[snapshot.key.operation]
        loop = asyncio.get_running_loop()
        self._timers[snapshot.key] = loop.call_later(
            max(delay, 0.0), self._queue, snapshot.key, snapshot.version
        )

    def close(self) -> None:
        """Forget all plans."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._runway.clear()

    def _queue(self, key: TaskKey, version: int) -> None:
        del self._timers[key]
        self._runway.append((key, version))
        if len(self._runway) == 1:
            asyncio.get_running_loop().call_soon(self._let_go)

    def _let_go(self) -> None:
        for _ in range(min(_AT_ONCE, len(self._runway))):
            self._take_off(*self._runway.popleft())
        if self._runway:
            # In the loop's next turn: who has asked meanwhile is answered first.
            asyncio.get_running_loop().call_soon(self._let_go)
