"""The watch by itself: a service played by hand, and nothing that waits for time."""

import asyncio
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from gateway.exceptions import GatewayError, UpstreamThrottled, UpstreamTimeout
from gateway.metrics import Metrics
from gateway.models import Operation, Snapshot, Status, TaskKey
from gateway.readings import Failed, Reading, Source
from gateway.settings import Watch as WatchSettings
from gateway.stores.memory import MemoryStore
from gateway.watch import Kind, Watch
from gateway.watchers import Update, Watcher
from tests.ticked import TickedLoop

pytestmark = pytest.mark.anyio

KEY = TaskKey(Operation.SD_GET_PROGRESS, "a")


def snapshot(etag: str, status: Status = Status.RUNNING) -> Snapshot:
    """Return a snapshot that differs from others by its ETag."""
    return Snapshot(KEY, 0.0, 3600.0, b"", status, 0.5, None, b"{}", etag)


def etags(updates: Iterable[Update]) -> list[str | None]:
    """Return the ETags of what a watcher was told, None for a failure."""
    return [update.snapshot and update.snapshot.etag for update in updates]


async def taken(watcher: Watcher) -> list[Update]:
    """Take what the watcher is told within a few turns of the loop; fail at once when that is nothing."""
    taking = asyncio.ensure_future(watcher.take())
    await turns(taking.done)
    if not taking.done():
        taking.cancel()
        pytest.fail("the watcher is told nothing")
    return taking.result()


async def turns(enough: Callable[[], bool]) -> None:
    """Let the loop take turns until it is enough, a hundred at most: nothing here waits for time."""
    for _ in range(100):
        if enough():
            return
        await asyncio.sleep(0)


def listen(watch: Watch) -> list[str | None]:
    """Return a list that gets the ETag of whatever is told from now on; nothing is left for the slots."""
    told: list[str | None] = []

    def deliver(update: Update, _watchers: Collection[Watcher]) -> Iterable[Watcher]:
        told.extend(etags([update]))
        return ()

    watch.deliver = deliver
    return told


class HandService:
    """A service whose fresh answers the test gives."""

    def __init__(self) -> None:
        self.known: Snapshot | None = None
        self.asked = asyncio.Event()
        self.answers: asyncio.Queue[Snapshot | Exception] = asyncio.Queue()
        self.demand: Counter[tuple[TaskKey, bytes]] = Counter()

    def lookup(self, _key: TaskKey) -> Reading | None:
        return Reading(self.known, 0.0, Source.HIT) if self.known is not None else None

    current = lookup

    def join(self, key: TaskKey, client: bytes) -> None:
        self.demand[key, client] += 1

    def leave(self, key: TaskKey, client: bytes) -> None:
        self.demand[key, client] -= 1

    async def get_fresh(self, key: TaskKey, *, client: bytes | None) -> Reading | Failed:
        assert client is None, "its watchers have joined"
        assert +self.demand
        self.asked.set()
        answer = await self.answers.get()
        if isinstance(answer, GatewayError):
            return Failed(key, answer, Source.MISS)
        if isinstance(answer, Exception):
            raise answer
        return Reading(answer, 0.0, Source.MISS)


async def asked(service: HandService) -> None:
    """Let the schedule run until it asks; fail at once when it does not."""
    await turns(service.asked.is_set)
    assert service.asked.is_set(), "no schedule asks"


@pytest.fixture
def service() -> HandService:
    return HandService()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(max_tasks=10, stale_seconds=60, clock=lambda: 0.0)


@pytest.fixture
def watch(service: HandService, store: MemoryStore) -> Watch:
    return hand_watch(service, store)


def hand_watch(service: HandService, store: MemoryStore) -> Watch:
    metrics = Metrics(CollectorRegistry(), gateway_version="test")
    clock: Callable[[], float] = lambda: 0.0  # noqa: E731 - the clock stands
    return Watch(WatchSettings(), service=service, store=store, metrics=metrics, clock=clock)  # type: ignore[arg-type]


async def nobody_waits(service: HandService) -> bool:
    """Tell whether an answer is left lying, by whoever asked for it; it is taken back."""
    service.answers.put_nowait(snapshot("of nobody's"))
    for _ in range(10):  # turns of the loop, of which one would do
        await asyncio.sleep(0)
    left = not service.answers.empty()
    if left:
        service.answers.get_nowait()
    return left


