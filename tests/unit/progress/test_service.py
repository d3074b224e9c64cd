"""The progress service over a memory store and a manual clock, with an upstream that the test controls."""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from gateway.domain.errors import (
    CircuitOpen,
    GatewayError,
    KeyPairRefused,
    NonceRefused,
    Overloaded,
    RateLimited,
    TimestampRefused,
    UpstreamBusy,
    UpstreamDetail,
    UpstreamInvalid,
    UpstreamRejected,
    UpstreamThrottled,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import Operation, Status, TaskKey
from gateway.progress.outcomes import CacheStatus, LookupFailure, LookupSuccess
from gateway.progress.service import ProgressService
from gateway.settings.model import Cache
from gateway.stores.base import ANY_FRESH, CacheEntry, Lease, Requirement
from gateway.stores.memory import MemoryStore
from gateway.telemetry.metrics import Metrics
from gateway.upstream.awaited_query import AwaitedQuery
from gateway.upstream.client import UpstreamClient
from gateway.upstream.signed_calls import ParsedResponse
from tests.support.seen import TAGS

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
    UpstreamBusy("busy"),
    UpstreamThrottled("slowly"),
    UpstreamRejected("no", envelope=b"{}", detail=UpstreamDetail()),
]
# None of these says anything about the task: the gateway's own limits, an open circuit, and refused
# credentials.
NOT_THE_TASKS: list[GatewayError] = [
    Overloaded("full"),
    RateLimited("full"),
    CircuitOpen("resting"),
    KeyPairRefused("refused"),
    TimestampRefused("refused"),
    NonceRefused("refused"),
]


def name_of(value: object) -> str:
    return type(value).__name__


@dataclass(eq=False)
class Alike:
    """Equals every copy of an error: each caller receives a copy."""

    error: GatewayError

    def __eq__(self, other: object) -> bool:
        alike = type(other) is type(self.error) and vars(other) == vars(self.error)
        return alike and str(other) == str(self.error)

    __hash__ = None  # type: ignore[assignment]


@dataclass
class Clock:
    """A clock that the test advances."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


class Call:
    """One query that the upstream received, and the test answers."""

    def __init__(
        self,
        key: TaskKey,
        *,
        is_refresh: bool,
        timeout_seconds: float,
        on_expected_wait: Callable[[float], None],
        on_retry: Callable[[], None],
        awaited_query: AwaitedQuery,
    ) -> None:
        self.key = key
        self.is_refresh = is_refresh
        self.timeout_seconds = timeout_seconds
        self.on_expected_wait = on_expected_wait
        self.on_retry = on_retry
        self.awaited_query = awaited_query
        self.outcome: asyncio.Future[ParsedResponse] = asyncio.get_running_loop().create_future()

    def answer(self, status: str = "running", **data: Any) -> None:
        """Complete the query with a response."""
        self.outcome.set_result(answer(self.key, status, **data))

    def fail(self, error: BaseException) -> None:
        """Fail the query."""
        self.outcome.set_exception(error)


def answer(key: TaskKey, status: str, **data: Any) -> ParsedResponse:
    data = {"taskId": key.task_id, "status": status, "progress": 0.5} | data
    return ParsedResponse(data, json.dumps({"status": 10, "data": data}).encode())


class FakeUpstream:
    """Replaces the upstream client: records each query, and leaves the response to the test."""

    def __init__(self) -> None:
        self.queues = False
        self.keys: list[TaskKey] = []
        self._calls: asyncio.Queue[Call] = asyncio.Queue()

    async def query(
        self,
        key: TaskKey,
        *,
        is_refresh: bool,
        timeout_seconds: float,
        on_expected_wait: Callable[[float], None],
        on_retry: Callable[[], None],
        awaited_query: AwaitedQuery,
    ) -> ParsedResponse:
        """Wait until the test responds; until then the query is queued, or on the wire."""
        self.keys.append(key)
        awaited_query.runs_to_end = not self.queues
        call = Call(
            key,
            is_refresh=is_refresh,
            timeout_seconds=timeout_seconds,
            on_expected_wait=on_expected_wait,
            on_retry=on_retry,
            awaited_query=awaited_query,
        )
        self._calls.put_nowait(call)
        return await call.outcome

    async def call(self) -> Call:
        """Return the next query, once there is one."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self._calls.get()

    @property
    def count(self) -> int:
        """Return the number of queries."""
        return len(self.keys)


class Bench:
    """A service with its dependencies."""

    def __init__(
        self, cache: Cache = CACHE, store: MemoryStore | None = None, clock: Clock | None = None
    ) -> None:
        self.clock = clock or Clock()
        self.upstream = FakeUpstream()
        self.metrics = Metrics(CollectorRegistry(), gateway_version="0")
        if store is None:
            store = MemoryStore(max_tasks=100, min_keep_stale_seconds=60.0, clock=self.clock)
        self.store = store
        self.service = ProgressService(
            cache,
            store=self.store,
            upstream=cast("UpstreamClient", self.upstream),
            metrics=self.metrics,
            tags=TAGS,
            timeout_seconds=10.0,
            clock=self.clock,
        )
        self._stored: asyncio.Queue[Snapshot] = asyncio.Queue()
        self.store.add_snapshot_listener(self._stored.put_nowait)

    def begin(self, key: TaskKey = KEY) -> asyncio.Task[LookupSuccess]:
        """Start a query, and return its task."""
        return asyncio.create_task(self.get(key))

    async def get(self, key: TaskKey = KEY) -> LookupSuccess:
        """Query; return the result, or raise the failure."""
        outcome = await self.service.get(key)
        if isinstance(outcome, LookupFailure):
            raise outcome.copy_to_raise()
        return outcome

    async def learn(self, status: str = "running", key: TaskKey = KEY, **data: Any) -> LookupSuccess:
        """Query once, and let the upstream respond."""
        asked = self.begin(key)
        (await self.upstream.call()).answer(status, **data)
        return await asked

    async def fail(self, error: BaseException, key: TaskKey = KEY) -> LookupSuccess | BaseException:
        """Query once, let the upstream fail, and return what the caller received."""
        asked = self.begin(key)
        (await self.upstream.call()).fail(error)
        [outcome] = await asyncio.gather(asked, return_exceptions=True)
        return outcome

    async def renewed(self, *, after: Snapshot) -> None:
        """Wait until a newer snapshot than `after` is stored."""
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
        """Return the number of observed ages, their sum, and how many were overdue."""
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
    """Return a service with an empty store; it is closed at the end."""
    bench = Bench()
    yield bench
    await bench.service.aclose()


def data_of(result: LookupSuccess) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(result.snapshot.body)
    return data


# Miss, hit, collapsed


async def test_get_queries_the_upstream_on_a_miss(bench: Bench) -> None:
    """The first caller waits for the upstream, and its result is a miss."""
    result = await bench.learn(progress=0.35)
    assert (result.cache_status, result.age, result.had_older_snapshot, result.failure) == (
        CacheStatus.MISS,
        0.0,
        False,
        None,
    )
    assert data_of(result)["progress"] == 0.35
    assert bench.upstream.keys == [KEY]
    assert bench.lookups() == {"miss": 1}


async def test_get_answers_from_a_fresh_snapshot(bench: Bench) -> None:
    """While the snapshot is fresh no query is made, and the result has its age."""
    first = await bench.learn()
    bench.clock.now += CACHE.running_seconds - 0.1
    result = await bench.get(KEY)
    assert result.snapshot is first.snapshot
    assert (result.cache_status, result.failure, result.had_older_snapshot) == (CacheStatus.HIT, None, False)
    assert result.age == pytest.approx(CACHE.running_seconds - 0.1)
    assert bench.upstream.count == 1
    assert bench.lookups() == {"miss": 1, "hit": 1}


async def test_still_current_for_as_long_as_a_lookup_succeeds(bench: Bench) -> None:
    """An entry is current while it keeps the freshness promise, and each check counts as a lookup."""
    snapshot = (await bench.learn()).snapshot
    entry = cast("CacheEntry", bench.store.current_entry(KEY))
    promised = CACHE.running_seconds + CACHE.stale_while_revalidate_seconds
    ages = [0.5, CACHE.running_seconds - 0.25, CACHE.running_seconds, promised - 0.25]
    assert all(bench.service.may_serve_again(entry, snapshot.fetched_at + age) for age in ages)
    counted = {"miss": 1, "hit": 2, "stale": 2}
    assert bench.lookups() == counted
    assert bench.ages() == (5, sum(ages), 0)
    assert not bench.service.may_serve_again(entry, snapshot.fetched_at + promised)
    bench.store.put(replace(snapshot, version=snapshot.version + 1))
    assert not any(bench.service.may_serve_again(entry, snapshot.fetched_at + age) for age in ages)
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
    """A snapshot is fresh for the lifetime of its status, and stale after that."""
    await bench.learn(status)
    bench.clock.now += seconds - 0.01
    assert (await bench.get(KEY)).cache_status is CacheStatus.HIT
    bench.clock.now += 0.02
    assert (await bench.get(KEY)).cache_status is CacheStatus.STALE


