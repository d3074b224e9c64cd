"""The interface of a store of snapshots. The service uses it without knowing the implementation.

acquire -> a fresh snapshot, fetched by any replica   -> the result of the in-flight request
        -> a failure, met by any replica              -> the result of the in-flight request
        -> a lease: query the upstream, then          -> commit | fail | abandon
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, Self

from gateway.domain.errors import GatewayError
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import TaskKey


class Lease(NamedTuple):
    """The exclusive right, among all replicas, to query the upstream about a task.

    `version` is the version of the resulting snapshot: a fencing token. `token` identifies the holder; it is
    empty if no other replica can take the lease.
    """

    key: TaskKey
    version: int
    token: str = ""


class Store(Protocol):
    """Keeps the latest snapshot of each task, and for a short time the failures to fetch one.

    `peek`, `is_current`, `peek_stale`, `latest` and `failure` read this process's memory and never wait. The
    other methods may query a server. They do not raise if it is unavailable: each replica then works with its
    own memory. Open a store with `async with`.
    """

    @property
    def trouble(self) -> str | None:
        """The reason why the store is degraded, in one word; None if it is not."""
        ...

    async def __aenter__(self) -> Self:
        """Open the store; this need not wait for a connection to a server."""
        ...

    async def __aexit__(self, *exc_info: object) -> None:
        """Close all connections."""
        ...

    def peek(self, key: TaskKey) -> Snapshot | None:
        """Return the snapshot in memory, fresh or not, unless a newer one may have been missed."""
        ...

    def is_current(self, snapshot: Snapshot, now: float) -> bool:
        """Return whether `peek`, which has returned this snapshot, would certainly return it again `now`.

        Called for each repeated hit, so it does no look-up and does not count as a use of the cache entry.
        """
        ...

    def peek_stale(self, key: TaskKey) -> Snapshot | None:
        """Return the snapshot in memory even if a newer one may have been missed: for stale-if-error."""
        ...

    def latest(self, key: TaskKey) -> Snapshot | None:
        """Return the latest snapshot known, visible yet or not: the one that a new snapshot follows."""
        ...

    def failure(self, key: TaskKey) -> GatewayError | None:
        """Return the cached failure of a task, if any (negative cache)."""
        ...

    async def sync(self) -> bool:
        """Wait briefly for the read barrier; return whether `peek` may return a newer snapshot now."""
        ...

    async def acquire(
        self, key: TaskKey, *, after: int | None = None, timeout_seconds: float = math.inf
    ) -> Snapshot | GatewayError | Lease:
        """Return a result that makes an upstream query unnecessary, or the lease for one.

        `after`: only a fresh snapshot with a larger version is a result. If another replica holds the lease,
        this waits until that replica commits, fails or dies, at most `timeout_seconds`.
        """
        ...

    async def commit(self, lease: Lease, snapshot: Snapshot) -> Snapshot | None:
        """Store a snapshot unless a newer one is stored, and end the lease; return the stored one.

        A terminal snapshot is never replaced by a non-terminal one. This returns when the stored snapshot
        is visible in every replica. None: the lease has expired, and the stored snapshot is not fresh, or
        another replica holds the lease. Call `acquire` again.
        """
        ...

    async def fail(self, lease: Lease, error: GatewayError, *, seconds: float) -> None:
        """Cache a failure for `seconds`, and end the lease."""
        ...

    async def abandon(self, lease: Lease) -> None:
        """End the lease without a result."""
        ...

    async def token(self, per_second: float, *, saved: float, timeout_seconds: float) -> float:
        """Take one permit from the replicas' shared rate limiter; return the seconds to wait for it.

        `saved`: the burst size, in calls. Raises: RateLimiterExhausted if the wait exceeds `timeout_seconds`.
        """
        ...

    async def announce_throttling(self, retry_after: float | None) -> None:
        """Notify the other replicas that the upstream throttles, and for how long, if known."""
        ...

    def on_throttled(self, listener: Callable[[float | None], None]) -> None:
        """Call `listener` when the upstream throttles any replica, including this one."""
        ...

    def on_change(self, listener: Callable[[Snapshot], None]) -> None:
        """Call `listener`, on the event loop, with each snapshot that any replica stores from now on."""
        ...

    def __len__(self) -> int:
        """Return the number of snapshots in memory. Like `size`, read-only and safe in any thread."""
        ...

    def size(self) -> int:
        """Return the memory of all entries, in bytes."""
        ...
