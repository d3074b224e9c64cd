"""The interface of a store of snapshots. The service uses it without knowing the implementation.

    acquire -> a fresh snapshot that any replica has fetched -> use it instead of a query
            -> a cached failure of any replica               -> use it instead of a query
            -> a lease -> query the upstream -> commit          a snapshot
                                             -> store_failure   a failure of this task
                                             -> release_lease   no result

Each of these three ends the lease. `release_lease_early` ends it while the query still runs, so that another
replica can query the upstream, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

from gateway.domain.errors import GatewayError
from gateway.domain.permits_reply import PermitsReply
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import TaskKey


@dataclass(slots=True, eq=False)
class CacheEntry:
    """A snapshot in this process's memory, and how it is used there.

    Attributes:
        snapshot: The snapshot.
        reads: Number of lookups that have returned it while it was fresh.
        outdated: True once the snapshot has been replaced or evicted, and while another replica may have a
            newer one. An outdated entry is served only instead of an error.
        fetched_here: Whether this replica has fetched it from the upstream.
        failure: The failure of the latest query that should have replaced the stale snapshot, if any.
        required_version: The version that a newer snapshot must have at least: the newest that another
            replica has announced, or one after overlapping queries (`mark_outdated`). 0 if there is none.
    """

    snapshot: Snapshot
    reads: int = 0
    outdated: bool = False
    fetched_here: bool = True
    required_version: int = 0
    failure: GatewayError | None = None


class Requirement(NamedTuple):
    """The condition on a fresh snapshot that makes a query unnecessary. By default, any fresh one does.

    Attributes:
        newer_than: The version of the snapshot must be larger.
        seen_revision: The snapshot must not be older than the body with this revision.
    """

    newer_than: int = 0
    seen_revision: int = 0

    def is_met_by(self, snapshot: Snapshot) -> bool:
        """Tell whether this snapshot, if it is fresh, makes a query unnecessary."""
        return snapshot.version > self.newer_than and snapshot.may_follow(self.seen_revision)


ANY_FRESH = Requirement()


class Lease(NamedTuple):
    """The exclusive right, among all replicas, to query the upstream about a task.

    `version` is a fencing token: the version of the snapshot that the holder commits (see `Snapshot`).
    `token` identifies the holder; it is empty for a lease that exists in this process only.
    """

    key: TaskKey
    version: int
    token: str = ""


class Store(Protocol):
    """Keeps the latest snapshot of each task, and for a short time the failures to fetch one.

    `current_entry`, `entry`, `is_current`, `last_known` and `cached_failure` read this process's memory
    and never wait. Methods with `async` may send commands to a server. They do not raise an exception if it
    is unavailable: each replica then works with its own memory. Open a store with `async with`.
    """

    @property
    def trouble(self) -> str | None:
        """The reason why the store does not work fully, as text for operators; None if it does."""
        ...

    @property
    def starting(self) -> bool:
        """Whether the first connection to a server is awaited. This ends after a short time in any case."""
        ...

    async def __aenter__(self) -> Self:
        """Open the store; this need not wait for a connection to a server."""
        ...

    async def __aexit__(self, *exc_info: object) -> None:
        """Close all connections."""
        ...

    def current_entry(self, key: TaskKey) -> CacheEntry | None:
        """Return the entry of a task if it is not outdated and no message may be unread; it may be stale."""
        ...

    def entry(self, key: TaskKey) -> CacheEntry | None:
        """Return the entry of a task, even if `current_entry` would not."""
        ...

    def is_current(self, entry: CacheEntry) -> bool:
        """Tell whether `current_entry` would return this entry again.

        Every repeated hit calls this instead of `current_entry`. So it does no lookup, which would be a
        fifth of the cost of the hit, and does not mark the entry as recently used.
        """
        ...

    def last_known(self, key: TaskKey) -> Snapshot | None:
        """Return the snapshot in memory, even if it is stale or another replica may have a newer one."""
        ...

    def cached_failure(self, key: TaskKey) -> GatewayError | None:
        """Return the cached failure of a task, if any (negative cache)."""
        ...

    async def read_arrived_messages(self) -> bool:
        """Read the messages of other replicas that have arrived; return whether some may have been unread.

        While messages may be unread, `current_entry` returns None. So call it again if the result is True.
        """
        ...

    async def load_announced_snapshot(self, key: TaskKey) -> bool:
        """Read the snapshot that another replica has announced; return whether it was read.

        Return False at once if no snapshot was announced that is newer than the one in memory.
        """
        ...

    async def acquire(
        self, key: TaskKey, requirement: Requirement = ANY_FRESH, *, timeout_seconds: float = math.inf
    ) -> Snapshot | GatewayError | Lease:
        """Return a snapshot or failure that makes an upstream query unnecessary, or the lease for a query.

        A returned snapshot is fresh and meets the requirement; a shared store may also return one that does
        not meet it but is terminal. If another replica holds the lease, this waits until the lease has ended
        or expired. After `timeout_seconds` it returns UpstreamTimeout.
        """
        ...

    async def commit(self, lease: Lease, build: Callable[[Snapshot | None], Snapshot]) -> Snapshot | None:
        """Store a snapshot, end the lease, and return the stored snapshot.

        If the stored snapshot is newer, or only the stored one is terminal, it is kept and returned. The
        result is None if there is no snapshot to serve: the lease was lost and the stored snapshot is not
        fresh, or another replica has announced a newer snapshot. Then call `acquire` again.

        `build` returns the new snapshot, given the previous one. It is called again if another replica has
        stored a snapshot meanwhile. If `build` raises an exception, this method raises it, too, and the lease
        does not end.
        """
        ...

    async def store_failure(self, lease: Lease, error: GatewayError, *, seconds: float) -> None:
        """Cache a failure for `seconds`, and end the lease.

        A failure is shared only if the other replicas would have it, too. A lost connection, for example, is
        not shared.
        """
        ...

    async def release_lease(self, lease: Lease) -> None:
        """End the lease without a result."""
        ...

    def release_lease_early(self, lease: Lease) -> None:
        """End the lease before a retry: another replica may reach the upstream although this one cannot.

        This replica still calls `commit`, `store_failure` or `release_lease` at the end of its query.
        """
        ...

    async def take_permits(
        self, per_second: float, *, burst: float, refreshes: int, first_queries: int
    ) -> PermitsReply | None:
        """Take permits from the rate limiter that the replicas share; return None if there is none now.

        `burst`: the size of its token bucket. `refreshes` and `first_queries`: the number of queries of each
        kind for which this replica can use a permit now. A refresh is a query for a task of which a snapshot
        is known.
        """
        ...

    async def announce_throttling(self, retry_after: float | None) -> None:
        """Announce to the other replicas that the upstream throttles, with its Retry-After, if any."""
        ...

    def add_throttling_listener(self, listener: Callable[[float | None], None]) -> None:
        """Call `listener` with the `retry_after` of each announcement of throttling.

        A shared store also calls it for the announcements of this replica.
        """
        ...

    def add_snapshot_listener(
        self, listener: Callable[[Snapshot], None], *, is_watched: Callable[[TaskKey], bool] = lambda _: False
    ) -> None:
        """Call `listener`, on the event loop, with each new snapshot, even if it is too large to be kept.

        `is_watched` tells whether the listener needs each new snapshot of a task. Then the store loads those
        that other replicas fetch, even if no caller reads them.
        """
        ...

    def __len__(self) -> int:
        """Return the number of snapshots in memory. Any thread may call this, and `size`."""
        ...

    def size(self) -> int:
        """Return the size of all snapshots and failures in memory, in bytes."""
        ...
