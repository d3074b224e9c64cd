"""The watch hub, with a service that the test controls and a clock that stands still."""

import asyncio
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from functools import partial
from itertools import pairwise

import pytest
from msgspec.structs import replace
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from gateway.domain.errors import (
    GatewayError,
    Overloaded,
    UpstreamDetail,
    UpstreamRejected,
    UpstreamThrottled,
    UpstreamTimeout,
)
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import Operation, Status, TaskKey
from gateway.progress.outcomes import CacheStatus, LookupFailure, LookupSuccess
from gateway.settings.model import Watch as WatchSettings
from gateway.stores.memory import MemoryStore
from gateway.telemetry.metrics import Metrics
from gateway.watch.hub import WatchHub
from gateway.watch.subscriber import Subscriber, SubscriptionKind, Update
from tests.support.ticked import TickedLoop

pytestmark = pytest.mark.anyio

KEY = TaskKey(Operation.SD_GET_PROGRESS, "a")


def snapshot(etag: str, status: Status = Status.RUNNING) -> Snapshot:
    """Return a snapshot that differs from others by its ETag."""
    return Snapshot(KEY, 0.0, 3600.0, b"", status, 0.5, None, b"{}", etag)


def etags(updates: Iterable[Update]) -> list[str | None]:
    """Return the ETags of updates, None for a failure."""
    return [update.snapshot and update.snapshot.etag for update in updates]


async def received(subscriber: Subscriber) -> list[Update]:
    """Return the updates that arrive within a few turns of the loop; fail if there is none."""
    task = asyncio.ensure_future(subscriber.next_updates())
    await turns(task.done)
    if not task.done():
        task.cancel()
        pytest.fail("the subscriber receives nothing")
    return task.result()


async def turns(enough: Callable[[], bool]) -> None:
    """Let the loop run until `enough` holds, for at most a hundred turns."""
    for _ in range(100):
        if enough():
            return
        await asyncio.sleep(0)


def listen(watch: WatchHub) -> list[str | None]:
    """Return a list that receives the ETag of every update from now on; no update stays unsent."""
    published: list[str | None] = []

    def deliver(update: Update, _subscribers: Collection[Subscriber]) -> Iterable[Subscriber]:
        published.extend(etags([update]))
        return ()

    watch.direct_delivery_hook = deliver
    return published


class ManualOverdue:
    """The reason why the snapshot is old, as the test sets it."""

    overdue_after_seconds = 1.5

    def __init__(self) -> None:
        self.failure: GatewayError | None = None

    def error(self, _key: TaskKey) -> GatewayError | None:
        return self.failure

    def seconds_until_check(self, _key: TaskKey) -> float:
        return self.overdue_after_seconds


class ManualService:
    """A service whose fresh results are set by the test."""

    def __init__(self) -> None:
        self.overdue_detector = ManualOverdue()
        self.known: Snapshot | None = None
        self.asked = asyncio.Event()
        self.answers: asyncio.Queue[Snapshot | Exception] = asyncio.Queue()
        self.demand: Counter[tuple[TaskKey, bytes]] = Counter()
        self.seen_revisions: list[int] = []

    def lookup(self, _key: TaskKey, seen_revision: int = 0) -> LookupSuccess | None:
        if self.known is None or (self.known.version < seen_revision and not self.known.terminal):
            return None
        return LookupSuccess(self.known, 0.0, CacheStatus.HIT)

    peek = lookup

    def add_caller(self, key: TaskKey, client: bytes) -> None:
        self.demand[key, client] += 1

    def remove_caller(self, key: TaskKey, client: bytes) -> None:
        self.demand[key, client] -= 1

    async def query_if_stale(self, key: TaskKey, *, seen_revision: int) -> LookupSuccess | LookupFailure:
        assert +self.demand
        self.seen_revisions.append(seen_revision)
        self.asked.set()
        answer = await self.answers.get()
        if isinstance(answer, GatewayError):
            return LookupFailure(key, answer, CacheStatus.MISS)
        if isinstance(answer, Exception):
            raise answer
        return LookupSuccess(answer, 0.0, CacheStatus.MISS)


async def asked(service: ManualService) -> None:
    """Let the schedule run until it refreshes; fail if it does not."""
    await turns(service.asked.is_set)
    assert service.asked.is_set(), "no schedule refreshes"


@pytest.fixture
def service() -> ManualService:
    return ManualService()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(max_tasks=10, min_keep_stale_seconds=60, clock=lambda: 0.0)


@pytest.fixture
def watch(service: ManualService, store: MemoryStore) -> WatchHub:
    return manual_watch(service, store)


DEFAULT_SETTINGS = WatchSettings()


def manual_watch(
    service: ManualService,
    store: MemoryStore,
    clock: Callable[[], float] = lambda: 0.0,
    settings: WatchSettings = DEFAULT_SETTINGS,
) -> WatchHub:
    metrics = Metrics(CollectorRegistry(), gateway_version="test")
    return WatchHub(settings, service=service, store=store, metrics=metrics, clock=clock)  # type: ignore[arg-type]


async def nothing_waits(service: ManualService) -> bool:
    """Tell whether no schedule awaits a result of the service."""
    service.answers.put_nowait(snapshot("unclaimed"))
    for _ in range(10):  # turns of the loop, of which one would do
        await asyncio.sleep(0)
    left = not service.answers.empty()
    if left:
        service.answers.get_nowait()
    return left


async def test_watch_sends_the_cached_snapshot_at_once(service: ManualService, watch: WatchHub) -> None:
    """A subscriber receives the cached snapshot before the first refresh has a result."""
    service.known = snapshot("1")
    with watch.subscribe([KEY], SubscriptionKind.EVENTS) as subscriber:
        [update] = await received(subscriber)
        assert update.snapshot is service.known
    await watch.aclose()


async def test_watch_slot_holds_only_the_latest_update(watch: WatchHub, store: MemoryStore) -> None:
    """A subscriber that was busy receives the latest update, not those before it."""
    with watch.subscribe([KEY], SubscriptionKind.EVENTS) as subscriber:
        for etag in "123":
            store.put(snapshot(etag))
            await asyncio.sleep(0)  # it is published in the next turn of the loop
        [update] = await received(subscriber)
        assert update.snapshot is not None
        assert update.snapshot.etag == "3"
    await watch.aclose()