async def test_watch_offers_what_is_known_at_once(service: HandService, watch: Watch) -> None:
    """A watcher is told what is known already, before the first tick has an answer."""
    service.known = snapshot("1")
    with watch.watching([KEY], Kind.EVENTS) as watcher:
        [update] = await taken(watcher)
        assert update.snapshot is service.known
    await watch.aclose()


async def test_watch_slot_holds_the_newest_only(watch: Watch, store: MemoryStore) -> None:
    """A watcher that was busy finds the newest update, not those before it."""
    with watch.watching([KEY], Kind.EVENTS) as watcher:
        for etag in "123":
            store.keep(snapshot(etag))
            await asyncio.sleep(0)  # it is told in the loop's next turn
        [update] = await taken(watcher)
        assert update.snapshot is not None
        assert update.snapshot.etag == "3"
    await watch.aclose()


async def test_watch_delivers_past_the_slot_only_to_who_waits(watch: Watch, store: MemoryStore) -> None:
    """Nothing overtakes: an update is handed over at once only when all before it was taken."""
    delivered: list[str] = []

    def deliver(update: Update, watchers: Collection[Watcher]) -> Iterable[Watcher]:
        assert update.snapshot is not None
        [told] = watchers
        if told.idle_outlet is not outlet or update.snapshot.etag == "3":
            return watchers  # it is busy, or its reader does not keep up
        delivered.append(update.snapshot.etag)
        return []

    watch.deliver = deliver
    outlet = asyncio.WriteTransport()
    with watch.watching([KEY], Kind.EVENTS) as watcher:
        watcher.outlet = outlet
        store.keep(snapshot("1"))
        await asyncio.sleep(0)  # told while nobody waits yet
        assert etags(await taken(watcher)) == ["1"]
        waiting = asyncio.create_task(watcher.take())
        await asyncio.sleep(0)
        for etag in "23":  # of which the third wakes the watcher
            store.keep(snapshot(etag))
            await asyncio.sleep(0)
        assert etags(await waiting) == ["3"]
        waiting = asyncio.create_task(watcher.take())
        await asyncio.sleep(0)
        store.keep(snapshot("4"))
        watcher.ring()  # when the change is told it is awake, and has not looked yet
        assert etags(await waiting) == ["4"]
        assert delivered == ["2"]
        gone = asyncio.create_task(watcher.take())
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait([gone])
        store.keep(snapshot("5"))
        await asyncio.sleep(0)
        assert delivered == ["2"], "nobody waits any more"
    await watch.aclose()


def of(task_id: str, etag: str, status: Status = Status.RUNNING) -> Snapshot:
    """Return a snapshot of a certain task."""
    return replace(snapshot(etag, status), key=TaskKey(Operation.SD_GET_PROGRESS, task_id))


async def test_watch_tells_a_few_tasks_a_turn(watch: Watch, store: MemoryStore) -> None:
    """Of many tasks' changes one is told, then whoever else is ready runs, then the next; each the newest."""
    changes = [of(task_id, etag) for etag in "12" for task_id in "abc"]
    with watch.watching([change.key for change in changes[:3]], Kind.EVENTS) as watcher:
        for change in changes:
            store.keep(change)
        told = []
        for _ in range(4):
            await asyncio.sleep(0)
            watcher.ring()
            told.append([(update.key.task_id, *etags([update])) for update in await watcher.take()])
        assert told == [[("a", "2")], [("b", "2")], [("c", "2")], []]
    await watch.aclose()


async def test_watch_tells_the_more_the_more_wait(watch: Watch, store: MemoryStore) -> None:
    """However many tasks change in every turn of a busy loop, none is forgotten, and none waits for long."""
    told: list[int] = []
    watch.deliver = lambda update, _: told.append(int(update.key.task_id)) or ()  # type: ignore[func-returns-value]
    waiting = set[int]()
    most = 0
    with watch.watching([of(str(number), "0").key for number in range(1000)], Kind.EVENTS):
        for turn in range(300):
            for number in range(turn * 10, turn * 10 + 10):  # of 1,000 tasks, ten change a turn
                waiting.add(number % 1000)
                store.keep(of(str(number % 1000), str(number)))
            await asyncio.sleep(0)
            waiting.difference_update(told)
            told.clear()
            most = max(most, len(waiting))
        assert most < 100
        for _ in range(40):
            await asyncio.sleep(0)
        assert waiting == set(told)
    await watch.aclose()


