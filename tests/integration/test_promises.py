"""The promises about single flight, freshness and subscriptions, for any sequence of events.

Hypothesis plays callers, subscribers, the upstream and the clock over the real service, store, single flight
and watch hub. The results are not compared with a second implementation. Each result is checked against the
promises, with the responses of the upstream and their times.

    make test ARGS='--no-cov --hypothesis-profile=thorough tests/integration/test_promises.py'

runs 10,000 sequences instead of a hundred.
"""

import asyncio
import itertools
import json
import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from prometheus_client import CollectorRegistry, Gauge

from gateway.domain.entity_tag import same_body
from gateway.domain.errors import (
    CredentialsRefused,
    GatewayError,
    KeyPairRefused,
    NonceRefused,
    Overloaded,
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
from gateway.domain.vendor_values import vendor_status
from gateway.progress.outcomes import CacheStatus, LookupFailure, LookupSuccess
from gateway.progress.overdue_detector import MIN_OVERDUE_AFTER_SECONDS
from gateway.progress.service import ProgressService
from gateway.settings.model import Cache
from gateway.settings.model import Watch as WatchSettings
from gateway.stores.base import CacheEntry
from gateway.stores.memory import REMEMBER_SECONDS, MemoryStore
from gateway.telemetry.metrics import Metrics
from gateway.upstream.awaited_query import AwaitedQuery
from gateway.upstream.client import UpstreamClient
from gateway.upstream.signed_calls import ParsedResponse
from gateway.watch.hub import WatchHub
from gateway.watch.subscriber import Subscriber, SubscriptionKind, Update
from tests.support.seen import TAGS
from tests.support.ticked import TickedLoop

pytestmark = pytest.mark.timeout(1800)  # 10,000 games take more than ten minutes on a slow machine


WATCHED = [
    TaskKey(Operation.SD_GET_PROGRESS, "a"),
    TaskKey(Operation.SD_GET_PROGRESS, "b"),
    TaskKey(Operation.COMFY_GET_PROGRESS, "a"),
]
KEYS = [*WATCHED, TaskKey(Operation.SD_GET_RESULT, "a")]
DEADLINE_SECONDS = 10.0  # of upstream.timeout_seconds: no call is in flight for longer
LEAST_PAUSE_SECONDS = 0.2  # of a schedule, whatever the lifetimes say
LATE_SHARE = 0.05  # of a pause: schedules are coalesced
LEAST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 1.0, 30.0  # of a schedule whose upstream fails
ROUNDING_SECONDS = 0.01
# None of these failures is cached: the gateway's own limits, an open circuit, and refused
# credentials.
NOT_REMEMBERED = (Overloaded, CredentialsRefused)

caches = st.builds(
    Cache,
    waiting_seconds=st.sampled_from([2.0, 0.0, 4.0]),
    running_seconds=st.sampled_from([1.0, 0.0, 0.1]),
    unknown_seconds=st.sampled_from([1.0, 0.0]),
    terminal_seconds=st.sampled_from([600.0, 5.0]),
    result_seconds=st.sampled_from([30.0, 0.0]),
    error_seconds=st.sampled_from([1.0, 0.0, 5.0]),
    stale_while_revalidate_seconds=st.sampled_from([2.0, 0.0, 20.0]),
    stale_if_error_seconds=st.sampled_from([60.0, 0.0, 2.0]),
)
KINDS: list[type[GatewayError]] = [
    KeyPairRefused,
    TimestampRefused,
    NonceRefused,
    UpstreamThrottled,
    UpstreamInvalid,
    UpstreamBusy,
    UpstreamUnreachable,
    UpstreamTimeout,
    Overloaded,
]
failures = st.one_of(
    st.builds(
        lambda kind, seconds: kind("no", retry_after=seconds),
        st.sampled_from(KINDS),
        st.sampled_from([None, 0.0, 5.0, 100.0]),
    ),
    st.builds(UpstreamRejected, st.just("no"), envelope=st.just(b"{}"), detail=st.just(UpstreamDetail())),
)
progresses = st.sampled_from([0.5, 0.2, 0.9])  # few values: a response may repeat the last one
statuses = st.sampled_from(
    ["running", "running", "waiting", "succeeded", "successed", "failed", "canceled", "paused"]
)
keys = st.sampled_from([*KEYS[:1] * 4, *KEYS])  # few tasks, so that each comes up often
which = st.integers(0, 9)


@dataclass(slots=True)
class Story:
    """The history of one task: the responses, what was served of them, and what may come next."""

    answers: dict[str, float] = field(default_factory=dict)  # the progress of each response, and when it came
    asked: float = math.inf  # when the query in flight began
    arrived: float | None = None  # the last response
    failures: list[float] = field(default_factory=list)  # when each numbered failure occurred
    failing: bool = False  # the last call returned no response
    shown: Snapshot | None = None  # the last one
    highest: float = 0.0  # progress served while the task stayed running
    prompted: bool = False  # a caller has queried since the last call started
    due: float = 0.0  # no call may start before
    tick_due: float = 0.0  # nor one without a caller, but by a schedule
    patience: float = 0.0  # a schedule queries again until then


class FakeUpstream:
    """Replaces the upstream client, and keeps the promise of `UpstreamClient.query`: it ends in time."""

    def __init__(self, loop: TickedLoop, cache: Cache) -> None:
        self.in_flight: dict[TaskKey, asyncio.Future[dict[str, Any]]] = {}  # queries, queued or on the wire
        self.queue: dict[TaskKey, asyncio.Future[None]] = {}
        self.full = False
        self.closing = False
        self.stories = {key: Story() for key in KEYS}
        self.broken: list[str] = []  # an exception here would look like one of the upstream
        self._loop = loop
        self._cache = cache
        self._longest = dict.fromkeys(Operation, 0.0)  # call so far

    async def query(self, key: TaskKey, *, awaited_query: AwaitedQuery, **_: object) -> ParsedResponse:
        """Wait until the state machine responds."""
        story, began = self.stories[key], self._loop.time()
        if key in self.in_flight:
            self.broken.append(f"two calls in flight for {key}")
        # A refresh ahead starts early by the average latency of earlier calls.
        early = 0.0 if story.failing else self._longest[key.operation]
        if began < story.due - early - ROUNDING_SECONDS:
            self.broken.append(f"{key} was asked for {story.due - began} s before it was due")
        if not story.prompted and began < story.tick_due - ROUNDING_SECONDS:
            self.broken.append(f"the schedule asked for {key} {story.tick_due - began} s early")
        prompted, story.prompted = story.prompted, False
        outcome = self.in_flight[key] = self._loop.create_future()
        story.asked = began
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                if self.full:  # the query is queued until it may be sent
                    turn = self.queue[key] = self._loop.create_future()
                    try:
                        await turn
                    finally:
                        del self.queue[key]
                    if not awaited_query.wanted:
                        self.broken.append(f"{key} was asked for though nothing wants it")
                awaited_query.runs_to_end = True
                data = await outcome
        except asyncio.CancelledError:
            if (awaited_query.runs_to_end or awaited_query.wanted) and not self.closing:
                self.broken.append(f"{key} was given up while it was wanted, or on the wire")
            # No call was made: the reason for this one is also a reason for the next one.
            story.prompted = story.prompted or prompted
            raise
        except (TimeoutError, GatewayError) as exc:
            failure = exc if isinstance(exc, GatewayError) else UpstreamTimeout("too late")
            self._note_failure(story, failure, prompted=prompted)
            raise failure from None
        else:
            self._longest[key.operation] = max(self._longest[key.operation], self._loop.time() - began)
            self._note_answer(key, data, prompted=prompted)
            return ParsedResponse(data, json.dumps({"status": 10, "data": data}).encode())
        finally:
            del self.in_flight[key]
            story.asked = math.inf

    def lifetime(self, key: TaskKey, status: Status | None) -> float:
        """Return for how long a response counts as fresh, by the settings."""
        cache = self._cache
        if key.operation.is_result:
            return cache.result_seconds
        return {
            Status.WAITING: cache.waiting_seconds,
            Status.RUNNING: cache.running_seconds,
            Status.UNKNOWN: cache.unknown_seconds,
        }.get(status or Status.UNKNOWN, cache.terminal_seconds)

    def _note_failure(self, story: Story, failure: GatewayError, *, prompted: bool) -> None:
        now = self._loop.time()
        vars(failure)["number"] = len(story.failures)
        story.failures.append(now)
        story.failing = True
        story.due = now + (0.0 if isinstance(failure, NOT_REMEMBERED) else self._cache.error_seconds)
        pause = min(max(failure.retry_after or 0.0, LEAST_BACKOFF_SECONDS), LONGEST_BACKOFF_SECONDS)
        story.tick_due = now + (0.0 if prompted else pause)
        # A schedule that finds the cached failure backs off once more.
        story.patience = max(story.patience, now + self._cache.error_seconds + LONGEST_BACKOFF_SECONDS)

    def _note_answer(self, key: TaskKey, data: dict[str, Any], *, prompted: bool) -> None:
        now, story, status = self._loop.time(), self.stories[key], vendor_status(data)
        if story.failing:  # the upstream has recovered: every schedule that backs off continues
            for other in self.stories.values():
                other.tick_due = min(other.tick_due, now) if other.failing else other.tick_due
        if status is not Status.RUNNING or now - (story.arrived or now) >= REMEMBER_SECONDS:
            story.highest = 0.0
        story.answers[data["message"]] = story.arrived = now
        story.failing = False
        lifetime = self.lifetime(key, status)
        if story.shown is not None and story.shown.terminal:  # terminal tasks stay as they ended
            lifetime = min(lifetime, self._cache.terminal_seconds)
        story.due = now + lifetime
        pause = max(lifetime, LEAST_PAUSE_SECONDS)
        story.tick_due = now + (0.0 if prompted else pause)
        story.patience = max(story.patience, now + pause * (1 + LATE_SHARE))


@dataclass(slots=True, eq=False)
class Viewer:
    """An open stream or long poll, and the last update of each task."""

    subscriber: Subscriber
    leave: ExitStack
    result: asyncio.Task[None] | None = None
    received: dict[TaskKey, Update] = field(default_factory=dict)


class Promises(RuleBasedStateMachine):
    """Plays callers, subscribers, upstream and time; the invariants check the promises."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = TickedLoop()
        self.callers: list[tuple[TaskKey, asyncio.Task[None]]] = []
        self.viewers: list[Viewer] = []
        self.found: dict[TaskKey, CacheEntry] = {}
        self.marks = itertools.count()

    @initialize(cache=caches)
    def open(self, cache: Cache) -> None:
        """Wire the parts as the application does."""
        self.cache = cache
        self.upstream = FakeUpstream(self.loop, cache)
        self.metrics = Metrics(CollectorRegistry(), gateway_version="0")
        stale_seconds = max(cache.stale_while_revalidate_seconds, cache.stale_if_error_seconds)
        self.store = MemoryStore(max_tasks=100, min_keep_stale_seconds=stale_seconds, clock=self.loop.time)
        self.service = ProgressService(
            cache,
            store=self.store,
            upstream=cast("UpstreamClient", self.upstream),
            metrics=self.metrics,
            tags=TAGS,
            timeout_seconds=10.0,
            clock=self.loop.time,
        )
        self.watch = WatchHub(
            WatchSettings(),
            service=self.service,
            store=self.store,
            metrics=self.metrics,
            clock=self.loop.time,
        )

    # Callers

    @rule(key=keys, how=st.sampled_from(["get", "get", "query_if_stale"]))
    def ask(self, key: TaskKey, how: str) -> None:
        """Query, and wait if there is something to wait for."""
        self._begin(key, how)

    @rule(key=keys, times=st.integers(1, 3))
    def look(self, key: TaskKey, times: int) -> None:
        """Use the lookup, perhaps often enough to start refresh-ahead."""
        self.upstream.stories[key].prompted = True
        for _ in range(times):
            result = self.loop.within(partial(self.service.lookup, key))
            if result is not None:
                self._judge(key, result)
                assert result.entry is not None
                self.found[key] = result.entry

    @precondition(lambda self: self.found)
    @rule(number=which)
    def repeat_lookup(self, number: int) -> None:
        """Serve an earlier snapshot again, if the service says that it is still current."""
        key, entry = list(self.found.items())[number % len(self.found)]
        self.upstream.stories[key].prompted = True
        now = self.loop.time()
        if self.loop.within(partial(self.service.may_serve_again, entry, now)):
            snapshot = entry.snapshot
            source = CacheStatus.HIT if snapshot.fresh(now) else CacheStatus.STALE
            self._judge(key, LookupSuccess(snapshot, now - snapshot.fetched_at, source))

    @rule(key=keys)
    def peek(self, key: TaskKey) -> None:
        """Use `peek`, as callers do that a schedule serves."""
        result = self.service.peek(key)
        if result is not None:
            self._judge(key, result)

    @precondition(lambda self: self.callers)
    @rule(number=which)
    def disconnect(self, number: int) -> None:
        """Let a caller leave, the first or a later one."""
        _, caller = self.callers.pop(number % len(self.callers))
        caller.cancel()
        self.loop.settle()

    @rule(
        watched=st.lists(st.sampled_from(WATCHED), min_size=1, unique=True),
        kind=st.sampled_from(SubscriptionKind),
    )
    def begin_watching(self, watched: list[TaskKey], kind: SubscriptionKind) -> None:
        """Open a stream or a long poll."""
        for key in watched:
            self.upstream.stories[key].prompted = True
        stack = ExitStack()
        watching = self.watch.subscribe(watched, kind)
        viewer = Viewer(self.loop.within(lambda: stack.enter_context(watching)), stack)
        viewer.result = self.loop.create_task(self._read(viewer))
        self.viewers.append(viewer)
        self.loop.settle()

    @precondition(lambda self: self.viewers)
    @rule(number=which)
    def end_watching(self, number: int) -> None:
        """Let a subscriber leave; the last one ends the schedule."""
        self._leave(self.viewers.pop(number % len(self.viewers)))

    # Upstream and time

    @rule(full=st.booleans())
    def fill(self, full: bool) -> None:  # noqa: FBT001 - Hypothesis passes by name
        """Queue queries from now on, or send the queued ones."""
        self.upstream.full = full
        if not full:
            for turn in self.upstream.queue.values():
                turn.set_result(None)
            self.loop.settle()

    @precondition(lambda self: self.upstream.in_flight)
    @rule(number=which, status=statuses, progress=progresses)
    def answer(self, number: int, status: str, progress: float) -> None:
        """Respond to a call; the response may contradict earlier ones."""
        self._answer(self._in_flight_key(number), status, progress)

    @precondition(lambda self: self.upstream.in_flight)
    @rule(number=which, failure=failures)
    def fail(self, number: int, failure: GatewayError) -> None:
        """Let a call fail."""
        self._fail(self._in_flight_key(number), failure)

    # Two moves in one, because long histories need many moves: an upstream that responds, or fails, at once.

    @rule(key=keys, progress=progresses)
    def learn(self, key: TaskKey, progress: float) -> None:
        """Query, and let the task progress, or go back."""
        self._begin(key, "query_if_stale")
        if key in self.upstream.in_flight and key not in self.upstream.queue:
            self._answer(key, "running", progress)

    @rule(key=keys, failure=failures)
    def ask_in_vain(self, key: TaskKey, failure: GatewayError) -> None:
        """Query, and let that fail."""
        self._begin(key, "get")
        if key in self.upstream.in_flight and key not in self.upstream.queue:
            self._fail(key, failure)

    @rule(seconds=st.sampled_from([1.0, 0.1, 0.5, 2.5, 5.0, 20.0, 61.0, 700.0, 4000.0]))
    def pass_time(self, seconds: float) -> None:
        """Let time pass: a call without a response meets its deadline."""
        self.loop.advance(seconds)

    # Promises

    @invariant()
    def nothing_was_broken(self) -> None:
        """There is one call in flight per task, and no more calls than the lifetimes allow."""
        assert not self.upstream.broken, self.upstream.broken
        assert not self.loop.faults, self.loop.faults

    @invariant()
    def no_caller_is_left_behind(self) -> None:
        """Each waiting caller has a call in flight; all others have received a correct result."""
        for _, caller in self.callers:
            if caller.done():
                caller.result()
        self.callers = [(key, caller) for key, caller in self.callers if not caller.done()]
        assert {key for key, _ in self.callers} <= self.upstream.in_flight.keys()

    @invariant()
    def every_subscriber_is_current(self) -> None:
        """Check that subscribers have the latest snapshot, and that schedules of running tasks go on."""
        now = self.loop.time()
        for viewer in self.viewers:
            assert viewer.result is not None
            if viewer.result.done():
                viewer.result.result()
            for key in viewer.subscriber.keys:
                last = viewer.received.get(key)
                story, stored = self.upstream.stories[key], self.store.last_known(key)
                if last is None:
                    assert key in self.upstream.in_flight
                    continue
                if last.snapshot is None:
                    assert story.failing
                elif stored is not None and not last.snapshot.terminal:
                    assert same_body(last.snapshot.etag, stored.etag)
                if last.snapshot is None or not last.snapshot.terminal:
                    assert key in self.upstream.in_flight or now <= story.patience + ROUNDING_SECONDS

    @invariant()
    def gauges_count_subscribers(self) -> None:
        """Check the number of subscribers and of watched tasks."""
        watched = {key for viewer in self.viewers for key in viewer.subscriber.keys}
        assert total(self.metrics.watched_tasks) == len(watched)
        assert total(self.metrics.subscribers) == len(self.viewers)

    def teardown(self) -> None:
        """Close with callers and subscribers inside: none waits any more, and nothing is left."""
        try:
            if hasattr(self, "service"):  # Hypothesis may discard a run before it has begun
                self._close()
        finally:
            self.loop.close()

    def _close(self) -> None:
        self.upstream.closing = True
        self.watch.begin_shutdown()
        for part in (self.watch, self.service):
            closing = self.loop.create_task(part.aclose())
            self.loop.settle()
            closing.result()
        assert all(caller.done() for _, caller in self.callers)
        assert all(viewer.subscriber.must_end for viewer in self.viewers)
        late: list[asyncio.Task[Any]] = []
        for key in KEYS:
            late.append(self.loop.create_task(self.service.get(key)))
            for _ in range(3):
                self.loop.within(partial(self.service.lookup, key))
        self.begin_watching(WATCHED, SubscriptionKind.EVENTS)
        while self.viewers:
            self._leave(self.viewers.pop())
        self.loop.settle()
        assert all(task.done() for task in late)
        for task in late:
            if not task.cancelled():
                task.exception()  # retrieve the exception, or asyncio logs it
        assert not self.upstream.in_flight
        assert not asyncio.all_tasks(self.loop)
        assert self.loop.next_timer is None
        self.nothing_was_broken()
        self.gauges_count_subscribers()

    # Actions

    def _begin(self, key: TaskKey, how: str) -> None:
        self.upstream.stories[key].prompted = True
        self.callers.append((key, self.loop.create_task(self._ask(key, how))))
        self.loop.settle()

    def _in_flight_key(self, number: int) -> TaskKey:
        key = list(self.upstream.in_flight)[number % len(self.upstream.in_flight)]
        if key in self.upstream.queue:
            self.upstream.queue[key].set_result(None)
        return key

    def _answer(self, key: TaskKey, status: str, progress: float) -> None:
        mark = f"answer {next(self.marks)}"
        self.upstream.in_flight[key].set_result(
            {"taskId": key.task_id, "status": status, "progress": progress, "message": mark}
        )
        self.loop.settle()

    def _fail(self, key: TaskKey, failure: GatewayError) -> None:
        self.upstream.in_flight[key].set_exception(failure)
        self.loop.settle()

    def _leave(self, viewer: Viewer) -> None:
        assert viewer.result is not None
        viewer.result.cancel()
        self.loop.within(viewer.leave.close)

    async def _ask(self, key: TaskKey, how: str) -> None:
        self.service.add_caller(key, b"schedule")  # as the hub does for its subscribers
        try:
            outcome = await getattr(self.service, how)(key)
        finally:
            self.service.remove_caller(key, b"schedule")
        if isinstance(outcome, LookupFailure):
            self._judge_failure(key, outcome.failure)
        else:
            self._judge(key, outcome)

    async def _read(self, viewer: Viewer) -> None:
        while True:
            for update in await viewer.subscriber.next_updates():
                assert update.key in viewer.subscriber.keys
                last, viewer.received[update.key] = viewer.received.get(update.key), update
                assert not update.has_same_content(last)
                if update.snapshot is not None:
                    self._judge_update(update.key, update.snapshot)

    # Checks

    def _judge(self, key: TaskKey, result: LookupSuccess) -> None:
        """Check a result against the freshness promise and, after a failure, against stale-if-error."""
        now, story = self.loop.time(), self.upstream.stories[key]
        self._judge_content(key, result.snapshot)
        assert result.age == now - result.snapshot.fetched_at
        if result.failure is None:
            assert self._is_young(result.snapshot)
        else:
            assert result.cache_status is CacheStatus.STALE
            assert result.age <= self.cache.stale_if_error_seconds
            self._judge_failure_is_recent(story, result.failure)

    def _judge_failure(self, key: TaskKey, failure: GatewayError) -> None:
        """Check how long a failure is cached, and that no snapshot could have been served instead."""
        story = self.upstream.stories[key]
        self._judge_failure_is_recent(story, failure)
        if story.arrived is not None:
            assert self.loop.time() - story.arrived >= self.cache.stale_if_error_seconds

    def _judge_failure_is_recent(self, story: Story, failure: GatewayError) -> None:
        if "number" not in vars(failure):  # the service's own: the query in flight takes too long
            assert isinstance(failure, UpstreamTimeout)
            return
        remembered = 0.0 if isinstance(failure, NOT_REMEMBERED) else self.cache.error_seconds
        # Or it is the reason why a snapshot is old: no query has succeeded since.
        assert story.failing or self.loop.time() - story.failures[vars(failure)["number"]] <= remembered

    def _judge_update(self, key: TaskKey, snapshot: Snapshot) -> None:
        self._judge_content(key, snapshot)
        age = self.loop.time() - snapshot.fetched_at
        story = self.upstream.stories[key]
        is_overdue = self.loop.time() - story.asked >= MIN_OVERDUE_AFTER_SECONDS
        covers = (story.failing or is_overdue) and age <= self.cache.stale_if_error_seconds
        assert snapshot.terminal or covers or self._is_young(snapshot)

    def _judge_content(self, key: TaskKey, snapshot: Snapshot) -> None:
        """Each snapshot is what the upstream said about this task, and takes back nothing served before."""
        story, shown = self.upstream.stories[key], self.upstream.stories[key].shown
        # An update contains no envelope.
        data = json.loads(snapshot.envelope)["data"] if snapshot.envelope else json.loads(snapshot.body)
        assert snapshot.key == key
        assert data["taskId"] == key.task_id
        came = story.answers[data["message"]]
        assert snapshot.fetched_at == came or (snapshot.terminal and came < snapshot.fetched_at)
        assert snapshot.fetched_at <= self.loop.time()
        if shown is not None and abs(snapshot.fetched_at - shown.fetched_at) < REMEMBER_SECONDS:
            assert snapshot.fetched_at >= shown.fetched_at
            assert snapshot.status is shown.status or not shown.terminal
        if snapshot.status is Status.RUNNING:
            assert snapshot.progress is not None
            assert snapshot.progress >= story.highest
            story.highest = snapshot.progress
        story.shown = snapshot

    def _is_young(self, snapshot: Snapshot) -> bool:
        age = self.loop.time() - snapshot.fetched_at
        lifetime = self.upstream.lifetime(snapshot.key, snapshot.status)
        return age == 0.0 or age < lifetime + self.cache.stale_while_revalidate_seconds


def total(gauge: Gauge) -> float:
    return sum(sample.value for family in gauge.collect() for sample in family.samples)


TestPromises = Promises.TestCase
TestPromises.settings = settings(
    # Wiring the parts takes as long as a run.
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