async def test_watch_delivers_directly_only_to_idle_subscribers(watch: WatchHub, store: MemoryStore) -> None:
    """Updates stay in order: one is delivered directly only when all earlier ones were taken."""
    delivered: list[str] = []

    def deliver(update: Update, subscribers: Collection[Subscriber]) -> Iterable[Subscriber]:
        assert update.snapshot is not None
        [only] = subscribers
        if only.transport_if_idle is not client_transport or update.snapshot.etag == "3":
            return subscribers  # busy, or its reader does not keep up
        delivered.append(update.snapshot.etag)
        return []

    watch.direct_delivery_hook = deliver
    client_transport = asyncio.WriteTransport()
    with watch.subscribe([KEY], SubscriptionKind.EVENTS) as subscriber:
        subscriber.client_transport = client_transport
        store.put(snapshot("1"))
        await asyncio.sleep(0)  # published while no task waits yet
        assert etags(await received(subscriber)) == ["1"]
        waiting = asyncio.create_task(subscriber.next_updates())
        await asyncio.sleep(0)
        for etag in "23":  # only "3" wakes the subscriber
            store.put(snapshot(etag))
            await asyncio.sleep(0)
        assert etags(await waiting) == ["3"]
        waiting = asyncio.create_task(subscriber.next_updates())
        await asyncio.sleep(0)
        store.put(snapshot("4"))
        subscriber.wake()  # when the change is published it is awake, but has not taken its unsent updates
        assert etags(await waiting) == ["4"]
        assert delivered == ["2"]
        gone = asyncio.create_task(subscriber.next_updates())
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait([gone])
        store.put(snapshot("5"))
        await asyncio.sleep(0)
        assert delivered == ["2"], "no task waits any more"
    await watch.aclose()


def of(task_id: str, etag: str, status: Status = Status.RUNNING) -> Snapshot:
    """Return a snapshot of this task."""
    return replace(snapshot(etag, status), key=TaskKey(Operation.SD_GET_PROGRESS, task_id))


async def test_watch_publishes_a_few_tasks_per_turn(watch: WatchHub, store: MemoryStore) -> None:
    """Each turn of the loop publishes the latest change of one task; other work runs in between."""
    changes = [of(task_id, etag) for etag in "12" for task_id in "abc"]
    with watch.subscribe([change.key for change in changes[:3]], SubscriptionKind.EVENTS) as subscriber:
        for change in changes:
            store.put(change)
        published = []
        for _ in range(4):
            await asyncio.sleep(0)
            subscriber.wake()
            published.append(
                [(update.key.task_id, *etags([update])) for update in await subscriber.next_updates()]
            )
        assert published == [[("a", "2")], [("b", "2")], [("c", "2")], []]
    await watch.aclose()


async def test_watch_publishes_more_per_turn_when_the_backlog_grows(
    watch: WatchHub, store: MemoryStore
) -> None:
    """With changes in every turn of a busy loop, none is lost and none waits for long."""
    published: list[int] = []
    watch.direct_delivery_hook = lambda update, _: published.append(int(update.key.task_id)) or ()  # type: ignore[func-returns-value]
    waiting = set[int]()
    most = 0
    with watch.subscribe([of(str(number), "0").key for number in range(1000)], SubscriptionKind.EVENTS):
        for turn in range(300):
            for number in range(turn * 10, turn * 10 + 10):  # of 1,000 tasks, ten change a turn
                waiting.add(number % 1000)
                store.put(of(str(number % 1000), str(number)))
            await asyncio.sleep(0)
            waiting.difference_update(published)
            published.clear()
            most = max(most, len(waiting))
        assert most < 100
        for _ in range(40):
            await asyncio.sleep(0)
        assert waiting == set(published)
    await watch.aclose()


async def test_watch_drops_changes_of_unwatched_tasks(watch: WatchHub, store: MemoryStore) -> None:
    """A subscriber that has left receives nothing, and does not delay others."""
    published = listen(watch)
    with watch.subscribe([KEY], SubscriptionKind.EVENTS):
        with watch.subscribe([of("b", "0").key], SubscriptionKind.EVENTS):
            store.put(of("b", "1"))
        store.put(snapshot("2"))
        for _ in range(2):
            await asyncio.sleep(0)
    assert published == ["2"]
    await watch.aclose()


async def test_watch_continues_after_an_error_in_delivery(watch: WatchHub, store: MemoryStore) -> None:
    """An exception in delivery loses that event only; it is reported, and all other events arrive."""
    faults: list[BaseException] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context["exception"]))
    published: list[str | None] = []

    def deliver(update: Update, _subscribers: Collection[Subscriber]) -> Iterable[Subscriber]:
        published.extend(etags([update]))
        raise ZeroDivisionError

    watch.direct_delivery_hook = deliver
    with watch.subscribe([KEY, of("b", "0").key], SubscriptionKind.EVENTS):
        for change in (snapshot("1"), of("b", "2")):
            store.put(change)
        for _ in range(2):
            await asyncio.sleep(0)
        store.put(snapshot("3"))
        await asyncio.sleep(0)
        assert published == ["1", "2", "3"]
        assert [type(fault) for fault in faults] == [ZeroDivisionError] * 3
    await watch.aclose()


async def test_watch_publishes_stored_changes_before_shutdown(watch: WatchHub, store: MemoryStore) -> None:
    """Changes that were stored before the shutdown are in the last updates."""
    ends = [of(task_id, "1", Status.SUCCEEDED) for task_id in "abc"]
    with watch.subscribe([end.key for end in ends], SubscriptionKind.EVENTS) as subscriber:
        for end in ends:
            store.put(end)
        watch.begin_shutdown()
        assert [update.snapshot for update in await received(subscriber)] == ends
        assert subscriber.must_end
    await watch.aclose()


async def test_watch_new_subscriber_receives_an_unpublished_change(
    service: ManualService, watch: WatchHub, store: MemoryStore
) -> None:
    """A change that is not published yet reaches a new subscriber first: it may have read it already."""
    service.known = snapshot("1")
    with watch.subscribe([KEY], SubscriptionKind.EVENTS):
        service.known = snapshot("2")
        store.put(service.known)
        with watch.subscribe([KEY], SubscriptionKind.LONGPOLL) as second:
            assert etags(await received(second)) == ["2"]
    await watch.aclose()


