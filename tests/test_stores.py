"""What every store promises: one suite, run over each of them, on a clock that is turned by hand."""

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
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import Operation, Status, TaskKey
from gateway.settings.model import Store as StoreSettings
from gateway.stores.base import Lease, Store
from gateway.stores.memory import ENTRY_BYTES, MEMORY_SECONDS, MemoryStore
from gateway.stores.valkey.store import ValkeyStore
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.redaction import Redactor
from tests.harness import Json, eventually
from tests.seen import said, seen
from tests.storeserver import shared_by

STALE_SECONDS = 60.0
LIFETIME = 2.0
KEY = TaskKey(Operation.SD_GET_PROGRESS, "task")
OTHER = TaskKey(Operation.SD_GET_PROGRESS, "other")
RESULT = TaskKey(Operation.SD_GET_RESULT, "task")

Make = Callable[..., Awaitable[Store]]


@dataclass
class Clock:
    """A clock that a test turns by hand."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """Return the clock that the stores look at."""
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
    """Return a function that makes an empty store of the kind under test."""
    async with AsyncExitStack() as stack:

        async def make(max_tasks: int = 100, max_bytes: int = 1_000_000) -> Store:
            memory = MemoryStore(
                max_tasks=max_tasks, max_bytes=max_bytes, stale_seconds=STALE_SECONDS, clock=clock
            )
            if shared is None:
                return await stack.enter_async_context(memory)
            store = ValkeyStore(
                StoreSettings.model_validate({**shared, "key_prefix": uuid4().hex, "timeout_seconds": 1}),
                memory=memory,
                redactor=Redactor(),
                metrics=Metrics(CollectorRegistry(), gateway_version="test"),
                stale_seconds=2,
                covering_seconds=STALE_SECONDS,
                clock=clock,
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
    """Land with a snapshot, by a lease that nobody else could take."""
    return await store.commit(Lease(snapshot.key, snapshot.version), snapshot)


async def shown(store: Store, key: TaskKey) -> Snapshot | None:
    """Peek once nothing may have been missed."""
    await store.sync()
    return store.peek(key)


async def fail(store: Store, key: TaskKey, error: GatewayError, *, seconds: float) -> None:
    """Land with a failure."""
    await store.fail(Lease(key, 1), error, seconds=seconds)


@pytest.fixture
def snapshot(clock: Clock) -> Callable[..., Snapshot]:
    """Return a function that makes a snapshot fetched at the clock's time."""

    def snapshot(key: TaskKey = KEY, *, age: float = 0.0, **values: Any) -> Snapshot:
        values.setdefault("version", int((clock.now - age) * 1_000_000))
        return seen(key, at=clock.now - age, **({"lifetime": LIFETIME} | values))

    return snapshot


async def test_store_is_empty_at_first(store: Store) -> None:
    """An empty store has no snapshot and no failure for any task."""
    assert await shown(store, KEY) is None
    assert store.peek_stale(KEY) is None
    assert store.failure(KEY) is None
    assert store.trouble is None
    assert len(store) == 0


async def test_store_keeps_what_is_saved(store: Store, snapshot: Callable[..., Snapshot]) -> None:
    """A saved snapshot is handed out by peek, recall and take_off, with all that it holds."""
    one = snapshot(etaRelative=3.0, message="so far", state={"job": "a\nb"})
    assert await save(store, one) is one
    for kept in (await shown(store, KEY), store.peek_stale(KEY), await store.acquire(KEY)):
        assert isinstance(kept, Snapshot)
        assert (kept.key, kept.fetched_at, kept.lifetime) == (KEY, one.fetched_at, LIFETIME)
        assert (kept.envelope, kept.body, kept.etag) == (one.envelope, one.body, one.etag)
        assert (kept.status, kept.progress, kept.eta_seconds) == (Status.RUNNING, 0.5, 3.0)
    assert len(store) == 1


async def test_store_keeps_tasks_and_operations_apart(
    store: Store, snapshot: Callable[..., Snapshot]
) -> None:
    """A task's snapshot is found under its own operation and ID, and under no other."""
    keys = [TaskKey(operation, task_id) for operation in Operation for task_id in ("a", "b")]
    for key in keys:
        await save(store, snapshot(key, message=repr(key)))
    assert len(store) == len(keys)
    for key in keys:
        kept = await shown(store, key)
        assert kept is not None
        assert (kept.key, said(kept)) == (key, repr(key))


