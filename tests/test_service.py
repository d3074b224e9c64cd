"""The service over a memory store and a hand-ticked clock, with an upstream that answers when told to."""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from gateway.domain.errors import (
    GatewayError,
    Overloaded,
    RateLimiterExhausted,
    UpstreamBusy,
    UpstreamClock,
    UpstreamCredentials,
    UpstreamDetail,
    UpstreamInvalid,
    UpstreamNonce,
    UpstreamOpen,
    UpstreamRejected,
    UpstreamThrottled,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from gateway.domain.snapshot import Operation, Snapshot, Status, TaskKey
from gateway.progress.results import CacheResult, CacheStatus, FetchFailure
from gateway.progress.service import ProgressService
from gateway.settings.model import Cache
from gateway.stores.base import Lease
from gateway.stores.memory import MemoryStore
from gateway.telemetry.metrics import Metrics
from gateway.upstream.client import UpstreamClient
from gateway.upstream.demand import Demand
from gateway.upstream.signed_request import ParsedResponse

KEY = TaskKey(Operation.SD_GET_PROGRESS, "01j5t2qx82323pswaqykz9eq4")
OTHER = TaskKey(Operation.SD_GET_PROGRESS, "another")
RESULT = TaskKey(Operation.SD_GET_RESULT, KEY.task_id)
CALLERS = 50
PATIENCE_SECONDS = 10.0
CACHE = Cache(
    waiting_seconds=4.0,
    running_seconds=2.0,
    unknown_seconds=1.0,
    terminal_seconds=600.0,
    result_seconds=30.0,
    error_seconds=1.0,
    stale_while_revalidate_seconds=3.0,
    stale_if_error_seconds=60.0,
)

FAILURES: list[GatewayError] = [
    UpstreamTimeout("too late"),
    UpstreamUnreachable("gone"),
    UpstreamInvalid("nonsense"),
    UpstreamBusy("unwell"),
    UpstreamThrottled("slowly"),
    UpstreamRejected("no", envelope=b"{}", detail=UpstreamDetail()),
]
# None of these is the task's own: our limits and an open circuit pass by themselves, and credentials are the
# pair's affair.
NOT_THE_TASKS: list[GatewayError] = [
    Overloaded("full"),
    RateLimiterExhausted("full"),
    UpstreamOpen("resting"),
    UpstreamCredentials("refused"),
    UpstreamClock("refused"),
    UpstreamNonce("refused"),
]


def name_of(value: object) -> str:
    return type(value).__name__


@dataclass(eq=False)
class Alike:
    """Equals every copy of an error: of what is shared each caller gets one."""

    error: GatewayError

    def __eq__(self, other: object) -> bool:
        alike = type(other) is type(self.error) and vars(other) == vars(self.error)
        return alike and str(other) == str(self.error)

    __hash__ = None  # type: ignore[assignment]


@dataclass
class Clock:
    """A clock that a test turns by hand."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


class Call:
    """One query that the upstream got, and the test answers."""

    def __init__(
        self,
        key: TaskKey,
        *,
        renewal: bool,
        timeout_seconds: float,
        hold_up: Callable[[float], None],
        demand: Demand,
    ) -> None:
        self.key = key
        self.renewal = renewal
        self.timeout_seconds = timeout_seconds
        self.hold_up = hold_up
        self.demand = demand
        self.outcome: asyncio.Future[ParsedResponse] = asyncio.get_running_loop().create_future()

    def answer(self, status: str = "running", **data: Any) -> None:
        """Answer the query."""
        self.outcome.set_result(answer(self.key, status, **data))

    def fail(self, error: BaseException) -> None:
        """Let the query fail."""
        self.outcome.set_exception(error)


def answer(key: TaskKey, status: str, **data: Any) -> ParsedResponse:
    data = {"taskId": key.task_id, "status": status, "progress": 0.5} | data
    return ParsedResponse(data, json.dumps({"status": 10, "data": data}).encode())


class FakeUpstream:
    """Stands at the network's edge: takes note of each query, and leaves the answer to the test."""

    def __init__(self) -> None:
        self.queues = False
        self.keys: list[TaskKey] = []
        self._calls: asyncio.Queue[Call] = asyncio.Queue()

    async def query(
        self,
        key: TaskKey,
        *,
        renewal: bool,
        timeout_seconds: float,
        on_queued: Callable[[float], None],
        demand: Demand,
    ) -> ParsedResponse:
        """Wait until the test answers; until then the query is queued, or on the wire."""
        self.keys.append(key)
        demand.committed = not self.queues
        call = Call(key, renewal=renewal, timeout_seconds=timeout_seconds, hold_up=on_queued, demand=demand)
        self._calls.put_nowait(call)
        return await call.outcome

    async def call(self) -> Call:
        """Return the next query that has not been seen yet, as soon as there is one."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self._calls.get()

    @property
    def count(self) -> int:
        """How many queries there were."""
        return len(self.keys)


class Bench:
    """A service with all that surrounds it."""

    def __init__(self, cache: Cache = CACHE, store: MemoryStore | None = None) -> None:
        self.clock = Clock()
        self.upstream = FakeUpstream()
        self.metrics = Metrics(CollectorRegistry(), gateway_version="0")
        if store is None:
            store = MemoryStore(max_tasks=100, stale_seconds=60.0, clock=self.clock)
        self.store = store
        self.service = ProgressService(
            cache,
            store=self.store,
            upstream=cast("UpstreamClient", self.upstream),
            metrics=self.metrics,
            timeout_seconds=10.0,
            clock=self.clock,
        )
        self._stored: asyncio.Queue[Snapshot] = asyncio.Queue()
        self.store.on_change(self._stored.put_nowait)

    def begin(self, key: TaskKey = KEY) -> asyncio.Task[CacheResult]:
        """Begin to ask, and return the task that waits."""
        return asyncio.create_task(self.get(key))

    async def get(self, key: TaskKey = KEY) -> CacheResult:
        """Ask; return the reading, or raise the failure."""
        outcome = await self.service.get(key)
        if isinstance(outcome, FetchFailure):
            raise outcome.raised()
        return outcome

    async def learn(self, status: str = "running", key: TaskKey = KEY, **data: Any) -> CacheResult:
        """Ask once, and let the upstream answer."""
        asked = self.begin(key)
        (await self.upstream.call()).answer(status, **data)
        return await asked

    async def fail(self, error: BaseException, key: TaskKey = KEY) -> CacheResult | BaseException:
        """Ask once, let the upstream fail, and return what the caller got."""
        asked = self.begin(key)
        (await self.upstream.call()).fail(error)
        [outcome] = await asyncio.gather(asked, return_exceptions=True)
        return outcome

    async def renewed(self, *, after: Snapshot) -> None:
        """Wait until a newer snapshot than `after` has been stored."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (await self._stored.get()).fetched_at <= after.fetched_at:
                pass

    def lookups(self) -> dict[str, int]:
        """Return how many lookups of progress were counted, by result."""
        counted = {
            source.value: self.metrics.registry.get_sample_value(
                "sd_gateway_cache_lookups_total", {"operation": KEY.operation, "result": source}
            )
            for source in CacheStatus
        }
        return {result: int(count) for result, count in counted.items() if count}

    def ages(self) -> tuple[float, float, float]:
        """Return of how many answers the age was measured, their sum, and how many were overdue."""
        names = ("answer_age_seconds_count", "answer_age_seconds_sum", "answers_overdue_total")
        count, total, overdue = (
            self.metrics.registry.get_sample_value(f"sd_gateway_{name}", {"operation": KEY.operation}) or 0.0
            for name in names
        )
        return count, total, overdue

    def transitions(self) -> dict[str, int]:
        """Return how many transitions of progress were counted, by status."""
        counted = {
            status.value: self.metrics.registry.get_sample_value(
                "sd_gateway_tasks_observed_total", {"operation": KEY.operation, "status": status}
            )
            for status in Status
        }
        return {status: int(count) for status, count in counted.items() if count}


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """Return a service with an empty store, closed in the end."""
    bench = Bench()
    yield bench
    await bench.service.aclose()


def data_of(result: CacheResult) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(result.snapshot.body)
    return data


# Miss, hit, collapsed


async def test_get_asks_upstream_for_what_is_not_known(bench: Bench) -> None:
    """The first caller waits for upstream, and is told so."""
    result = await bench.learn(progress=0.35)
    assert (result.source, result.age, result.replaced_stale, result.failure) == (
        CacheStatus.MISS,
        0.0,
        False,
        None,
    )
    assert data_of(result)["progress"] == 0.35
    assert bench.upstream.keys == [KEY]
    assert bench.lookups() == {"miss": 1}


async def test_get_answers_from_a_fresh_snapshot(bench: Bench) -> None:
    """While the snapshot is fresh nobody asks upstream, and its age is told."""
    first = await bench.learn()
    bench.clock.now += CACHE.running_seconds - 0.1
    result = await bench.get(KEY)
    assert result.snapshot is first.snapshot
    assert (result.source, result.failure, result.replaced_stale) == (CacheStatus.HIT, None, False)
    assert result.age == pytest.approx(CACHE.running_seconds - 0.1)
    assert bench.upstream.count == 1
    assert bench.lookups() == {"miss": 1, "hit": 1}


async def test_repeat_answers_for_as_long_as_a_lookup(bench: Bench) -> None:
    """A snapshot is given again while it keeps the freshness promise, and each time counts as looked up."""
    snapshot = (await bench.learn()).snapshot
    promised = CACHE.running_seconds + CACHE.stale_while_revalidate_seconds
    ages = [0.5, CACHE.running_seconds - 0.25, CACHE.running_seconds, promised - 0.25]
    assert all(bench.service.still_current(snapshot, snapshot.fetched_at + age) for age in ages)
    counted = {"miss": 1, "hit": 2, "stale": 2}
    assert bench.lookups() == counted
    assert bench.ages() == (5, sum(ages), 0)
    assert not bench.service.still_current(snapshot, snapshot.fetched_at + promised)
    bench.store.keep(replace(snapshot, version=snapshot.version + 1))
    assert not any(bench.service.still_current(snapshot, snapshot.fetched_at + age) for age in ages)
    assert bench.lookups() == counted


@pytest.mark.parametrize(
    ("status", "seconds"),
    [
        ("waiting", CACHE.waiting_seconds),
        ("running", CACHE.running_seconds),
        ("paused", CACHE.unknown_seconds),
        ("succeeded", CACHE.terminal_seconds),
        ("successed", CACHE.terminal_seconds),
        ("failed", CACHE.terminal_seconds),
        ("canceled", CACHE.terminal_seconds),
    ],
)
async def test_get_takes_the_lifetime_from_the_status(bench: Bench, status: str, seconds: float) -> None:
    """A snapshot is fresh for as long as its status says, and stale from then on."""
    await bench.learn(status)
    bench.clock.now += seconds - 0.01
    assert (await bench.get(KEY)).source is CacheStatus.HIT
    bench.clock.now += 0.02
    assert (await bench.get(KEY)).source is CacheStatus.STALE


async def test_get_takes_the_lifetime_of_results(bench: Bench) -> None:
    """Results are kept by the lifetime of results, envelope and all."""
    first = await bench.learn("succeeded", RESULT, images=["u"])
    bench.clock.now += CACHE.result_seconds - 0.01
    result = await bench.get(RESULT)
    assert (result.source, result.snapshot) == (CacheStatus.HIT, first.snapshot)
    assert json.loads(result.snapshot.envelope)["data"]["images"] == ["u"]
    bench.clock.now += 0.02
    assert (await bench.get(RESULT)).source is CacheStatus.STALE


async def test_get_shares_one_call_among_a_crowd(bench: Bench) -> None:
    """Fifty callers at once cost one call: one of them made it, the others joined."""
    crowd = [bench.begin() for _ in range(CALLERS)]
    (await bench.upstream.call()).answer()
    results = await asyncio.gather(*crowd)
    assert {id(result.snapshot) for result in results} == {id(results[0].snapshot)}
    assert [result.source for result in results] == [CacheStatus.MISS] + [CacheStatus.COLLAPSED] * (
        CALLERS - 1
    )
    assert bench.upstream.count == 1
    assert bench.lookups() == {"miss": 1, "collapsed": CALLERS - 1}


async def test_get_keeps_tasks_and_operations_apart(bench: Bench) -> None:
    """Other tasks and other operations are other calls, and each caller gets its own task's answer."""
    keys = [KEY, OTHER, RESULT, TaskKey(Operation.COMFY_GET_PROGRESS, KEY.task_id)]
    asked = [bench.begin(key) for key in keys]
    for call in reversed([await bench.upstream.call() for _ in keys]):
        call.answer()
    assert [result.snapshot.key for result in await asyncio.gather(*asked)] == keys
    assert sorted(bench.upstream.keys) == sorted(keys)


@pytest.mark.parametrize("leaver", [0, 1, -1])
async def test_get_survives_a_caller_who_hangs_up(bench: Bench, leaver: int) -> None:
    """A caller that hangs up, the first one included, cancels nobody, and no call is made twice."""
    crowd = [bench.begin() for _ in range(3)]
    call = await bench.upstream.call()
    gone = crowd.pop(leaver)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    call.answer()
    assert [result.age for result in await asyncio.gather(*crowd)] == [0.0, 0.0]
    assert bench.upstream.count == 1


async def test_get_stores_an_answer_that_nobody_waits_for(bench: Bench) -> None:
    """When every caller has hung up the answer still lands, and the next one finds it."""
    asked = bench.begin()
    call = await bench.upstream.call()
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert not call.outcome.cancelled()
    next_one = bench.begin()
    call.answer()
    assert (await next_one).source is CacheStatus.COLLAPSED
    assert (await bench.get(KEY)).source is CacheStatus.HIT
    assert bench.upstream.count == 1


# Held up by the budget


def long_ago(bench: Bench) -> None:
    """Let so much time pass that a snapshot is too old to be shown, and young enough to cover a failure."""
    bench.clock.now += CACHE.running_seconds + CACHE.stale_while_revalidate_seconds + 1


async def test_get_does_not_wait_for_a_flight_that_is_held_up(bench: Bench) -> None:
    """Who has a snapshot to fall back on is told why it is old, at once; the flight goes on and lands."""
    first = await bench.learn(progress=0.1)
    long_ago(bench)
    crowd = [bench.begin() for _ in range(3)]
    call = await bench.upstream.call()
    assert call.renewal
    call.hold_up(7.0)
    call.hold_up(6.0)
    for result in await asyncio.gather(*crowd, bench.get(KEY)):
        assert (result.snapshot, result.source) == (first.snapshot, CacheStatus.STALE)
        assert result.failure == Alike(
            RateLimiterExhausted(
                "the query is queued by the rate limiter for upstream calls", retry_after=7.0
            )
        )
    assert bench.lookups() == {"miss": 1, "stale": 4}
    call.answer(progress=0.9)
    await bench.renewed(after=first.snapshot)
    assert data_of(await bench.get(KEY))["progress"] == 0.9
    assert bench.upstream.count == 2


async def test_get_waits_for_a_flight_that_is_not_held_up(bench: Bench) -> None:
    """A snapshot to fall back on is no reason not to wait for a flight that is in the air."""
    for _ in range(2):
        await bench.learn()
        long_ago(bench)
        asked = bench.begin()
        (await bench.upstream.call()).answer(progress=0.9)
        result = await asked
        assert (result.source, result.replaced_stale, result.failure) == (CacheStatus.MISS, True, None)
        long_ago(bench)
        assert not bench.service._in_flight._demands


async def test_get_waits_for_a_held_up_flight_without_a_snapshot(bench: Bench) -> None:
    """Who has nothing to fall back on, or nothing young enough, waits for its turn."""
    for meanwhile in (OTHER, RESULT):
        asked = bench.begin()
        call = await bench.upstream.call()
        call.hold_up(7.0)
        await bench.learn(key=meanwhile)
        assert not asked.done()
        call.answer()
        assert (await asked).source is CacheStatus.MISS
        bench.clock.now += CACHE.stale_if_error_seconds + CACHE.running_seconds


async def test_get_fresh_waits_for_a_held_up_flight(bench: Bench) -> None:
    """A schedule that nobody waits for keeps its place in the queue and brings the fresh snapshot."""
    await bench.learn()
    long_ago(bench)
    asked = asyncio.create_task(bench.service.get_fresh(KEY))
    call = await bench.upstream.call()
    call.hold_up(7.0)
    await bench.learn(key=OTHER)  # whoever waits no longer would have been answered meanwhile
    assert not asked.done()
    call.answer(progress=0.9)
    result = await asked
    assert (result.source, result.failure) == (CacheStatus.MISS, None)


async def test_get_joins_a_flight_that_has_just_landed(bench: Bench) -> None:
    """A caller that comes between a flight's end and its being cleared away gets what it brought."""
    first = await bench.learn()
    long_ago(bench)
    early = bench.begin()
    call = await bench.upstream.call()
    call.fail(Overloaded("no slot"))  # which is not remembered, so only the flight tells it
    late = bench.begin()
    for result in await asyncio.gather(early, late):
        assert (result.snapshot, result.source) == (first.snapshot, CacheStatus.STALE)
        assert isinstance(result.failure, Overloaded)
    assert bench.upstream.count == 2
    assert not bench.service._in_flight._demands


# Callers that leave


async def left(caller: asyncio.Task[Any]) -> None:
    """Let a caller leave."""
    caller.cancel()
    await asyncio.wait([caller])
    assert caller.cancelled()


async def test_read_drops_a_queued_query_when_its_last_caller_leaves(bench: Bench) -> None:
    """While one waits nothing changes; when all have left, the next caller gets a flight of its own."""
    bench.upstream.queues = True
    first, second = bench.begin(), bench.begin()
    queued = await bench.upstream.call()
    await left(first)
    assert not queued.outcome.done()
    await left(second)
    bench.upstream.queues = False
    third = bench.begin()  # before the dropped flight has run to its end
    assert (await bench.upstream.call()) is not queued
    assert queued.outcome.cancelled()
    assert not third.done()
    assert bench.lookups() == {}
    assert bench.upstream.count == 2
    fourth = bench.begin()
    await asyncio.sleep(0)
    assert len(bench.service._in_flight._demands) == 1
    await left(third)
    await left(fourth)


async def test_read_leaves_no_trace_of_a_flight_that_was_dropped_before_it_began(bench: Bench) -> None:
    """A caller may leave in the very turn of the loop in which it came."""
    waiting = bench.service._in_flight.start(KEY)
    bench.service.join(KEY, b"1")
    bench.service.leave(KEY, b"1")
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    assert (KEY in bench.service._in_flight, bench.service._in_flight._demands) == (False, {})
    assert bench.upstream.count == 0
    await bench.learn()


async def test_read_completes_and_stores_what_is_on_the_wire(bench: Bench) -> None:
    """A query that was sent is completed though every caller has left, and stored for the next one."""
    caller = bench.begin()
    call = await bench.upstream.call()
    await left(caller)
    call.answer()
    result = await bench.get()
    assert (result.source, bench.upstream.count) == (CacheStatus.COLLAPSED, 1)
    assert (await bench.get()).source is CacheStatus.HIT
    assert not bench.service._in_flight._demands


@pytest.mark.parametrize("how", ["stale", "held up", "hot"])
async def test_read_drops_no_refresh_that_the_gateway_wants_itself(bench: Bench, how: str) -> None:
    """A refresh behind a stale answer is wanted in itself; callers that join and leave change nothing."""
    await bench.learn()
    bench.upstream.queues = True
    if how == "stale":
        bench.clock.now += CACHE.running_seconds
        assert (await bench.get()).source is CacheStatus.STALE
        call = await bench.upstream.call()
    elif how == "held up":
        long_ago(bench)
        asked = bench.begin()
        call = await bench.upstream.call()
        call.hold_up(7.0)
        assert (await asked).source is CacheStatus.STALE
    else:
        known = cast("Snapshot", bench.store.peek(KEY))
        bench.service._refresh(known.key, known.version)
        call = await bench.upstream.call()
        long_ago(bench)
    joined = asyncio.create_task(bench.service.get_fresh(KEY))
    await asyncio.sleep(0)
    await left(joined)
    assert not call.outcome.done()
    call.answer(progress=0.9)
    await bench.renewed(after=cast("Snapshot", bench.store.peek_stale(KEY)))


async def test_subscribers_want_the_flights_that_a_schedule_begins(bench: Bench) -> None:
    """A schedule's query goes with the last subscriber, and is each subscriber's client's."""
    bench.upstream.queues = True
    for client in (b"1", b"2"):
        bench.service.join(KEY, client)
    ticking = asyncio.create_task(bench.service.get_fresh(KEY, client=None))
    call = await bench.upstream.call()
    assert call.demand.clients == {b"1": 1, b"2": 1}
    bench.service.leave(KEY, b"1")
    assert not call.outcome.done()
    bench.service.leave(KEY, b"2")
    await asyncio.wait([ticking])
    assert call.outcome.cancelled()
    assert not bench.service._in_flight._demands


async def test_read_tells_whose_query_it_is(bench: Bench) -> None:
    """The budget is fair to clients: a flight knows those that wait for it, each once."""
    callers = [asyncio.create_task(bench.service.get(KEY, client=client)) for client in (b"1", b"1", b"2")]
    call = await bench.upstream.call()
    assert call.demand.clients == {b"1": 2, b"2": 1}
    await left(callers[0])
    assert call.demand.clients == {b"1": 1, b"2": 1}
    call.answer()
    await asyncio.gather(*callers[1:])
    assert call.demand.clients == {}


# Stale


async def test_get_answers_a_young_stale_snapshot_at_once(bench: Bench) -> None:
    """Stale but young: answered at once, while exactly one refresh runs behind, whoever else comes."""
    first = await bench.learn(progress=0.1)
    bench.clock.now += CACHE.running_seconds
    results = [await bench.get(KEY) for _ in range(CALLERS)]
    assert {result.source for result in results} == {CacheStatus.STALE}
    assert all(result.snapshot is first.snapshot and result.failure is None for result in results)
    assert results[0].age == CACHE.running_seconds
    (await bench.upstream.call()).answer(progress=0.9)
    await bench.renewed(after=first.snapshot)
    result = await bench.get(KEY)
    assert (result.source, result.age, data_of(result)["progress"]) == (CacheStatus.HIT, 0.0, 0.9)
    assert bench.upstream.count == 2
    assert bench.lookups() == {"miss": 1, "stale": CALLERS, "hit": 1}


async def test_get_waits_when_a_stale_snapshot_is_too_old(bench: Bench) -> None:
    """Stale and no longer young: all wait for the one call, and are told that it replaced something."""
    await bench.learn(progress=0.1)
    bench.clock.now += CACHE.running_seconds + CACHE.stale_while_revalidate_seconds
    crowd = [bench.begin() for _ in range(3)]
    (await bench.upstream.call()).answer(progress=0.9)
    for result, source in zip(await asyncio.gather(*crowd), ["miss", "collapsed", "collapsed"], strict=True):
        assert (result.source, result.age, result.replaced_stale) == (source, 0.0, True)
        assert data_of(result)["progress"] == 0.9
    assert bench.upstream.count == 2


async def test_get_joins_the_refresh_that_runs_behind(bench: Bench) -> None:
    """Who comes when the snapshot has grown too old joins the refresh that is in the air already."""
    await bench.learn()
    bench.clock.now += CACHE.running_seconds
    await bench.get(KEY)
    call = await bench.upstream.call()
    bench.clock.now += CACHE.stale_while_revalidate_seconds
    late = bench.begin()
    await bench.learn(key=OTHER)
    assert not late.done()
    call.answer()
    assert (await late).source is CacheStatus.COLLAPSED
    assert bench.upstream.keys == [KEY, KEY, OTHER]


async def test_get_counts_age_from_the_answers_arrival(bench: Bench) -> None:
    """An answer that took long is as old as its arrival, and no caller waits for another one."""
    asked = bench.begin()
    call = await bench.upstream.call()
    bench.clock.now += 8.0
    call.answer()
    result = await asked
    assert (result.age, result.snapshot.fetched_at) == (0.0, bench.clock.now)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=st.lists(
        st.tuples(st.floats(0, 8), st.sampled_from(["waiting", "running", "paused", "succeeded"])),
        max_size=12,
    )
)
async def test_get_keeps_the_freshness_promise(steps: list[tuple[float, str]]) -> None:
    """While upstream answers nobody gets a snapshot older than its lifetime + stale_while_revalidate."""
    bench = Bench()
    status = "waiting"

    async def answer_all() -> None:
        while True:
            (await bench.upstream.call()).answer(status)

    answering = asyncio.create_task(answer_all())
    try:
        for seconds, status in steps:  # noqa: B007  # what the upstream says from now on
            bench.clock.now += seconds
            result = await bench.get(KEY)
            assert result.age == bench.clock.now - result.snapshot.fetched_at
            assert result.age < result.snapshot.lifetime + CACHE.stale_while_revalidate_seconds
            assert (result.source is CacheStatus.HIT) <= (result.age < result.snapshot.lifetime)
    finally:
        answering.cancel()
        await asyncio.wait([answering])
        await bench.service.aclose()


