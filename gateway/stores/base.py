"""The interface of a store of snapshots. The service uses it without knowing the implementation.

acquire -> a fresh snapshot, fetched by any replica     -> the result of the in-flight request
        -> a cached failure, recorded by any replica    -> the result of the in-flight request
        -> a lease: the caller queries the upstream     -> commit | fail | abandon
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

    `version` becomes the version of the snapshot. It is a fencing token: a snapshot of an older lease does
    not replace a newer one. `token` identifies the holder; it is empty if no server granted the lease.
    """

    key: TaskKey
    version: int
    token: str = ""


class Store(Protocol):
    """Keeps the latest snapshot of each task, and for a short time the failures to fetch one.

    The methods that are not `async` use this process's memory only, and never wait. The others may query a
    server. If the server is unavailable they do not raise: the replica then works with its own memory. Open a
    store with `async with`.
    """

    @property
    def trouble(self) -> str | None:
        """The reason why the store is degraded, in one word; None if it is not."""
        ...

    async def __aenter__(self) -> Self:
        """Open the store. It is usable at once, and may connect to a server in the background."""
        ...

    async def __aexit__(self, *exc_info: object) -> None:
        """Close all connections."""
        ...

    def peek(self, key: TaskKey) -> Snapshot | None:
        """Return the visible snapshot, fresh or not; None if this replica may have missed a newer one."""
        ...

    def is_current(self, snapshot: Snapshot, now: float) -> bool:
        """Return whether `peek`, which has returned this snapshot, would certainly return it again `now`.

        It runs for each repeated hit, so it does no lookup and does not count as a use of the cache entry.
        """
        ...

    def peek_stale(self, key: TaskKey) -> Snapshot | None:
        """Return the visible snapshot even if a newer one may have been missed; for stale-if-error."""
        ...

    def latest(self, key: TaskKey) -> Snapshot | None:
        """Return the latest known snapshot, visible or not; a new snapshot is built on it."""
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

        `after`: a snapshot is a result only if its version is larger. If another replica holds the lease,
        this waits until that replica ends the lease or the lease expires, for at most `timeout_seconds`.
        """
        ...

    async def commit(self, lease: Lease, snapshot: Snapshot) -> Snapshot | None:
        """Store a snapshot unless a newer one is stored, and end the lease; return the stored one.

        A terminal snapshot is never replaced by a non-terminal one. This returns when every replica can show
        the stored snapshot. It returns None if the lease has expired and there is no fresh snapshot instead:
        call `acquire` again.
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

        `per_second`: the rate. `saved`: the burst size, in calls. Raises: RateLimiterExhausted if the wait
        exceeds `timeout_seconds`.
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
        """Return the number of snapshots in memory. Like `size`, it only reads, and is safe in any thread."""
        ...

    def size(self) -> int:
        """Return the memory of all entries, in bytes."""
        ...