async def test_store_goes_forward(store: Store, clock: Clock, snapshot: Callable[..., Snapshot]) -> None:
    """A newer snapshot takes the older one's place."""
    await save(store, snapshot(message="older"))
    clock.now += 1
    newer = await save(store, snapshot(message="newer"))
    assert newer is not None
    assert said(newer) == "newer"
    assert await shown(store, KEY) == newer
    assert len(store) == 1


async def test_store_says_what_it_shows_without_a_lookup(
    make: Make, clock: Clock, snapshot: Callable[..., Snapshot]
) -> None:
    """What peek has returned is shown until a newer one takes its place, or it has to make room."""
    store = await make(max_tasks=2)
    older = await save(store, snapshot())
    assert older is not None
    await shown(store, KEY)
    assert store.is_current(older, clock())
    clock.now += 1
    newer = await save(store, snapshot())
    assert newer is not None
    assert await shown(store, KEY) is newer
    assert (store.is_current(older, clock()), store.is_current(newer, clock())) == (False, True)
    for other in ("a", "b"):
        await save(store, snapshot(KEY._replace(task_id=other)))
    assert await shown(store, KEY) is None
    assert not store.is_current(newer, clock())


async def test_store_never_goes_back(store: Store, snapshot: Callable[..., Snapshot]) -> None:
    """An older snapshot does not take a newer one's place; whoever saves it is handed the newer."""
    newer = await save(store, snapshot(message="newer"))
    assert newer is not None
    assert await save(store, snapshot(age=1, message="older")) is newer
    assert await shown(store, KEY) is newer
    assert await store.acquire(KEY) is newer


async def test_store_lets_what_has_ended_stay_ended(
    store: Store, clock: Clock, snapshot: Callable[..., Snapshot]
) -> None:
    """No later snapshot of a task that goes on replaces a terminal one; a later terminal one does."""
    ended = await save(store, snapshot(status="succeeded", lifetime=600.0))
    clock.now += 1
    assert await save(store, snapshot()) is ended
    assert await shown(store, KEY) is ended
    again = snapshot(status="succeeded", lifetime=600.0)
    assert await save(store, again) is again


async def test_store_gives_the_lease_where_nothing_is_fresh(
    store: Store, clock: Clock, snapshot: Callable[..., Snapshot]
) -> None:
    """A flight that finds nothing, or something stale, may ask upstream, with a stamp above all before."""
    first = await store.acquire(KEY)
    assert isinstance(first, Lease)
    assert first.key == KEY
    landed = await store.commit(first, snapshot(version=first.version))
    assert landed is not None
    assert await store.acquire(KEY) is landed
    clock.now += LIFETIME
    second = await store.acquire(KEY)
    assert isinstance(second, Lease)
    assert second.version > first.version


async def test_store_gives_the_lease_to_whoever_wants_a_newer_one(
    store: Store, snapshot: Callable[..., Snapshot]
) -> None:
    """Who names the stamp that is known gets the lease though that one is fresh, or a newer one."""
    landed = await save(store, snapshot(age=1))
    assert landed is not None
    lease = await store.acquire(KEY, after=landed.version)
    assert isinstance(lease, Lease)
    newer = await store.commit(lease, snapshot(version=lease.version))
    assert newer is not None
    assert await store.acquire(KEY, after=landed.version) is newer


async def test_store_gives_the_lease_again_when_it_is_given_back(store: Store) -> None:
    """An abandoned lease is there for the next one at once, and nothing is remembered of it."""
    lease = await store.acquire(KEY)
    assert isinstance(lease, Lease)
    await store.abandon(lease)
    assert isinstance(await store.acquire(KEY), Lease)


async def test_store_ends_a_flight_with_the_failure(store: Store) -> None:
    """A failure that is remembered is what the next flight ends with."""
    lease = await store.acquire(KEY)
    assert isinstance(lease, Lease)
    failure = UpstreamTimeout("too late")
    await store.fail(lease, failure, seconds=1.0)
    assert await store.acquire(KEY) is failure


async def test_store_hands_out_stale_snapshots(
    store: Store, clock: Clock, snapshot: Callable[..., Snapshot]
) -> None:
    """Freshness is the snapshot's own business: a stale one is handed out, with its moment unchanged."""
    saved = await save(store, snapshot())
    assert saved is not None
    clock.now += LIFETIME + STALE_SECONDS - 0.1
    kept = await shown(store, KEY)
    assert kept is not None
    assert kept is saved