# Failures


@pytest.mark.parametrize("failure", FAILURES + NOT_THE_TASKS, ids=name_of)
async def test_get_raises_a_failure_that_nothing_covers(bench: Bench, failure: GatewayError) -> None:
    """Without a snapshot every caller of the one call gets the failure."""
    crowd = [bench.begin() for _ in range(3)]
    (await bench.upstream.call()).fail(failure)
    assert await asyncio.gather(*crowd, return_exceptions=True) == [Alike(failure)] * 3
    assert bench.upstream.count == 1
    assert bench.lookups() == {"miss": 1, "collapsed": 2}


@pytest.mark.parametrize("failure", FAILURES, ids=name_of)
async def test_get_remembers_a_failure_for_a_while(bench: Bench, failure: GatewayError) -> None:
    """A failure is answered from memory for error_seconds; then upstream is asked again."""
    await bench.fail(failure)
    bench.clock.now += CACHE.error_seconds - 0.01
    for _ in range(3):
        with pytest.raises(type(failure)):
            await bench.get(KEY)
    assert bench.upstream.count == 1
    assert bench.lookups() == {"miss": 1, "negative": 3}
    bench.clock.now += 0.02
    assert (await bench.learn()).source is CacheStatus.MISS
    assert bench.upstream.count == 2


