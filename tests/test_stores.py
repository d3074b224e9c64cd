"""What every store promises: one suite, run over each of them, on a clock that is turned by hand."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from gateway.exceptions import UpstreamTimeout, UpstreamUnreachable
from gateway.models import Operation, Snapshot, Status, TaskKey
from gateway.stores import Store
from gateway.stores.memory import MEMORY_SECONDS, MemoryStore

STALE_SECONDS = 60.0
LIFETIME = 2.0
KEY = TaskKey(Operation.SD_GET_PROGRESS, "task")
OTHER = TaskKey(Operation.SD_GET_PROGRESS, "other")
RESULT = TaskKey(Operation.SD_GET_RESULT, "task")

Make = Callable[..., Store]


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


@pytest.fixture(params=["memory"])
def make(request: pytest.FixtureRequest, clock: Clock) -> Make:
    """Return a function that makes an empty store of the kind under test."""
    kinds: dict[str, Make] = {
        "memory": lambda max_tasks=100: MemoryStore(
            max_tasks=max_tasks, stale_seconds=STALE_SECONDS, clock=clock
        )
    }
    return kinds[request.param]


@pytest.fixture
def store(make: Make) -> Store:
    """Return an empty store."""
    return make()


@pytest.fixture
def snapshot(clock: Clock) -> Callable[..., Snapshot]:
    """Return a function that makes a snapshot fetched at the clock's time."""

    def snapshot(key: TaskKey = KEY, *, age: float = 0.0, **values: Any) -> Snapshot:
        values = {"envelope": b"{}", "lifetime": LIFETIME, "status": Status.RUNNING, "progress": 0.5} | values
        return Snapshot(key, clock.now - age, **values)

    return snapshot


async def test_store_is_empty_at_first(store: Store) -> None:
    """An empty store has no snapshot and no failure for any task."""
    assert store.peek(KEY) is None
    assert await store.load(KEY) is None
    assert store.failure(KEY) is None
    assert len(store) == 0


async def test_store_keeps_what_is_saved(store: Store, snapshot: Callable[..., Snapshot]) -> None:
    """A saved snapshot is handed out by peek and by load, with all that it holds."""
    one = snapshot(envelope=b"envelope", body=b"body", etag='"tag"', eta_seconds=3.0)
    assert await store.save(one) is one
    for kept in (store.peek(KEY), await store.load(KEY)):
        assert kept is not None
        assert (kept.key, kept.fetched_at, kept.lifetime) == (KEY, one.fetched_at, LIFETIME)
        assert (kept.envelope, kept.body, kept.etag) == (b"envelope", b"body", '"tag"')
        assert (kept.status, kept.progress, kept.eta_seconds) == (Status.RUNNING, 0.5, 3.0)
    assert len(store) == 1


async def test_store_keeps_tasks_and_operations_apart(
    store: Store, snapshot: Callable[..., Snapshot]
) -> None:
    """A task's snapshot is found under its own operation and ID, and under no other."""
    keys = [TaskKey(operation, task_id) for operation in Operation for task_id in ("a", "b")]
    for key in keys:
        await store.save(snapshot(key, envelope=repr(key).encode()))
    assert len(store) == len(keys)
    for key in keys:
        kept = store.peek(key)
        assert kept is not None
        assert (kept.key, kept.envelope) == (key, repr(key).encode())


async def test_store_goes_forward(store: Store, clock: Clock, snapshot: Callable[..., Snapshot]) -> None:
    """A newer snapshot takes the older one's place."""
    await store.save(snapshot(envelope=b"older"))
    clock.now += 1
    newer = await store.save(snapshot(envelope=b"newer"))
    assert newer.envelope == b"newer"
    assert store.peek(KEY) == newer
    assert len(store) == 1


async def test_store_never_goes_back(store: Store, snapshot: Callable[..., Snapshot]) -> None:
    """An older snapshot does not take a newer one's place; whoever saves it is handed the newer."""
    newer = await store.save(snapshot(envelope=b"newer"))
    assert (await store.save(snapshot(age=1, envelope=b"older"))).envelope == b"newer"
    assert store.peek(KEY) == newer
    assert await store.load(KEY) == newer


async def test_store_takes_the_later_of_two_fetched_at_once(
    store: Store, snapshot: Callable[..., Snapshot]
) -> None:
    """Of two snapshots fetched at the same moment the one saved later is kept."""
    await store.save(snapshot(envelope=b"one"))
    assert (await store.save(snapshot(envelope=b"other"))).envelope == b"other"
    kept = store.peek(KEY)
    assert kept is not None
    assert kept.envelope == b"other"


async def test_store_hands_out_stale_snapshots(
    store: Store, clock: Clock, snapshot: Callable[..., Snapshot]
) -> None:
    """Freshness is the snapshot's own business: a stale one is handed out, with its moment unchanged."""
    fetched_at = (await store.save(snapshot())).fetched_at
    clock.now += LIFETIME + STALE_SECONDS - 0.1
    kept = store.peek(KEY)
    assert kept is not None
    assert kept.fetched_at == fetched_at