async def test_watch_sends_nothing_older_than_the_client_has_received(
    service: ManualService, watch: WatchHub, store: MemoryStore
) -> None:
    """A subscriber that names a version receives nothing older, not even at first, and all later changes."""
    service.known = versioned(1)
    with (
        watch.subscribe([KEY], SubscriptionKind.EVENTS) as any_version,
        watch.subscribe([KEY], SubscriptionKind.EVENTS, seen_revisions={KEY: 3}) as returning,
    ):
        assert etags(await received(any_version)) == ["1"]
        await asked(service)
        assert service.seen_revisions[-1] == 3
        for version, expected in ((2, []), (3, ["3"]), (4, ["4"])):
            store.put(versioned(version))
            assert etags(await received(any_version)) == [str(version)]
            returning.wake()
            assert etags(await received(returning)) == expected
    await watch.aclose()


async def test_watch_sends_a_newer_snapshot_with_the_content_of_a_refused_one(
    watch: WatchHub, store: MemoryStore
) -> None:
    """The client has received a newer response than the first snapshot, so it does not know this content."""
    with watch.subscribe([KEY], SubscriptionKind.EVENTS, seen_revisions={KEY: 3}) as subscriber:
        store.put(versioned(2))
        subscriber.wake()
        assert etags(await received(subscriber)) == []
        store.put(replace(versioned(2), version=4))
        subscriber.wake()
        assert etags(await received(subscriber)) == ["2"]
    await watch.aclose()


async def test_watch_sends_the_end_whatever_the_client_has_received(
    service: ManualService, watch: WatchHub, store: MemoryStore
) -> None:
    """A terminal snapshot is final, so it is sent even if its version is smaller."""
    service.known = versioned(1)
    with watch.subscribe([KEY], SubscriptionKind.EVENTS, seen_revisions={KEY: 9}) as subscriber:
        store.put(versioned(2, Status.SUCCEEDED))
        assert etags(await received(subscriber)) == ["2"]
    await watch.aclose()


async def test_watch_writes_directly_once_the_client_is_up_to_date(
    watch: WatchHub, store: MemoryStore
) -> None:
    """A direct write does not check versions: until the named version is sent, the stream sends itself."""
    with watch.subscribe([KEY], SubscriptionKind.EVENTS, seen_revisions={KEY: 2}) as subscriber:
        subscriber.client_transport = asyncio.WriteTransport()
        for idle in (None, subscriber.client_transport):
            waiting = asyncio.create_task(subscriber.next_updates())
            await asyncio.sleep(0)
            assert subscriber.transport_if_idle is idle
            store.put(versioned(2 if idle is None else 3))
            await waiting
    await watch.aclose()


def versioned(version: int, status: Status = Status.RUNNING) -> Snapshot:
    """Return a snapshot with this version as its ETag."""
    return replace(snapshot(str(version), status), version=version)


async def test_watch_schedule_does_not_publish_stored_changes_early(
    service: ManualService, watch: WatchHub, store: MemoryStore
) -> None:
    """An unpublished snapshot keeps its place in the queue when its schedule gets it as a result."""
    mine, other = snapshot("1"), of("b", "2")
    published = listen(watch)
    with watch.subscribe([mine.key, other.key], SubscriptionKind.EVENTS):
        await asked(service)
        service.answers.put_nowait(mine)
        store.put(other)
        store.put(mine)
        await asyncio.sleep(0)
        assert published == ["2"]
        await asyncio.sleep(0)
        assert published == ["2", "1"]
    await watch.aclose()


async def test_watch_schedule_publishes_results_that_are_not_stored(
    service: ManualService, watch: WatchHub, store: MemoryStore
) -> None:
    """A result other than the unpublished snapshot is published after it."""
    published = listen(watch)
    with watch.subscribe([KEY], SubscriptionKind.EVENTS):
        await asked(service)
        service.answers.put_nowait(snapshot("2"))
        store.put(snapshot("1"))
        for _ in range(2):
            await asyncio.sleep(0)
        assert published == ["1", "2"]
    await watch.aclose()


async def test_watch_publishes_changes_in_order(
    service: ManualService, watch: WatchHub, store: MemoryStore
) -> None:
    """An unpublished change is published before a new subscriber joins, and before a later failure."""
    service.known = snapshot("0")
    with watch.subscribe([KEY], SubscriptionKind.EVENTS) as first:
        store.put(snapshot("1"))
        store.put(snapshot("2"))
        with watch.subscribe([KEY], SubscriptionKind.EVENTS) as second:
            for subscriber in (first, second):
                assert etags(await received(subscriber)) == ["2"]
        published = listen(watch)
        await asked(service)
        service.answers.put_nowait(UpstreamTimeout("late"))  # arrives before the change is published
        store.put(snapshot("3"))
        await asyncio.sleep(0)
        assert published == ["3", None]
    await watch.aclose()