async def test_get_remembers_a_failure_against_its_task_only(bench: Bench) -> None:
    """One task's failure keeps nobody from asking for another."""
    await bench.fail(UpstreamTimeout("too late"))
    assert (await bench.learn(key=OTHER)).source is CacheStatus.MISS
    assert (await bench.learn(key=RESULT)).source is CacheStatus.MISS


@pytest.mark.parametrize("failure", NOT_THE_TASKS, ids=name_of)
async def test_get_holds_no_failure_against_a_task_that_is_not_its_own(
    bench: Bench, failure: GatewayError
) -> None:
    """Our own limits and refused credentials are not remembered: the next caller asks again at once."""
    await bench.fail(failure)
    assert bench.store.failure(KEY) is None
    assert (await bench.learn()).source is CacheStatus.MISS
    assert bench.upstream.count == 2
    assert bench.lookups() == {"miss": 2}


@pytest.mark.parametrize("failure", FAILURES + NOT_THE_TASKS, ids=name_of)
async def test_get_covers_a_failure_with_a_stale_snapshot(bench: Bench, failure: GatewayError) -> None:
    """A snapshot no older than stale_if_error is answered in a failure's place, and the failure is told."""
    first = await bench.learn()
    bench.clock.now += CACHE.stale_if_error_seconds
    crowd = [bench.begin() for _ in range(2)]
    (await bench.upstream.call()).fail(failure)
    for result in await asyncio.gather(*crowd):
        assert result.snapshot is first.snapshot
        assert (result.source, result.failure) == (CacheStatus.STALE, Alike(failure))
        assert result.age == CACHE.stale_if_error_seconds
    assert bench.lookups() == {"miss": 1, "stale": 2}