async def test_store_remembers_a_tasks_story_for_an_hour(
    store: Store, clock: Clock, snapshot: Callable[..., Snapshot]
) -> None:
    """A task's snapshot outlives its freshness by an hour, counted from its fetching, and then goes."""
    await save(store, snapshot(age=1))
    clock.now += LIFETIME + MEMORY_SECONDS - 1.1
    assert await shown(store, KEY) is not None
    clock.now += 0.2
    assert await shown(store, KEY) is None
    assert store.peek_stale(KEY) is None
    assert len(store) == 0


async def test_store_drops_a_result_that_nobody_may_see(
    store: Store, clock: Clock, snapshot: Callable[..., Snapshot]
) -> None:
    """A result may be large and has no story: it goes as soon as it may not be shown even stale."""
    await save(store, snapshot(RESULT))
    clock.now += LIFETIME + STALE_SECONDS - 0.1
    assert await shown(store, RESULT) is not None
    clock.now += 0.2
    assert await shown(store, RESULT) is None
    assert len(store) == 0


async def test_store_is_bounded(make: Make, clock: Clock, snapshot: Callable[..., Snapshot]) -> None:
    """No more than max_tasks snapshots are kept here; the least recently read or written go first."""
    store = await make(max_tasks=3)
    keys = [TaskKey(Operation.SD_GET_PROGRESS, name) for name in "abcd"]
    for key in keys[:3]:
        clock.now += 0.1
        await save(store, snapshot(key))
    assert await shown(store, keys[0]) is not None  # read: now b is the least recently used
    await save(store, snapshot(keys[3]))
    assert len(store) == 3
    assert [await shown(store, key) is None for key in keys] == [False, True, False, False]


async def test_store_is_bounded_in_bytes(make: Make, clock: Clock, snapshot: Callable[..., Snapshot]) -> None:
    """Bodies, envelopes and failures together stay within max_bytes; the least recently used go first."""
    store = await make(max_bytes=100_000)
    keys = [TaskKey(Operation.SD_GET_PROGRESS, name) for name in "abcd"]
    for key in keys[:3]:
        clock.now += 0.1
        kept = await save(store, snapshot(key, message="x" * 14_000))  # it stands in body and envelope
        assert kept is not None
    assert store.size() == 3 * (len(kept.body) + len(kept.envelope) + ENTRY_BYTES)
    assert await shown(store, keys[0]) is not None  # read: now b is the least recently used
    await save(store, snapshot(keys[3], message="x" * 14_000))
    assert [await shown(store, key) is None for key in keys] == [False, True, False, False]
    assert len(store) == 3
    assert store.size() <= 100_000


async def test_store_drops_failures_before_snapshots(
    make: Make, clock: Clock, snapshot: Callable[..., Snapshot]
) -> None:
    """A failure may hold an envelope of a megabyte: it counts, and makes room before any snapshot does."""
    store = await make(max_bytes=100_000)
    await save(store, snapshot(message="x" * 14_000))
    before = store.size()
    keys = [TaskKey(Operation.SD_GET_PROGRESS, name) for name in "abc"]
    for key in keys:
        await fail(store, key, rejection(b'{"status":20,"x":"%b"}' % (b"x" * 30_000)), seconds=60)
        assert before < store.size() <= 100_000
    assert [store.failure(key) is None for key in keys] == [True, False, False]
    await save(store, snapshot(OTHER, message="x" * 14_000))
    assert [store.failure(key) is None for key in keys] == [True, True, False]
    assert await shown(store, KEY) is not None
    clock.now += 61
    await fail(store, OTHER, UpstreamTimeout("too late"), seconds=0)
    assert store.failure(keys[2]) is None


async def test_store_serves_what_is_too_large_to_be_kept(
    make: Make, clock: Clock, snapshot: Callable[..., Snapshot]
) -> None:
    """What alone exceeds the bound is handed to those who wait for it; what it follows is kept no longer."""
    store = await make(max_bytes=100_000)
    heard: list[Snapshot] = []
    store.on_change(heard.append)
    small = await save(store, snapshot())
    clock.now += 1
    large = snapshot(message="x" * 60_000)
    assert await save(store, large) is large
    assert small is not None
    assert {stored.version for stored in heard} == {small.version, large.version}
    assert await shown(store, KEY) is None
    await fail(store, OTHER, rejection(b'{"status":20,"x":"%b"}' % (b"x" * 100_000)), seconds=60)
    assert store.failure(OTHER) is None
    assert (len(store), store.size()) == (0, 0)


