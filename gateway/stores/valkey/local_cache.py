"""What this replica holds of what all share, and from when to when each copy may be shown.

    taken up -> coming, until every replica has it -> held: shown in its predecessor's place
    something may have been missed -> doubted: not shown before the server has confirmed it

What follows a snapshot that may still be shown says from which moment on it is. So the replicas change
over together, however soon each of them has it; whoever asks them in turn is never shown the older one again.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from gateway.domain.snapshot import Snapshot
from gateway.domain.task import TaskKey
from gateway.stores.memory import MemoryStore

_TIMER_SECONDS = (
    0.002  # the loop's clock counts in milliseconds: a timer never comes before the moment itself
)


class _Arrival(NamedTuple):
    """A snapshot to come, and the timer that lets those know who wait and do not ask."""

    shown_at: float
    snapshot: Snapshot
    timer: asyncio.TimerHandle


class _PendingActivations:
    """A task's snapshots to come, oldest first; `over` when all have."""

    def __init__(self) -> None:
        self.arrivals: deque[_Arrival] = deque()
        self.over = asyncio.Event()


class LocalCache:
    """Holds copies in `memory`. `clock` is the snapshots' clock."""

    def __init__(self, memory: MemoryStore, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._memory = memory
        self._clock = clock
        self._coming: dict[TaskKey, _PendingActivations] = {}
        self._doubted: dict[TaskKey, int] = {}  # the newest stamp known when something may have been missed

    def peek(self, key: TaskKey) -> Snapshot | None:
        """Return the snapshot to be shown now, unless it is doubted."""
        snapshot = self.peek_stale(key)
        if self._doubted and snapshot is not None and snapshot.version <= self._doubted.get(key, -1):
            return None
        return snapshot

    def peek_stale(self, key: TaskKey) -> Snapshot | None:
        """Return the snapshot to be shown now, doubted or not."""
        if self._coming and (coming := self._coming.get(key)) is not None:
            now = self._clock()
            while coming.arrivals and coming.arrivals[0].shown_at <= now:
                self._arrive(key, coming)
        return self._memory.peek(key)

    def latest(self, key: TaskKey) -> Snapshot | None:
        """Return the newest snapshot known, which may be still to come."""
        coming = self._coming.get(key)
        return coming.arrivals[-1].snapshot if coming is not None else self._memory.peek(key)

    def doubted(self, key: TaskKey) -> bool:
        """Tell whether the server is to be asked before what is held is shown."""
        return key in self._doubted

    def doubt(self, concerned: Callable[[TaskKey], bool]) -> None:
        """Doubt whatever is known of these tasks: something newer may have been missed."""
        held = {snapshot.key: snapshot for snapshot in self._memory.snapshots()}
        latest = held | {key: coming.arrivals[-1].snapshot for key, coming in self._coming.items()}
        self._doubted = {
            key: snapshot.version
            for key, snapshot in latest.items()
            if concerned(key) or key in self._doubted
        }
        for key in self._doubted.keys() & held.keys():
            held[key].shown_until = -math.inf

    def confirm(self, key: TaskKey) -> None:
        """Doubt no more: the server knows nothing newer."""
        if self._doubted.pop(key, None) is not None and (held := self._memory.peek(key)) is not None:
            coming = self._coming.get(key)
            held.shown_until = math.inf if coming is None else coming.arrivals[0].shown_at

    def take_up(self, snapshot: Snapshot, *, shown_at: float) -> None:
        """Hold a snapshot from a moment on, unless this one or a newer one is known."""
        key = snapshot.key
        latest = self.latest(key)
        if latest is not None and (
            latest.version > snapshot.version or (latest.terminal and not snapshot.terminal)
        ):
            return
        if self._doubted:
            self.confirm(key)
        if latest is not None and latest.version == snapshot.version:
            return
        wait = shown_at - self._clock()
        if wait <= 0:
            self._memory.keep(snapshot)
            return
        coming = self._coming.get(key)
        if coming is None:
            coming = self._coming[key] = _PendingActivations()
        for earlier in (latest, self._memory.peek(key)):
            if earlier is not None:
                earlier.shown_until = min(earlier.shown_until, shown_at)
        timer = asyncio.get_running_loop().call_later(
            wait + _TIMER_SECONDS, self._arrive, key, coming, snapshot
        )
        coming.arrivals.append(_Arrival(shown_at, snapshot, timer))

    async def arrived(self, key: TaskKey) -> None:
        """Wait until nothing of a task is still to come."""
        while (coming := self._coming.get(key)) is not None:
            await coming.over.wait()

    def close(self) -> None:
        """Let nothing come any more."""
        for coming in self._coming.values():
            for arrival in coming.arrivals:
                arrival.timer.cancel()

    def _arrive(self, key: TaskKey, coming: _PendingActivations, last: Snapshot | None = None) -> None:
        """Hold the next to come; those up to `last`, where it is given."""
        while coming.arrivals:
            arrival = coming.arrivals.popleft()
            arrival.timer.cancel()
            if not coming.arrivals:
                del self._coming[key]
                coming.over.set()
            self._memory.keep(arrival.snapshot)
            if last is None or arrival.snapshot is last:
                return