async def test_get_covers_a_remembered_failure(bench: Bench) -> None:
    """While the failure is remembered it is covered at once, without another call."""
    await bench.learn()
    bench.clock.now += 20.0
    failure = UpstreamTimeout("too late")
    await bench.fail(failure)
    for _ in range(3):
        result = await bench.get(KEY)
        assert (result.source, result.failure, result.age) == (CacheStatus.STALE, Alike(failure), 20.0)
    assert bench.upstream.count == 2
    assert bench.lookups() == {"miss": 1, "stale": 4}


async def test_get_raises_when_the_snapshot_is_too_old_to_cover(bench: Bench) -> None:
    """Beyond stale_if_error no snapshot is shown: the failure is raised, and again from memory."""
    await bench.learn()
    bench.clock.now += CACHE.stale_if_error_seconds + 0.01
    failure = UpstreamTimeout("too late")
    assert await bench.fail(failure) == Alike(failure)
    with pytest.raises(UpstreamTimeout):
        await bench.get(KEY)
    assert bench.upstream.count == 2
    assert bench.lookups() == {"miss": 2, "negative": 1}


async def test_get_tells_of_a_refresh_that_failed(bench: Bench) -> None:
    """When the refresh behind failed the stale answers tell it, and no other refresh begins meanwhile."""
    first = await bench.learn()
    bench.clock.now += CACHE.running_seconds
    assert (await bench.get(KEY)).failure is None
    failure = UpstreamBusy("unwell")
    joined = asyncio.create_task(bench.service.get_fresh(KEY))
    (await bench.upstream.call()).fail(failure)
    assert (await joined).failure == Alike(failure)
    for _ in range(3):
        result = await bench.get(KEY)
        assert (result.snapshot, result.source) == (first.snapshot, CacheStatus.STALE)
        assert result.failure == Alike(failure)
    assert bench.upstream.count == 2
    bench.clock.now += CACHE.error_seconds + 0.01
    assert (await bench.get(KEY)).failure is None
    (await bench.upstream.call()).answer()
    assert bench.upstream.count == 3