async def test_watch_change_of_a_task_nobody_watches_any_more(watch: Watch, store: MemoryStore) -> None:
    """Who has left is told nothing, and holds nobody up."""
    told = listen(watch)
    with watch.watching([KEY], Kind.EVENTS):
        with watch.watching([of("b", "0").key], Kind.EVENTS):
            store.keep(of("b", "1"))
        store.keep(snapshot("2"))
        for _ in range(2):
            await asyncio.sleep(0)
    assert told == ["2"]
    await watch.aclose()


async def test_watch_goes_on_after_a_fault_in_delivery(watch: Watch, store: MemoryStore) -> None:
    """One event that cannot be delivered costs that event; it is told, and all others come."""
    faults: list[BaseException] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context["exception"]))
    told: list[str | None] = []

    def deliver(update: Update, _watchers: Collection[Watcher]) -> Iterable[Watcher]:
        told.extend(etags([update]))
        raise ZeroDivisionError

    watch.deliver = deliver
    with watch.watching([KEY, of("b", "0").key], Kind.EVENTS):
        for change in (snapshot("1"), of("b", "2")):
            store.keep(change)
        for _ in range(2):
            await asyncio.sleep(0)
        store.keep(snapshot("3"))
        await asyncio.sleep(0)
        assert told == ["1", "2", "3"]
        assert [type(fault) for fault in faults] == [ZeroDivisionError] * 3
    await watch.aclose()


async def test_watch_tells_all_before_the_farewell(watch: Watch, store: MemoryStore) -> None:
    """What was stored before the gateway leaves is in its last word."""
    ends = [of(task_id, "1", Status.SUCCEEDED) for task_id in "abc"]
    with watch.watching([end.key for end in ends], Kind.EVENTS) as watcher:
        for end in ends:
            store.keep(end)
        watch.say_farewell()
        assert [update.snapshot for update in await taken(watcher)] == ends
        assert watcher.leaving
    await watch.aclose()


async def test_watch_tells_who_joins_what_is_due_by_then(
    service: HandService, watch: Watch, store: MemoryStore
) -> None:
    """A change that arrives in the store only when it is looked at is not missed by who makes it look."""
    service.known = snapshot("1")

    def current(key: TaskKey) -> Reading | None:
        if service.known is not None and service.known.etag == "1":
            service.known = snapshot("2")
            store.keep(service.known)
        return service.lookup(key)

    with watch.watching([KEY], Kind.EVENTS):
        service.current = current  # type: ignore[method-assign]
        with watch.watching([KEY], Kind.LONGPOLL) as late:
            assert etags(await taken(late)) == ["2"]
    await watch.aclose()


async def test_watch_schedule_leaves_changes_in_their_place(
    service: HandService, watch: Watch, store: MemoryStore
) -> None:
    """Of what a schedule fetched it tells nothing itself that waits to be told already; else it does."""
    mine, other = snapshot("1"), of("b", "2")
    told = listen(watch)
    with watch.watching([mine.key, other.key], Kind.EVENTS):
        await asked(service)
        service.answers.put_nowait(mine)
        store.keep(other)
        store.keep(mine)
        await asyncio.sleep(0)
        assert told == ["2"]
        await asyncio.sleep(0)
        assert told == ["2", "1"]
    await watch.aclose()


async def test_watch_schedule_tells_what_is_not_stored(
    service: HandService, watch: Watch, store: MemoryStore
) -> None:
    """What a schedule got beside a change that waits is told, too, and after it."""
    told = listen(watch)
    with watch.watching([KEY], Kind.EVENTS):
        await asked(service)
        service.answers.put_nowait(snapshot("2"))
        store.keep(snapshot("1"))
        for _ in range(2):
            await asyncio.sleep(0)
        assert told == ["1", "2"]
    await watch.aclose()


async def test_watch_tells_changes_in_their_order(
    service: HandService, watch: Watch, store: MemoryStore
) -> None:
    """What waits to be told is told before who joins, and before a failure that came later."""
    service.known = snapshot("0")
    with watch.watching([KEY], Kind.EVENTS) as early:
        store.keep(snapshot("1"))
        store.keep(snapshot("2"))
        with watch.watching([KEY], Kind.EVENTS) as late:
            for watcher in (early, late):
                assert etags(await taken(watcher)) == ["2"]
        told = listen(watch)
        await asked(service)
        service.answers.put_nowait(UpstreamTimeout("late"))  # which the schedule hears of before it
        store.keep(snapshot("3"))
        await asyncio.sleep(0)
        assert told == ["3", None]
    await watch.aclose()