async def test_store_remembers_a_tasks_story_for_an_hour(
    store: Store, clock: Clock, snapshot: Callable[..., Snapshot]
) -> None:
    """A task's snapshot outlives its freshness by an hour, counted from its fetching, and then goes."""
    await store.save(snapshot(age=1))
    clock.now += LIFETIME + MEMORY_SECONDS - 1.1
    assert store.peek(KEY) is not None
    clock.now += 0.2
    assert store.peek(KEY) is None
    assert await store.load(KEY) is None
    assert len(store) == 0


async def test_store_drops_a_result_that_nobody_may_see(
    store: Store, clock: Clock, snapshot: Callable[..., Snapshot]
) -> None:
    """A result may be large and has no story: it goes as soon as it may not be shown even stale."""
    await store.save(snapshot(RESULT, status=None, progress=None))
    clock.now += LIFETIME + STALE_SECONDS - 0.1
    assert store.peek(RESULT) is not None
    clock.now += 0.2
    assert store.peek(RESULT) is None
    assert len(store) == 0


async def test_store_is_bounded(make: Make, clock: Clock, snapshot: Callable[..., Snapshot]) -> None:
    """No more than max_tasks snapshots are kept here; the least recently read or written go first."""
    store = make(max_tasks=3)
    keys = [TaskKey(Operation.SD_GET_PROGRESS, name) for name in "abcd"]
    for key in keys[:3]:
        clock.now += 0.1
        await store.save(snapshot(key))
    assert store.peek(keys[0]) is not None  # read: now b is the least recently used
    await store.save(snapshot(keys[3]))
    assert len(store) == 3
    assert [store.peek(key) is None for key in keys] == [False, True, False, False]


async def test_store_remembers_a_failure_for_its_time(store: Store, clock: Clock) -> None:
    """A failure is remembered for as many seconds as were said, and no longer."""
    failure = UpstreamTimeout("too late")
    await store.fail(KEY, failure, seconds=1.0)
    clock.now += 0.9
    assert store.failure(KEY) is failure
    clock.now += 0.2
    assert store.failure(KEY) is None


async def test_store_remembers_the_latest_failure(store: Store, clock: Clock) -> None:
    """A later failure takes the earlier one's place, and its time begins anew."""
    await store.fail(KEY, UpstreamTimeout("too late"), seconds=1.0)
    clock.now += 0.5
    later = UpstreamUnreachable("gone")
    await store.fail(KEY, later, seconds=1.0)
    clock.now += 0.9
    assert store.failure(KEY) is later


async def test_store_remembers_no_failure_for_no_time(store: Store) -> None:
    """A failure for 0 seconds is not remembered, and ends the memory of an earlier one."""
    await store.fail(KEY, UpstreamTimeout("too late"), seconds=0.0)
    assert store.failure(KEY) is None
    await store.fail(KEY, UpstreamTimeout("too late"), seconds=1.0)
    await store.fail(KEY, UpstreamTimeout("too late"), seconds=0.0)
    assert store.failure(KEY) is None


async def test_store_remembers_failures_by_task(store: Store) -> None:
    """One task's failure is not another's, nor that of its result."""
    await store.fail(KEY, UpstreamTimeout("too late"), seconds=1.0)
    assert store.failure(OTHER) is None
    assert store.failure(RESULT) is None


async def test_store_keeps_the_snapshot_of_a_failing_task(
    store: Store, snapshot: Callable[..., Snapshot]
) -> None:
    """A failure leaves the snapshot in place: it is what may cover the failure."""
    kept = await store.save(snapshot())
    await store.fail(KEY, UpstreamTimeout("too late"), seconds=1.0)
    assert store.peek(KEY) == kept
    assert store.failure(KEY) is not None


async def test_store_forgets_the_failure_when_an_answer_comes(
    store: Store, snapshot: Callable[..., Snapshot]
) -> None:
    """A stored answer ends the memory of a failure, before its time."""
    await store.fail(KEY, UpstreamTimeout("too late"), seconds=1.0)
    await store.fail(OTHER, UpstreamTimeout("too late"), seconds=1.0)
    await store.save(snapshot())
    assert store.failure(KEY) is None
    assert store.failure(OTHER) is not None


async def test_store_counts_no_failures(store: Store) -> None:
    """The number of entries is that of snapshots."""
    await store.fail(KEY, UpstreamTimeout("too late"), seconds=1.0)
    assert len(store) == 0


async def test_store_tells_its_listeners_of_each_change(
    store: Store, clock: Clock, snapshot: Callable[..., Snapshot]
) -> None:
    """Every listener hears of each snapshot that is stored from then on, and finds it there."""
    heard: list[tuple[bytes, bool]] = []
    also: list[Snapshot] = []
    await store.save(snapshot(envelope=b"before"))
    store.on_change(lambda stored: heard.append((stored.envelope, store.peek(stored.key) == stored)))
    store.on_change(also.append)
    clock.now += 1
    await store.save(snapshot(envelope=b"one"))
    await store.save(snapshot(OTHER, envelope=b"two"))
    await store.save(snapshot(age=1, envelope=b"too old"))
    await store.fail(KEY, UpstreamTimeout("too late"), seconds=1.0)
    assert heard == [(b"one", True), (b"two", True)]
    assert [stored.envelope for stored in also] == [b"one", b"two"]