async def test_get_covers_no_failure_beyond_its_bound_however_young_the_snapshot() -> None:
    """Where stale_if_error is the narrower bound, one young enough to be revalidated covers nothing."""
    bench = Bench(CACHE.model_copy(update={"stale_if_error_seconds": 0.0}))
    await bench.learn()
    bench.clock.now += CACHE.running_seconds
    assert (await bench.get(KEY)).failure is None
    joined = asyncio.create_task(bench.service.get_fresh(KEY))
    (await bench.upstream.call()).fail(UpstreamTimeout("too late"))
    for outcome in (await joined, await bench.service.get(KEY)):
        assert isinstance(outcome, FetchFailure)
        assert isinstance(outcome.failure, UpstreamTimeout)
    assert bench.lookups() == {"miss": 1, "stale": 1, "negative": 1}
    await bench.service.aclose()


async def test_get_asks_nobody_behind_an_answer_that_covers_a_failure(bench: Bench) -> None:
    """While a failure is remembered the stale answers that cover it begin no refresh."""
    first = await bench.learn()
    bench.clock.now += 20.0
    await bench.fail(UpstreamTimeout("too late"))
    for _ in range(3):
        result = await bench.get(KEY)
        assert (result.snapshot, result.source) == (first.snapshot, CacheStatus.STALE)
        assert isinstance(result.failure, UpstreamTimeout)
        assert KEY not in bench.service._in_flight
    await bench.learn(key=OTHER)  # a refresh begun before would have asked before
    assert bench.upstream.keys == [KEY, KEY, OTHER]


async def test_read_tells_of_the_call_behind_a_covered_failure(bench: Bench) -> None:
    """Who waited for a call that failed is told of it beside the stale answer."""
    await bench.learn()
    bench.clock.now += 20.0
    asked = bench.begin()
    call = await bench.upstream.call()
    bench.clock.now += 0.5
    call.fail(UpstreamInvalid("nonsense", detail=UpstreamDetail(request_id="r-1")))
    result = await asked
    assert result.source is CacheStatus.STALE
    assert result.fetch is not None
    assert (result.fetch.upstream_seconds, result.fetch.invoke_id) == (pytest.approx(0.5), "r-1")


async def test_get_recovers(bench: Bench) -> None:
    """The first good answer ends a failure: nothing of it is told any more."""
    await bench.learn()
    bench.clock.now += 20.0
    await bench.fail(UpstreamTimeout("too late"))
    bench.clock.now += CACHE.error_seconds + 0.01
    result = await bench.learn(progress=0.8)
    assert (result.source, result.failure, result.replaced_stale) == (CacheStatus.MISS, None, True)
    assert (await bench.get(KEY)).failure is None


async def test_get_keeps_of_a_failure_nothing_but_what_it_says(bench: Bench) -> None:
    """A failure that is remembered holds no frame that it came through; each caller is raised a copy."""
    failure = UpstreamTimeout("too late", detail=UpstreamDetail(request_id="r-1"), retry_after=2.0)
    failure.__cause__ = OSError("a cause")
    failure.__context__ = OSError("a context")
    await bench.fail(failure)
    kept = bench.store.failure(KEY)
    raised = []
    for _ in range(2):
        with pytest.raises(UpstreamTimeout) as caught:
            await bench.get(KEY)
        raised.append(caught.value)
    assert [kept, *raised] == [Alike(failure)] * 3
    assert len({id(error) for error in (failure, kept, *raised)}) == 4
    assert kept is not None
    assert (kept.__traceback__, kept.__cause__, kept.__context__) == (None, None, None)


async def test_get_shares_a_bug_and_does_not_remember_it(bench: Bench) -> None:
    """An exception that is none of the tree reaches whoever waits; the next caller asks again."""
    bug = ZeroDivisionError("a bug")
    crowd = [bench.begin() for _ in range(3)]
    (await bench.upstream.call()).fail(bug)
    assert await asyncio.gather(*crowd, return_exceptions=True) == [bug] * 3
    assert bench.store.failure(KEY) is None
    assert (await bench.learn()).source is CacheStatus.MISS


async def test_get_fails_on_a_state_that_nests_too_deep(bench: Bench) -> None:
    """An answer that cannot be rendered is a failure of the upstream's, remembered like any other."""
    deep: dict[str, Any] = {}
    for _ in range(50_000):
        deep = {"state": deep}
    asked = bench.begin()
    call = await bench.upstream.call()
    call.outcome.set_result(
        ParsedResponse({"taskId": KEY.task_id, "status": "running", "state": deep}, b"{}")
    )
    with pytest.raises(UpstreamInvalid):
        await asked
    assert bench.store.failure(KEY) is not None
    while deep:  # taken apart by hand: the interpreter would do it by recursion
        deep = deep.pop("state")


# What is observed


async def test_get_folds_each_answer_into_the_story(bench: Bench) -> None:
    """Progress does not fall while the task runs, and no answer undoes a terminal one."""
    await bench.learn("running", progress=0.65)
    bench.clock.now += 10.0
    assert data_of(await bench.learn("running", progress=0.2))["progress"] == 0.65
    bench.clock.now += 10.0
    assert data_of(await bench.learn("succeeded"))["progress"] == 1.0
    bench.clock.now += CACHE.terminal_seconds + 10.0
    result = await bench.learn("running", progress=0.1)
    assert (data_of(result)["status"], data_of(result)["terminal"]) == ("succeeded", True)
    assert (result.source, result.age) == (CacheStatus.MISS, 0.0)


async def test_get_counts_each_transition_once(bench: Bench) -> None:
    """A status is counted when a task comes to it, not each time that it is seen; results have none."""
    for status in ["waiting", "waiting", "running", "running", "waiting", "successed", "running", "failed"]:
        await bench.learn(status)
        bench.clock.now += CACHE.terminal_seconds + 10.0
    await bench.learn("running", OTHER)
    await bench.learn("succeeded", RESULT)
    assert bench.transitions() == {"waiting": 2, "running": 2, "succeeded": 1}