async def test_get_takes_the_lifetime_of_results(bench: Bench) -> None:
    """Results have their own lifetime, and contain the envelope."""
    first = await bench.learn("succeeded", RESULT, images=["u"])
    bench.clock.now += CACHE.result_seconds - 0.01
    result = await bench.get(RESULT)
    assert (result.cache_status, result.snapshot) == (CacheStatus.HIT, first.snapshot)
    assert json.loads(result.snapshot.envelope)["data"]["images"] == ["u"]
    bench.clock.now += 0.02
    assert (await bench.get(RESULT)).cache_status is CacheStatus.STALE


async def test_get_shares_one_query_among_callers(bench: Bench) -> None:
    """Fifty concurrent callers cause one query: one of them started it, the others joined."""
    crowd = [bench.begin() for _ in range(CALLERS)]
    (await bench.upstream.call()).answer()
    results = await asyncio.gather(*crowd)
    assert {id(result.snapshot) for result in results} == {id(results[0].snapshot)}
    assert [result.cache_status for result in results] == [CacheStatus.MISS] + [CacheStatus.COLLAPSED] * (
        CALLERS - 1
    )
    assert bench.upstream.count == 1
    assert bench.lookups() == {"miss": 1, "collapsed": CALLERS - 1}


async def test_get_keeps_tasks_and_operations_apart(bench: Bench) -> None:
    """Other tasks and other operations are other queries, and each caller gets its own task's snapshot."""
    keys = [KEY, OTHER, RESULT, TaskKey(Operation.COMFY_GET_PROGRESS, KEY.task_id)]
    asked = [bench.begin(key) for key in keys]
    for call in reversed([await bench.upstream.call() for _ in keys]):
        call.answer()
    assert [result.snapshot.key for result in await asyncio.gather(*asked)] == keys
    assert sorted(bench.upstream.keys) == sorted(keys)


@pytest.mark.parametrize("leaver", [0, 1, -1])
async def test_get_survives_a_caller_that_disconnects(bench: Bench, leaver: int) -> None:
    """A caller that disconnects, even the first one, cancels nothing for the others."""
    crowd = [bench.begin() for _ in range(3)]
    call = await bench.upstream.call()
    gone = crowd.pop(leaver)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    call.answer()
    assert [result.age for result in await asyncio.gather(*crowd)] == [0.0, 0.0]
    assert bench.upstream.count == 1


async def test_get_stores_a_response_without_callers(bench: Bench) -> None:
    """When every caller has disconnected, the response is stored, and the next caller gets it."""
    asked = bench.begin()
    call = await bench.upstream.call()
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert not call.outcome.cancelled()
    next_one = bench.begin()
    call.answer()
    assert (await next_one).cache_status is CacheStatus.COLLAPSED
    assert (await bench.get(KEY)).cache_status is CacheStatus.HIT
    assert bench.upstream.count == 1


# Queued by the rate limiter


def long_ago(bench: Bench) -> None:
    """Let a snapshot become too old to revalidate, and young enough for stale-if-error."""
    bench.clock.now += CACHE.running_seconds + CACHE.stale_while_revalidate_seconds + 1


async def test_get_does_not_wait_for_a_queued_request(bench: Bench) -> None:
    """A caller with a stale snapshot gets it at once with the reason; the request completes later."""
    first = await bench.learn(progress=0.1)
    long_ago(bench)
    crowd = [bench.begin() for _ in range(3)]
    call = await bench.upstream.call()
    assert call.is_refresh
    call.on_expected_wait(7.0)
    call.on_expected_wait(6.0)
    for result in await asyncio.gather(*crowd, bench.get(KEY)):
        assert (result.snapshot, result.cache_status) == (first.snapshot, CacheStatus.STALE)
        assert result.failure == Alike(
            RateLimited("the query is queued by the rate limiter for upstream calls", retry_after=7.0)
        )
    assert bench.lookups() == {"miss": 1, "stale": 4}
    call.answer(progress=0.9)
    await bench.renewed(after=first.snapshot)
    assert data_of(await bench.get(KEY))["progress"] == 0.9
    assert bench.upstream.count == 2


async def test_get_waits_for_a_request_that_is_not_queued(bench: Bench) -> None:
    """A stale snapshot is not served while the request for a new one is in flight."""
    for _ in range(2):
        await bench.learn()
        long_ago(bench)
        asked = bench.begin()
        (await bench.upstream.call()).answer(progress=0.9)
        result = await asked
        assert (result.cache_status, result.had_older_snapshot, result.failure) == (
            CacheStatus.MISS,
            True,
            None,
        )
        long_ago(bench)
        assert not bench.service._in_flight._queries


async def test_get_waits_for_a_queued_request_without_a_snapshot(bench: Bench) -> None:
    """A caller without a snapshot that is young enough waits for the queued request."""
    for meanwhile in (OTHER, RESULT):
        asked = bench.begin()
        call = await bench.upstream.call()
        call.on_expected_wait(7.0)
        await bench.learn(key=meanwhile)
        assert not asked.done()
        call.answer()
        assert (await asked).cache_status is CacheStatus.MISS
        bench.clock.now += CACHE.stale_if_error_seconds + CACHE.running_seconds


async def test_query_if_stale_waits_for_a_queued_request(bench: Bench) -> None:
    """A schedule waits for the queued request and gets the fresh snapshot."""
    await bench.learn()
    long_ago(bench)
    asked = asyncio.create_task(bench.service.query_if_stale(KEY))
    call = await bench.upstream.call()
    call.on_expected_wait(7.0)
    await bench.learn(key=OTHER)  # a caller that does not wait would have its result by now
    assert not asked.done()
    call.answer(progress=0.9)
    result = await asked
    assert (result.cache_status, result.failure) == (CacheStatus.MISS, None)


async def test_get_joins_a_request_that_has_just_ended(bench: Bench) -> None:
    """A caller that arrives between the end of a request and its removal gets its result."""
    first = await bench.learn()
    long_ago(bench)
    early = bench.begin()
    call = await bench.upstream.call()
    call.fail(Overloaded("too many calls"))  # it is not cached, so only the request returns it
    late = bench.begin()
    for result in await asyncio.gather(early, late):
        assert (result.snapshot, result.cache_status) == (first.snapshot, CacheStatus.STALE)
        assert isinstance(result.failure, Overloaded)
    assert bench.upstream.count == 2
    assert not bench.service._in_flight._queries


async def test_get_replaces_a_request_that_has_just_ended(bench: Bench) -> None:
    """A caller that arrives between the end of a request and its removal may need a newer response."""
    known = (await bench.learn()).snapshot
    long_ago(bench)
    early = bench.begin()
    (await bench.upstream.call()).answer(progress=0.6)
    late = asyncio.create_task(bench.service.get(KEY, seen_revision=2**52))
    assert (await early).snapshot.version > known.version
    (await bench.upstream.call()).answer(progress=0.9)
    outcome = await late
    assert isinstance(outcome, LookupSuccess)
    assert data_of(outcome)["progress"] == 0.9


class AnnouncingStore(MemoryStore):
    """A store to which another replica has announced a snapshot, which is not read yet."""

    announced: Snapshot | None = None

    async def load_announced_snapshot(self, key: TaskKey) -> bool:
        """Read the announced snapshot."""
        announced, self.announced = self.announced, None
        if announced is None:
            return False
        self.put(announced, fetched_here=False)
        return True


async def with_announced_end() -> tuple[Bench, Snapshot]:
    """Return a service with an old snapshot, and the end of its task, which another replica has announced."""
    clock = Clock()
    store = AnnouncingStore(max_tasks=10, min_keep_stale_seconds=60.0, clock=clock)
    bench = Bench(store=store, clock=clock)
    known = (await bench.learn()).snapshot
    long_ago(bench)
    ended = replace(known, fetched_at=clock.now, lifetime=600.0, status=Status.SUCCEEDED, version=2**53)
    store.announced = ended
    return bench, ended


