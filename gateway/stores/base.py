"""The interface of a store of snapshots. The service uses it without knowing the implementation.

acquire -> a fresh snapshot that any replica has fetched -> use it instead of a query
        -> a cached failure of any replica               -> use it instead of a query
        -> a lease -> query the upstream                 -> commit | fail | abandon
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

from gateway.domain.errors import GatewayError
from gateway.domain.permits import Permits
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import TaskKey


@dataclass(slots=True, eq=False)
class CacheEntry:
    """A snapshot in this process's memory, and how it is used there.

    Attributes:
        snapshot: The snapshot.
        reads: Number of lookups that have returned it while it was fresh.
        current: False if it has been replaced or evicted, or if another replica may have a newer one. It may
            then be served only instead of an error.
        fetched_here: Whether this replica has fetched it from the upstream.
        superseded_by: The newest version that another replica has announced.
    """

    snapshot: Snapshot
    reads: int = 0
    current: bool = True
    fetched_here: bool = True
    superseded_by: int = 0


class Wanted(NamedTuple):
    """Which fresh snapshots make a query unnecessary. By default, any fresh snapshot does.

    Attributes:
        newer_than: Only one with a larger version than this.
        seen_revision: Only one that is not older than the body with this revision.
    """

    newer_than: int = 0
    seen_revision: int = 0

    def is_met_by(self, snapshot: Snapshot) -> bool:
        """Tell whether this snapshot, if it is fresh, makes a query unnecessary."""
        return snapshot.version > self.newer_than and snapshot.is_at_least(self.seen_revision)


ANY = Wanted()


class Lease(NamedTuple):
    """The exclusive right, among all replicas, to query the upstream about a task.

    `version` is a fencing token: the version of the snapshot that the holder commits. `token` identifies the
    holder. It is empty for a lease that only exists in this process.
    """

    key: TaskKey
    version: int
    token: str = ""


class Store(Protocol):
    """Keeps the latest snapshot of each task, and for a short time the failures to fetch one.

    `peek`, `is_current`, `peek_any` and `failure` read this process's memory and never wait. The other
    methods may query a server. They do not raise if it is unavailable: each replica then works with its own
    memory. Open a store with `async with`.
    """

    @property
    def trouble(self) -> str | None:
        """The reason why the store does not work fully, as text for operators; None if it does."""
        ...

    async def __aenter__(self) -> Self:
        """Open the store; this need not wait for a connection to a server."""
        ...

    async def __aexit__(self, *exc_info: object) -> None:
        """Close all connections."""
        ...

    def peek(self, key: TaskKey) -> CacheEntry | None:
        """Return the snapshot in memory, fresh or not, unless another replica may have a newer one."""
        ...

    def is_current(self, entry: CacheEntry) -> bool:
        """Tell whether an entry that `peek` has returned is still the entry that `peek` would return.

        Every repeated hit calls this instead of `peek`. So it does no lookup, and does not mark the entry as
        recently used.
        """
        ...

    def peek_any(self, key: TaskKey) -> Snapshot | None:
        """Return the latest snapshot in memory, even if another replica may have a newer one."""
        ...

    def failure(self, key: TaskKey) -> GatewayError | None:
        """Return the cached failure of a task, if any (negative cache)."""
        ...

    async def sync(self) -> bool:
        """Read the messages of other replicas, if some may be unread; return whether this was necessary.

        While messages may be unread, `peek` returns None. So call `peek` again if the result is True.
        """
        ...

    async def acquire(
        self, key: TaskKey, wanted: Wanted = ANY, *, timeout_seconds: float = math.inf
    ) -> Snapshot | GatewayError | Lease:
        """Return a snapshot or failure that makes an upstream query unnecessary, or the lease for a query.

        If another replica holds the lease, this waits until that replica has ended the lease, or until the
        lease has expired, but at most for `timeout_seconds`.
        """
        ...

    async def commit(self, lease: Lease, build: Callable[[Snapshot | None], Snapshot]) -> Snapshot | None:
        """Store a snapshot, end the lease, and return the stored snapshot.

        If a newer snapshot is stored, or a terminal one while the new one is not terminal, that one is kept
        and returned. Return None if the lease was lost and the stored snapshot is not fresh: call `acquire`
        again.

        `build` returns the new snapshot, given the previous one. It is called again if another replica has
        stored a snapshot meanwhile. If it raises an exception, the exception is passed on, and the lease is
        kept.
        """
        ...

    async def fail(self, lease: Lease, error: GatewayError, *, seconds: float) -> None:
        """Cache a failure for `seconds`, and end the lease.

        Only failures that any replica would meet are shared. A lost connection, for example, is not.
        """
        ...

    async def abandon(self, lease: Lease) -> None:
        """End the lease without a result."""
        ...

    def release(self, lease: Lease) -> None:
        """End the lease after a failed attempt, although this replica retries its query.

        Another replica can then query. This one may still call `commit`.
        """
        ...

    async def take_permits(
        self, per_second: float, *, burst: float, renewals: int, first_queries: int
    ) -> Permits | None:
        """Take permits from the replicas' shared rate limiter; None if there is no such limiter now.

        `burst`: the size of its token bucket. `renewals` and `first_queries`: how many queries of either kind
        are queued on this replica.
        """
        ...

    async def announce_throttling(self, retry_after: float | None) -> None:
        """Announce to the other replicas that the upstream throttles, with its Retry-After, if any."""
        ...

    def on_throttled(self, listener: Callable[[float | None], None]) -> None:
        """Call `listener` with the `retry_after` of each announcement of throttling.

        A shared store also calls it for the announcements of this replica.
        """
        ...

    def on_change(
        self, listener: Callable[[Snapshot], None], *, wanted: Callable[[TaskKey], bool] = lambda _: False
    ) -> None:
        """Call `listener`, on the event loop, with each snapshot that is stored from now on.

        `wanted` tells whether the listener needs the snapshots of a task that other replicas fetch.
        """
        ...

    def __len__(self) -> int:
        """Return the number of snapshots in memory. Any thread may call this, and `size`."""
        ...

    def size(self) -> int:
        """Return the size of all snapshots and failures in memory, in bytes."""
        ...