class LeaseBook(MemoryStore):
    """A store that notes which leases are out."""

    def __init__(self) -> None:
        super().__init__(max_tasks=100, stale_seconds=60.0)
        self.out: set[Lease] = set()

    async def acquire(
        self, key: TaskKey, *, after: int | None = None, timeout_seconds: float = math.inf
    ) -> Snapshot | GatewayError | Lease:
        outcome = await super().acquire(key, after=after, timeout_seconds=timeout_seconds)
        if isinstance(outcome, Lease):
            self.out.add(outcome)
        return outcome

    async def commit(self, lease: Lease, snapshot: Snapshot) -> Snapshot | None:
        self.out.remove(lease)
        return await super().commit(lease, snapshot)

    async def fail(self, lease: Lease, error: GatewayError, *, seconds: float) -> None:
        self.out.remove(lease)
        await super().fail(lease, error, seconds=seconds)

    async def abandon(self, lease: Lease) -> None:
        self.out.remove(lease)
        await super().abandon(lease)


@pytest.mark.parametrize(
    "error",
    [
        None,
        UpstreamTimeout("late"),  # remembered
        Overloaded("full"),  # not remembered
        RuntimeError("a bug"),
    ],
)
async def test_get_lets_go_of_its_lease(error: Exception | None) -> None:
    """However a flight ends, other replicas need not wait for its lease to run out."""
    book = LeaseBook()
    bench = Bench(store=book)
    asked = bench.begin()
    call = await bench.upstream.call()
    assert len(book.out) == 1
    if error is None:
        call.answer()
    else:
        call.fail(error)
    await asyncio.gather(asked, return_exceptions=True)
    assert not book.out


async def test_close_lets_go_of_leases() -> None:
    """Nor when the gateway leaves in the middle of a query."""
    book = LeaseBook()
    bench = Bench(store=book)
    asked = bench.begin()
    await bench.upstream.call()
    await bench.service.aclose()
    await asyncio.gather(asked, return_exceptions=True)
    assert not book.out


async def test_get_logs_no_known_status_and_counts_no_result(bench: Bench) -> None:
    """Transitions are of tasks: a result has none, and a word of the vendor's that is known is no news."""
    with capture_logs() as logs:
        await bench.learn("waiting")
        await bench.learn("succeeded", key=TaskKey(Operation.SD_GET_RESULT, KEY.task_id))
    assert logs == []
    observed = [
        sample.labels
        for family in bench.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "sd_gateway_tasks_observed_total" and sample.value
    ]
    assert observed == [{"operation": KEY.operation, "status": "waiting"}]


async def test_get_logs_a_status_never_seen_before(bench: Bench) -> None:
    """A new status is counted as unknown and logged with its words, once per transition and cut short."""
    with capture_logs() as lines:
        await bench.learn("pausing" * 100)
        bench.clock.now += 10.0
        await bench.learn("pausing" * 100)
    [line] = [line for line in lines if line["event"] == "unknown_task_status"]
    assert (line["log_level"], line["task_id"], line["operation"]) == ("warning", KEY.task_id, KEY.operation)
    assert line["status"].startswith("'pausingpausing")
    assert line["status"].limit == 100  # cut by the log, after it has redacted all of it
    assert bench.transitions() == {"unknown": 1}


async def test_get_logs_a_crowd_of_new_statuses_by_samples(bench: Bench) -> None:
    """A new word of the vendor's comes with every task at once: a few are logged, the rest counted."""
    with capture_logs() as lines:
        for number in range(30):
            await bench.learn("pausing", TaskKey(KEY.operation, f"task-{number}"))
        bench.clock.now += 10.0
        await bench.learn("pausing", OTHER)
    told = [line["suppressed"] for line in lines if line["event"] == "unknown_task_status"]
    assert told == [0] * 10 + [20]
    assert bench.transitions() == {"unknown": 31}


async def test_read_logs_a_crowd_of_bugs_by_samples(bench: Bench) -> None:
    """A bug that every flight meets is raised to each caller, and logged with its trace a few times."""
    with capture_logs() as lines:
        for _ in range(30):
            assert isinstance(await bench.fail(KeyError("bug")), KeyError)
    told = [line for line in lines if line["event"] == "fetch_crashed"]
    assert [line["suppressed"] for line in told] == [0] * 10
    assert (told[0]["log_level"], told[0]["exc_info"]) == ("error", True)
    assert (told[0]["operation"], told[0]["task_id"]) == KEY


async def test_read_tells_every_waiter_of_the_call(bench: Bench) -> None:
    """Who began the flight and who joined it get the time that upstream took and its id; a hit does not."""
    first, second = bench.begin(), bench.begin()
    call = await bench.upstream.call()
    bench.clock.now += 0.25
    call.outcome.set_result(answer(KEY, "running")._replace(invoke_id="i_7"))
    for asked in (first, second):
        fetch = (await asked).fetch
        assert fetch is not None
        assert (fetch.upstream_seconds, fetch.invoke_id) == (pytest.approx(0.25), "i_7")
    assert (await bench.get()).fetch is None


@pytest.mark.parametrize(
    ("detail", "told"),
    [
        (None, None),
        (UpstreamDetail(), None),
        (UpstreamDetail(request_id="r-1"), "r-1"),
        (UpstreamDetail(invoke_id="i_1", request_id="r-1"), "i_1"),
    ],
)
async def test_read_tells_every_waiter_of_the_call_that_failed(
    bench: Bench, detail: UpstreamDetail | None, told: str | None
) -> None:
    """A failure comes with its time and whichever id upstream gave; one that is remembered has no call."""
    asked = asyncio.create_task(bench.service.get(KEY))
    call = await bench.upstream.call()
    bench.clock.now += 0.5
    call.fail(UpstreamInvalid("nonsense", detail=detail))
    failed = await asked
    assert isinstance(failed, FetchFailure)
    assert failed.fetch is not None
    assert (failed.key, failed.source) == (KEY, CacheStatus.MISS)
    assert (failed.fetch.upstream_seconds, failed.fetch.invoke_id) == (pytest.approx(0.5), told)
    again = await bench.service.get(KEY)
    assert isinstance(again, FetchFailure)
    assert (again.source, again.fetch) == (CacheStatus.NEGATIVE, None)


async def test_get_measures_the_age_of_what_it_answers(bench: Bench) -> None:
    """The age is measured on every way to an answer, and those beyond the freshness promise are counted."""
    first = await bench.learn()
    assert bench.ages() == (1, 0.0, 0)
    bench.clock.now += 1.0
    await bench.get(KEY)
    assert bench.ages() == (2, 1.0, 0)
    bench.clock.now += CACHE.running_seconds - 1.0
    await bench.get(KEY)
    assert bench.ages() == (3, 1.0 + CACHE.running_seconds, 0)
    (await bench.upstream.call()).answer()
    await bench.renewed(after=first.snapshot)
    promised = CACHE.running_seconds + CACHE.stale_while_revalidate_seconds
    bench.clock.now += promised
    await bench.fail(UpstreamTimeout("too late"))
    assert bench.ages() == (4, 1.0 + CACHE.running_seconds + promised, 1)
    await bench.get(KEY)  # covered, while the failure is remembered
    assert bench.ages() == (5, 1.0 + CACHE.running_seconds + 2 * promised, 2)