async def test_get_reads_an_announced_snapshot_while_its_query_is_queued() -> None:
    """Another replica has found that the task has ended: a caller does not receive an older snapshot."""
    bench, ended = await with_announced_end()
    bench.upstream.queues = True
    asked = bench.begin()
    queued = await bench.upstream.call()
    queued.on_expected_wait(7.0)
    result = await asked
    assert (result.snapshot, result.cache_status, result.failure) == (ended, CacheStatus.HIT, None)
    assert not queued.outcome.done()
    assert bench.lookups() == {CacheStatus.MISS: 1, CacheStatus.HIT: 1}
    await bench.service.aclose()


async def test_get_reads_an_announced_snapshot_although_a_failure_is_cached() -> None:
    """The failure may be this replica's own: it cannot reach the upstream, and another replica can."""
    bench, ended = await with_announced_end()
    bench.store.put_failure(KEY, UpstreamTimeout("too late"), seconds=1.0)
    result = await bench.service.get_after_miss(KEY)  # the announcement has invalidated the entry
    assert (result.snapshot, result.cache_status, result.failure) == (ended, CacheStatus.HIT, None)
    assert bench.upstream.count == 1
    await bench.service.aclose()


# Callers that leave


async def left(caller: asyncio.Task[Any]) -> None:
    """Let a caller leave."""
    caller.cancel()
    await asyncio.wait([caller])
    assert caller.cancelled()


async def test_get_drops_a_queued_query_when_its_last_caller_leaves(bench: Bench) -> None:
    """The query stays while one caller waits; when all have left, the next caller starts a new request."""
    bench.upstream.queues = True
    first, second = bench.begin(), bench.begin()
    queued = await bench.upstream.call()
    await left(first)
    assert not queued.outcome.done()
    await left(second)
    bench.upstream.queues = False
    third = bench.begin()  # before the dropped request has ended
    assert (await bench.upstream.call()) is not queued
    assert queued.outcome.cancelled()
    assert not third.done()
    assert bench.lookups() == {}
    assert bench.upstream.count == 2
    fourth = bench.begin()
    await asyncio.sleep(0)
    assert len(bench.service._in_flight._queries) == 1
    await left(third)
    await left(fourth)


async def test_get_cleans_up_a_request_dropped_before_it_began(bench: Bench) -> None:
    """A caller may leave in the same iteration of the event loop in which it came."""
    waiting = bench.service._in_flight.join_or_start(KEY)
    bench.service.add_caller(KEY, b"1")
    bench.service.remove_caller(KEY, b"1")
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    assert (KEY in bench.service._in_flight, bench.service._in_flight._queries) == (False, {})
    assert bench.upstream.count == 0
    await bench.learn()


async def test_get_completes_and_stores_a_query_on_the_wire(bench: Bench) -> None:
    """A query that was sent is completed although every caller has left, and its result is stored."""
    caller = bench.begin()
    call = await bench.upstream.call()
    await left(caller)
    call.answer()
    result = await bench.get()
    assert (result.cache_status, bench.upstream.count) == (CacheStatus.COLLAPSED, 1)
    assert (await bench.get()).cache_status is CacheStatus.HIT
    assert not bench.service._in_flight._queries


@pytest.mark.parametrize("how", ["stale", "queued", "hot"])
async def test_get_drops_no_background_refresh(bench: Bench, how: str) -> None:
    """A background refresh needs no callers: callers that join and leave change nothing."""
    await bench.learn()
    bench.upstream.queues = True
    if how == "stale":
        bench.clock.now += CACHE.running_seconds
        assert (await bench.get()).cache_status is CacheStatus.STALE
        call = await bench.upstream.call()
    elif how == "queued":
        long_ago(bench)
        asked = bench.begin()
        call = await bench.upstream.call()
        call.on_expected_wait(7.0)
        assert (await asked).cache_status is CacheStatus.STALE
    else:
        known = cast("Snapshot", bench.store.last_known(KEY))
        bench.service._start_refresh_ahead(known.key, known.version)
        call = await bench.upstream.call()
        long_ago(bench)
    joined = asyncio.create_task(bench.service.query_if_stale(KEY))
    await asyncio.sleep(0)
    await left(joined)
    assert not call.outcome.done()
    call.answer(progress=0.9)
    await bench.renewed(after=cast("Snapshot", bench.store.last_known(KEY)))


async def test_subscribers_are_the_demand_of_a_schedules_requests(bench: Bench) -> None:
    """A schedule's query is dropped with the last subscriber, and counts for each subscriber's client."""
    bench.upstream.queues = True
    for client in (b"1", b"2"):
        bench.service.add_caller(KEY, client)
    ticking = asyncio.create_task(bench.service.query_if_stale(KEY))
    call = await bench.upstream.call()
    assert call.awaited_query.clients == {b"1": 1, b"2": 1}
    bench.service.remove_caller(KEY, b"1")
    assert not call.outcome.done()
    bench.service.remove_caller(KEY, b"2")
    await asyncio.wait([ticking])
    assert call.outcome.cancelled()
    assert not bench.service._in_flight._queries


async def test_get_passes_the_clients_of_a_query(bench: Bench) -> None:
    """The rate limiter is fair to clients: the awaited query has the clients of all waiting callers."""
    callers = [asyncio.create_task(bench.service.get(KEY, client=client)) for client in (b"1", b"1", b"2")]
    call = await bench.upstream.call()
    assert call.awaited_query.clients == {b"1": 2, b"2": 1}
    await left(callers[0])
    assert call.awaited_query.clients == {b"1": 1, b"2": 1}
    call.answer()
    await asyncio.gather(*callers[1:])
    assert call.awaited_query.clients == {}


# Stale


async def test_get_serves_stale_while_revalidate(bench: Bench) -> None:
    """A stale snapshot that is young enough is served at once, and one background refresh runs."""
    first = await bench.learn(progress=0.1)
    bench.clock.now += CACHE.running_seconds
    results = [await bench.get(KEY) for _ in range(CALLERS)]
    assert {result.cache_status for result in results} == {CacheStatus.STALE}
    assert all(result.snapshot is first.snapshot and result.failure is None for result in results)
    assert results[0].age == CACHE.running_seconds
    (await bench.upstream.call()).answer(progress=0.9)
    await bench.renewed(after=first.snapshot)
    result = await bench.get(KEY)
    assert (result.cache_status, result.age, data_of(result)["progress"]) == (CacheStatus.HIT, 0.0, 0.9)
    assert bench.upstream.count == 2
    assert bench.lookups() == {"miss": 1, "stale": CALLERS, "hit": 1}


async def test_get_waits_beyond_stale_while_revalidate(bench: Bench) -> None:
    """When the stale snapshot is too old, all callers wait for one query, and the result says so."""
    await bench.learn(progress=0.1)
    bench.clock.now += CACHE.running_seconds + CACHE.stale_while_revalidate_seconds
    crowd = [bench.begin() for _ in range(3)]
    (await bench.upstream.call()).answer(progress=0.9)
    for result, source in zip(await asyncio.gather(*crowd), ["miss", "collapsed", "collapsed"], strict=True):
        assert (result.cache_status, result.age, result.had_older_snapshot) == (source, 0.0, True)
        assert data_of(result)["progress"] == 0.9
    assert bench.upstream.count == 2


async def test_get_joins_a_background_refresh(bench: Bench) -> None:
    """A caller that arrives when the snapshot is too old joins the background refresh in flight."""
    await bench.learn()
    bench.clock.now += CACHE.running_seconds + 2.0
    await bench.get(KEY)
    call = await bench.upstream.call()
    bench.clock.now += CACHE.stale_while_revalidate_seconds - 1.75
    late = bench.begin()
    await bench.learn(key=OTHER)
    assert not late.done()
    call.answer()
    assert (await late).cache_status is CacheStatus.COLLAPSED
    assert bench.upstream.keys == [KEY, KEY, OTHER]


