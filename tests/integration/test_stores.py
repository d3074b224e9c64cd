"""The contract of every store: one suite for all implementations, on a simulated clock."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest
from prometheus_client import CollectorRegistry

from gateway.domain.errors import (
    GatewayError,
    UpstreamDetail,
    UpstreamInvalid,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import Operation, Status, TaskKey
from gateway.settings.store_section import Store as StoreSettings
from gateway.stores.base import CacheEntry, Lease, Requirement, Store
from gateway.stores.memory import ENTRY_OVERHEAD_BYTES, REMEMBER_SECONDS, MemoryStore
from gateway.stores.valkey.store import ValkeyStore
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.redaction import Redactor
from tests.support.harness import Json, eventually
from tests.support.seen import TAGS, said, seen
from tests.support.storeserver import shared_by

STALE_SECONDS = 60.0
LIFETIME = 2.0
KEY = TaskKey(Operation.SD_GET_PROGRESS, "task")
OTHER = TaskKey(Operation.SD_GET_PROGRESS, "other")
RESULT = TaskKey(Operation.SD_GET_RESULT, "task")

Make = Callable[..., Awaitable[Store]]


@dataclass
class Clock:
    """A simulated clock."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """Return the clock of the stores."""
    return Clock()


@pytest.fixture(scope="module", params=["memory", "valkey", "redis", "cluster", "sentinel"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Json | None]:
    """Return the settings of the store under test; None for memory."""
    if request.param == "memory":
        yield None
    else:
        with shared_by(request.param, tmp_path_factory.mktemp(request.param)) as settings:
            yield settings


@pytest.fixture
async def make(shared: Json | None, clock: Clock) -> AsyncIterator[Make]:
    """Return a function that creates an empty store of the kind under test."""
    async with AsyncExitStack() as stack:

        async def make(max_tasks: int = 100, max_bytes: int = 1_000_000) -> Store:
            limits = {"max_tasks": max_tasks, "max_bytes": max_bytes, "min_keep_stale_seconds": STALE_SECONDS}
            if shared is None:
                return await stack.enter_async_context(MemoryStore(**limits, clock=clock))
            store = ValkeyStore(
                StoreSettings.model_validate({**shared, "key_prefix": uuid4().hex, "timeout_seconds": 1}),
                tags=TAGS,
                lifetimes=dict.fromkeys([None, *Status], 3600.0),
                error_seconds=60.0,
                identity=lambda: "account",
                redactor=Redactor(),
                metrics=Metrics(CollectorRegistry(), gateway_version="test"),
                clock=clock,
                **limits,
            )
            await stack.enter_async_context(store)
            await eventually(lambda: store.trouble is None, "the store is up")
            return store

        yield make


@pytest.fixture
async def store(make: Make) -> Store:
    """Return an empty store."""
    return await make()


async def save(store: Store, snapshot: Snapshot) -> Snapshot | None:
    """Commit a snapshot with a lease that no other replica can have taken."""
    return await store.commit(Lease(snapshot.key, snapshot.version), lambda _: snapshot)


async def entry_of(store: Store, key: TaskKey) -> CacheEntry | None:
    """Return the current entry of a task. A busy machine may have paused this process."""
    await store.read_arrived_messages()
    return store.current_entry(key)


async def shown(store: Store, key: TaskKey) -> Snapshot | None:
    """Return the current snapshot of a task."""
    entry = await entry_of(store, key)
    return None if entry is None else entry.snapshot


async def fail(store: Store, key: TaskKey, error: GatewayError, *, seconds: float) -> None:
    """Record a failure with a lease."""
    await store.store_failure(Lease(key, 1), error, seconds=seconds)


@pytest.fixture
def snapshot(clock: Clock) -> Callable[..., Snapshot]:
    """Return a function that creates a snapshot fetched at the current simulated time."""

    def snapshot(key: TaskKey = KEY, *, age: float = 0.0, **values: Any) -> Snapshot:
        values.setdefault("version", int((clock.now - age) * 1_000_000))
        return seen(key, at=clock.now - age, **({"lifetime": LIFETIME} | values))

    return snapshot


async def test_store_is_empty_at_first(store: Store) -> None:
    """An empty store has no snapshot and no failure for any task."""
    assert await shown(store, KEY) is None
    assert store.last_known(KEY) is None
    assert store.cached_failure(KEY) is None
    assert store.trouble is None
    assert len(store) == 0


async def test_store_returns_a_committed_snapshot(store: Store, snapshot: Callable[..., Snapshot]) -> None:
    """A committed snapshot is returned by current_entry, last_known and acquire, with all its fields."""
    one = snapshot(etaRelative=3.0, message="so far", state={"job": "a\nb"})
    assert await save(store, one) is one
    for kept in (await shown(store, KEY), store.last_known(KEY), await store.acquire(KEY)):
        assert isinstance(kept, Snapshot)
        assert (kept.key, kept.fetched_at, kept.lifetime) == (KEY, one.fetched_at, LIFETIME)
        assert (kept.envelope, kept.body, kept.etag) == (one.envelope, one.body, one.etag)
        assert (kept.status, kept.progress, kept.eta_seconds) == (Status.RUNNING, 0.5, 3.0)
    assert len(store) == 1


async def test_store_keeps_tasks_and_operations_apart(
    store: Store, snapshot: Callable[..., Snapshot]
) -> None:
    """A snapshot is found only under its own operation and task ID."""
    keys = [TaskKey(operation, task_id) for operation in Operation for task_id in ("a", "b")]
    for key in keys:
        await save(store, snapshot(key, message=repr(key)))
    assert len(store) == len(keys)
    for key in keys:
        kept = await shown(store, key)
        assert kept is not None
        assert (kept.key, said(kept)) == (key, repr(key))


async def test_store_replaces_older_snapshots(
    store: Store, clock: Clock, snapshot: Callable[..., Snapshot]
) -> None:
    """A newer snapshot replaces an older one."""
    await save(store, snapshot(message="older"))
    clock.now += 1
    newer = await save(store, snapshot(message="newer"))
    assert newer is not None
    assert said(newer) == "newer"
    assert await shown(store, KEY) == newer
    assert len(store) == 1


async def test_store_is_current_needs_no_lookup(
    make: Make, clock: Clock, snapshot: Callable[..., Snapshot]
) -> None:
    """An entry is current until a newer one replaces it, or it is evicted."""
    store = await make(max_tasks=2)
    await save(store, snapshot())
    older = await entry_of(store, KEY)
    assert older is not None
    assert store.is_current(older)
    clock.now += 1
    newest = await save(store, snapshot())
    newer = await entry_of(store, KEY)
    assert newer is not None
    assert newer.snapshot is newest
    assert (store.is_current(older), store.is_current(newer)) == (False, True)
    for other in ("a", "b"):
        await save(store, snapshot(KEY._replace(task_id=other)))
    assert await shown(store, KEY) is None
    assert not store.is_current(newer)


async def test_store_never_goes_back(store: Store, snapshot: Callable[..., Snapshot]) -> None:
    """An older snapshot does not replace a newer one; `commit` returns the newer one."""
    await save(store, snapshot(message="newer"))
    kept = await save(store, snapshot(age=1, message="older"))
    assert kept is not None
    assert said(kept) == "newer"
    assert await shown(store, KEY) is kept
    assert await store.acquire(KEY) is kept


async def test_store_keeps_terminal_snapshots(
    store: Store, clock: Clock, snapshot: Callable[..., Snapshot]
) -> None:
    """A terminal snapshot is replaced only by a later terminal one."""
    ended = await save(store, snapshot(status="succeeded", lifetime=600.0))
    clock.now += 1
    kept = await save(store, snapshot())
    assert kept is not None
    assert ended is not None
    assert (kept.status, kept.version) == (Status.SUCCEEDED, ended.version)
    assert await shown(store, KEY) is kept
    again = snapshot(status="succeeded", lifetime=600.0)
    assert await save(store, again) is again


async def test_store_grants_a_lease_without_a_fresh_snapshot(
    store: Store, clock: Clock, snapshot: Callable[..., Snapshot]
) -> None:
    """Without a fresh snapshot `acquire` returns a lease, with a version above all earlier ones."""
    first = await store.acquire(KEY)
    assert isinstance(first, Lease)
    assert first.key == KEY
    landed = await store.commit(first, lambda _: snapshot(version=first.version))
    assert landed is not None
    assert await store.acquire(KEY) is landed
    clock.now += LIFETIME
    second = await store.acquire(KEY)
    assert isinstance(second, Lease)
    assert second.version > first.version


async def test_store_grants_a_lease_for_a_newer_snapshot(
    store: Store, snapshot: Callable[..., Snapshot]
) -> None:
    """With `after`, `acquire` returns a lease although a snapshot is fresh, or a newer snapshot."""
    landed = await save(store, snapshot(age=1))
    assert landed is not None
    lease = await store.acquire(KEY, Requirement(newer_than=landed.version))
    assert isinstance(lease, Lease)
    newer = await store.commit(lease, lambda _: snapshot(version=lease.version))
    assert newer is not None
    assert await store.acquire(KEY, Requirement(newer_than=landed.version)) is newer


async def test_store_grants_an_abandoned_lease_again(store: Store) -> None:
    """An abandoned lease is available immediately, and leaves no failure."""
    lease = await store.acquire(KEY)
    assert isinstance(lease, Lease)
    await store.release_lease(lease)
    assert isinstance(await store.acquire(KEY), Lease)


async def test_store_returns_a_cached_failure(store: Store) -> None:
    """A cached failure is the result of the next `acquire`."""
    lease = await store.acquire(KEY)
    assert isinstance(lease, Lease)
    failure = UpstreamInvalid("nonsense")
    await store.store_failure(lease, failure, seconds=1.0)
    assert await store.acquire(KEY) is failure


async def test_store_counts_the_reads_of_an_entry(
    store: Store, clock: Clock, snapshot: Callable[..., Snapshot]
) -> None:
    """A new snapshot has a new entry without reads, fetched by this replica."""
    await save(store, snapshot())
    older = await entry_of(store, KEY)
    assert older is not None
    older.reads += 1
    assert await entry_of(store, KEY) is older
    clock.now += 1
    await save(store, snapshot())
    newer = await entry_of(store, KEY)
    assert newer is not None
    assert (newer.reads, newer.fetched_here) == (0, True)


async def test_store_builds_on_the_stored_snapshot(
    store: Store, clock: Clock, snapshot: Callable[..., Snapshot]
) -> None:
    """`commit` passes the snapshot that the new one follows, or None."""
    followed: list[Snapshot | None] = []

    async def commit() -> Snapshot | None:
        lease = await store.acquire(KEY)
        assert isinstance(lease, Lease)

        def build(previous: Snapshot | None) -> Snapshot:
            followed.append(previous)
            return snapshot(version=lease.version, previous=previous)

        return await store.commit(lease, build)

    first = await commit()
    clock.now += LIFETIME
    second = await commit()
    assert followed == [None, first]
    assert first is not None
    assert second is not None
    assert (second.etag, second.revision) == (first.etag, first.revision)


async def test_store_keeps_the_lease_if_no_snapshot_can_be_built(store: Store) -> None:
    """An exception of `build` is raised, and the lease can still be ended with a failure."""
    lease = await store.acquire(KEY)
    assert isinstance(lease, Lease)
    failure = UpstreamInvalid("nonsense")

    def build(_: Snapshot | None) -> Snapshot:
        raise failure

    with pytest.raises(UpstreamInvalid):
        await store.commit(lease, build)
    await store.store_failure(lease, failure, seconds=1.0)
    assert await store.acquire(KEY) is failure


async def test_store_accepts_the_result_of_a_released_lease(
    store: Store, snapshot: Callable[..., Snapshot]
) -> None:
    """A query whose lease was released may still succeed, and its snapshot is stored."""
    lease = await store.acquire(KEY)
    assert isinstance(lease, Lease)
    store.release_lease_early(lease)
    landed = await store.commit(lease, lambda _: snapshot(version=lease.version))
    assert landed is not None
    assert await shown(store, KEY) is landed


async def test_store_returns_stale_snapshots(
    store: Store, clock: Clock, snapshot: Callable[..., Snapshot]
) -> None:
    """A stale snapshot is returned unchanged: the snapshot determines its own freshness."""
    saved = await save(store, snapshot())
    assert saved is not None
    clock.now += LIFETIME + STALE_SECONDS - 0.1
    kept = await shown(store, KEY)
    assert kept is not None
    assert kept is saved


async def test_store_keeps_progress_for_an_hour(
    store: Store, clock: Clock, snapshot: Callable[..., Snapshot]
) -> None:
    """A progress snapshot is kept for an hour after its freshness, counted from its fetch."""
    await save(store, snapshot(age=1))
    clock.now += LIFETIME + REMEMBER_SECONDS - 1.1
    assert await shown(store, KEY) is not None
    clock.now += 0.2
    assert await shown(store, KEY) is None
    assert store.last_known(KEY) is None
    assert len(store) == 0


async def test_store_drops_an_expired_result(
    store: Store, clock: Clock, snapshot: Callable[..., Snapshot]
) -> None:
    """A result, which may be large, is dropped when it may no longer be served stale."""
    await save(store, snapshot(RESULT))
    clock.now += LIFETIME + STALE_SECONDS - 0.1
    assert await shown(store, RESULT) is not None
    clock.now += 0.2
    assert await shown(store, RESULT) is None
    assert len(store) == 0


async def test_store_is_bounded(make: Make, clock: Clock, snapshot: Callable[..., Snapshot]) -> None:
    """At most max_tasks snapshots are kept; the least recently used are evicted first."""
    store = await make(max_tasks=3)
    keys = [TaskKey(Operation.SD_GET_PROGRESS, name) for name in "abcd"]
    for key in keys[:3]:
        clock.now += 0.1
        await save(store, snapshot(key))
    assert await shown(store, keys[0]) is not None  # read: b is the least recently used now
    await save(store, snapshot(keys[3]))
    assert len(store) == 3
    assert [await shown(store, key) is None for key in keys] == [False, True, False, False]


async def test_store_does_not_count_a_message_as_use(
    make: Make, clock: Clock, snapshot: Callable[..., Snapshot]
) -> None:
    """A replica looks at its entry when a message arrives, also one of its own. The entry stays as old."""
    store = await make(max_tasks=2)
    keys = [TaskKey(Operation.SD_GET_PROGRESS, name) for name in "abc"]
    for key in keys[:2]:
        clock.now += 0.1
        await save(store, snapshot(key))
    assert await shown(store, keys[0]) is not None  # read: b is the least recently used now
    looked = store.entry_without_use(keys[1])
    assert looked is not None
    assert looked.snapshot.key == keys[1]
    assert store.entry_without_use(keys[2]) is None
    await save(store, snapshot(keys[2]))
    assert [await shown(store, key) is None for key in keys] == [False, True, False]


async def test_store_is_bounded_in_bytes(make: Make, clock: Clock, snapshot: Callable[..., Snapshot]) -> None:
    """Bodies, envelopes and failures together obey max_bytes; the least recently used go first."""
    store = await make(max_bytes=100_000)
    keys = [TaskKey(Operation.SD_GET_PROGRESS, name) for name in "abcd"]
    for key in keys[:3]:
        clock.now += 0.1
        kept = await save(store, snapshot(key, message="x" * 14_000))  # in body and envelope
        assert kept is not None
    assert store.size() == 3 * (len(kept.body) + len(kept.envelope) + ENTRY_OVERHEAD_BYTES)
    assert await shown(store, keys[0]) is not None  # read: b is the least recently used now
    await save(store, snapshot(keys[3], message="x" * 14_000))
    assert [await shown(store, key) is None for key in keys] == [False, True, False, False]
    assert len(store) == 3
    assert store.size() <= 100_000


async def test_store_drops_failures_before_snapshots(
    make: Make, clock: Clock, snapshot: Callable[..., Snapshot]
) -> None:
    """Failures count towards the limit with their envelopes, and are evicted before snapshots."""
    store = await make(max_bytes=100_000)
    await save(store, snapshot(message="x" * 14_000))
    before = store.size()
    keys = [TaskKey(Operation.SD_GET_PROGRESS, name) for name in "abc"]
    for key in keys:
        await fail(store, key, rejection(b'{"status":20,"x":"%b"}' % (b"x" * 30_000)), seconds=60)
        assert before < store.size() <= 100_000
    assert [store.cached_failure(key) is None for key in keys] == [True, False, False]
    await save(store, snapshot(OTHER, message="x" * 14_000))
    assert [store.cached_failure(key) is None for key in keys] == [True, True, False]
    assert await shown(store, KEY) is not None
    clock.now += 61
    await fail(store, OTHER, UpstreamTimeout("too late"), seconds=0)
    assert store.cached_failure(keys[2]) is None


async def test_store_serves_what_is_too_large_to_be_kept(
    make: Make, clock: Clock, snapshot: Callable[..., Snapshot]
) -> None:
    """A snapshot above the limit is returned to waiting requests but not kept, nor is its predecessor."""
    store = await make(max_bytes=100_000)
    heard: list[Snapshot] = []
    store.add_snapshot_listener(heard.append)
    small = await save(store, snapshot())
    clock.now += 1
    large = snapshot(message="x" * 60_000)
    assert await save(store, large) is large
    assert small is not None
    assert {stored.version for stored in heard} == {small.version, large.version}
    assert await shown(store, KEY) is None
    await fail(store, OTHER, rejection(b'{"status":20,"x":"%b"}' % (b"x" * 100_000)), seconds=60)
    assert store.cached_failure(OTHER) is None
    assert (len(store), store.size()) == (0, 0)


async def test_store_size_is_read_only(store: Store, clock: Clock, snapshot: Callable[..., Snapshot]) -> None:
    """The size can be read on any thread without changes; expired entries are removed at a lookup."""
    await save(store, snapshot())
    clock.now += LIFETIME + REMEMBER_SECONDS + 1
    assert (len(store), store.size() > ENTRY_OVERHEAD_BYTES) == (1, True)
    assert await shown(store, OTHER) is None
    assert (len(store), store.size()) == (0, 0)


def rejection(envelope: bytes) -> UpstreamRejected:
    """Return the failure of a rejected query."""
    return UpstreamRejected("the upstream rejected the query", envelope=envelope, detail=UpstreamDetail())


async def test_store_caches_a_failure_for_its_lifetime(store: Store, clock: Clock) -> None:
    """A failure is cached for exactly the given seconds."""
    failure = UpstreamTimeout("too late")
    await fail(store, KEY, failure, seconds=1.0)
    clock.now += 0.9
    assert store.cached_failure(KEY) is failure
    clock.now += 0.2
    assert store.cached_failure(KEY) is None


async def test_store_caches_the_latest_failure(store: Store, clock: Clock) -> None:
    """A later failure replaces an earlier one, and restarts its lifetime."""
    await fail(store, KEY, UpstreamTimeout("too late"), seconds=1.0)
    clock.now += 0.5
    later = UpstreamUnreachable("gone")
    await fail(store, KEY, later, seconds=1.0)
    clock.now += 0.9
    assert store.cached_failure(KEY) is later


async def test_store_caches_no_failure_for_0_seconds(store: Store) -> None:
    """A failure for 0 seconds is not cached, and removes an earlier one."""
    await fail(store, KEY, UpstreamTimeout("too late"), seconds=0.0)
    assert store.cached_failure(KEY) is None
    await fail(store, KEY, UpstreamTimeout("too late"), seconds=1.0)
    await fail(store, KEY, UpstreamTimeout("too late"), seconds=0.0)
    assert store.cached_failure(KEY) is None


async def test_store_caches_failures_by_task(store: Store) -> None:
    """The failure of one task does not affect another, nor the result of the same task."""
    await fail(store, KEY, UpstreamTimeout("too late"), seconds=1.0)
    assert store.cached_failure(OTHER) is None
    assert store.cached_failure(RESULT) is None


async def test_store_keeps_the_snapshot_of_a_failing_task(
    store: Store, snapshot: Callable[..., Snapshot]
) -> None:
    """A failure keeps the snapshot, which may be served as stale-if-error."""
    kept = await save(store, snapshot())
    await fail(store, KEY, UpstreamTimeout("too late"), seconds=1.0)
    assert await shown(store, KEY) == kept
    assert store.cached_failure(KEY) is not None


async def test_store_removes_the_failure_on_commit(store: Store, snapshot: Callable[..., Snapshot]) -> None:
    """A committed snapshot removes a cached failure."""
    await fail(store, KEY, UpstreamTimeout("too late"), seconds=1.0)
    await fail(store, OTHER, UpstreamTimeout("too late"), seconds=1.0)
    await save(store, snapshot())
    assert store.cached_failure(KEY) is None
    assert store.cached_failure(OTHER) is not None


async def test_store_grants_the_first_permit_immediately(store: Store, shared: Json | None) -> None:
    """The shared rate limiter has a permit at first; memory has no such limiter."""
    permits = await store.take_permits(10.0, burst=1.0, refreshes=1, first_queries=1)
    if shared is None:
        assert permits is None
    else:
        assert permits is not None
        assert (permits.refreshes, permits.first_queries) == (1, 0)
        assert 0 < permits.next_seconds <= 0.1


async def test_store_counts_no_failures(store: Store) -> None:
    """The number of entries counts snapshots only."""
    await fail(store, KEY, UpstreamTimeout("too late"), seconds=1.0)
    assert len(store) == 0


async def test_store_notifies_listeners_of_each_change(
    store: Store, clock: Clock, snapshot: Callable[..., Snapshot]
) -> None:
    """Every listener receives each snapshot stored from then on, which is then visible."""
    heard: list[tuple[str | None, bool]] = []
    also: list[Snapshot] = []
    await save(store, snapshot(message="before"))
    store.add_snapshot_listener(
        lambda stored: heard.append((said(stored), store.last_known(stored.key) == stored))
    )
    store.add_snapshot_listener(also.append)
    clock.now += 1
    await save(store, snapshot(message="one"))
    await save(store, snapshot(OTHER, message="two"))
    await save(store, snapshot(age=1, message="too old"))
    await fail(store, KEY, UpstreamTimeout("too late"), seconds=1.0)
    assert list(dict.fromkeys(heard)) == [("one", True), ("two", True)]
    assert list(dict.fromkeys(map(said, also))) == ["one", "two"]