async def test_store_tells_its_size_and_changes_nothing(
    store: Store, clock: Clock, snapshot: Callable[..., Snapshot]
) -> None:
    """A scrape, on any thread, only reads: what has expired goes when a task is looked for."""
    await save(store, snapshot())
    clock.now += LIFETIME + MEMORY_SECONDS + 1
    assert (len(store), store.size() > ENTRY_BYTES) == (1, True)
    assert await shown(store, OTHER) is None
    assert (len(store), store.size()) == (0, 0)


def rejection(envelope: bytes) -> UpstreamRejected:
    """Return the failure of a rejected query."""
    return UpstreamRejected("the upstream rejected the query", envelope=envelope, detail=UpstreamDetail())


async def test_store_remembers_a_failure_for_its_time(store: Store, clock: Clock) -> None:
    """A failure is remembered for as many seconds as were said, and no longer."""
    failure = UpstreamTimeout("too late")
    await fail(store, KEY, failure, seconds=1.0)
    clock.now += 0.9
    assert store.failure(KEY) is failure
    clock.now += 0.2
    assert store.failure(KEY) is None


async def test_store_remembers_the_latest_failure(store: Store, clock: Clock) -> None:
    """A later failure takes the earlier one's place, and its time begins anew."""
    await fail(store, KEY, UpstreamTimeout("too late"), seconds=1.0)
    clock.now += 0.5
    later = UpstreamUnreachable("gone")
    await fail(store, KEY, later, seconds=1.0)
    clock.now += 0.9
    assert store.failure(KEY) is later


async def test_store_remembers_no_failure_for_no_time(store: Store) -> None:
    """A failure for 0 seconds is not remembered, and ends the memory of an earlier one."""
    await fail(store, KEY, UpstreamTimeout("too late"), seconds=0.0)
    assert store.failure(KEY) is None
    await fail(store, KEY, UpstreamTimeout("too late"), seconds=1.0)
    await fail(store, KEY, UpstreamTimeout("too late"), seconds=0.0)
    assert store.failure(KEY) is None


async def test_store_remembers_failures_by_task(store: Store) -> None:
    """One task's failure is not another's, nor that of its result."""
    await fail(store, KEY, UpstreamTimeout("too late"), seconds=1.0)
    assert store.failure(OTHER) is None
    assert store.failure(RESULT) is None


async def test_store_keeps_the_snapshot_of_a_failing_task(
    store: Store, snapshot: Callable[..., Snapshot]
) -> None:
    """A failure leaves the snapshot in place: it is what may cover the failure."""
    kept = await save(store, snapshot())
    await fail(store, KEY, UpstreamTimeout("too late"), seconds=1.0)
    assert await shown(store, KEY) == kept
    assert store.failure(KEY) is not None


async def test_store_forgets_the_failure_when_an_answer_comes(
    store: Store, snapshot: Callable[..., Snapshot]
) -> None:
    """A stored answer ends the memory of a failure, before its time."""
    await fail(store, KEY, UpstreamTimeout("too late"), seconds=1.0)
    await fail(store, OTHER, UpstreamTimeout("too late"), seconds=1.0)
    await save(store, snapshot())
    assert store.failure(KEY) is None
    assert store.failure(OTHER) is not None


async def test_store_gives_a_token_at_once_where_none_was_taken(store: Store) -> None:
    """Nobody waits for a budget that is whole."""
    assert await store.token(10.0, saved=1, timeout_seconds=0) == 0


async def test_store_counts_no_failures(store: Store) -> None:
    """The number of entries is that of snapshots."""
    await fail(store, KEY, UpstreamTimeout("too late"), seconds=1.0)
    assert len(store) == 0


async def test_store_tells_its_listeners_of_each_change(
    store: Store, clock: Clock, snapshot: Callable[..., Snapshot]
) -> None:
    """Every listener hears of each snapshot that is stored from then on, and finds it there."""
    heard: list[tuple[str | None, bool]] = []
    also: list[Snapshot] = []
    await save(store, snapshot(message="before"))
    store.on_change(lambda stored: heard.append((said(stored), store.peek_stale(stored.key) == stored)))
    store.on_change(also.append)
    clock.now += 1
    await save(store, snapshot(message="one"))
    await save(store, snapshot(OTHER, message="two"))
    await save(store, snapshot(age=1, message="too old"))
    await fail(store, KEY, UpstreamTimeout("too late"), seconds=1.0)
    assert heard == [("one", True), ("two", True)]
    assert [said(stored) for stored in also] == ["one", "two"]