async def test_get_serves_stale_when_the_refresh_takes_too_long(bench: Bench) -> None:
    """A caller does not wait for a refresh that is overdue: it receives the old snapshot and the reason."""
    await bench.learn()
    bench.clock.now += CACHE.running_seconds
    await bench.get(KEY)
    call = await bench.upstream.call()
    assert bench.service.overdue_detector.error(KEY) is None
    bench.clock.now += CACHE.stale_while_revalidate_seconds
    result = await bench.get(KEY)
    assert isinstance(result, LookupSuccess)
    assert isinstance(result.failure, UpstreamTimeout)
    assert isinstance(bench.service.overdue_detector.error(KEY), UpstreamTimeout)
    waiting = asyncio.create_task(bench.service.query_if_stale(KEY))
    call.answer()
    assert (await waiting).cache_status is CacheStatus.COLLAPSED
    assert bench.service.overdue_detector.error(KEY) is None
    assert bench.upstream.keys == [KEY, KEY], "the refresh has continued"


@pytest.mark.parametrize("repeated", [True, False])
async def test_overdue_limit_ignores_queries_that_outlast_an_outage(bench: Bench, *, repeated: bool) -> None:
    """A slow upstream raises the limit. A query whose call was repeated does not: its upstream was silent."""
    asked = bench.begin()
    call = await bench.upstream.call()
    bench.clock.now += 8.0
    call.awaited_query.repeated = repeated
    call.answer()
    await asked
    assert bench.service.overdue_detector.overdue_after_seconds == (1.5 if repeated else pytest.approx(4.8))


async def test_overdue_limit_ignores_the_wait_before_the_call(bench: Bench) -> None:
    """Otherwise a long queue for permits would hide that updates are overdue, and delay the next report."""
    asked = bench.begin()
    call = await bench.upstream.call()
    bench.clock.now += 8.0
    call.awaited_query.seconds_before_call = 7.9
    call.answer()
    await asked
    assert bench.service.overdue_detector.overdue_after_seconds == 1.5


async def test_get_counts_age_from_the_arrival_of_the_response(bench: Bench) -> None:
    """The age of a slow response counts from its arrival, and no caller waits for another one."""
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
    """While the upstream responds, no caller gets a snapshot older than lifetime + stale_while_revalidate."""
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
            assert (result.cache_status is CacheStatus.HIT) <= (result.age < result.snapshot.lifetime)
    finally:
        answering.cancel()
        await asyncio.wait([answering])
        await bench.service.aclose()


# Failures


@pytest.mark.parametrize("failure", FAILURES + NOT_THE_TASKS, ids=name_of)
async def test_get_returns_a_failure_without_a_snapshot(bench: Bench, failure: GatewayError) -> None:
    """Without a snapshot every caller of the query receives the failure."""
    crowd = [bench.begin() for _ in range(3)]
    (await bench.upstream.call()).fail(failure)
    assert await asyncio.gather(*crowd, return_exceptions=True) == [Alike(failure)] * 3
    assert bench.upstream.count == 1
    assert bench.lookups() == {"miss": 1, "collapsed": 2}


@pytest.mark.parametrize("failure", FAILURES, ids=name_of)
async def test_refusal_prefers_the_cached_failure(bench: Bench, failure: GatewayError) -> None:
    """A caller that must not wait receives the task's own failure while it is cached, and else the reason."""
    reason = Overloaded("too many")
    assert bench.service.refuse_lookup(KEY, reason).failure is reason
    await bench.fail(failure)
    assert bench.service.refuse_lookup(KEY, reason).failure == Alike(failure)
    assert bench.upstream.count == 1
    assert bench.lookups() == {"negative": 2, "miss": 1}


@pytest.mark.parametrize("failure", FAILURES, ids=name_of)
async def test_get_caches_a_failure(bench: Bench, failure: GatewayError) -> None:
    """A failure is served from memory for error_seconds; then the upstream is queried again."""
    await bench.fail(failure)
    bench.clock.now += CACHE.error_seconds - 0.01
    for _ in range(3):
        with pytest.raises(type(failure)):
            await bench.get(KEY)
    assert bench.upstream.count == 1
    assert bench.lookups() == {"miss": 1, "negative": 3}
    bench.clock.now += 0.02
    assert (await bench.learn()).cache_status is CacheStatus.MISS
    assert bench.upstream.count == 2


async def test_get_caches_a_failure_for_its_task_only(bench: Bench) -> None:
    """The failure of one task does not affect another."""
    await bench.fail(UpstreamTimeout("too late"))
    assert (await bench.learn(key=OTHER)).cache_status is CacheStatus.MISS
    assert (await bench.learn(key=RESULT)).cache_status is CacheStatus.MISS


@pytest.mark.parametrize("failure", NOT_THE_TASKS, ids=name_of)
async def test_get_caches_no_failure_unrelated_to_the_task(bench: Bench, failure: GatewayError) -> None:
    """The gateway's own limits and refused credentials are not cached: the next caller makes a query."""
    await bench.fail(failure)
    assert bench.store.cached_failure(KEY) is None
    assert (await bench.learn()).cache_status is CacheStatus.MISS
    assert bench.upstream.count == 2
    assert bench.lookups() == {"miss": 2}


@pytest.mark.parametrize("failure", FAILURES + NOT_THE_TASKS, ids=name_of)
async def test_get_serves_stale_if_error(bench: Bench, failure: GatewayError) -> None:
    """A snapshot up to stale_if_error old is served instead of a failure, and contains the failure."""
    first = await bench.learn()
    bench.clock.now += CACHE.stale_if_error_seconds
    crowd = [bench.begin() for _ in range(2)]
    (await bench.upstream.call()).fail(failure)
    for result in await asyncio.gather(*crowd):
        assert result.snapshot is first.snapshot
        assert (result.cache_status, result.failure) == (CacheStatus.STALE, Alike(failure))
        assert result.age == CACHE.stale_if_error_seconds
    assert bench.lookups() == {"miss": 1, "stale": 2}


async def test_get_serves_stale_if_error_from_memory(bench: Bench) -> None:
    """While the failure is cached, the stale snapshot is served at once, without another query."""
    await bench.learn()
    bench.clock.now += 20.0
    failure = UpstreamTimeout("too late")
    await bench.fail(failure)
    for _ in range(3):
        result = await bench.get(KEY)
        assert (result.cache_status, result.failure, result.age) == (CacheStatus.STALE, Alike(failure), 20.0)
    assert bench.upstream.count == 2
    assert bench.lookups() == {"miss": 1, "stale": 4}


async def test_get_returns_the_failure_beyond_stale_if_error(bench: Bench) -> None:
    """Beyond stale_if_error no snapshot is served: the failure is returned, and again from memory."""
    await bench.learn()
    bench.clock.now += CACHE.stale_if_error_seconds + 0.01
    failure = UpstreamTimeout("too late")
    assert await bench.fail(failure) == Alike(failure)
    with pytest.raises(UpstreamTimeout):
        await bench.get(KEY)
    assert bench.upstream.count == 2
    assert bench.lookups() == {"miss": 2, "negative": 1}


async def test_get_reports_a_failed_background_refresh(bench: Bench) -> None:
    """After a failed background refresh, stale results contain the failure, and no refresh starts."""
    first = await bench.learn()
    bench.clock.now += CACHE.running_seconds
    assert (await bench.get(KEY)).failure is None
    failure = UpstreamBusy("busy")
    joined = asyncio.create_task(bench.service.query_if_stale(KEY))
    (await bench.upstream.call()).fail(failure)
    assert (await joined).failure == Alike(failure)
    for _ in range(3):
        result = await bench.get(KEY)
        assert (result.snapshot, result.cache_status) == (first.snapshot, CacheStatus.STALE)
        assert result.failure == Alike(failure)
    assert bench.upstream.count == 2
    bench.clock.now += CACHE.error_seconds + 0.01
    assert (await bench.get(KEY)).failure is None
    (await bench.upstream.call()).answer()
    assert bench.upstream.count == 3


async def test_get_respects_a_short_stale_if_error() -> None:
    """If stale_if_error is shorter than stale-while-revalidate, it limits the age after a failure."""
    bench = Bench(CACHE.model_copy(update={"stale_if_error_seconds": 0.0}))
    await bench.learn()
    bench.clock.now += CACHE.running_seconds
    assert (await bench.get(KEY)).failure is None
    joined = asyncio.create_task(bench.service.query_if_stale(KEY))
    (await bench.upstream.call()).fail(UpstreamTimeout("too late"))
    for outcome in (await joined, await bench.service.get(KEY)):
        assert isinstance(outcome, LookupFailure)
        assert isinstance(outcome.failure, UpstreamTimeout)
    assert bench.lookups() == {"miss": 1, "stale": 1, "negative": 1}
    await bench.service.aclose()


