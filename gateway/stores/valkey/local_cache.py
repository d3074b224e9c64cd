"""The local cache of a replica: copies of shared snapshots, and when each copy becomes visible.

    apply      -> pending until every replica has the snapshot -> active: replaces its predecessor
    invalidate -> a message may have been missed: not visible until `revalidate`

A snapshot that may still be visible is replaced at an activation time. All replicas switch at that time,
independent of when each of them receives the replacement, so a client that queries several replicas never
sees an older snapshot again.
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

# The loop's clock counts in milliseconds: without the margin, a timer could fire before the activation time.
_TIMER_SECONDS = 0.002


class _Activation(NamedTuple):
    """A pending snapshot, and the timer that notifies subscribers and waiters even if no request comes."""

    shown_at: float
    snapshot: Snapshot
    timer: asyncio.TimerHandle


class _PendingActivations:
    """The pending snapshots of a task, oldest first; `done` is set when all are active."""

    def __init__(self) -> None:
        self.activations: deque[_Activation] = deque()
        self.done = asyncio.Event()


class LocalCache:
    """Keeps active copies in `memory`. `clock` is the clock of the snapshots."""

    def __init__(self, memory: MemoryStore, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._memory = memory
        self._clock = clock
        self._pending: dict[TaskKey, _PendingActivations] = {}
        # The latest version known of a task when a message about it may have been missed.
        self._invalidated: dict[TaskKey, int] = {}

    def peek(self, key: TaskKey) -> Snapshot | None:
        """Return the active snapshot, unless it is invalidated."""
        snapshot = self.peek_stale(key)
        if self._invalidated and snapshot is not None and snapshot.version <= self._invalidated.get(key, -1):
            return None
        return snapshot

    def peek_stale(self, key: TaskKey) -> Snapshot | None:
        """Return the active snapshot, invalidated or not."""
        if self._pending and (pending := self._pending.get(key)) is not None:
            now = self._clock()
            while pending.activations and pending.activations[0].shown_at <= now:
                self._activate(key, pending)
        return self._memory.peek(key)

    def latest(self, key: TaskKey) -> Snapshot | None:
        """Return the latest snapshot known, which may be pending."""
        pending = self._pending.get(key)
        return pending.activations[-1].snapshot if pending is not None else self._memory.peek(key)

    def invalidated(self, key: TaskKey) -> bool:
        """Return whether the active snapshot is not visible until the server has been queried."""
        return key in self._invalidated

    def invalidate(self, concerned: Callable[[TaskKey], bool]) -> None:
        """Invalidate the snapshots of these tasks: a newer one may have been missed."""
        active = {snapshot.key: snapshot for snapshot in self._memory.snapshots()}
        latest = active | {key: pending.activations[-1].snapshot for key, pending in self._pending.items()}
        self._invalidated = {
            key: snapshot.version
            for key, snapshot in latest.items()
            if concerned(key) or key in self._invalidated
        }
        for key in self._invalidated.keys() & active.keys():
            active[key].current_until = -math.inf

    def revalidate(self, key: TaskKey) -> None:
        """Make a task visible again: the server has no newer snapshot."""
        if self._invalidated.pop(key, None) is not None and (active := self._memory.peek(key)) is not None:
            pending = self._pending.get(key)
            active.current_until = math.inf if pending is None else pending.activations[0].shown_at

    def apply(self, snapshot: Snapshot, *, shown_at: float) -> None:
        """Activate a snapshot at `shown_at`, unless this one or a newer one is known."""
        key = snapshot.key
        latest = self.latest(key)
        if latest is not None and (
            latest.version > snapshot.version or (latest.terminal and not snapshot.terminal)
        ):
            return
        if self._invalidated:
            self.revalidate(key)
        if latest is not None and latest.version == snapshot.version:
            return
        wait = shown_at - self._clock()
        if wait <= 0:
            self._memory.keep(snapshot)
            return
        pending = self._pending.get(key)
        if pending is None:
            pending = self._pending[key] = _PendingActivations()
        for earlier in (latest, self._memory.peek(key)):
            if earlier is not None:
                earlier.current_until = min(earlier.current_until, shown_at)
        timer = asyncio.get_running_loop().call_later(
            wait + _TIMER_SECONDS, self._activate, key, pending, snapshot
        )
        pending.activations.append(_Activation(shown_at, snapshot, timer))

    async def activated(self, key: TaskKey) -> None:
        """Wait until no snapshot of a task is pending."""
        while (pending := self._pending.get(key)) is not None:
            await pending.done.wait()

    def close(self) -> None:
        """Cancel all pending activations."""
        for pending in self._pending.values():
            for activation in pending.activations:
                activation.timer.cancel()

    def _activate(self, key: TaskKey, pending: _PendingActivations, last: Snapshot | None = None) -> None:
        """Activate the next pending snapshot, or all up to `last`."""
        while pending.activations:
            activation = pending.activations.popleft()
            activation.timer.cancel()
            if not pending.activations:
                del self._pending[key]
                pending.done.set()
            self._memory.keep(activation.snapshot)
            if last is None or activation.snapshot is last:
                return