async def test_watch_end_that_waits_to_be_told_stands(
    watch: Watch, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An end that waits to be told is not overwritten by what a forgetful store lets run again."""
    with watch.watching([KEY], Kind.EVENTS) as watcher:
        store.keep(snapshot("1", Status.SUCCEEDED))
        monkeypatch.setattr(store, "peek", lambda _: None)
        store.keep(snapshot("2"))
        assert etags(await taken(watcher)) == ["1"]
        for etag in "34":
            store.keep(snapshot(etag, Status.SUCCEEDED))
        assert etags(await taken(watcher)) == ["4"]
    await watch.aclose()


async def test_watch_says_nothing_twice(service: HandService, watch: Watch, store: MemoryStore) -> None:
    """The same representation, stored again, rings nobody; nor does the same failure."""
    with watch.watching([KEY], Kind.EVENTS) as watcher:
        service.answers.put_nowait(snapshot("1"))
        assert len(await taken(watcher)) == 1
        store.keep(snapshot("1"))
        await asyncio.sleep(0)
        watcher.ring()
        assert await taken(watcher) == []
    await watch.aclose()
    first = Update(KEY, failure=UpstreamTimeout("late"))
    assert Update(KEY, failure=UpstreamTimeout("late")).says_the_same(first)
    assert not Update(KEY, failure=UpstreamTimeout("later")).says_the_same(first)
    assert not Update(KEY, snapshot("1")).says_the_same(first)


async def test_watch_tells_late_comers_the_latest(service: HandService, watch: Watch) -> None:
    """Who joins a schedule gets its latest update, a failure too, without a new tick."""
    with watch.watching([KEY], Kind.EVENTS) as early:
        service.answers.put_nowait(UpstreamTimeout("late"))
        await taken(early)
        with watch.watching([KEY], Kind.LONGPOLL) as late:
            [update] = await taken(late)
            assert isinstance(update.failure, UpstreamTimeout)
    await watch.aclose()


async def test_watch_tells_late_comers_nothing_too_old(
    service: HandService, watch: Watch, store: MemoryStore
) -> None:
    """Who joins while the latest is too old to show gets what upstream says now, changed or not."""
    with watch.watching([KEY], Kind.EVENTS) as early:
        service.answers.put_nowait(snapshot("1"))
        await taken(early)
        service.asked.clear()
        with watch.watching([KEY], Kind.EVENTS) as late:
            with watch.watching([KEY], Kind.EVENTS) as gone:
                await asked(service)  # at once, although the schedule sleeps for an hour
            for watcher in (early, late, gone):
                watcher.ring()
                assert await taken(watcher) == []
            service.answers.put_nowait(snapshot("1"))
            [update] = await taken(late)
            assert update.snapshot is not None
            assert update.snapshot.etag == "1"
            for watcher in (early, gone):
                watcher.ring()
                assert await taken(watcher) == []
            store.keep(snapshot("1"))
            await asyncio.sleep(0)
            late.ring()
            assert await taken(late) == []
    await watch.aclose()


async def test_watch_asks_again_once_somebody_got_an_answer(
    service: HandService, watch: Watch, store: MemoryStore
) -> None:
    """A schedule that rests after a failure goes on when a query, or another replica, brought a snapshot."""
    with watch.watching([KEY], Kind.EVENTS) as watcher:
        for _ in range(2):
            service.answers.put_nowait(UpstreamThrottled("slowly", retry_after=3600.0))
            [update] = await taken(watcher)
            assert isinstance(update.failure, UpstreamThrottled)
            service.asked.clear()
            store.keep(snapshot("1"))
            await asked(service)
            [update] = await taken(watcher)
            assert update.snapshot is not None
    await watch.aclose()


def test_watch_backs_off_for_half_a_minute_at_most() -> None:
    """After failures a schedule asks less and less often, as told to, but never leaves its watchers alone."""
    loop = TickedLoop()
    pauses = []
    try:
        service, store = HandService(), MemoryStore(max_tasks=10, stale_seconds=60, clock=loop.time)
        watch = loop.within(lambda: hand_watch(service, store))
        watching = watch.watching([KEY], Kind.EVENTS)
        loop.within(watching.__enter__)
        for told in (None, None, None, 12.0, None, None, 3600.0, *[1.0] * 1100):  # an outage of hours
            service.asked.clear()
            service.answers.put_nowait(UpstreamThrottled("slowly", retry_after=told))
            loop.settle()
            failed_at = loop.time()
            while not service.asked.is_set():
                assert loop.next_timer is not None
                loop.advance(loop.next_timer - loop.time())
            pauses.append(loop.time() - failed_at)
        loop.within(lambda: watching.__exit__(None, None, None))
        loop.run_until_complete(watch.aclose())
    finally:
        loop.close()
    assert pauses == [1.0, 2.0, 4.0, 12.0, 16.0, 30.0, 30.0, *[30.0] * 1100]


async def test_watch_takes_nothing_final_back(service: HandService, watch: Watch, store: MemoryStore) -> None:
    """A task that ended under its watchers stays so for them, and for who joins, whatever is stored later."""
    with watch.watching([KEY], Kind.EVENTS) as early:
        service.answers.put_nowait(snapshot("1", Status.SUCCEEDED))
        await taken(early)
        store.keep(snapshot("2"))
        await asyncio.sleep(0)
        early.ring()
        assert await taken(early) == []
        with watch.watching([KEY], Kind.EVENTS) as late:
            [update] = await taken(late)
            assert update.snapshot is not None
            assert update.snapshot.terminal
    await watch.aclose()


def large(task_id: str, etag: str, status: Status = Status.RUNNING) -> Snapshot:
    """Return a snapshot of which three fit into the small store."""
    return replace(of(task_id, etag, status), body=etag.encode() * 20_000)


@pytest.fixture
def small_store() -> MemoryStore:
    return MemoryStore(max_tasks=10, max_bytes=65_536, stale_seconds=60, clock=lambda: 0.0)


async def test_watch_holds_no_large_bodies(service: HandService, small_store: MemoryStore) -> None:
    """Of ten tasks whose watcher is busy the bodies are the store's; but for one, which is told next."""
    watch = hand_watch(service, small_store)
    stored = [large(str(number), "1") for number in range(10)]
    bodies = [each.body for each in stored]
    with watch.watching([each.key for each in stored], Kind.EVENTS) as watcher:
        while stored:
            small_store.keep(stored.pop())
            await asyncio.sleep(0)
        [alone] = [sys.getrefcount(body) for body in [large("a", "1").body]]
        assert sum(sys.getrefcount(body) > alone for body in bodies) == 3 + 1
        assert [update.key.task_id for update in await taken(watcher)] == ["9", "2", "1", "0"]
    await watch.aclose()


@pytest.mark.parametrize("status", [Status.RUNNING, Status.SUCCEEDED])
async def test_watch_tells_again_what_has_made_room(
    service: HandService, small_store: MemoryStore, status: Status
) -> None:
    """An update whose body is gone when its watcher comes to it is asked for again at once, and told."""
    watch = hand_watch(service, small_store)
    told = [large(task_id, "1", status) for task_id in "ab"]
    with watch.watching([each.key for each in told], Kind.EVENTS) as watcher:
        for each in told:
            service.answers.put_nowait(each)
        await turns(lambda: watcher.is_offered(told[1].key))
        assert [update.key.task_id for update in await taken(watcher)] == ["a"]
        service.answers.put_nowait(told[1])
        [update] = await taken(watcher)
        assert update.snapshot is not None
        assert (update.key.task_id, update.snapshot.body) == ("b", large("b", "1").body)
    await watch.aclose()


async def test_watch_tells_of_what_is_larger_than_the_store(service: HandService) -> None:
    """A watcher that waits is told of a task that the store has no room for, once for each change."""
    store = MemoryStore(max_tasks=10, max_bytes=8_192, stale_seconds=60, clock=lambda: 0.0)
    watch = hand_watch(service, store)
    with watch.watching([KEY], Kind.EVENTS) as watcher:
        for etag in "123":
            store.keep(large("a", etag))
            assert etags(await taken(watcher)) == [etag]
        assert len(store) == 0
        assert not any(map(watcher.is_offered, watcher.keys))
    await watch.aclose()


async def test_watch_takes_up_one_update_at_a_time(watch: Watch, store: MemoryStore) -> None:
    """A reader that is slow over one task finds the newest of the next, and once only."""
    with watch.watching([large(task_id, "1").key for task_id in "ab"], Kind.EVENTS) as watcher:
        for task_id in "ab":
            store.keep(large(task_id, "1"))
            await asyncio.sleep(0)
        updates = watcher.updates()
        assert etags([next(updates)]) == ["1"]
        store.keep(replace(large("b", "2"), stamp=1))  # stored, and not told yet
        assert etags([*updates, *await taken(watcher)]) == ["2"]
        await turns(lambda: False)
        assert not any(map(watcher.is_offered, watcher.keys))
    await watch.aclose()


async def test_watch_schedule_ends_with_its_last_watcher(service: HandService, watch: Watch) -> None:
    """When the last watcher leaves, nobody asks for the task any more; the next one begins anew."""
    with watch.watching([KEY], Kind.EVENTS), watch.watching([KEY], Kind.EVENTS):
        await asked(service)
    assert await nobody_waits(service)
    service.asked.clear()
    with watch.watching([KEY], Kind.EVENTS):
        await asked(service)
    await watch.aclose()


async def test_watch_schedule_ends_with_its_task(service: HandService, watch: Watch) -> None:
    """A task that has ended is not asked for again, though it is still watched."""
    with watch.watching([KEY], Kind.EVENTS) as watcher:
        service.answers.put_nowait(snapshot("1", Status.SUCCEEDED))
        [update] = await taken(watcher)
        assert update.snapshot is not None
        assert update.snapshot.terminal
        service.asked.clear()
        await asyncio.sleep(0)
        assert not service.asked.is_set()
    await watch.aclose()


async def test_watch_farewell_reaches_late_comers(watch: Watch) -> None:
    """Once the gateway is leaving, everybody knows, and so does who comes after."""
    with watch.watching([KEY], Kind.EVENTS) as watcher:
        watch.say_farewell()
        assert await taken(watcher) == []
        assert watcher.leaving
        with watch.watching([KEY], Kind.EVENTS) as late:
            assert late.leaving
            assert await taken(late) == []
    await watch.aclose()


async def test_watch_closes_with_watchers_inside(service: HandService, watch: Watch) -> None:
    """Closing ends every schedule, watched or not, and waits for them."""
    with watch.watching([KEY], Kind.EVENTS):
        await asked(service)
        await watch.aclose()
        assert await nobody_waits(service)


async def test_watch_closed_begins_nothing(service: HandService, watch: Watch, store: MemoryStore) -> None:
    """A change that waits to be told while the watch closes wakes no schedule that rests."""
    with watch.watching([KEY], Kind.EVENTS) as watcher:
        service.answers.put_nowait(UpstreamThrottled("slowly", retry_after=3600.0))
        await taken(watcher)
        service.asked.clear()
        store.keep(snapshot("1"))
        await watch.aclose()
        assert etags(await taken(watcher)) == ["1"]
        assert await nobody_waits(service)
        assert not service.asked.is_set()


@pytest.mark.parametrize("fault", ["asking", "telling"])
async def test_watch_goes_on_after_a_bug_in_a_tick(service: HandService, fault: str) -> None:
    """An unexpected exception is logged and told as a problem; the schedule backs off, and goes on."""
    store = MemoryStore(max_tasks=10, stale_seconds=60)
    watch = hand_watch(service, store)

    def broken(update: Update, watchers: Collection[Watcher]) -> Iterable[Watcher]:
        if update.failure is None:
            raise ZeroDivisionError
        return watchers

    with capture_logs() as lines, watch.watching([KEY], Kind.EVENTS) as watcher:
        if fault == "asking":
            service.answers.put_nowait(ZeroDivisionError())
        else:
            watch.deliver = broken
            service.answers.put_nowait(snapshot("0"))
        [update] = await taken(watcher)
        assert update.failure is not None
        assert update.failure.code == "internal"
        with watch.watching([KEY], Kind.LONGPOLL) as late:
            [update] = await taken(late)
            assert update.failure is not None
        watch.deliver = lambda _, watchers: watchers
        service.asked.clear()
        store.keep(snapshot("1"))  # what ends every rest: somebody got an answer
        assert etags(await taken(watcher)) == ["1"]
        await asked(service)
    assert [(line["event"], line["log_level"]) for line in lines] == [("bug in a schedule", "error")]
    assert not +service.demand
    await watch.aclose()


async def test_watch_counts_its_watchers_clients_in(service: HandService, watch: Watch) -> None:
    """Each watcher's client is part of the demand for its tasks, for as long as it watches."""
    with watch.watching([KEY], Kind.EVENTS, client=b"1"):
        with (
            watch.watching([KEY, of("b", "0").key], Kind.LONGPOLL, client=b"2"),
            watch.watching([KEY], Kind.EVENTS, client=b"2"),
        ):
            told = {(key.task_id, client): count for (key, client), count in service.demand.items()}
            assert told == {("a", b"1"): 1, ("a", b"2"): 2, ("b", b"2"): 1}
        assert +service.demand == {(KEY, b"1"): 1}
    assert not +service.demand
    await watch.aclose()
