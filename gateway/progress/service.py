"""The progress service: answers queries from the store, or from the upstream through single flight.

    fresh snapshot                  -> answer at once
    stale-while-revalidate          -> answer at once, and start one background refresh
    else                            -> all callers wait for one in-flight request to the upstream
    the request fails               -> stale-if-error: a snapshot that is young enough, else the failure
    the rate limiter queues it      -> the same at once; the request stays in the queue
    all callers have left           -> a request that is still queued is dropped
    a fresh snapshot is read twice  -> refresh-ahead: the next reader finds a fresh snapshot

Freshness promise: while the upstream responds, no caller receives a snapshot older than its lifetime +
`cache.stale_while_revalidate_seconds`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from copy import copy
from functools import partial

import structlog

from gateway.domain.errors import (
    CircuitOpen,
    CredentialsRefused,
    GatewayError,
    Overloaded,
    RateLimiterExhausted,
    UpstreamError,
)
from gateway.domain.snapshot import Snapshot, build_snapshot
from gateway.domain.task import Operation, Status, TaskKey
from gateway.progress.in_flight import InFlightRequests
from gateway.progress.refresh_ahead import RefreshAhead
from gateway.progress.results import CacheResult, CacheStatus, FetchFailure, FetchResult
from gateway.settings.model import Cache
from gateway.stores.base import Lease, Store
from gateway.telemetry.log_sampling import LogSampler
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.redaction import Excerpt
from gateway.telemetry.tracing import NoTracing, Tracing
from gateway.upstream.client import UpstreamClient
from gateway.upstream.demand import Demand

_HOT_READS = 2  # reads within one lifetime that start refresh-ahead
_HIT = CacheStatus.HIT  # a constant, because the lookup of an enum member takes 50 ns at each hit

_MAX_STATUS_LENGTH = 4096  # characters that are searched for secrets; the log shows 100 of them

log = structlog.get_logger(__name__)


class ProgressService:
    """Answers queries.

    `timeout_seconds`: limit for an in-flight request, with waiting for another replica and for the upstream.
    `clock` is the monotonic clock of `Snapshot.fetched_at`.
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
        self._timeout_seconds = timeout_seconds
        self._store = store
        self._upstream = upstream
        self._metrics = metrics
        self._tracing = tracing or NoTracing()
        self._clock = clock
        self._in_flight: InFlightRequests[TaskKey, FetchResult] = InFlightRequests(self._fetch)
        self._lifetimes: dict[Status | None, float] = {
            None: cache.result_seconds,
            Status.WAITING: cache.waiting_seconds,
            Status.RUNNING: cache.running_seconds,
            Status.UNKNOWN: cache.unknown_seconds,
            **{status: cache.terminal_seconds for status in Status if status.terminal},
        }
        self._log_sampler = LogSampler(clock=clock)  # an unknown status, or a bug, may occur with every task
        self._refresh_ahead = RefreshAhead(self._refresh)
        self._count_lookup = {
            (operation, source): metrics.cache_lookups.labels(operation, source).inc
            for operation in Operation
            for source in CacheStatus
        }
        self._hits = {operation: metrics.cache_lookups.labels(operation, _HIT) for operation in Operation}
        self._ages = {operation: metrics.answer_age.labels(operation).observe for operation in Operation}
        self._overdue = {operation: metrics.answers_overdue.labels(operation).inc for operation in Operation}

    def lookup(self, key: TaskKey) -> CacheResult | None:
        """Return a result from the store without waiting, or None. Every cache hit runs this.

        A stale result starts a background refresh, unless a failure of the task is cached.
        """
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
        self._count_lookup[key.operation, CacheStatus.STALE]()
        self._record_age(snapshot, age)
        return result

    def still_current(self, snapshot: Snapshot, now: float) -> bool:
        """Tell whether a snapshot that `lookup` returned may be served again `now`; if so, count a lookup.

        Reuse a stale snapshot for a short time only: this does not check whether its refresh has failed.
        """
        age = now - snapshot.fetched_at
        if not self._store.is_current(snapshot, now):
            return False
        if age < snapshot.lifetime:
            self._count_hit(snapshot, age)
            return True
        if age >= snapshot.lifetime + self._cache.stale_while_revalidate_seconds:
            return False
        self._count_lookup[snapshot.key.operation, CacheStatus.STALE]()
        self._record_age(snapshot, age)
        return True

    async def get(self, key: TaskKey, *, client: bytes = b"") -> CacheResult | FetchFailure:
        """Return a result from the store or the upstream, or the failure if stale-if-error does not apply.

        `client` identifies the caller: the rate limiter is fair to clients. If this is cancelled, an upstream
        query that has no other callers is dropped, unless it is on the wire.
        """
        result = self.lookup(key)
        if result is None and await self._store.sync():
            result = self.lookup(key)
        if result is not None:
            return result
        outcome = await self._wait(key, client)
        self._count_lookup[key.operation, outcome.cache_status]()
        return outcome

    def count_lookup(self, outcome: CacheResult | FetchFailure) -> None:
        """Count one lookup with this outcome, for a long poll: its schedule counts none."""
        self._count_lookup[outcome.key.operation, outcome.cache_status]()
        if isinstance(outcome, CacheResult):
            self._record_age(outcome.snapshot, outcome.age)

    async def get_fresh(self, key: TaskKey, *, client: bytes | None = b"") -> CacheResult | FetchFailure:
        """Return a fresh snapshot, and wait for it if necessary; for schedules, so it counts no lookup.

        `client`: as in `get`; None if the request is made for the subscribers that have joined.
        """
        snapshot = self._store.peek(key)
        age = 0.0 if snapshot is None else self._clock() - snapshot.fetched_at
        if snapshot is None or age >= snapshot.lifetime:
            return await self._wait(key, client, wait_while_queued=True)
        return CacheResult(snapshot, age, CacheStatus.HIT)

    def peek(self, key: TaskKey) -> CacheResult | None:
        """Return what `lookup` returns, but count no lookup and start no refresh."""
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
        """Add a subscriber. Until it leaves, requests for the task are made on behalf of its client, too."""
        self._in_flight.join(key, client)

    def leave(self, key: TaskKey, client: bytes) -> None:
        """Remove a subscriber that has joined."""
        self._in_flight.leave(key, client)

    async def aclose(self) -> None:
        """Cancel every in-flight request, and start no more."""
        self._refresh_ahead.close()
        await self._in_flight.aclose()

    def _count_hit(self, snapshot: Snapshot, age: float) -> None:
        operation = snapshot.key.operation
        snapshot.read_count += 1
        if snapshot.read_count == _HOT_READS and not snapshot.terminal and not self._in_flight.closed:
            self._refresh_ahead.schedule(snapshot, age)
        self._hits[operation].value += 1
        if not snapshot.terminal:
            self._ages[operation](age)

    def _stale(self, snapshot: Snapshot, age: float) -> CacheResult | None:
        """Return a result with a stale snapshot, or None if it is too old.

        Stale-while-revalidate sets the maximum age. If a failure is remembered, the maximum age is
        `cache.stale_if_error_seconds`, which may be shorter, and the result contains the failure.
        """
        failure = self._store.failure(snapshot.key)
        if failure is None:
            too_old = age >= snapshot.lifetime + self._cache.stale_while_revalidate_seconds
        else:
            too_old = age > self._cache.stale_if_error_seconds
        return None if too_old else CacheResult(snapshot, age, CacheStatus.STALE, failure=failure)

    def _refresh(self, key: TaskKey, version: int) -> None:
        known = self._store.peek(key)
        # A watch or another replica may have replaced the snapshot meanwhile. Then the reads of the new
        # snapshot decide about refresh-ahead.
        if known is not None and known.version == version and self._store.failure(key) is None:
            self._in_flight.start(key, background=True, after=version)

    async def _wait(
        self, key: TaskKey, client: bytes | None, *, wait_while_queued: bool = False
    ) -> CacheResult | FetchFailure:
        """Wait for the in-flight request; `wait_while_queued`: even while the rate limiter queues it."""
        failure = self._store.failure(key)
        if failure is not None:
            return self._stale_if_error(key, failure, CacheStatus.NEGATIVE)
        source = CacheStatus.COLLAPSED if key in self._in_flight else CacheStatus.MISS
        known = self._store.peek_stale(key)
        if client is not None:
            self._in_flight.join(key, client)
        try:
            wait_while_queued = wait_while_queued or not self._within_stale_if_error(known)
            fetch = await self._join_request(key, wait_while_queued=wait_while_queued)
        finally:
            if client is not None:
                self._in_flight.leave(key, client)
        outcome = fetch.outcome
        if isinstance(outcome, GatewayError):
            return self._stale_if_error(key, outcome, source, fetch)
        age = self._clock() - outcome.fetched_at
        self._record_age(outcome, age)
        return CacheResult(outcome, age, source, replaced_stale=known is not None, fetch=fetch)

    async def _join_request(self, key: TaskKey, *, wait_while_queued: bool) -> FetchResult:
        """Wait for the in-flight request, or start one; return early with an error if it is queued."""
        request = self._in_flight.start(key)
        if wait_while_queued:
            return await asyncio.shield(request)
        if request.done():  # it ended in this iteration of the event loop
            return request.result()
        demand = self._in_flight.demand(key)
        if demand.queued_error is None:
            demand.queued_error = asyncio.get_running_loop().create_future()
        queued_error = demand.queued_error
        await asyncio.wait((request, queued_error), return_when=asyncio.FIRST_COMPLETED)
        if request.done():
            return request.result()
        demand.background = True  # the request stays in the queue
        return FetchResult(queued_error.result())

    def _stale_if_error(
        self, key: TaskKey, failure: GatewayError, source: CacheStatus, fetch: FetchResult | None = None
    ) -> CacheResult | FetchFailure:
        """Return a stale snapshot instead of the failure, unless it is too old (stale-if-error)."""
        snapshot = self._store.peek_stale(key)
        if snapshot is None or not self._within_stale_if_error(snapshot):
            return FetchFailure(key, failure, source, fetch)
        age = self._clock() - snapshot.fetched_at
        self._record_age(snapshot, age)
        return CacheResult(snapshot, age, CacheStatus.STALE, failure=failure, fetch=fetch)

    def _record_age(self, snapshot: Snapshot, age: float) -> None:
        if snapshot.terminal:
            return
        self._ages[snapshot.key.operation](age)
        if age >= snapshot.lifetime + self._cache.stale_while_revalidate_seconds:
            self._overdue[snapshot.key.operation]()

    def _within_stale_if_error(self, snapshot: Snapshot | None) -> bool:
        """Tell whether this snapshot may be served instead of a failure."""
        return (
            snapshot is not None and self._clock() - snapshot.fetched_at <= self._cache.stale_if_error_seconds
        )

    async def _fetch(self, key: TaskKey, demand: Demand, after: int | None) -> FetchResult:
        """Run an in-flight request. It returns failures and does not raise them, because callers share them.

        `after`: fetch even if the snapshot of this version is still fresh.
        """
        try:
            with self._tracing.flight(key) as mark:
                fetch = await self._fetch_with_lease(key, demand, after=after)
                mark.outcome = fetch.outcome.code if isinstance(fetch.outcome, GatewayError) else "ok"
                return fetch if mark.context is None else fetch._replace(span=mark.context)
        except Exception as exc:
            # A background refresh may have no waiting caller: then only the log shows an unexpected error.
            if (suppressed := self._log_sampler.take(type(exc).__name__)) is not None:
                log.exception(
                    "fetch_crashed", operation=key.operation, task_id=key.task_id, suppressed=suppressed
                )
            raise

    async def _fetch_with_lease(self, key: TaskKey, demand: Demand, *, after: int | None) -> FetchResult:
        deadline = self._clock() + self._timeout_seconds
        while True:
            # `acquire` looks for a snapshot again. Another replica may have stored one since the lookup of
            # the caller, and a second query would break the promise of one upstream query.
            lease = await self._store.acquire(key, after=after, timeout_seconds=deadline - self._clock())
            if not isinstance(lease, Lease):
                return FetchResult(lease)
            fetch = await self._query_upstream(lease, demand, deadline)
            if fetch is not None:
                return fetch

    async def _query_upstream(self, lease: Lease, demand: Demand, deadline: float) -> FetchResult | None:
        """Query the upstream and store the outcome. None: the lease was lost; acquire it again."""
        key = lease.key
        previous = self._store.latest(key)
        started = self._clock()
        try:
            response = await self._upstream.query(
                key,
                renewal=previous is not None,
                timeout_seconds=deadline - started,
                on_queued=partial(self._on_queued, demand),
                demand=demand,
            )
            demand.committed = True
            self._refresh_ahead.observe_latency(key.operation, self._clock() - started)
            previous = self._store.latest(key)
            snapshot = build_snapshot(
                response.data,
                response.envelope,
                key,
                fetched_at=self._clock(),
                lifetimes=self._lifetimes,
                previous=previous,
                version=lease.version,
            )
        except GatewayError as exc:
            failure = copy(exc)
            demand.committed = True
            # The gateway's own limits, an open circuit and refused credentials say nothing about this task,
            # so they are not stored as its failure (negative cache).
            if isinstance(failure, Overloaded | RateLimiterExhausted | CircuitOpen | CredentialsRefused):
                await self._store.abandon(lease)
            else:
                await self._store.fail(lease, failure, seconds=self._cache.error_seconds)
            invoke_id = failure.invoke_id if isinstance(failure, UpstreamError) else None
            return FetchResult(failure, self._clock() - started, invoke_id)
        except BaseException:
            await self._store.abandon(lease)
            raise
        upstream_seconds = snapshot.fetched_at - started
        self._record_transition(previous, snapshot, response.data.get("status"))
        kept = await self._store.commit(lease, snapshot)
        return None if kept is None else FetchResult(kept, upstream_seconds, response.invoke_id)

    def _on_queued(self, demand: Demand, seconds: float) -> None:
        if demand.queued_error is None:
            demand.queued_error = asyncio.get_running_loop().create_future()
        if not demand.queued_error.done():
            failure = RateLimiterExhausted(
                "the query is queued by the rate limiter for upstream calls", retry_after=seconds
            )
            demand.queued_error.set_result(failure)

    def _record_transition(self, previous: Snapshot | None, snapshot: Snapshot, raw_status: object) -> None:
        status = snapshot.status
        if status is None or (previous is not None and previous.status is status):
            return
        self._metrics.tasks_observed.labels(snapshot.key.operation, status).inc()
        if status is Status.UNKNOWN and (suppressed := self._log_sampler.take("status")) is not None:
            log.warning(
                "unknown_task_status",
                operation=snapshot.key.operation,
                task_id=snapshot.key.task_id,
                status=Excerpt(repr(raw_status)[:_MAX_STATUS_LENGTH], 100),
                suppressed=suppressed,
            )