async def test_get_starts_no_refresh_while_a_failure_is_cached(bench: Bench) -> None:
    """While a failure is cached, stale results start no refresh."""
    first = await bench.learn()
    bench.clock.now += 20.0
    await bench.fail(UpstreamTimeout("too late"))
    for _ in range(3):
        result = await bench.get(KEY)
        assert (result.snapshot, result.cache_status) == (first.snapshot, CacheStatus.STALE)
        assert isinstance(result.failure, UpstreamTimeout)
        assert KEY not in bench.service._in_flight
    await bench.learn(key=OTHER)  # a refresh would have made its query by now
    assert bench.upstream.keys == [KEY, KEY, OTHER]


async def test_get_returns_the_fetch_behind_stale_if_error(bench: Bench) -> None:
    """A caller that waited for a failed query gets its details with the stale result."""
    await bench.learn()
    bench.clock.now += 20.0
    asked = bench.begin()
    call = await bench.upstream.call()
    bench.clock.now += 0.5
    call.fail(UpstreamInvalid("nonsense", detail=UpstreamDetail(request_id="r-1")))
    result = await asked
    assert result.cache_status is CacheStatus.STALE
    assert result.fetch_outcome is not None
    assert (result.fetch_outcome.upstream_seconds, result.fetch_outcome.invoke_id) == (
        pytest.approx(0.5),
        "r-1",
    )


async def test_get_recovers(bench: Bench) -> None:
    """The first successful response ends a failure, and results contain it no more."""
    await bench.learn()
    bench.clock.now += 20.0
    await bench.fail(UpstreamTimeout("too late"))
    bench.clock.now += CACHE.error_seconds + 0.01
    result = await bench.learn(progress=0.8)
    assert (result.cache_status, result.failure, result.had_older_snapshot) == (CacheStatus.MISS, None, True)
    assert (await bench.get(KEY)).failure is None


async def test_get_caches_no_traceback_of_a_failure(bench: Bench) -> None:
    """A cached failure has no traceback; each caller raises a copy."""
    failure = UpstreamTimeout("too late", detail=UpstreamDetail(request_id="r-1"), retry_after=2.0)
    failure.__cause__ = OSError("a cause")
    failure.__context__ = OSError("a context")
    await bench.fail(failure)
    kept = bench.store.cached_failure(KEY)
    raised = []
    for _ in range(2):
        with pytest.raises(UpstreamTimeout) as caught:
            await bench.get(KEY)
        raised.append(caught.value)
    assert [kept, *raised] == [Alike(failure)] * 3
    assert len({id(error) for error in (failure, kept, *raised)}) == 4
    assert kept is not None
    assert (kept.__traceback__, kept.__cause__, kept.__context__) == (None, None, None)


async def test_get_shares_an_unexpected_error_and_does_not_cache_it(bench: Bench) -> None:
    """An unexpected exception reaches every waiting caller; the next caller makes a query."""
    bug = ZeroDivisionError("a bug")
    crowd = [bench.begin() for _ in range(3)]
    (await bench.upstream.call()).fail(bug)
    assert await asyncio.gather(*crowd, return_exceptions=True) == [bug] * 3
    assert bench.store.cached_failure(KEY) is None
    assert (await bench.learn()).cache_status is CacheStatus.MISS


async def test_get_fails_on_a_state_that_nests_too_deep(bench: Bench) -> None:
    """A response that cannot be rendered is a failure of the upstream, cached like any other."""
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
    assert bench.store.cached_failure(KEY) is not None
    while deep:  # taken apart step by step: the interpreter would do it by recursion
        deep = deep.pop("state")


# Observed metrics and logs


async def test_get_merges_each_response_with_the_previous_snapshot(bench: Bench) -> None:
    """Progress does not fall while the task runs, and no response replaces a terminal one."""
    await bench.learn("running", progress=0.65)
    bench.clock.now += 10.0
    assert data_of(await bench.learn("running", progress=0.2))["progress"] == 0.65
    bench.clock.now += 10.0
    assert data_of(await bench.learn("succeeded"))["progress"] == 1.0
    bench.clock.now += CACHE.terminal_seconds + 10.0
    result = await bench.learn("running", progress=0.1)
    assert (data_of(result)["status"], data_of(result)["terminal"]) == ("succeeded", True)
    assert (result.cache_status, result.age) == (CacheStatus.MISS, 0.0)


async def test_get_counts_each_transition_once(bench: Bench) -> None:
    """A status is counted when a task reaches it, not each time it is seen; results have none."""
    for status in ["waiting", "waiting", "running", "running", "waiting", "successed", "running", "failed"]:
        await bench.learn(status)
        bench.clock.now += CACHE.terminal_seconds + 10.0
    await bench.learn("running", OTHER)
    await bench.learn("succeeded", RESULT)
    assert bench.transitions() == {"waiting": 2, "running": 2, "succeeded": 1}


class LeaseBook(MemoryStore):
    """A store that records its outstanding leases."""

    def __init__(self) -> None:
        super().__init__(max_tasks=100, min_keep_stale_seconds=60.0)
        self.out: set[Lease] = set()
        self.released: list[Lease] = []

    async def acquire(
        self, key: TaskKey, requirement: Requirement = ANY_FRESH, *, timeout_seconds: float = math.inf
    ) -> Snapshot | GatewayError | Lease:
        outcome = await super().acquire(key, requirement, timeout_seconds=timeout_seconds)
        if isinstance(outcome, Lease):
            self.out.add(outcome)
        return outcome

    async def commit(self, lease: Lease, build: Callable[[Snapshot | None], Snapshot]) -> Snapshot | None:
        kept = await super().commit(lease, build)
        self.out.remove(lease)  # if `build` raises, the lease is kept
        return kept

    async def store_failure(self, lease: Lease, error: GatewayError, *, seconds: float) -> None:
        self.out.remove(lease)
        await super().store_failure(lease, error, seconds=seconds)

    async def release_lease(self, lease: Lease) -> None:
        self.out.remove(lease)
        await super().release_lease(lease)

    def release_lease_early(self, lease: Lease) -> None:
        self.released.append(lease)
        super().release_lease_early(lease)


@pytest.mark.parametrize(
    "error",
    [
        None,
        UpstreamTimeout("late"),  # cached
        Overloaded("full"),  # not cached
        RuntimeError("a bug"),
    ],
)
async def test_get_releases_its_lease(error: Exception | None) -> None:
    """However a request ends, other replicas need not wait for its lease to expire."""
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


async def test_close_releases_leases() -> None:
    """Closing during a query releases the lease, too."""
    book = LeaseBook()
    bench = Bench(store=book)
    asked = bench.begin()
    await bench.upstream.call()
    await bench.service.aclose()
    await asyncio.gather(asked, return_exceptions=True)
    assert not book.out


async def test_get_logs_no_known_status_and_counts_no_result(bench: Bench) -> None:
    """A result has no transitions, and a known status of the vendor is not logged."""
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


async def test_get_logs_an_unknown_status(bench: Bench) -> None:
    """An unknown status is counted as such and logged, once per transition and shortened."""
    with capture_logs() as lines:
        await bench.learn("pausing" * 100)
        bench.clock.now += 10.0
        await bench.learn("pausing" * 100)
    [line] = [line for line in lines if line["event"] == "unknown_task_status"]
    assert (line["log_level"], line["task_id"], line["operation"]) == ("warning", KEY.task_id, KEY.operation)
    assert line["status"].startswith("'pausingpausing")
    assert line["status"].limit == 100  # the log shortens it after redacting all of it
    assert bench.transitions() == {"unknown": 1}


async def test_get_samples_the_log_of_unknown_statuses(bench: Bench) -> None:
    """If every task has an unknown status at once, a few are logged and the rest counted."""
    with capture_logs() as lines:
        for number in range(30):
            await bench.learn("pausing", TaskKey(KEY.operation, f"task-{number}"))
        bench.clock.now += 10.0
        await bench.learn("pausing", OTHER)
    logged = [line["suppressed"] for line in lines if line["event"] == "unknown_task_status"]
    assert logged == [0] * 10 + [20]
    assert bench.transitions() == {"unknown": 31}