async def test_get_measures_no_age_of_what_does_not_age(bench: Bench) -> None:
    """Answers about a task that has ended are as good as new, however old, and whatever upstream does."""
    await bench.learn("succeeded")
    bench.clock.now += 10.0
    await bench.get(KEY)
    assert bench.ages() == (0, 0.0, 0)


async def test_read_tells_of_no_call_where_none_was_made(bench: Bench) -> None:
    """One of our own limits has no id of upstream's."""
    asked = asyncio.create_task(bench.service.get(KEY))
    (await bench.upstream.call()).fail(Overloaded("full"))
    failed = await asked
    assert isinstance(failed, FetchFailure)
    assert failed.fetch is not None
    assert failed.fetch.invoke_id is None


async def test_get_makes_no_series_per_task(bench: Bench) -> None:
    """However many tasks are asked for, no series is made for any of them."""

    def series() -> set[str]:
        return {f"{s.name}{s.labels}" for family in bench.metrics.registry.collect() for s in family.samples}

    await bench.learn()
    before = series()
    for number in range(20):
        await bench.learn(key=TaskKey(KEY.operation, f"task-{number}"))
    assert series() == before


# Other replicas


class SharedStore(MemoryStore):
    """A store in which another replica's snapshot is found only when it is asked for."""

    elsewhere: Snapshot | None = None

    async def acquire(
        self, key: TaskKey, *, after: int | None = None, timeout_seconds: float = math.inf
    ) -> Snapshot | GatewayError | Lease:
        """Find the other replica's snapshot, if it is of this task."""
        if self.elsewhere is not None and self.elsewhere.key == key:
            self.keep(self.elsewhere)
        return await super().acquire(key, after=after, timeout_seconds=timeout_seconds)


async def test_fetch_looks_again_before_it_asks() -> None:
    """When another replica has landed meanwhile its answer is taken, and upstream is not asked."""
    store = SharedStore(max_tasks=10, stale_seconds=60.0, clock=Clock())
    bench = Bench(store=store)
    store.elsewhere = Snapshot(KEY, bench.clock.now - 0.5, CACHE.running_seconds, b"{}", Status.RUNNING, 0.5)
    results = await asyncio.gather(bench.begin(), bench.begin())
    assert [result.snapshot for result in results] == [store.elsewhere] * 2
    assert [result.age for result in results] == [0.5, 0.5]
    assert [result.key for result in results] == [KEY, KEY]
    for result in results:  # waited for a flight, which made no call
        assert result.fetch is not None
        assert (result.fetch.upstream_seconds, result.fetch.invoke_id) == (None, None)
        assert result.fetch.span is None
    assert bench.upstream.count == 0


async def test_fetch_asks_when_the_other_replicas_snapshot_is_stale() -> None:
    """Another replica's snapshot that is stale is no reason not to ask."""
    store = SharedStore(max_tasks=10, stale_seconds=60.0, clock=Clock())
    bench = Bench(store=store)
    store.elsewhere = Snapshot(KEY, bench.clock.now - 50.0, CACHE.running_seconds, b"{}", Status.RUNNING, 0.5)
    assert (await bench.learn(progress=0.9)).age == 0.0
    assert bench.upstream.count == 1


class ContestedStore(MemoryStore):
    """A store in which another replica has asked since, the first time somebody lands."""

    late = True

    async def commit(self, lease: Lease, snapshot: Snapshot) -> Snapshot | None:
        """Come too late, once."""
        late, self.late = self.late, False
        return None if late else await super().commit(lease, snapshot)


async def test_fetch_that_comes_too_late_begins_again() -> None:
    """An answer that others have overtaken is shown to nobody: the flight takes off once more."""
    clock = Clock()
    bench = Bench(store=ContestedStore(max_tasks=10, stale_seconds=60.0, clock=clock))
    waiting = bench.begin()
    (await bench.upstream.call()).answer(progress=0.1)
    (await bench.upstream.call()).answer(progress=0.2)
    assert data_of(await waiting)["progress"] == 0.2


async def test_fetch_folds_its_answer_into_what_came_meanwhile(bench: Bench) -> None:
    """What another replica has shown while the call was in the air is not undone by its answer."""
    known = (await bench.learn(progress=0.1)).snapshot
    long_ago(bench)
    asked = bench.begin()
    call = await bench.upstream.call()
    bench.store.keep(replace(known, progress=0.8, version=known.version + 1))
    call.answer(progress=0.3)
    assert data_of(await asked)["progress"] == 0.8


# Hot tasks


async def test_get_refreshes_a_hot_task_ahead(bench: Bench) -> None:
    """A task read twice within a lifetime is asked for again before it goes stale: its readers never wait."""
    first = await bench.learn()
    bench.clock.now += CACHE.running_seconds - 1e-6
    for _ in range(5):
        assert (await bench.get(KEY)).source is CacheStatus.HIT
    call = await bench.upstream.call()
    assert (await bench.get(KEY)).source is CacheStatus.HIT
    call.answer(progress=0.9)
    await bench.renewed(after=first.snapshot)
    bench.clock.now += CACHE.running_seconds - 1e-6
    result = await bench.get(KEY)
    assert (result.source, data_of(result)["progress"]) == (CacheStatus.HIT, 0.9)
    assert bench.upstream.count == 2


async def test_get_refreshes_a_hot_task_so_early_that_the_answer_comes_in_time() -> None:
    """How long upstream took for the answers before is how long before it goes stale a task is asked for."""
    bench = Bench(CACHE.model_copy(update={"running_seconds": 600.0}))
    asked = bench.begin()
    call = await bench.upstream.call()
    bench.clock.now += 3000.0
    call.answer()
    await asked
    for _ in range(2):
        assert (await bench.get(KEY)).age == 0.0
    assert (await bench.upstream.call()).key == KEY  # else it would be asked for in ten minutes
    await bench.service.aclose()


@pytest.mark.parametrize(("status", "polls"), [("running", 1), ("succeeded", 5)])
async def test_get_refreshes_nothing_ahead_without_need(bench: Bench, status: str, polls: int) -> None:
    """A task read once is not hot, and one that has ended has nothing new to tell."""
    result = await bench.learn(status)
    bench.clock.now += result.snapshot.lifetime - 1e-6
    for _ in range(polls):
        await bench.get(KEY)
    hot = await bench.learn(key=OTHER)
    bench.clock.now += hot.snapshot.lifetime - 1e-6
    for _ in range(2):
        await bench.get(OTHER)
    assert (await bench.upstream.call()).key == OTHER  # a refresh ahead of the first would have come before
    assert bench.upstream.keys == [KEY, OTHER, OTHER]


@pytest.mark.parametrize("polls", [0, 2])
async def test_get_refreshes_nothing_ahead_that_was_renewed_meanwhile(bench: Bench, polls: int) -> None:
    """When somebody else has renewed a hot task before the refresh was due the refresh is not made."""
    first = await bench.learn()
    bench.clock.now += CACHE.running_seconds - 1e-3
    for _ in range(2):
        await bench.get(KEY)
    newer = replace(first.snapshot, fetched_at=bench.clock.now, version=first.snapshot.version + 1, polls=0)
    bench.store.keep(newer)
    for _ in range(polls):
        await bench.get(KEY)
    due = asyncio.Event()
    asyncio.get_running_loop().call_later(2e-3, due.set)
    await due.wait()
    assert bench.upstream.count == 1


