"""Where snapshots live. The service knows this Protocol and never which store is behind it.

take_off -> a fresh snapshot, whoever fetched it   -> the flight ends with it
         -> a failure, whoever met it              -> the flight ends with it
         -> a lease: ask upstream, then            -> land | fail | abandon
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, Self

from gateway.domain.errors import GatewayError
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import TaskKey


class Lease(NamedTuple):
    """The right to ask upstream about a task, over all replicas. `version` is for the answer's snapshot.

    `token` proves whose lease it is; it is empty where nobody else could take it.
    """

    key: TaskKey
    version: int
    token: str = ""


class Store(Protocol):
    """Keeps the newest snapshot of each task, and for a moment the failures to get one.

    `peek`, `is_current`, `peek_stale`, `latest` and `failure` never wait: they answer from this process's
    memory. The others may ask a server, and never raise when it is gone: each replica then goes on alone.
    Open it with `async with`.
    """

    @property
    def trouble(self) -> str | None:
        """Why it does less than it should, in a word."""
        ...

    async def __aenter__(self) -> Self:
        """Make ready; it need not wait until a server is reached."""
        ...

    async def __aexit__(self, *exc_info: object) -> None:
        """Let go of whatever is held open."""
        ...

    def peek(self, key: TaskKey) -> Snapshot | None:
        """Return the snapshot held here, fresh or not, unless a newer one may have been missed."""
        ...

    def is_current(self, snapshot: Snapshot, now: float) -> bool:
        """Tell whether `peek`, which has returned this snapshot, would surely do so again `now`.

        Asked at every repeated hit, so no look-up: whoever only asks this keeps nothing in the cache.
        """
        ...

    def peek_stale(self, key: TaskKey) -> Snapshot | None:
        """Return the snapshot held here even then: to cover a failure."""
        ...

    def latest(self, key: TaskKey) -> Snapshot | None:
        """Return the newest snapshot known here, be it shown yet or not: for what follows it."""
        ...

    def failure(self, key: TaskKey) -> GatewayError | None:
        """Return the failure that is remembered against a task, while it is."""
        ...

    async def sync(self) -> bool:
        """Wait for a moment until nothing may have been missed; tell whether `peek` may know more now."""
        ...

    async def acquire(
        self, key: TaskKey, *, after: int | None = None, timeout_seconds: float = math.inf
    ) -> Snapshot | GatewayError | Lease:
        """Return what ends a flight before it asks upstream, or the lease to ask.

        `after`: a fresh snapshot will do only if its stamp is larger. Where another replica holds
        the lease, this waits until that one has landed, failed or died, or patience has run out.
        """
        ...

    async def commit(self, lease: Lease, snapshot: Snapshot) -> Snapshot | None:
        """Store a snapshot unless a newer one is there, and end the lease; return the one that is kept.

        What has ended stays ended: no snapshot of a task that goes on replaces a terminal one. It returns
        when what is kept is shown, by every replica. None: too late, and what is kept is not fresh, or
        another replica is asking: take off again.
        """
        ...

    async def fail(self, lease: Lease, error: GatewayError, *, seconds: float) -> None:
        """Remember a failure for so many seconds, and end the lease."""
        ...

    async def abandon(self, lease: Lease) -> None:
        """End the lease without an outcome."""
        ...

    async def token(self, per_second: float, *, saved: float, timeout_seconds: float) -> float:
        """Take one upstream call out of the replicas' common budget; return the seconds to wait for it.

        `saved`: how many calls a silence saves up. Raises: BudgetSpent, when that exceeds
        `timeout_seconds`.
        """
        ...

    async def announce_throttling(self, retry_after: float | None) -> None:
        """Tell the other replicas that upstream has slowed this one down, and for how long, if it said so."""
        ...

    def on_throttled(self, listener: Callable[[float | None], None]) -> None:
        """Call `listener` when upstream has slowed a replica down, perhaps this one."""
        ...

    def on_change(self, listener: Callable[[Snapshot], None]) -> None:
        """Call `listener`, on the event loop, with each snapshot stored from now on, by whichever replica."""
        ...

    def __len__(self) -> int:
        """Return the number of snapshots held here; like `size` it changes nothing: any thread may ask."""
        ...

    def size(self) -> int:
        """Return the memory of what is held here, in bytes."""
        ...