async def test_get_samples_the_log_of_unexpected_errors(bench: Bench) -> None:
    """An error that every request raises reaches each caller, and is logged with traceback a few times."""
    with capture_logs() as lines:
        for _ in range(30):
            assert isinstance(await bench.fail(KeyError("bug")), KeyError)
    logged = [line for line in lines if line["event"] == "fetch_crashed"]
    assert [line["suppressed"] for line in logged] == [0] * 10
    assert (logged[0]["log_level"], logged[0]["exc_info"]) == ("error", True)
    assert (logged[0]["operation"], logged[0]["task_id"]) == KEY


async def test_get_returns_the_fetch_to_every_waiting_caller(bench: Bench) -> None:
    """All callers of a request get the duration and the id of the upstream's call; a hit does not."""
    first, second = bench.begin(), bench.begin()
    call = await bench.upstream.call()
    bench.clock.now += 0.25
    call.outcome.set_result(answer(KEY, "running")._replace(invoke_id="i_7"))
    for asked in (first, second):
        fetch = (await asked).fetch_outcome
        assert fetch is not None
        assert (fetch.upstream_seconds, fetch.invoke_id) == (pytest.approx(0.25), "i_7")
    assert (await bench.get()).fetch_outcome is None


@pytest.mark.parametrize(
    ("detail", "invoke_id"),
    [
        (None, None),
        (UpstreamDetail(), None),
        (UpstreamDetail(request_id="r-1"), "r-1"),
        (UpstreamDetail(invoke_id="i_1", request_id="r-1"), "i_1"),
    ],
)
async def test_get_returns_the_failed_fetch_to_every_waiting_caller(
    bench: Bench, detail: UpstreamDetail | None, invoke_id: str | None
) -> None:
    """A failure has its duration and the id that the upstream returned; a cached one has none."""
    asked = asyncio.create_task(bench.service.get(KEY))
    call = await bench.upstream.call()
    bench.clock.now += 0.5
    call.fail(UpstreamInvalid("nonsense", detail=detail))
    failed = await asked
    assert isinstance(failed, LookupFailure)
    assert failed.fetch_outcome is not None
    assert (failed.key, failed.cache_status) == (KEY, CacheStatus.MISS)
    assert (failed.fetch_outcome.upstream_seconds, failed.fetch_outcome.invoke_id) == (
        pytest.approx(0.5),
        invoke_id,
    )
    again = await bench.service.get(KEY)
    assert isinstance(again, LookupFailure)
    assert (again.cache_status, again.fetch_outcome) == (CacheStatus.NEGATIVE, None)


async def test_get_observes_the_age_of_results(bench: Bench) -> None:
    """The age of each result is observed, and those beyond the freshness promise are counted."""
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
    await bench.get(KEY)  # stale-if-error, while the failure is cached
    assert bench.ages() == (5, 1.0 + CACHE.running_seconds + 2 * promised, 2)


async def test_get_observes_no_age_of_terminal_snapshots(bench: Bench) -> None:
    """Snapshots of ended tasks do not become outdated, whatever the upstream does."""
    await bench.learn("succeeded")
    bench.clock.now += 10.0
    await bench.get(KEY)
    assert bench.ages() == (0, 0.0, 0)


async def test_get_returns_no_id_without_a_call(bench: Bench) -> None:
    """A failure by one of the gateway's own limits has no id of the upstream."""
    asked = asyncio.create_task(bench.service.get(KEY))
    (await bench.upstream.call()).fail(Overloaded("full"))
    failed = await asked
    assert isinstance(failed, LookupFailure)
    assert failed.fetch_outcome is not None
    assert failed.fetch_outcome.invoke_id is None


async def test_get_makes_no_series_per_task(bench: Bench) -> None:
    """The number of metric series does not depend on the number of tasks."""

    def series() -> set[str]:
        return {f"{s.name}{s.labels}" for family in bench.metrics.registry.collect() for s in family.samples}

    await bench.learn()
    before = series()
    for number in range(20):
        await bench.learn(key=TaskKey(KEY.operation, f"task-{number}"))
    assert series() == before


# Other replicas


class SharedStore(MemoryStore):
    """A store in which another replica's snapshot becomes visible during `acquire`."""

    elsewhere: Snapshot | None = None

    async def acquire(
        self, key: TaskKey, requirement: Requirement = ANY_FRESH, *, timeout_seconds: float = math.inf
    ) -> Snapshot | GatewayError | Lease:
        """Return the other replica's snapshot, if it is of this task."""
        if self.elsewhere is not None and self.elsewhere.key == key:
            self.put(self.elsewhere)
        return await super().acquire(key, requirement, timeout_seconds=timeout_seconds)


async def test_fetch_checks_the_store_before_it_queries() -> None:
    """When another replica has stored a snapshot meanwhile, it is used, and no query is made."""
    store = SharedStore(max_tasks=10, min_keep_stale_seconds=60.0, clock=Clock())
    bench = Bench(store=store)
    store.elsewhere = Snapshot(
        KEY, bench.clock.now - 0.5, CACHE.running_seconds, b"{}", Status.RUNNING, 0.5, version=1
    )
    results = await asyncio.gather(bench.begin(), bench.begin())
    assert [result.snapshot for result in results] == [store.elsewhere] * 2
    assert [result.age for result in results] == [0.5, 0.5]
    assert [result.key for result in results] == [KEY, KEY]
    for result in results:  # waited for a request, which made no call
        assert result.fetch_outcome is not None
        assert (result.fetch_outcome.upstream_seconds, result.fetch_outcome.invoke_id) == (None, None)
        assert result.fetch_outcome.span is None
    assert bench.upstream.count == 0


async def test_fetch_queries_when_the_other_replicas_snapshot_is_stale() -> None:
    """A stale snapshot of another replica does not prevent a query."""
    store = SharedStore(max_tasks=10, min_keep_stale_seconds=60.0, clock=Clock())
    bench = Bench(store=store)
    store.elsewhere = Snapshot(
        KEY, bench.clock.now - 50.0, CACHE.running_seconds, b"{}", Status.RUNNING, 0.5, version=1
    )
    assert (await bench.learn(progress=0.9)).age == 0.0
    assert bench.upstream.count == 1


class ContestedStore(MemoryStore):
    """A store in which another replica has taken over the lease at the first commit."""

    late = True

    async def commit(self, lease: Lease, build: Callable[[Snapshot | None], Snapshot]) -> Snapshot | None:
        """Refuse the first commit."""
        late, self.late = self.late, False
        return None if late else await super().commit(lease, build)


async def test_fetch_whose_commit_is_refused_begins_again() -> None:
    """A snapshot whose commit is refused is served to no caller: the request starts again."""
    clock = Clock()
    bench = Bench(store=ContestedStore(max_tasks=10, min_keep_stale_seconds=60.0, clock=clock))
    waiting = bench.begin()
    (await bench.upstream.call()).answer(progress=0.1)
    (await bench.upstream.call()).answer(progress=0.2)
    assert data_of(await waiting)["progress"] == 0.2


async def test_fetch_merges_its_response_with_a_newer_snapshot(bench: Bench) -> None:
    """A snapshot that another replica stored during the call is not undone by the response."""
    known = (await bench.learn(progress=0.1)).snapshot
    long_ago(bench)
    asked = bench.begin()
    call = await bench.upstream.call()
    bench.store.put(replace(known, progress=0.8, version=known.version + 1))
    call.answer(progress=0.3)
    assert data_of(await asked)["progress"] == 0.8


async def test_fetch_returns_a_snapshot_that_another_replica_stored_during_a_failed_call(
    bench: Bench,
) -> None:
    """If another replica has succeeded during a retry, its snapshot is the result."""
    known = (await bench.learn(progress=0.1)).snapshot
    long_ago(bench)
    asked = bench.begin()
    call = await bench.upstream.call()
    newer = replace(known, fetched_at=bench.clock.now, version=known.version + 10**12)
    bench.store.put(newer)
    call.fail(UpstreamTimeout("too late"))
    assert (await asked).snapshot is newer


async def test_fetch_releases_its_lease_before_a_retry() -> None:
    """This replica's upstream connection may be the reason for the retry: another replica may try."""
    book = LeaseBook()
    bench = Bench(store=book)
    asked = bench.begin()
    call = await bench.upstream.call()
    assert book.released == []
    call.on_retry()
    assert book.released == list(book.out)
    call.answer()
    await asked
    assert not book.out


# Versions that clients have received