async def test_get_refreshes_nothing_ahead_while_a_failure_is_remembered(bench: Bench) -> None:
    """When another replica's call has failed before the refresh was due upstream has its rest."""
    await bench.learn()
    bench.clock.now += CACHE.running_seconds - 1e-3
    for _ in range(2):
        await bench.get(KEY)
    bench.store.keep_failure(KEY, UpstreamTimeout("too late"), seconds=60.0)
    due = asyncio.Event()
    asyncio.get_running_loop().call_later(2e-3, due.set)
    await due.wait()
    await bench.learn(key=OTHER)  # a refresh begun before would have asked before
    assert bench.upstream.keys == [KEY, OTHER]


# For schedules


async def test_get_fresh_waits_where_others_take_the_stale_answer(bench: Bench) -> None:
    """A schedule gets the fresh snapshot there is, or waits for one however young the stale one is."""
    asked = asyncio.create_task(bench.service.get_fresh(KEY))
    (await bench.upstream.call()).answer(progress=0.1)
    first = await asked
    assert first.source is CacheStatus.MISS
    assert (await bench.service.get_fresh(KEY)).snapshot is first.snapshot
    bench.clock.now += CACHE.running_seconds
    waiting = asyncio.create_task(bench.service.get_fresh(KEY))
    (await bench.upstream.call()).answer(progress=0.9)
    result = await waiting
    assert (result.age, data_of(result)["progress"]) == (0.0, 0.9)
    assert bench.lookups() == {}, "no caller has asked"


async def test_current_begins_nothing(bench: Bench) -> None:
    """Looking at what is held asks nobody and counts nothing."""
    assert bench.service.peek(KEY) is None
    first = await bench.learn()
    for age, source in [(0.0, CacheStatus.HIT), (CACHE.running_seconds, CacheStatus.STALE)]:
        bench.clock.now = first.snapshot.fetched_at + age
        result = bench.service.peek(KEY)
        assert result is not None
        assert (result.snapshot, result.age, result.source) == (first.snapshot, age, source)
    assert bench.upstream.count == 1
    assert bench.lookups() == {"miss": 1}


async def test_current_shows_nothing_that_is_too_old(bench: Bench) -> None:
    """The freshness promise holds for those whom a schedule serves, and so does the bound of a failure."""
    first = await bench.learn()
    bench.clock.now += CACHE.running_seconds + CACHE.stale_while_revalidate_seconds
    assert bench.service.peek(KEY) is None
    failure = UpstreamTimeout("too late")
    await bench.fail(failure)
    result = bench.service.peek(KEY)
    assert result is not None
    assert (result.snapshot, result.failure) == (first.snapshot, Alike(failure))
    bench.clock.now = first.snapshot.fetched_at + CACHE.stale_if_error_seconds
    bench.store.keep_failure(KEY, failure, seconds=1.0)
    assert bench.service.peek(KEY) is not None
    bench.clock.now += 0.01
    assert bench.service.peek(KEY) is None


# The end


async def test_aclose_ends_every_flight(bench: Bench) -> None:
    """Closing cancels the calls in the air and leaves nobody waiting."""
    crowd = [bench.begin(), bench.begin(OTHER)]
    calls = [await bench.upstream.call() for _ in crowd]
    await bench.service.aclose()
    assert all(call.outcome.cancelled() for call in calls)
    for outcome in await asyncio.gather(*crowd, return_exceptions=True):
        assert isinstance(outcome, asyncio.CancelledError)


async def test_aclose_takes_back_what_was_to_be_refreshed_ahead(bench: Bench) -> None:
    """After closing no refresh begins that was planned before."""
    await bench.learn()
    bench.clock.now += CACHE.running_seconds - 1e-3
    for _ in range(2):
        await bench.get(KEY)
    await bench.service.aclose()
    passed = asyncio.Event()
    asyncio.get_running_loop().call_later(2e-3, passed.set)
    await passed.wait()
    assert bench.upstream.count == 1


async def test_aclose_lets_nothing_begin(bench: Bench) -> None:
    """After closing the store still answers, and nothing is refreshed: neither ahead nor behind."""
    await bench.learn()
    await bench.service.aclose()
    for age, source in [(0.0, CacheStatus.HIT), (CACHE.running_seconds, CacheStatus.STALE)]:
        bench.clock.now = 1000.0 + age
        for _ in range(3):
            result = bench.service.lookup(KEY)
            assert result is not None
            assert result.source is source
    with pytest.raises(asyncio.CancelledError):
        await bench.get(OTHER)
    assert bench.upstream.count == 1


class SlowStore(MemoryStore):
    """A store in which another replica has the lease for a while."""

    clock = Clock()
    patience: float = 0.0

    async def acquire(
        self, key: TaskKey, *, after: int | None = None, timeout_seconds: float = math.inf
    ) -> Snapshot | GatewayError | Lease:
        """Give the lease after four seconds."""
        self.patience = timeout_seconds
        self.clock.now += 4.0
        return await super().acquire(key, after=after, timeout_seconds=timeout_seconds)


async def test_fetch_has_one_deadline_whomever_it_waits_for() -> None:
    """What a flight waited for another replica's is not given to its own query once more."""
    store = SlowStore(max_tasks=10, stale_seconds=60.0)
    bench = Bench(store=store)
    store.clock = bench.clock
    task = bench.begin()
    call = await bench.upstream.call()
    assert store.patience == 10.0
    assert call.timeout_seconds == 6.0
    call.answer()
    await task


class LaggingStore(MemoryStore):
    """A store that has missed something until it has caught up."""

    behind = True
    whole = True
    caught_up = 0

    def peek(self, key: TaskKey) -> Snapshot | None:
        """Show nothing while it is behind."""
        return None if self.behind else super().peek(key)

    async def sync(self) -> bool:
        """Catch up, if it can."""
        self.caught_up += 1
        self.behind = not self.whole
        return self.whole


@pytest.mark.parametrize(
    ("age", "source"),
    [(0.5, CacheStatus.HIT), (CACHE.running_seconds + 0.5, CacheStatus.STALE)],
    ids=["fresh", "stale"],
)
async def test_read_catches_up_before_it_asks(age: float, source: CacheStatus) -> None:
    """A replica that may have missed something waits for that, and then shows what it holds, stale or not."""
    store = LaggingStore(max_tasks=10, stale_seconds=60.0, clock=Clock())
    bench = Bench(store=store)
    held = Snapshot(KEY, bench.clock.now - age, CACHE.running_seconds, b"{}", Status.RUNNING, 0.5)
    store.keep(held)
    assert bench.service.lookup(KEY) is None
    for _ in range(2):
        result = await bench.get(KEY)
        assert (result.snapshot, result.source) == (held, source)
    assert store.caught_up == 1  # who is shown something does not wait
    assert bench.lookups() == {source: 2}
    await bench.service.aclose()


async def test_read_asks_where_it_cannot_catch_up() -> None:
    """Where it cannot catch up it flies, and the store finds out what is to be shown."""
    store = LaggingStore(max_tasks=10, stale_seconds=60.0, clock=Clock())
    store.whole = False
    bench = Bench(store=store)
    task = bench.begin()
    (await bench.upstream.call()).answer(progress=0.25)
    assert (await task).snapshot.progress == 0.25