async def test_watch_unpublished_end_is_not_overwritten(
    watch: WatchHub, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A running snapshot, stored after an eviction, does not overwrite an unpublished terminal one."""
    with watch.subscribe([KEY], SubscriptionKind.EVENTS) as subscriber:
        store.put(snapshot("1", Status.SUCCEEDED))
        monkeypatch.setattr(store, "current_entry", lambda _: None)
        store.put(snapshot("2"))
        assert etags(await received(subscriber)) == ["1"]
        for etag in "34":
            store.put(snapshot(etag, Status.SUCCEEDED))
        assert etags(await received(subscriber)) == ["4"]
    await watch.aclose()


async def test_watch_publishes_nothing_twice(
    service: ManualService, watch: WatchHub, store: MemoryStore
) -> None:
    """The same representation, stored again, wakes no subscriber; nor does the same failure."""
    with watch.subscribe([KEY], SubscriptionKind.EVENTS) as subscriber:
        service.answers.put_nowait(snapshot("1"))
        assert len(await received(subscriber)) == 1
        store.put(snapshot("1"))
        await asyncio.sleep(0)
        subscriber.wake()
        assert await received(subscriber) == []
    await watch.aclose()
    first = Update(KEY, failure=UpstreamTimeout("late"))
    assert Update(KEY, failure=UpstreamTimeout("late")).has_same_content(first)
    assert not Update(KEY, failure=UpstreamTimeout("later")).has_same_content(first)
    assert not Update(KEY, snapshot("1")).has_same_content(first)


async def test_watch_new_subscriber_receives_the_latest_update(
    service: ManualService, watch: WatchHub
) -> None:
    """A subscriber that joins a schedule receives its latest update or failure without a refresh."""
    with watch.subscribe([KEY], SubscriptionKind.EVENTS) as first:
        service.answers.put_nowait(UpstreamTimeout("late"))
        await received(first)
        with watch.subscribe([KEY], SubscriptionKind.LONGPOLL) as second:
            [update] = await received(second)
            assert isinstance(update.failure, UpstreamTimeout)
    await watch.aclose()


async def test_watch_new_subscriber_receives_nothing_too_old(
    service: ManualService, watch: WatchHub, store: MemoryStore
) -> None:
    """If the latest snapshot is too old to send, a new subscriber receives a fresh one, changed or not."""
    with watch.subscribe([KEY], SubscriptionKind.EVENTS) as first:
        service.answers.put_nowait(snapshot("1"))
        await received(first)
        service.asked.clear()
        with watch.subscribe([KEY], SubscriptionKind.EVENTS) as second:
            with watch.subscribe([KEY], SubscriptionKind.EVENTS) as gone:
                await asked(service)  # at once, although the schedule sleeps for an hour
            for subscriber in (first, second, gone):
                subscriber.wake()
                assert await received(subscriber) == []
            service.answers.put_nowait(snapshot("1"))
            [update] = await received(second)
            assert update.snapshot is not None
            assert update.snapshot.etag == "1"
            for subscriber in (first, gone):
                subscriber.wake()
                assert await received(subscriber) == []
            store.put(snapshot("1"))
            await asyncio.sleep(0)
            second.wake()
            assert await received(second) == []
    await watch.aclose()


async def test_watch_backoff_ends_with_a_stored_snapshot(
    service: ManualService, watch: WatchHub, store: MemoryStore
) -> None:
    """A schedule that backs off resumes when a query, or another replica, stores a snapshot."""
    with watch.subscribe([KEY], SubscriptionKind.EVENTS) as subscriber:
        for _ in range(2):
            service.answers.put_nowait(UpstreamThrottled("slowly", retry_after=3600.0))
            [update] = await received(subscriber)
            assert isinstance(update.failure, UpstreamThrottled)
            service.asked.clear()
            store.put(snapshot("1"))
            await asked(service)
            [update] = await received(subscriber)
            assert update.snapshot is not None
    await watch.aclose()


def test_watch_backs_off_for_at_most_half_a_minute() -> None:
    """A failing task is refreshed after a second, or after Retry-After, up to 30 seconds, for hours."""
    loop = TickedLoop()
    pauses = []
    try:
        service, store = (
            ManualService(),
            MemoryStore(max_tasks=10, min_keep_stale_seconds=60, clock=loop.time),
        )
        watch = loop.within(lambda: manual_watch(service, store))
        subscription = watch.subscribe([KEY], SubscriptionKind.EVENTS)
        loop.within(subscription.__enter__)
        for retry_after in (None, None, None, 12.0, None, None, 3600.0, *[1.0] * 1100):  # an outage of hours
            service.asked.clear()
            service.answers.put_nowait(UpstreamThrottled("slowly", retry_after=retry_after))
            loop.settle()
            failed_at = loop.time()
            while not service.asked.is_set():
                assert loop.next_timer is not None
                loop.advance(loop.next_timer - loop.time())
            pauses.append(round(loop.time() - failed_at, 1))
        loop.within(lambda: subscription.__exit__(None, None, None))
        loop.run_until_complete(watch.aclose())
    finally:
        loop.close()
    assert pauses == [1.0, 1.0, 1.0, 12.0, 1.0, 1.0, 30.0, *[1.0] * 1100]


def test_watch_waits_for_an_unknown_task() -> None:
    """A rejected task is refreshed with backoff; it counts as not found from 30 s until it has a snapshot."""
    loop = TickedLoop()
    rejection = UpstreamRejected("no such task", envelope=b"{}", detail=UpstreamDetail())
    throttled = UpstreamThrottled("slowly", retry_after=8.0)
    pauses, unknown = [], []
    try:
        service, store = (
            ManualService(),
            MemoryStore(max_tasks=10, min_keep_stale_seconds=60, clock=loop.time),
        )
        watch = loop.within(lambda: manual_watch(service, store, loop.time))
        subscription = watch.subscribe([KEY], SubscriptionKind.EVENTS)
        subscriber = loop.within(subscription.__enter__)
        for answer in (rejection, rejection, rejection, throttled, *[rejection] * 4):
            service.asked.clear()
            service.answers.put_nowait(answer)
            loop.settle()
            failed_at = loop.time()
            unknown.append(KEY in subscriber.not_found_keys)
            while not service.asked.is_set():
                assert loop.next_timer is not None
                loop.advance(loop.next_timer - loop.time())
            pauses.append(round(loop.time() - failed_at, 1))
        service.answers.put_nowait(snapshot("1"))
        loop.settle()
        assert not subscriber.not_found_keys
        loop.within(lambda: subscription.__exit__(None, None, None))
        loop.run_until_complete(watch.aclose())
    finally:
        loop.close()
    assert pauses[:5] == [1.0, 2.0, 4.0, 8.0, 15.0]
    assert all(15.0 <= pause <= 30.0 for pause in pauses[5:]), "not all tasks at the same time"
    assert len(set(pauses[5:])) > 1
    assert unknown == [False] * 5 + [True] * 3


async def test_watch_ended_tasks_stay_ended(
    service: ManualService, watch: WatchHub, store: MemoryStore
) -> None:
    """A task that has ended stays so for old and new subscribers, whatever is stored later."""
    with watch.subscribe([KEY], SubscriptionKind.EVENTS) as first:
        service.answers.put_nowait(snapshot("1", Status.SUCCEEDED))
        await received(first)
        store.put(snapshot("2"))
        await asyncio.sleep(0)
        first.wake()
        assert await received(first) == []
        with watch.subscribe([KEY], SubscriptionKind.EVENTS) as second:
            [update] = await received(second)
            assert update.snapshot is not None
            assert update.snapshot.terminal
    await watch.aclose()


def large(task_id: str, etag: str, status: Status = Status.RUNNING) -> Snapshot:
    """Return a snapshot of which three fit into the small store."""
    return replace(of(task_id, etag, status), body=etag.encode() * 20_000)


@pytest.fixture
def small_store() -> MemoryStore:
    return MemoryStore(max_tasks=10, max_bytes=65_536, min_keep_stale_seconds=60, clock=lambda: 0.0)


async def test_watch_keeps_no_large_bodies(service: ManualService, small_store: MemoryStore) -> None:
    """A busy subscriber keeps one body; those of its other tasks are only in the store."""
    watch = manual_watch(service, small_store)
    stored = [large(str(number), "1") for number in range(10)]
    bodies = [each.body for each in stored]
    with watch.subscribe([each.key for each in stored], SubscriptionKind.EVENTS) as subscriber:
        while stored:
            small_store.put(stored.pop())
            await asyncio.sleep(0)
        [alone] = [sys.getrefcount(body) for body in [large("a", "1").body]]
        assert sum(sys.getrefcount(body) > alone for body in bodies) == 3 + 1
        assert [update.key.task_id for update in await received(subscriber)] == ["9", "2", "1", "0"]
    await watch.aclose()


@pytest.mark.parametrize("status", [Status.RUNNING, Status.SUCCEEDED])
async def test_watch_refreshes_evicted_bodies(
    service: ManualService, small_store: MemoryStore, status: Status
) -> None:
    """A snapshot whose body was evicted before it was sent is fetched again at once and sent."""
    watch = manual_watch(service, small_store)
    ends = [large(task_id, "1", status) for task_id in "ab"]
    with watch.subscribe([end.key for end in ends], SubscriptionKind.EVENTS) as subscriber:
        for end in ends:
            service.answers.put_nowait(end)
        await turns(lambda: subscriber.has_unsent(ends[1].key))
        assert [update.key.task_id for update in await received(subscriber)] == ["a"]
        service.answers.put_nowait(ends[1])
        [update] = await received(subscriber)
        assert update.snapshot is not None
        assert (update.key.task_id, update.snapshot.body) == ("b", large("b", "1").body)
    await watch.aclose()


async def test_watch_sends_bodies_larger_than_the_store(service: ManualService) -> None:
    """An idle subscriber receives each change of a task that does not fit into the store, once."""
    store = MemoryStore(max_tasks=10, max_bytes=8_192, min_keep_stale_seconds=60, clock=lambda: 0.0)
    watch = manual_watch(service, store)
    with watch.subscribe([KEY], SubscriptionKind.EVENTS) as subscriber:
        for etag in "123":
            store.put(large("a", etag))
            assert etags(await received(subscriber)) == [etag]
        assert len(store) == 0
        assert not any(map(subscriber.has_unsent, subscriber.keys))
    await watch.aclose()


async def test_watch_looks_up_one_body_at_a_time(watch: WatchHub, store: MemoryStore) -> None:
    """After a slow write the next task's update has the latest body, and is sent once."""
    with watch.subscribe(
        [large(task_id, "1").key for task_id in "ab"], SubscriptionKind.EVENTS
    ) as subscriber:
        for task_id in "ab":
            store.put(large(task_id, "1"))
            await asyncio.sleep(0)
        updates = subscriber.take_unsent()
        assert etags([next(updates)]) == ["1"]
        store.put(replace(large("b", "2"), version=1))  # stored, but not published yet
        assert etags([*updates, *await received(subscriber)]) == ["2"]
        await turns(lambda: False)
        assert not any(map(subscriber.has_unsent, subscriber.keys))
    await watch.aclose()


async def test_watch_schedule_ends_with_its_last_subscriber(service: ManualService, watch: WatchHub) -> None:
    """When the last subscriber leaves, the task is not refreshed any more; the next one starts anew."""
    with watch.subscribe([KEY], SubscriptionKind.EVENTS), watch.subscribe([KEY], SubscriptionKind.EVENTS):
        await asked(service)
    assert await nothing_waits(service)
    service.asked.clear()
    with watch.subscribe([KEY], SubscriptionKind.EVENTS):
        await asked(service)
    await watch.aclose()


async def test_watch_schedule_ends_with_its_task(service: ManualService, watch: WatchHub) -> None:
    """An ended task is not refreshed again, although it still has subscribers."""
    with watch.subscribe([KEY], SubscriptionKind.EVENTS) as subscriber:
        service.answers.put_nowait(snapshot("1", Status.SUCCEEDED))
        [update] = await received(subscriber)
        assert update.snapshot is not None
        assert update.snapshot.terminal
        service.asked.clear()
        await asyncio.sleep(0)
        assert not service.asked.is_set()
    await watch.aclose()


async def test_watch_shutdown_reaches_new_subscribers(watch: WatchHub) -> None:
    """At shutdown all subscribers are woken and flagged, including those that join later."""
    with watch.subscribe([KEY], SubscriptionKind.EVENTS) as subscriber:
        watch.begin_shutdown()
        assert await received(subscriber) == []
        assert subscriber.must_end
        with watch.subscribe([KEY], SubscriptionKind.EVENTS) as second:
            assert second.must_end
            assert await received(second) == []
    await watch.aclose()


async def test_watch_closes_with_open_subscriptions(service: ManualService, watch: WatchHub) -> None:
    """Closing ends every schedule, and waits for its end."""
    with watch.subscribe([KEY], SubscriptionKind.EVENTS):
        await asked(service)
        await watch.aclose()
        assert await nothing_waits(service)


async def test_watch_closed_starts_no_schedule(
    service: ManualService, watch: WatchHub, store: MemoryStore
) -> None:
    """A change that is unpublished while the hub closes restarts no schedule."""
    with watch.subscribe([KEY], SubscriptionKind.EVENTS) as subscriber:
        service.answers.put_nowait(UpstreamThrottled("slowly", retry_after=3600.0))
        await received(subscriber)
        service.asked.clear()
        store.put(snapshot("1"))
        await watch.aclose()
        assert etags(await received(subscriber)) == ["1"]
        assert await nothing_waits(service)
        assert not service.asked.is_set()


@pytest.mark.parametrize("fault", ["fetching", "publishing"])
async def test_watch_continues_after_a_bug_in_a_refresh(service: ManualService, fault: str) -> None:
    """An unexpected exception is logged and published as a problem; the schedule backs off and continues."""
    store = MemoryStore(max_tasks=10, min_keep_stale_seconds=60)
    watch = manual_watch(service, store)

    def broken(update: Update, subscribers: Collection[Subscriber]) -> Iterable[Subscriber]:
        if update.failure is None:
            raise ZeroDivisionError
        return subscribers

    with capture_logs() as lines, watch.subscribe([KEY], SubscriptionKind.EVENTS) as subscriber:
        if fault == "fetching":
            service.answers.put_nowait(ZeroDivisionError())
        else:
            watch.direct_delivery_hook = broken
            service.answers.put_nowait(snapshot("0"))
        [update] = await received(subscriber)
        assert update.failure is not None
        assert update.failure.code == "internal"
        with watch.subscribe([KEY], SubscriptionKind.LONGPOLL) as second:
            [update] = await received(second)
            assert update.failure is not None
        watch.direct_delivery_hook = lambda _, subscribers: subscribers
        service.asked.clear()
        store.put(snapshot("1"))  # ends the backoff
        assert etags(await received(subscriber)) == ["1"]
        await asked(service)
    assert [(line["event"], line["log_level"]) for line in lines] == [("bug_in_schedule", "error")]
    assert not +service.demand
    await watch.aclose()


async def test_watch_counts_the_clients_of_its_subscribers(service: ManualService, watch: WatchHub) -> None:
    """A subscriber's client is part of the demand for its tasks while the subscription is open."""
    with watch.subscribe([KEY], SubscriptionKind.EVENTS, client=b"1"):
        with (
            watch.subscribe([KEY, of("b", "0").key], SubscriptionKind.LONGPOLL, client=b"2"),
            watch.subscribe([KEY], SubscriptionKind.EVENTS, client=b"2"),
        ):
            published = {(key.task_id, client): count for (key, client), count in service.demand.items()}
            assert published == {("a", b"1"): 1, ("a", b"2"): 2, ("b", b"2"): 1}
        assert +service.demand == {(KEY, b"1"): 1}
    assert not +service.demand
    await watch.aclose()


async def codes(subscriber: Subscriber) -> list[str | None]:
    """Return the codes of the overdue notices that the subscriber receives next."""
    await turns(lambda: subscriber.woken)
    subscriber.woken = False
    list(subscriber.take_unsent())
    return [overdue_notice.code for overdue_notice in subscriber.take_overdue_notices()]


async def test_watch_counts_tasks_until_their_first_snapshot(watch: WatchHub, store: MemoryStore) -> None:
    """A task without a snapshot counts once, until it has one or is left."""
    keys = [of(task_id, "").key for task_id in "abc"]
    with watch.counted_as_unanswered(keys, client=b"first"):
        assert len(watch.unanswered_tasks) == 3
    with watch.subscribe(keys, SubscriptionKind.EVENTS, client=b"first"):
        with watch.counted_as_unanswered(keys, client=b"second"):
            assert len(watch.unanswered_tasks) == 3
        with watch.subscribe(keys, SubscriptionKind.EVENTS, client=b"second"):
            store.put(of("a", "1"))
            await asyncio.sleep(0)
            assert len(watch.unanswered_tasks) == 2
            store.put(of("a", "2"))
            await asyncio.sleep(0)
            assert len(watch.unanswered_tasks) == 2
        assert len(watch.unanswered_tasks) == 2
    assert len(watch.unanswered_tasks) == 0
    await watch.aclose()


async def test_watch_counts_tasks_for_a_client_that_still_waits(watch: WatchHub) -> None:
    """When the client that asked first leaves, its tasks count for another one."""
    keys = [of(str(number), "").key for number in range(150)]
    first = watch.subscribe(keys, SubscriptionKind.EVENTS, client=b"first")
    second = watch.subscribe(keys, SubscriptionKind.LONGPOLL, client=b"second")
    first.__enter__()
    with second:
        assert watch.unanswered_tasks.has_room(b"second", 4_000)
        first.__exit__(None, None, None)
        assert len(watch.unanswered_tasks) == 150
        assert watch.unanswered_tasks.has_room(b"first", 4_000)
        assert not watch.unanswered_tasks.has_room(b"second", 4_000)
    assert len(watch.unanswered_tasks) == 0
    await watch.aclose()


async def test_watch_admits_known_tasks_without_counting(watch: WatchHub, store: MemoryStore) -> None:
    """A task with a snapshot, however old, does not wait for its first one, even if many others do."""
    known, unknown = of("a", "1"), of("b", "1")
    store.put(known)
    with watch.unanswered_tasks.counted(b"greedy", 20_000):
        with watch.counted_as_unanswered([known.key], client=b"greedy"):
            assert len(watch.unanswered_tasks) == 20_000
        with watch.subscribe([known.key], SubscriptionKind.EVENTS, client=b"greedy"):
            assert len(watch.unanswered_tasks) == 20_000
        with (
            pytest.raises(Overloaded),
            watch.counted_as_unanswered([known.key, unknown.key], client=b"greedy"),
        ):
            pass
    await watch.aclose()


async def test_watch_wakes_many_subscribers_in_turn(watch: WatchHub, store: MemoryStore) -> None:
    """A change that hundreds wait for wakes some in each turn of the loop; other work runs in between."""
    with ExitStack() as stack:
        subscribers = [
            stack.enter_context(watch.subscribe([KEY], SubscriptionKind.LONGPOLL)) for _ in range(300)
        ]
        polls = [asyncio.create_task(subscriber.next_updates()) for subscriber in subscribers]
        await asyncio.sleep(0)
        store.put(snapshot("1"))
        counts = [0]
        while counts[-1] < len(polls):
            await asyncio.sleep(0)
            counts.append(sum(poll.done() for poll in polls))
        assert max(after - before for before, after in pairwise(counts)) <= 64
        assert all([etags(await poll) == ["1"] for poll in polls])
    await watch.aclose()


async def test_long_polls_that_expire_together_end_in_turn(watch: WatchHub) -> None:
    """A few long polls end in each turn of the loop, in the order in which they began."""
    ended = []

    async def poll(subscriber: Subscriber) -> None:
        with subscriber.expiring(0.05):
            await subscriber.next_updates()
        assert subscriber.must_end
        ended.append(subscriber)

    with ExitStack() as stack:
        subscribers = [
            stack.enter_context(watch.subscribe([KEY], SubscriptionKind.LONGPOLL)) for _ in range(300)
        ]
        polls = [asyncio.create_task(poll(subscriber)) for subscriber in subscribers]
        counts = [0]
        while counts[-1] < len(polls):
            await asyncio.sleep(0)
            counts.append(len(ended))
        assert max(after - before for before, after in pairwise(counts)) <= 64
        assert ended == subscribers
        await asyncio.gather(*polls)
    await watch.aclose()


def test_long_poll_expires_only_while_it_waits() -> None:
    """It ends when its time is over; no timer is left of a long poll that has ended before."""
    loop = TickedLoop()
    try:
        for ends_in_time in (False, True):
            subscriber = Subscriber([KEY], b"")
            wait = subscriber.expiring(5.0)
            loop.within(wait.__enter__)
            loop.advance(4.9)
            assert not subscriber.must_end
            if ends_in_time:
                loop.within(partial(wait.__exit__, None, None, None))
            loop.advance(0.2)
            assert subscriber.must_end is not ends_in_time
    finally:
        loop.close()
    assert loop.faults == []


async def test_failures_of_tasks_with_many_subscribers_are_published_in_turn(
    watch: WatchHub, service: ManualService
) -> None:
    """When many calls fail together, each turn of the loop publishes the failure of one such task."""
    keys = [of(f"task-{number}", "").key for number in range(10)]
    published: list[TaskKey] = []
    watch.direct_delivery_hook = lambda update, _: published.append(update.key) or ()
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(watch.subscribe(keys, SubscriptionKind.EVENTS))
        await turns(lambda: len(service.seen_revisions) == len(keys))
        for _ in keys:
            service.answers.put_nowait(UpstreamTimeout("late"))
        counts = [0]
        while counts[-1] < len(keys):
            await asyncio.sleep(0)
            counts.append(len(published))
        assert max(after - before for before, after in pairwise(counts)) == 1
    await watch.aclose()


async def test_watch_drops_a_failure_that_a_snapshot_has_outdated(
    watch: WatchHub, service: ManualService, store: MemoryStore
) -> None:
    """A failure that waits for its turn is not published after a snapshot that is newer."""
    keys = [of(task_id, "").key for task_id in "ab"]
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(watch.subscribe(keys, SubscriptionKind.EVENTS))
        await turns(lambda: len(service.seen_revisions) == len(keys))
        published = listen(watch)
        for _ in keys:
            service.answers.put_nowait(UpstreamTimeout("late"))
        await turns(lambda: published == [None])
        store.put(of("b", "1"))
        await turns(lambda: len(service.seen_revisions) == len(keys) + 1)
        assert published == [None, "1"]
        assert not watch._watched[keys[1]].backing_off, "the schedule does not back off after the snapshot"
    await watch.aclose()


async def test_watch_publishes_no_older_snapshot_after_a_newer_one(
    watch: WatchHub, service: ManualService, store: MemoryStore
) -> None:
    """Another replica's snapshot may be published before the schedule continues with an older result."""
    published = listen(watch)
    with watch.subscribe([KEY], SubscriptionKind.EVENTS):
        await asked(service)
        service.known = replace(snapshot("4"), version=4, revision=4)
        store.put(service.known)
        await turns(lambda: published == ["4"])
        service.answers.put_nowait(replace(snapshot("3"), version=3, revision=3))
        await turns(service.answers.empty)
        for _ in range(9):
            await asyncio.sleep(0)
        assert published == ["4"]
    await watch.aclose()


async def test_watch_publishes_an_older_version_if_the_newer_one_is_lost(
    watch: WatchHub, service: ManualService, store: MemoryStore
) -> None:
    """The store was emptied and the clock set back: what the upstream says now counts."""
    published = listen(watch)
    with watch.subscribe([KEY], SubscriptionKind.EVENTS):
        await asked(service)
        store.put(replace(snapshot("4"), version=4, revision=4))
        await turns(lambda: published == ["4"])
        service.answers.put_nowait(replace(snapshot("3"), version=3, revision=3))
        await turns(lambda: published == ["4", "3"])
        assert published == ["4", "3"]
    await watch.aclose()


async def test_watch_publishes_the_newest_of_two_failures_that_wait(
    watch: WatchHub, service: ManualService
) -> None:
    """If a task fails again while its failure waits for its turn, only the newer failure is published."""
    keys = [of(str(number), "").key for number in range(40)]
    last, published = keys[-1], []

    def deliver(update: Update, _: Iterable[Subscriber]) -> list[Subscriber]:
        if update.key == last:
            published.append(update.failure)
        return []

    watch.direct_delivery_hook = deliver
    with ExitStack() as stack:
        for _ in range(99):
            stack.enter_context(watch.subscribe(keys, SubscriptionKind.EVENTS))
        await turns(lambda: len(service.seen_revisions) == len(keys))
        for _ in keys:
            service.answers.put_nowait(UpstreamTimeout("first"))
        await turns(lambda: all(watch._watched[key].backing_off for key in keys))
        assert not published
        watch._schedules.refresh_now(watch._watched[last])
        await turns(lambda: len(service.seen_revisions) == len(keys) + 1)
        newer = UpstreamThrottled("second")
        service.answers.put_nowait(newer)
        await turns(lambda: published)
        for _ in keys:
            await asyncio.sleep(0)
        assert published == [newer]
    await watch.aclose()


async def test_watch_finds_a_task_whose_rejection_waits(service: ManualService, store: MemoryStore) -> None:
    """A task counts as found if a snapshot comes while the rejection waits for its turn."""
    watch = manual_watch(service, store, settings=WatchSettings(unknown_task_seconds=0))
    keys = [of(task_id, "").key for task_id in "ab"]
    with ExitStack() as stack:
        subscribers = [stack.enter_context(watch.subscribe(keys, SubscriptionKind.EVENTS)) for _ in range(99)]
        await turns(lambda: len(service.seen_revisions) == len(keys))
        for _ in keys:
            rejection = UpstreamRejected("no such task", envelope=b"{}", detail=UpstreamDetail())
            service.answers.put_nowait(rejection)
        await turns(lambda: keys[0] in subscribers[0].not_found_keys)
        store.put(of("b", "1"))
        await turns(lambda: len(service.seen_revisions) == len(keys) + 1)
        assert all(subscriber.not_found_keys == {keys[0]} for subscriber in subscribers)
        assert not watch._watched[keys[1]].not_found
    await watch.aclose()


async def test_watch_sends_each_overdue_notice_once(
    service: ManualService, watch: WatchHub, store: MemoryStore
) -> None:
    """Subscribers receive each change of the code; its end, only those that have received a code."""
    throttled, timeout = UpstreamThrottled("slowly"), UpstreamTimeout("late")
    service.known = snapshot("1")
    with watch.subscribe([KEY], SubscriptionKind.EVENTS) as subscriber:
        assert await codes(subscriber) == []
        watched = watch._watched[KEY]
        for failure in (throttled, throttled, timeout):
            watch._update_overdue_error(watched, failure)
        assert await codes(subscriber) == ["upstream-timeout"], "the latest state"
        watch._update_overdue_error(watched, UpstreamTimeout("later"))
        assert await codes(subscriber) == []
        with watch.subscribe([KEY], SubscriptionKind.EVENTS) as other:
            assert await codes(other) == ["upstream-timeout"]
            store.put(snapshot("1"))  # the same body
            await turns(lambda: subscriber.woken)
            assert await codes(other) == [None]
        assert await codes(subscriber) == [None]
        watch._update_overdue_error(watched, throttled)
        watch._update_overdue_error(watched, None)
        assert await codes(subscriber) == [], "it ended before the subscriber received it"
    await watch.aclose()


async def test_watch_sends_the_overdue_notice_after_the_snapshot(watch: WatchHub, store: MemoryStore) -> None:
    """A subscriber receives the overdue notice of a snapshot after the snapshot."""
    with watch.subscribe([KEY], SubscriptionKind.EVENTS) as subscriber:
        store.put(snapshot("1"))
        await turns(lambda: subscriber.woken)
        watch._update_overdue_error(watch._watched[KEY], UpstreamTimeout("late"))
        assert subscriber.take_overdue_notices() == []
        assert await codes(subscriber) == ["upstream-timeout"]
    await watch.aclose()


async def test_watch_sends_no_overdue_notice_without_a_snapshot(watch: WatchHub) -> None:
    """While there is no snapshot, none is old."""
    with watch.subscribe([KEY], SubscriptionKind.EVENTS) as subscriber:
        watch._update_overdue_error(watch._watched[KEY], UpstreamTimeout("late"))
        assert await codes(subscriber) == []
    await watch.aclose()


def test_watch_continues_every_schedule_after_a_recovery() -> None:
    """While the upstream fails, one task is refreshed per second; the first success continues all others."""
    loop = TickedLoop()
    keys = [TaskKey(Operation.SD_GET_PROGRESS, f"task{number}") for number in range(50)]
    failing = True
    refreshed: list[TaskKey] = []

    class FailingService(ManualService):
        async def query_if_stale(self, key: TaskKey, *, seen_revision: int) -> LookupSuccess | LookupFailure:
            refreshed.append(key)
            if failing:
                return LookupFailure(key, UpstreamTimeout("late"), CacheStatus.MISS)
            return LookupSuccess(
                replace(snapshot("1"), key=key, fetched_at=loop.time()), 0.0, CacheStatus.MISS
            )

    try:
        store = MemoryStore(max_tasks=100, min_keep_stale_seconds=60, clock=loop.time)
        watch = loop.within(lambda: manual_watch(FailingService(), store, loop.time))
        subscription = watch.subscribe(keys, SubscriptionKind.EVENTS)
        loop.within(subscription.__enter__)
        loop.settle()
        for _ in range(70):  # until all back off for 30 s
            loop.advance(1.0)
        refreshed.clear()
        for _ in range(3):
            loop.advance(1.0)
        assert len(refreshed) <= 3 * 3, "one probe per second, and the schedules that are due"
        failing = False
        refreshed.clear()
        loop.advance(1.1)
        assert set(refreshed) == set(keys)
        loop.within(lambda: subscription.__exit__(None, None, None))
        loop.run_until_complete(watch.aclose())
        assert loop.next_timer is None
    finally:
        loop.close()


def test_watch_leaves_rejected_tasks_alone_when_another_becomes_known() -> None:
    """A new task, which the upstream knows after a moment, does not end the back-off of unknown tasks."""
    loop = TickedLoop()
    keys = [TaskKey(Operation.SD_GET_PROGRESS, f"unknown-{number}") for number in range(50)]
    new = TaskKey(Operation.SD_GET_PROGRESS, "new")
    is_known = False
    refreshed: list[TaskKey] = []

    class RejectingService(ManualService):
        async def query_if_stale(self, key: TaskKey, *, seen_revision: int) -> LookupSuccess | LookupFailure:
            refreshed.append(key)
            if key == new and is_known:
                found = replace(snapshot("1"), key=key, fetched_at=loop.time())
                return LookupSuccess(found, 0.0, CacheStatus.MISS)
            rejected = UpstreamRejected("no", envelope=b"{}", detail=UpstreamDetail())
            return LookupFailure(key, rejected, CacheStatus.MISS)

    try:
        store = MemoryStore(max_tasks=100, min_keep_stale_seconds=60, clock=loop.time)
        watch = loop.within(lambda: manual_watch(RejectingService(), store, loop.time))
        unknown = watch.subscribe(keys, SubscriptionKind.EVENTS)
        loop.within(unknown.__enter__)
        for _ in range(100):  # until all back off for up to 30 s
            loop.advance(1.0)
        follow = watch.subscribe([new], SubscriptionKind.EVENTS)
        loop.within(follow.__enter__)
        loop.advance(0.5)
        is_known = True
        refreshed.clear()
        loop.advance(1.0)
        assert new in refreshed
        assert len(refreshed) < 20, "those that are due"
        for subscription in (unknown, follow):
            loop.within(partial(subscription.__exit__, None, None, None))
        loop.run_until_complete(watch.aclose())
        assert loop.next_timer is None
    finally:
        loop.close()


def test_watch_checks_a_slow_refresh_although_clients_subscribe_again() -> None:
    """Each new subscriber may restart the refresh; the check whether the update is overdue stays due."""
    loop = TickedLoop()

    class SilentService(ManualService):
        async def query_if_stale(self, key: TaskKey, *, seen_revision: int) -> LookupSuccess | LookupFailure:
            return await asyncio.get_running_loop().create_future()

    try:
        store = MemoryStore(max_tasks=100, min_keep_stale_seconds=60, clock=loop.time)
        service = loop.within(SilentService)
        service.known = snapshot("1")
        watch = loop.within(lambda: manual_watch(service, store, loop.time))
        subscriptions = [watch.subscribe([KEY], SubscriptionKind.EVENTS) for _ in range(3)]
        first = loop.within(subscriptions[0].__enter__)
        loop.settle()
        assert etags(first.take_unsent()) == ["1"]
        service.known = None  # from now on, too old to be served: each subscriber awaits a refresh
        service.overdue_detector.failure = UpstreamTimeout("late")
        for subscription in subscriptions[1:]:
            loop.advance(0.7)
            loop.within(subscription.__enter__)
        loop.advance(0.2)
        assert [state.code for state in first.take_overdue_notices()] == ["upstream-timeout"]
        for subscription in subscriptions:
            loop.within(partial(subscription.__exit__, None, None, None))
        loop.run_until_complete(watch.aclose())
        assert loop.next_timer is None
    finally:
        loop.close()