async def test_get_returns_nothing_older_than_the_client_has_received(bench: Bench) -> None:
    """A client that names a newer version gets a new snapshot, although the present one is fresh."""
    known = (await bench.learn(progress=0.1)).snapshot
    for lookup in (bench.service.lookup, bench.service.peek):
        assert lookup(KEY, known.version) is not None
        assert lookup(KEY, known.version + 1) is None
    asked = asyncio.create_task(bench.service.get(KEY, seen_revision=known.version + 1))
    (await bench.upstream.call()).answer(progress=0.9)
    outcome = await asked
    assert isinstance(outcome, LookupSuccess)
    assert outcome.snapshot.version > known.version
    assert data_of(outcome)["progress"] == 0.9
    assert bench.upstream.count == 2


@pytest.mark.parametrize("age", [0.0, CACHE.running_seconds + 1])
async def test_get_returns_the_version_that_the_client_has(bench: Bench, age: float) -> None:
    """A client that names the present version gets it without waiting, fresh or stale."""
    known = (await bench.learn()).snapshot
    bench.clock.now += age
    outcome = await bench.service.get(KEY, seen_revision=known.version)
    assert isinstance(outcome, LookupSuccess)
    assert outcome.snapshot is known


async def test_get_returns_the_end_of_a_task_whatever_the_client_has_received(bench: Bench) -> None:
    """A terminal snapshot is final: a larger version causes no query."""
    known = (await bench.learn("succeeded")).snapshot
    outcome = await bench.service.get(KEY, seen_revision=known.version + 10**6)
    fresh = await bench.service.query_if_stale(KEY, seen_revision=known.version + 10**6)
    assert isinstance(outcome, LookupSuccess)
    assert outcome.snapshot is known
    assert isinstance(fresh, LookupSuccess)
    assert fresh.snapshot is known
    assert bench.upstream.count == 1


async def test_get_joins_no_request_that_is_older_than_the_client(bench: Bench) -> None:
    """A request in flight may return an older version than the client has: then another one follows."""
    asked = bench.begin()
    first = await bench.upstream.call()
    late = asyncio.create_task(bench.service.get(KEY, seen_revision=2**52))
    await asyncio.sleep(0)
    first.answer(progress=0.1)
    assert data_of(await asked)["progress"] == 0.1
    (await bench.upstream.call()).answer(progress=0.2)
    outcome = await late
    assert isinstance(outcome, LookupSuccess)
    assert data_of(outcome)["progress"] == 0.2
    assert outcome.snapshot.version >= 2**52
    assert bench.upstream.count == 2


async def test_one_request_satisfies_all_clients_that_wait(bench: Bench) -> None:
    """Each client has seen another revision, and the request in flight is too old for all of them."""
    asked = bench.begin()
    first = await bench.upstream.call()
    late = [
        asyncio.create_task(bench.service.get(KEY, seen_revision=revision))
        for revision in range(2**52, 2**52 + 10)
    ]
    await asyncio.sleep(0)
    first.answer(progress=0.1)
    await asked
    (await bench.upstream.call()).answer(progress=0.2)
    for outcome in await asyncio.gather(*late):
        assert isinstance(outcome, LookupSuccess)
        assert data_of(outcome)["progress"] == 0.2
    assert bench.upstream.count == 2


async def test_get_needs_a_newer_response_than_other_clients(bench: Bench) -> None:
    """The snapshot is what one client has seen, but perhaps older than what another one has seen."""
    known = (await bench.learn(progress=0.6)).snapshot
    bench.service.add_caller(KEY, b"client")
    bench.service._in_flight.get_or_create_query(KEY).seen_revision = known.revision  # of the first client
    assert known.version < known.revision
    asked = asyncio.create_task(bench.service.get(KEY, seen_revision=known.version + 1))
    (await bench.upstream.call()).answer(progress=0.9)
    outcome = await asked
    assert isinstance(outcome, LookupSuccess)
    assert data_of(outcome)["progress"] == 0.9


class OutdatedStore(MemoryStore):
    """A store that offers its first snapshot whatever is required."""

    first: Snapshot | None = None

    async def acquire(
        self, key: TaskKey, requirement: Requirement = ANY_FRESH, *, timeout_seconds: float = math.inf
    ) -> Snapshot | GatewayError | Lease:
        return self.first or await super().acquire(key, requirement, timeout_seconds=timeout_seconds)

    async def commit(self, lease: Lease, build: Callable[[Snapshot | None], Snapshot]) -> Snapshot | None:
        self.first = await super().commit(lease, build)
        return self.first


async def test_get_fails_if_all_requests_return_something_older() -> None:
    """The client gets an error, and not a response that is older than the one it has."""
    bench = Bench(store=OutdatedStore(max_tasks=100, min_keep_stale_seconds=60.0))
    known = (await bench.learn()).snapshot
    outcome = await bench.service.get(KEY, seen_revision=known.revision + 1)
    assert isinstance(outcome, LookupFailure)
    assert outcome.failure.code == "upstream-timeout"


@pytest.mark.parametrize("failure", [FAILURES[0], NOT_THE_TASKS[0]], ids=name_of)
async def test_stale_if_error_serves_nothing_older_than_the_client_has_received(
    bench: Bench, failure: GatewayError
) -> None:
    """An older snapshot than the client has is not served instead of a failure."""
    known = (await bench.learn()).snapshot
    asked = asyncio.create_task(bench.service.get(KEY, seen_revision=known.version + 1))
    (await bench.upstream.call()).fail(failure)
    outcome = await asked
    assert isinstance(outcome, LookupFailure)
    assert outcome.failure == Alike(failure)


async def test_query_if_stale_returns_nothing_older_than_the_subscribers_have_received(
    bench: Bench,
) -> None:
    """A schedule fetches at once if a subscriber has received a newer version."""
    known = (await bench.learn(progress=0.1)).snapshot
    assert (await bench.service.query_if_stale(KEY, seen_revision=known.version)).key == KEY
    asked = asyncio.create_task(bench.service.query_if_stale(KEY, seen_revision=known.version + 1))
    (await bench.upstream.call()).answer(progress=0.9)
    outcome = await asked
    assert isinstance(outcome, LookupSuccess)
    assert outcome.snapshot.version > known.version


# Refresh-ahead


async def test_refresh_ahead_of_a_task_that_is_read_twice(bench: Bench) -> None:
    """A task that is read twice in a lifetime is refreshed before it becomes stale: readers never wait."""
    first = await bench.learn()
    bench.clock.now += CACHE.running_seconds - 1e-6
    for _ in range(5):
        assert (await bench.get(KEY)).cache_status is CacheStatus.HIT
    call = await bench.upstream.call()
    assert (await bench.get(KEY)).cache_status is CacheStatus.HIT
    call.answer(progress=0.9)
    await bench.renewed(after=first.snapshot)
    bench.clock.now += CACHE.running_seconds - 1e-6
    result = await bench.get(KEY)
    assert (result.cache_status, data_of(result)["progress"]) == (CacheStatus.HIT, 0.9)
    assert bench.upstream.count == 2


async def test_refresh_ahead_uses_the_average_latency() -> None:
    """A refresh starts before the end of the lifetime by the average latency of earlier queries."""
    bench = Bench(CACHE.model_copy(update={"running_seconds": 600.0}))
    asked = bench.begin()
    call = await bench.upstream.call()
    bench.clock.now += 3000.0
    call.answer()
    await asked
    for _ in range(2):
        assert (await bench.get(KEY)).age == 0.0
    assert (await bench.upstream.call()).key == KEY  # without it the next query would be due in ten minutes
    await bench.service.aclose()


async def test_refresh_ahead_is_later_where_the_snapshot_was_not_fetched() -> None:
    """The replica that has fetched a snapshot refreshes it first: the others subtract no latency."""
    bench = Bench(CACHE.model_copy(update={"running_seconds": 600.0}))
    asked = bench.begin()
    call = await bench.upstream.call()
    bench.clock.now += 3000.0
    call.answer()
    known = (await asked).snapshot
    bench.store.put(replace(known, version=known.version + 1), fetched_here=False)
    for _ in range(2):
        await bench.get(KEY)
    await bench.learn(key=OTHER)  # a refresh would have made its query by now
    assert bench.upstream.keys == [KEY, OTHER]
    await bench.service.aclose()


@pytest.mark.parametrize(("status", "polls"), [("running", 1), ("succeeded", 5)])
async def test_refresh_ahead_only_of_running_tasks_read_twice(bench: Bench, status: str, polls: int) -> None:
    """A task that is read once, or has ended, is not refreshed."""
    result = await bench.learn(status)
    bench.clock.now += result.snapshot.lifetime - 1e-6
    for _ in range(polls):
        await bench.get(KEY)
    hot = await bench.learn(key=OTHER)
    bench.clock.now += hot.snapshot.lifetime - 1e-6
    for _ in range(2):
        await bench.get(OTHER)
    assert (await bench.upstream.call()).key == OTHER  # refresh-ahead would have made its query by now
    assert bench.upstream.keys == [KEY, OTHER, OTHER]


