"""The progress service: answers queries from the store, or from the upstream through single flight.

    fresh snapshot                  -> answer at once
    stale-while-revalidate          -> answer at once, and start one background refresh
    else                            -> all callers wait for one in-flight request to the upstream
    the request fails               -> stale-if-error: a snapshot that is young enough, else the failure
    the rate limiter queues it      -> stale-if-error at once, else wait; in both cases it stays queued
    all callers have left           -> a request that is still queued is dropped
    a fresh snapshot is read twice  -> refresh-ahead: the next reader finds a fresh snapshot

A request counts as queued if it must wait for at least `NOTICEABLE_SECONDS` (`rate_limiter.py`). Freshness
promise: while the upstream responds and the rate limiter does not queue the request, no caller receives a
snapshot older than its lifetime + `cache.stale_while_revalidate_seconds`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from copy import copy
from functools import partial

import structlog

from gateway.domain.entity_tag import EntityTags
from gateway.domain.errors import (
    CircuitOpen,
    CredentialsRefused,
    GatewayError,
    Overloaded,
    RateLimiterExhausted,
    UpstreamError,
    UpstreamTimeout,
)
from gateway.domain.snapshot import Snapshot, build_snapshot
from gateway.domain.task import Operation, Status, TaskKey
from gateway.progress.in_flight import InFlightRequests
from gateway.progress.refresh_ahead import RefreshAhead
from gateway.progress.results import CacheResult, CacheStatus, FetchFailure, FetchResult
from gateway.settings.model import Cache
from gateway.stores.base import ANY, CacheEntry, Lease, Store, Wanted
from gateway.telemetry.log_sampling import LogSampler
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.redaction import Excerpt
from gateway.telemetry.tracing import NoTracing, Tracing
from gateway.upstream.client import UpstreamClient
from gateway.upstream.demand import Demand

# Maximum number of in-flight requests that a caller waits for, one after the other. The second and third are
# needed if the result of the one before is older than the revision that the client has seen.
_MAX_ROUNDS = 3
_HOT_READS = 2  # reads of a snapshot while it is fresh, after which refresh-ahead starts
_HIT = CacheStatus.HIT  # a constant, because the lookup of an enum member takes 50 ns at each hit

_MAX_STATUS_LENGTH = 4096  # characters that are searched for secrets; the log shows 100 of them

log = structlog.get_logger(__name__)


class ProgressService:
    """Answers queries.

    `timeout_seconds`: limit for an in-flight request: for the wait for another replica's lease and the query
    together.
    `clock` is the monotonic clock of `Snapshot.fetched_at`.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        store: Store,
        upstream: UpstreamClient,
        metrics: Metrics,
        tags: EntityTags,
        timeout_seconds: float,
        tracing: Tracing | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cache = cache
        self._timeout_seconds = timeout_seconds
        self._store = store
        self._tags = tags
        self._upstream = upstream
        self._metrics = metrics
        self._tracing = tracing or NoTracing()
        self._clock = clock
        self._in_flight: InFlightRequests[TaskKey, FetchResult] = InFlightRequests(self._fetch)
        self._lifetimes = cache.lifetimes
        self._log_sampler = LogSampler(clock=clock)  # an unknown status, or a bug, may occur with every task
        self._refresh_ahead = RefreshAhead(self._refresh)
        self._lookup_counters = {
            (operation, cache_status): metrics.cache_lookups.labels(operation, cache_status).inc
            for operation in Operation
            for cache_status in CacheStatus
        }
        self._hits = {operation: metrics.cache_lookups.labels(operation, _HIT) for operation in Operation}
        self._ages = {operation: metrics.answer_age.labels(operation).observe for operation in Operation}
        self._overdue = {operation: metrics.answers_overdue.labels(operation).inc for operation in Operation}

    def lookup(self, key: TaskKey, seen_revision: int = 0) -> CacheResult | None:
        """Return a result from the store without waiting, or None. Every cache hit runs this.

        If the result is stale, a background refresh starts, unless a failure of the task is cached.
        `seen_revision`: only a snapshot that is not older than the body with this revision is a result.
        """
        entry = self._store.peek(key)
        if entry is None:
            return None
        snapshot = entry.snapshot
        if seen_revision and not snapshot.is_at_least(seen_revision):
            return None
        age = self._clock() - snapshot.fetched_at
        if age < snapshot.lifetime:
            self._count_hit(entry, age)
            return CacheResult(snapshot, age, _HIT, entry=entry)
        result = self._stale(snapshot, age)
        if result is None:
            return None
        if result.failure is None:
            self._in_flight.start(key, background=True)
        self._lookup_counters[key.operation, CacheStatus.STALE]()
        self._record_age(snapshot, age)
        return result._replace(entry=entry)

    def count_if_current(self, entry: CacheEntry, now: float) -> bool:
        """Tell whether an entry that `lookup` has read may be served again `now`; if so, count a lookup.

        Reuse a stale snapshot for a short time only: this does not check whether its refresh has failed.
        """
        if not self._store.is_current(entry):
            return False
        snapshot = entry.snapshot
        age = now - snapshot.fetched_at
        if age < snapshot.lifetime:
            self._count_hit(entry, age)
            return True
        if age >= snapshot.lifetime + self._cache.stale_while_revalidate_seconds:
            return False
        self._lookup_counters[snapshot.key.operation, CacheStatus.STALE]()
        self._record_age(snapshot, age)
        return True

    async def get(
        self, key: TaskKey, *, client: bytes = b"", seen_revision: int = 0
    ) -> CacheResult | FetchFailure:
        """Return a result from the store or the upstream, or the failure if stale-if-error does not apply.

        `client` identifies the client for the fair queue of the rate limiter. If this is cancelled, an
        upstream query without other callers is dropped, unless it is on the wire. `seen_revision`: the client
        has received the body with this revision, and must not receive an older one unless it is terminal.
        """
        result = self.lookup(key, seen_revision)
        if result is None and await self._store.sync():
            result = self.lookup(key, seen_revision)
        if result is not None:
            return result
        outcome = await self._wait(key, client, seen_revision=seen_revision)
        self._lookup_counters[key.operation, outcome.cache_status]()
        return outcome

    def count_lookup(self, outcome: CacheResult | FetchFailure) -> None:
        """Count one lookup with this outcome, for a long poll: its schedule counts none."""
        self._lookup_counters[outcome.key.operation, outcome.cache_status]()
        if isinstance(outcome, CacheResult):
            self._record_age(outcome.snapshot, outcome.age)

    async def get_fresh(
        self, key: TaskKey, *, client: bytes | None = b"", seen_revision: int = 0
    ) -> CacheResult | FetchFailure:
        """Return the snapshot if it is fresh, else the outcome of an in-flight request. For schedules.

        The outcome may be a failure, or a stale snapshot with the failure (stale-if-error). This counts no
        lookup, and waits even while the rate limiter queues the request. `client`: as in `get`; None if only
        the subscribers that have joined need the result.
        """
        entry = self._store.peek(key)
        if entry is None and await self._store.sync():
            entry = self._store.peek(key)
        snapshot = None if entry is None else entry.snapshot
        age = 0.0 if snapshot is None else self._clock() - snapshot.fetched_at
        if snapshot is None or age >= snapshot.lifetime or not snapshot.is_at_least(seen_revision):
            return await self._wait(key, client, wait_while_queued=True, seen_revision=seen_revision)
        return CacheResult(snapshot, age, CacheStatus.HIT)

    def peek(self, key: TaskKey, seen_revision: int = 0) -> CacheResult | None:
        """Return what `lookup` returns, but count no lookup and start no refresh."""
        entry = self._store.peek(key)
        if entry is None:
            return None
        snapshot = entry.snapshot
        if seen_revision and not snapshot.is_at_least(seen_revision):
            return None
        age = self._clock() - snapshot.fetched_at
        return (
            CacheResult(snapshot, age, CacheStatus.HIT)
            if age < snapshot.lifetime
            else self._stale(snapshot, age)
        )

    async def sync(self) -> None:
        """Read the messages of other replicas that may be unread: until then, `peek` may return None."""
        await self._store.sync()

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

    def _count_hit(self, entry: CacheEntry, age: float) -> None:
        snapshot = entry.snapshot
        operation = snapshot.key.operation
        entry.reads += 1
        if entry.reads == _HOT_READS and not snapshot.terminal and not self._in_flight.closed:
            self._refresh_ahead.schedule(snapshot, age, early=entry.fetched_here)
        self._hits[operation].value += 1
        if not snapshot.terminal:
            self._ages[operation](age)

    def _stale(self, snapshot: Snapshot, age: float) -> CacheResult | None:
        """Return a result with a stale snapshot, or None if it is too old.

        The maximum age is the lifetime + `cache.stale_while_revalidate_seconds`. If a failure of the task is
        cached, it is `cache.stale_if_error_seconds`, which may be shorter, and the result has the failure.
        """
        failure = self._store.failure(snapshot.key)
        if failure is None:
            too_old = age >= snapshot.lifetime + self._cache.stale_while_revalidate_seconds
        else:
            too_old = age > self._cache.stale_if_error_seconds
        return None if too_old else CacheResult(snapshot, age, CacheStatus.STALE, failure=failure)

    def _refresh(self, key: TaskKey, version: int) -> None:
        known = self._store.peek_any(key)
        # A schedule or another replica may have replaced the snapshot meanwhile. Then the reads of the new
        # snapshot decide whether it is refreshed ahead.
        if known is not None and known.version == version and self._store.failure(key) is None:
            self._in_flight.start(key, background=True, wanted=Wanted(newer_than=version))

    async def _wait(
        self, key: TaskKey, client: bytes | None, *, wait_while_queued: bool = False, seen_revision: int = 0
    ) -> CacheResult | FetchFailure:
        """Wait for the in-flight request, or start one. Serve a cached failure without a request.

        `wait_while_queued`: wait even while the rate limiter queues the request.
        """
        failure = self._store.failure(key)
        if failure is not None:
            return self._stale_if_error(key, failure, CacheStatus.NEGATIVE, seen_revision=seen_revision)
        cache_status = CacheStatus.COLLAPSED if key in self._in_flight else CacheStatus.MISS
        known = self._store.peek_any(key)
        if client is not None:
            self._in_flight.join(key, client)
        try:
            wait_while_queued = wait_while_queued or not self._within_stale_if_error(known, seen_revision)
            for _ in range(_MAX_ROUNDS):
                fetch = await self._join_request(
                    key, wait_while_queued=wait_while_queued, seen_revision=seen_revision
                )
                outcome = fetch.outcome
                if isinstance(outcome, GatewayError) or outcome.is_at_least(seen_revision):
                    break  # else the request had started before this caller named its `seen_revision`
        finally:
            if client is not None:
                self._in_flight.leave(key, client)
        if isinstance(outcome, GatewayError):
            return self._stale_if_error(key, outcome, cache_status, fetch, seen_revision=seen_revision)
        age = self._clock() - outcome.fetched_at
        self._record_age(outcome, age)
        return CacheResult(outcome, age, cache_status, replaced_stale=known is not None, fetch=fetch)

    async def _join_request(
        self, key: TaskKey, *, wait_while_queued: bool, seen_revision: int
    ) -> FetchResult:
        """Wait for the in-flight request, or start one.

        Without `wait_while_queued`, return an error as soon as the rate limiter queues the request.
        """
        request = self._in_flight.start(key, wanted=Wanted(seen_revision=seen_revision))
        if wait_while_queued:
            return await asyncio.shield(request)
        if request.done():  # it ended in this iteration of the event loop
            return request.result()
        demand = self._in_flight.demand(key)
        if demand.queued_signal is None:
            demand.queued_signal = asyncio.get_running_loop().create_future()
        queued_signal = demand.queued_signal
        await asyncio.wait((request, queued_signal), return_when=asyncio.FIRST_COMPLETED)
        if request.done():
            return request.result()
        demand.background = True  # the request stays in the queue
        return FetchResult(queued_signal.result())

    def _stale_if_error(
        self,
        key: TaskKey,
        failure: GatewayError,
        cache_status: CacheStatus,
        fetch: FetchResult | None = None,
        *,
        seen_revision: int,
    ) -> CacheResult | FetchFailure:
        """Return a stale snapshot instead of the failure, unless it is too old (stale-if-error)."""
        snapshot = self._store.peek_any(key)
        if snapshot is None or not self._within_stale_if_error(snapshot, seen_revision):
            return FetchFailure(key, failure, cache_status, fetch)
        age = self._clock() - snapshot.fetched_at
        self._record_age(snapshot, age)
        return CacheResult(snapshot, age, CacheStatus.STALE, failure=failure, fetch=fetch)

    def _record_age(self, snapshot: Snapshot, age: float) -> None:
        if snapshot.terminal:
            return
        self._ages[snapshot.key.operation](age)
        if age >= snapshot.lifetime + self._cache.stale_while_revalidate_seconds:
            self._overdue[snapshot.key.operation]()

    def _within_stale_if_error(self, snapshot: Snapshot | None, seen_revision: int) -> bool:
        """Tell whether this snapshot may be served instead of a failure."""
        return (
            snapshot is not None
            and snapshot.is_at_least(seen_revision)
            and self._clock() - snapshot.fetched_at <= self._cache.stale_if_error_seconds
        )

    async def _fetch(self, key: TaskKey, demand: Demand, wanted: Wanted | None) -> FetchResult:
        """Run an in-flight request. It returns failures and does not raise them, because callers share them.

        `wanted`: which fresh snapshots in the store make the query unnecessary.
        """
        try:
            with self._tracing.in_flight_span(key) as span:
                fetch = await self._fetch_with_lease(key, demand, wanted or ANY)
                span.outcome = fetch.outcome.code if isinstance(fetch.outcome, GatewayError) else "ok"
                return fetch if span.context is None else fetch._replace(span=span.context)
        except Exception as exc:
            # A background refresh may have no waiting caller: then only the log shows an unexpected error.
            if (suppressed := self._log_sampler.take(type(exc).__name__)) is not None:
                log.exception(
                    "fetch_crashed", operation=key.operation, task_id=key.task_id, suppressed=suppressed
                )
            raise

    async def _fetch_with_lease(self, key: TaskKey, demand: Demand, wanted: Wanted) -> FetchResult:
        deadline = self._clock() + self._timeout_seconds
        for _ in range(_MAX_ROUNDS):
            # `acquire` looks for a snapshot again: since the caller's lookup, another replica may have stored
            # one, and a second upstream query for the same lifetime must not be made.
            lease = await self._store.acquire(key, wanted, timeout_seconds=deadline - self._clock())
            if not isinstance(lease, Lease):
                return FetchResult(lease)
            fetch = await self._query_upstream(lease, demand, deadline)
            if fetch is not None:
                return fetch
        latest = self._store.peek_any(key)
        return FetchResult(latest or UpstreamTimeout("other replicas took the lease each time"))

    async def _query_upstream(self, lease: Lease, demand: Demand, deadline: float) -> FetchResult | None:
        """Query the upstream, and store and return the outcome. None: the lease was lost; acquire again."""
        key = lease.key
        started = self._clock()
        upstream_seconds = 0.0

        followed: Snapshot | None = None

        def build(previous: Snapshot | None) -> Snapshot:
            nonlocal followed
            followed = previous
            return build_snapshot(
                response.data,
                response.envelope,
                key,
                fetched_at=started + upstream_seconds,
                lifetimes=self._lifetimes,
                previous=previous,
                tags=self._tags,
                version=lease.version,
            )

        try:
            response = await self._upstream.query(
                key,
                renewal=self._store.peek_any(key) is not None,
                timeout_seconds=deadline - started,
                on_queued=partial(self._on_queued, demand),
                on_retry=partial(self._store.release, lease),
                demand=demand,
            )
            demand.must_finish = True
            upstream_seconds = self._clock() - started
            self._refresh_ahead.observe_latency(key.operation, upstream_seconds)
            kept = await self._store.commit(lease, build)
        except GatewayError as exc:
            failure = copy(exc)
            demand.must_finish = True
            # The gateway's own limits, an open circuit and refused credentials say nothing about this task,
            # so they are not stored as its failure (negative cache).
            if isinstance(failure, Overloaded | RateLimiterExhausted | CircuitOpen | CredentialsRefused):
                await self._store.abandon(lease)
            else:
                await self._store.fail(lease, failure, seconds=self._cache.error_seconds)
            entry = self._store.peek(key)
            if entry is not None and entry.snapshot.version > lease.version:
                return FetchResult(entry.snapshot)  # another replica has succeeded meanwhile
            invoke_id = failure.invoke_id if isinstance(failure, UpstreamError) else None
            return FetchResult(failure, self._clock() - started, invoke_id)
        except BaseException:
            await self._store.abandon(lease)
            raise
        if kept is None:
            return None
        self._record_transition(followed, kept, response.data.get("status"))
        return FetchResult(kept, upstream_seconds, response.invoke_id)

    def _on_queued(self, demand: Demand, seconds: float) -> None:
        if demand.queued_signal is None:
            demand.queued_signal = asyncio.get_running_loop().create_future()
        if not demand.queued_signal.done():
            failure = RateLimiterExhausted(
                "the query is queued by the rate limiter for upstream calls", retry_after=seconds
            )
            demand.queued_signal.set_result(failure)

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
