"""The one place where store, flight and upstream meet.

    fresh                 -> the store's snapshot, at once
    stale, young enough   -> the same, and one refresh begins behind it
    else                  -> everybody waits for the one flight: upstream -> store -> all waiters
    the flight failed     -> a snapshot not older than stale_if_error, else the failure
    ... is held up by the budget -> the same at once, while the flight keeps its place in the queue
    every caller has left -> a flight whose query is still queued is dropped
    read twice while fresh -> hot: refreshed ahead, so that the next reader finds it fresh

Freshness promise: while upstream answers, nobody is handed a snapshot older than its
lifetime + stale_while_revalidate.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from copy import copy
from functools import partial

import structlog

from gateway.domain.errors import (
    GatewayError,
    Overloaded,
    RateLimiterExhausted,
    UpstreamCredentials,
    UpstreamError,
    UpstreamOpen,
)
from gateway.domain.snapshot import Snapshot, observe
from gateway.domain.task import Operation, Status, TaskKey
from gateway.progress.in_flight import InFlightRequests
from gateway.progress.refresh_ahead import RefreshAhead
from gateway.progress.results import CacheResult, CacheStatus, FetchFailure, FetchResult
from gateway.settings.model import Cache
from gateway.stores.base import Lease, Store
from gateway.telemetry.log_sampling import LogSampler
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.redaction import Excerpt
from gateway.telemetry.tracing import Tracing, Untraced
from gateway.upstream.client import UpstreamClient
from gateway.upstream.demand import Demand

_HOT = 2  # readers within one lifetime
_HIT = CacheStatus.HIT  # needed at each hit, and an enum's member takes 50 ns to look up

_LONGEST_STATUS = 4096  # characters that are searched for secrets, of which 100 are logged

log = structlog.get_logger(__name__)


class ProgressService:
    """Answers queries. `clock` is the monotonic clock that `Snapshot.fetched_at` is read from.

    `timeout_seconds`: how long a flight may take, whomever it waits for.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        store: Store,
        upstream: UpstreamClient,
        metrics: Metrics,
        timeout_seconds: float,
        tracing: Tracing | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cache = cache
        self._patience_seconds = timeout_seconds
        self._store = store
        self._upstream = upstream
        self._metrics = metrics
        self._tracing = tracing or Untraced()
        self._clock = clock
        self._in_flight: InFlightRequests[TaskKey, FetchResult] = InFlightRequests(self._fetch)
        self._lifetimes: dict[Status | None, float] = {
            None: cache.result_seconds,
            Status.WAITING: cache.waiting_seconds,
            Status.RUNNING: cache.running_seconds,
            Status.UNKNOWN: cache.unknown_seconds,
            **{status: cache.terminal_seconds for status in Status if status.terminal},
        }
        self._log_sampler = LogSampler(clock=clock)  # a vendor's new word, or a bug, may come with every task
        self._ahead = RefreshAhead(self._take_off)
        self._count = {
            (operation, source): metrics.cache_lookups.labels(operation, source).inc
            for operation in Operation
            for source in CacheStatus
        }
        self._hits = {operation: metrics.cache_lookups.labels(operation, _HIT) for operation in Operation}
        self._age = {operation: metrics.answer_age.labels(operation).observe for operation in Operation}
        self._overdue = {operation: metrics.answers_overdue.labels(operation).inc for operation in Operation}

    def lookup(self, key: TaskKey) -> CacheResult | None:
        """Answer from the store, without waiting, or return None: the hot path."""
        snapshot = self._store.peek(key)
        if snapshot is None:
            return None
        age = self._clock() - snapshot.fetched_at
        if age < snapshot.lifetime:
            self._count_hit(snapshot, age)
            return CacheResult(snapshot, age, _HIT)
        result = self._stale(snapshot, age)
        if result is None:
            return None
        if result.failure is None:
            self._in_flight.start(key, background=True)
        self._count[key.operation, CacheStatus.STALE]()
        self._note_age(snapshot, age)
        return result

    def repeat(self, snapshot: Snapshot, now: float) -> bool:
        """Tell whether this snapshot, which a lookup found, may be the answer `now`; then it counts as one.

        Of a stale one that is true for a moment only: nobody looks whether its refresh has failed.
        """
        age = now - snapshot.fetched_at
        if not self._store.is_current(snapshot, now):
            return False
        if age < snapshot.lifetime:
            self._count_hit(snapshot, age)
            return True
        if age >= snapshot.lifetime + self._cache.stale_while_revalidate_seconds:
            return False
        self._count[snapshot.key.operation, CacheStatus.STALE]()
        self._note_age(snapshot, age)
        return True

    async def read(self, key: TaskKey, *, client: bytes = b"") -> CacheResult | FetchFailure:
        """Answer, from the store or from upstream; Failed when no snapshot is young enough to cover it.

        `client` tells whose query it is: the budget is fair to clients. Once it is cancelled, a query that
        nothing else wants is dropped, unless it is on the wire.
        """
        result = self.lookup(key)
        if result is None and await self._store.sync():
            result = self.lookup(key)
        if result is not None:
            return result
        outcome = await self._wait(key, client)
        self._count[key.operation, outcome.source]()
        return outcome

    def count(self, outcome: CacheResult | FetchFailure) -> None:
        """Count one lookup with this outcome: of a caller that a schedule has served."""
        self._count[outcome.key.operation, outcome.source]()
        if isinstance(outcome, CacheResult):
            self._note_age(outcome.snapshot, outcome.age)

    async def get_fresh(self, key: TaskKey, *, client: bytes | None = b"") -> CacheResult | FetchFailure:
        """Answer as `read`, but wait for a fresh snapshot and count no lookup: a schedule asks, no caller.

        `client`: None on behalf of what has joined.
        """
        snapshot = self._store.peek(key)
        age = 0.0 if snapshot is None else self._clock() - snapshot.fetched_at
        if snapshot is None or age >= snapshot.lifetime:
            return await self._wait(key, client, patient=True)
        return CacheResult(snapshot, age, CacheStatus.HIT)

    def current(self, key: TaskKey) -> CacheResult | None:
        """Return what the store holds and may be shown, and begin nothing: for those a schedule serves."""
        snapshot = self._store.peek(key)
        if snapshot is None:
            return None
        age = self._clock() - snapshot.fetched_at
        return (
            CacheResult(snapshot, age, CacheStatus.HIT)
            if age < snapshot.lifetime
            else self._stale(snapshot, age)
        )

    def join(self, key: TaskKey, client: bytes) -> None:
        """Count in a subscriber: until it leaves, the task's flights are for its client, too."""
        self._in_flight.join(key, client)

    def leave(self, key: TaskKey, client: bytes) -> None:
        """Count out a subscriber that has joined."""
        self._in_flight.leave(key, client)

    async def aclose(self) -> None:
        """End every flight, and begin none any more."""
        self._ahead.close()
        await self._in_flight.aclose()

    def _count_hit(self, snapshot: Snapshot, age: float) -> None:
        operation = snapshot.key.operation
        snapshot.polls += 1
        if snapshot.polls == _HOT and not snapshot.terminal and not self._in_flight.closed:
            self._ahead.plan(snapshot, age)
        self._hits[operation].value += 1
        if not snapshot.terminal:
            self._age[operation](age)

    def _stale(self, snapshot: Snapshot, age: float) -> CacheResult | None:
        """Return a stale snapshot as an answer, unless it is too old for that.

        While upstream answers the freshness promise sets the bound. A failure has a bound of its own,
        which may be the narrower one: then nothing younger is to be had, and that must be told.
        """
        failure = self._store.failure(snapshot.key)
        if failure is None:
            too_old = age >= snapshot.lifetime + self._cache.stale_while_revalidate_seconds
        else:
            too_old = age > self._cache.stale_if_error_seconds
        return None if too_old else CacheResult(snapshot, age, CacheStatus.STALE, failure=failure)

    def _take_off(self, key: TaskKey, version: int) -> None:
        known = self._store.peek(key)
        # A watch or another replica may have renewed it meanwhile; then its own readers count.
        if known is not None and known.version == version and self._store.failure(key) is None:
            self._in_flight.start(key, background=True, after=version)

    async def _wait(
        self, key: TaskKey, client: bytes | None, *, patient: bool = False
    ) -> CacheResult | FetchFailure:
        """Wait for the key's flight; `patient`: even while it is held up by the budget."""
        failure = self._store.failure(key)
        if failure is not None:
            return self._cover(key, failure, CacheStatus.NEGATIVE)
        source = CacheStatus.COLLAPSED if key in self._in_flight else CacheStatus.MISS
        known = self._store.peek_stale(key)
        if client is not None:
            self._in_flight.join(key, client)
        try:
            fetch = await self._board(key, patient=patient or not self._covers(known))
        finally:
            if client is not None:
                self._in_flight.leave(key, client)
        outcome = fetch.outcome
        if isinstance(outcome, GatewayError):
            return self._cover(key, outcome, source, fetch)
        age = self._clock() - outcome.fetched_at
        self._note_age(outcome, age)
        return CacheResult(outcome, age, source, replaced_stale=known is not None, fetch=fetch)

    async def _board(self, key: TaskKey, *, patient: bool) -> FetchResult:
        flight = self._in_flight.start(key)
        if patient:
            return await asyncio.shield(flight)
        if flight.done():  # in this very turn of the loop
            return flight.result()
        demand = self._in_flight.demand(key)
        if demand.on_queued is None:
            demand.on_queued = asyncio.get_running_loop().create_future()
        on_queued = demand.on_queued
        await asyncio.wait((flight, on_queued), return_when=asyncio.FIRST_COMPLETED)
        if flight.done():
            return flight.result()
        demand.background = True  # it keeps its place in the queue
        return FetchResult(on_queued.result())

    def _cover(
        self, key: TaskKey, failure: GatewayError, source: CacheStatus, fetch: FetchResult | None = None
    ) -> CacheResult | FetchFailure:
        """Answer a failure with a snapshot, unless it is too old."""
        snapshot = self._store.peek_stale(key)
        if snapshot is None or not self._covers(snapshot):
            return FetchFailure(key, failure, source, fetch)
        age = self._clock() - snapshot.fetched_at
        self._note_age(snapshot, age)
        return CacheResult(snapshot, age, CacheStatus.STALE, failure=failure, fetch=fetch)

    def _note_age(self, snapshot: Snapshot, age: float) -> None:
        if snapshot.terminal:
            return
        self._age[snapshot.key.operation](age)
        if age >= snapshot.lifetime + self._cache.stale_while_revalidate_seconds:
            self._overdue[snapshot.key.operation]()

    def _covers(self, snapshot: Snapshot | None) -> bool:
        """Tell whether this snapshot may stand in for a failure."""
        return (
            snapshot is not None and self._clock() - snapshot.fetched_at <= self._cache.stale_if_error_seconds
        )

    async def _fetch(self, key: TaskKey, demand: Demand, after: int | None) -> FetchResult:
        """Fly: a failure is returned, not raised, for it is shared as data.

        `after`: fly although the snapshot with this stamp is still fresh.
        """
        try:
            with self._tracing.flight(key) as mark:
                fetch = await self._fly(key, demand, after=after)
                mark.outcome = fetch.outcome.code if isinstance(fetch.outcome, GatewayError) else "ok"
                return fetch if mark.context is None else fetch._replace(span=mark.context)
        except Exception as exc:
            # Behind a stale answer nobody waits who would tell of a bug.
            if (suppressed := self._log_sampler.take(type(exc).__name__)) is not None:
                log.exception(
                    "bug in a flight", operation=key.operation, task_id=key.task_id, suppressed=suppressed
                )
            raise

    async def _fly(self, key: TaskKey, demand: Demand, *, after: int | None) -> FetchResult:
        deadline = self._clock() + self._patience_seconds
        while True:
            # Look again. Between the look that sent us here and our taking off, another replica may
            # have landed with the same answer; asking twice would break the one-call promise.
            lease = await self._store.acquire(key, after=after, timeout_seconds=deadline - self._clock())
            if not isinstance(lease, Lease):
                return FetchResult(lease)
            fetch = await self._ask(lease, demand, deadline)
            if fetch is not None:
                return fetch

    async def _ask(self, lease: Lease, demand: Demand, deadline: float) -> FetchResult | None:
        """Ask upstream, and store what comes of it. None: too late, for others have asked since."""
        key = lease.key
        previous = self._store.latest(key)
        started = self._clock()
        try:
            answer = await self._upstream.query(
                key,
                renewal=previous is not None,
                timeout_seconds=deadline - started,
                on_queued=partial(self._hold_up, demand),
                demand=demand,
            )
            demand.committed = True
            self._ahead.learn(key.operation, self._clock() - started)
            previous = self._store.latest(key)
            snapshot = observe(
                answer.data,
                answer.envelope,
                key,
                fetched_at=self._clock(),
                lifetimes=self._lifetimes,
                previous=previous,
                version=lease.version,
            )
        except GatewayError as exc:
            failure = copy(exc)
            demand.committed = True
            # Our own limits and an open circuit pass by themselves, and refused credentials are the pair's
            # affair: none of them is the task's.
            if isinstance(failure, Overloaded | RateLimiterExhausted | UpstreamOpen | UpstreamCredentials):
                await self._store.abandon(lease)
            else:
                await self._store.fail(lease, failure, seconds=self._cache.error_seconds)
            invoke_id = failure.invoke_id if isinstance(failure, UpstreamError) else None
            return FetchResult(failure, self._clock() - started, invoke_id)
        except BaseException:
            await self._store.abandon(lease)
            raise
        upstream_seconds = snapshot.fetched_at - started
        self._note_transition(previous, snapshot, answer.data.get("status"))
        kept = await self._store.commit(lease, snapshot)
        return None if kept is None else FetchResult(kept, upstream_seconds, answer.invoke_id)

    def _hold_up(self, demand: Demand, seconds: float) -> None:
        if demand.on_queued is None:
            demand.on_queued = asyncio.get_running_loop().create_future()
        if not demand.on_queued.done():
            failure = RateLimiterExhausted(
                "the query waits for the budget of upstream calls", retry_after=seconds
            )
            demand.on_queued.set_result(failure)

    def _note_transition(self, previous: Snapshot | None, snapshot: Snapshot, raw_status: object) -> None:
        status = snapshot.status
        if status is None or (previous is not None and previous.status is status):
            return
        self._metrics.tasks_observed.labels(snapshot.key.operation, status).inc()
        if status is Status.UNKNOWN and (suppressed := self._log_sampler.take("status")) is not None:
            log.warning(
                "status never seen before",
                operation=snapshot.key.operation,
                task_id=snapshot.key.task_id,
                status=Excerpt(repr(raw_status)[:_LONGEST_STATUS], 100),
                suppressed=suppressed,
            )