@pytest.mark.parametrize("polls", [0, 2])
async def test_refresh_ahead_is_skipped_for_a_replaced_snapshot(bench: Bench, polls: int) -> None:
    """If the snapshot was replaced before the refresh was due, the refresh is not made."""
    first = await bench.learn()
    bench.clock.now += CACHE.running_seconds - 1e-3
    for _ in range(2):
        await bench.get(KEY)
    newer = replace(first.snapshot, fetched_at=bench.clock.now, version=first.snapshot.version + 1)
    bench.store.put(newer)
    for _ in range(polls):
        await bench.get(KEY)
    due = asyncio.Event()
    asyncio.get_running_loop().call_later(2e-3, due.set)
    await due.wait()
    assert bench.upstream.count == 1


async def test_refresh_ahead_is_skipped_while_a_failure_is_cached(bench: Bench) -> None:
    """If another replica's query failed before the refresh was due, the refresh is not made."""
    await bench.learn()
    bench.clock.now += CACHE.running_seconds - 1e-3
    for _ in range(2):
        await bench.get(KEY)
    bench.store.put_failure(KEY, UpstreamTimeout("too late"), seconds=60.0)
    due = asyncio.Event()
    asyncio.get_running_loop().call_later(2e-3, due.set)
    await due.wait()
    await bench.learn(key=OTHER)  # a refresh would have made its query by now
    assert bench.upstream.keys == [KEY, OTHER]


# For schedules


async def test_query_if_stale_does_not_return_a_stale_snapshot(bench: Bench) -> None:
    """A schedule gets a fresh snapshot, or waits for one however young the stale one is."""
    asked = asyncio.create_task(bench.service.query_if_stale(KEY))
    (await bench.upstream.call()).answer(progress=0.1)
    first = await asked
    assert first.cache_status is CacheStatus.MISS
    assert (await bench.service.query_if_stale(KEY)).snapshot is first.snapshot
    bench.clock.now += CACHE.running_seconds
    waiting = asyncio.create_task(bench.service.query_if_stale(KEY))
    (await bench.upstream.call()).answer(progress=0.9)
    result = await waiting
    assert (result.age, data_of(result)["progress"]) == (0.0, 0.9)
    assert bench.lookups() == {}, "no caller has asked"


async def test_peek_starts_nothing(bench: Bench) -> None:
    """`peek` makes no query and counts no lookup."""
    assert bench.service.peek(KEY) is None
    first = await bench.learn()
    for age, source in [(0.0, CacheStatus.HIT), (CACHE.running_seconds, CacheStatus.STALE)]:
        bench.clock.now = first.snapshot.fetched_at + age
        result = bench.service.peek(KEY)
        assert result is not None
        assert (result.snapshot, result.age, result.cache_status) == (first.snapshot, age, source)
    assert bench.upstream.count == 1
    assert bench.lookups() == {"miss": 1}


async def test_peek_returns_nothing_too_old(bench: Bench) -> None:
    """The freshness promise and stale-if-error also apply to `peek`."""
    first = await bench.learn()
    bench.clock.now += CACHE.running_seconds + CACHE.stale_while_revalidate_seconds
    assert bench.service.peek(KEY) is None
    failure = UpstreamTimeout("too late")
    await bench.fail(failure)
    result = bench.service.peek(KEY)
    assert result is not None
    assert (result.snapshot, result.failure) == (first.snapshot, Alike(failure))
    bench.clock.now = first.snapshot.fetched_at + CACHE.stale_if_error_seconds
    bench.store.put_failure(KEY, failure, seconds=1.0)
    assert bench.service.peek(KEY) is not None
    bench.clock.now += 0.01
    assert bench.service.peek(KEY) is None


# Closing


async def test_aclose_cancels_every_request(bench: Bench) -> None:
    """Closing cancels all requests in flight and leaves no caller waiting."""
    crowd = [bench.begin(), bench.begin(OTHER)]
    calls = [await bench.upstream.call() for _ in crowd]
    await bench.service.aclose()
    assert all(call.outcome.cancelled() for call in calls)
    for outcome in await asyncio.gather(*crowd, return_exceptions=True):
        assert isinstance(outcome, asyncio.CancelledError)


async def test_aclose_cancels_scheduled_refreshes(bench: Bench) -> None:
    """After closing no scheduled refresh starts."""
    await bench.learn()
    bench.clock.now += CACHE.running_seconds - 1e-3
    for _ in range(2):
        await bench.get(KEY)
    await bench.service.aclose()
    passed = asyncio.Event()
    asyncio.get_running_loop().call_later(2e-3, passed.set)
    await passed.wait()
    assert bench.upstream.count == 1


async def test_aclose_starts_no_refresh(bench: Bench) -> None:
    """After closing the store still serves snapshots, and no refresh starts, ahead or in the background."""
    await bench.learn()
    await bench.service.aclose()
    for age, source in [(0.0, CacheStatus.HIT), (CACHE.running_seconds, CacheStatus.STALE)]:
        bench.clock.now = 1000.0 + age
        for _ in range(3):
            result = bench.service.lookup(KEY)
            assert result is not None
            assert result.cache_status is source
    with pytest.raises(asyncio.CancelledError):
        await bench.get(OTHER)
    assert bench.upstream.count == 1


class SlowStore(MemoryStore):
    """A store in which another replica holds the lease for a while."""

    clock = Clock()
    patience: float = 0.0

    async def acquire(
        self, key: TaskKey, requirement: Requirement = ANY_FRESH, *, timeout_seconds: float = math.inf
    ) -> Snapshot | GatewayError | Lease:
        """Return the lease after four seconds."""
        self.patience = timeout_seconds
        self.clock.now += 4.0
        return await super().acquire(key, requirement, timeout_seconds=timeout_seconds)


async def test_fetch_has_one_deadline() -> None:
    """The time that a request waited for another replica's lease is not added to its own query."""
    store = SlowStore(max_tasks=10, min_keep_stale_seconds=60.0)
    bench = Bench(store=store)
    store.clock = bench.clock
    task = bench.begin()
    call = await bench.upstream.call()
    assert store.patience == 10.0
    assert call.timeout_seconds == 6.0
    call.answer()
    await task


class LaggingStore(MemoryStore):
    """A store that is behind the other replicas until `read_arrived_messages`."""

    behind = True
    whole = True
    caught_up = 0

    def current_entry(self, key: TaskKey) -> CacheEntry | None:
        """Return nothing while the store is behind."""
        return None if self.behind else super().current_entry(key)

    async def read_arrived_messages(self) -> bool:
        """Catch up, if possible."""
        self.caught_up += 1
        self.behind = not self.whole
        return self.whole


@pytest.mark.parametrize(
    ("age", "source"),
    [(0.5, CacheStatus.HIT), (CACHE.running_seconds + 0.5, CacheStatus.STALE)],
    ids=["fresh", "stale"],
)
async def test_get_catches_up_before_it_queries(age: float, source: CacheStatus) -> None:
    """A replica that may be behind reads its messages first, then serves its snapshot, stale or not."""
    store = LaggingStore(max_tasks=10, min_keep_stale_seconds=60.0, clock=Clock())
    bench = Bench(store=store)
    held = Snapshot(KEY, bench.clock.now - age, CACHE.running_seconds, b"{}", Status.RUNNING, 0.5, version=1)
    store.put(held)
    assert bench.service.lookup(KEY) is None
    for _ in range(2):
        result = await bench.get(KEY)
        assert (result.snapshot, result.cache_status) == (held, source)
    assert store.caught_up == 1  # a caller with a result does not wait
    assert bench.lookups() == {source: 2}
    await bench.service.aclose()


async def test_get_queries_when_it_cannot_catch_up() -> None:
    """If messages stay unread, it starts a request, and the store decides what is served."""
    store = LaggingStore(max_tasks=10, min_keep_stale_seconds=60.0, clock=Clock())
    store.whole = False
    bench = Bench(store=store)
    task = bench.begin()
    (await bench.upstream.call()).answer(progress=0.25)
    assert (await task).snapshot.progress == 0.25
