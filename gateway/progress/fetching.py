"""Makes the in-flight requests: acquires the lease of a task, queries the upstream, and stores the outcome.

    acquire -> a snapshot or failure of another replica -> return it
            -> the lease -> query the upstream -> commit -> return the stored snapshot
                                                         -> no snapshot to serve: acquire again
                                               -> store failure | release lease -> return the failure

Failures are returned and not raised, because all waiting callers share them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from copy import copy
from functools import cache, partial

import structlog

from gateway.domain.entity_tag import EntityTags
from gateway.domain.errors import (
    CircuitOpen,
    CredentialsRefused,
    GatewayError,
    Overloaded,
    RateLimited,
    UpstreamError,
    UpstreamIsGateway,
    UpstreamTimeout,
)
from gateway.domain.snapshot import Snapshot, build_snapshot
from gateway.domain.task import Operation, Status, TaskKey
from gateway.progress.outcomes import FetchOutcome
from gateway.settings.model import Cache as CacheSettings
from gateway.stores.base import ANY_FRESH, Lease, Requirement, Store
from gateway.telemetry.log_sampling import LogSampler
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.redaction import Excerpt
from gateway.telemetry.tracing import Tracing
from gateway.upstream.awaited_query import AwaitedQuery
from gateway.upstream.client import UpstreamClient

# Maximum number of leases that an in-flight request acquires, one after the other. A further one is needed if
# another replica has taken the lease or has announced a newer snapshot.
_MAX_LEASES = 3

_MAX_STATUS_LENGTH = 4096  # characters that are searched for secrets; the log shows 100 of them

# The gateway's own limits, an open circuit and refused credentials say nothing about the task. So they are
# not stored as its failure (negative cache).
_NOT_CACHED = (Overloaded, RateLimited, CircuitOpen, CredentialsRefused)

log = structlog.get_logger(__name__)


class Fetcher:
    """Makes in-flight requests.

    `settings` is the section `cache` of the settings. `timeout_seconds` limits an in-flight request: the wait
    for another replica's lease and the query together. `on_query_duration` receives the duration in seconds
    of each query that succeeds with one call, and how much of it passed before the call was sent.
    """

    def __init__(
        self,
        settings: CacheSettings,
        *,
        store: Store,
        upstream: UpstreamClient,
        metrics: Metrics,
        tags: EntityTags,
        timeout_seconds: float,
        on_query_duration: Callable[[Operation, float, float], None],
        tracing: Tracing,
        clock: Callable[[], float],
    ) -> None:
        self._error_seconds = settings.error_seconds
        self._lifetimes = settings.lifetimes
        self._timeout_seconds = timeout_seconds
        self._store = store
        self._upstream = upstream
        self._observed_counter = cache(metrics.tasks_observed.labels)
        self._tags = tags
        self._on_query_duration = on_query_duration
        self._tracing = tracing
        self._clock = clock
        self._log_sampler = LogSampler(clock=clock)  # an unknown status, or a bug, may occur with every task

    async def fetch(self, key: TaskKey, state: AwaitedQuery, requirement: Requirement | None) -> FetchOutcome:
        """Make an in-flight request, and return a snapshot or a failure.

        `requirement`: the fresh snapshots in the store that make the query unnecessary.
        """
        try:
            with self._tracing.in_flight_span(key) as span:
                fetch_outcome = await self._fetch_with_lease(key, state, requirement or ANY_FRESH)
                span.outcome = (
                    fetch_outcome.snapshot_or_error.code
                    if isinstance(fetch_outcome.snapshot_or_error, GatewayError)
                    else "ok"
                )
                return fetch_outcome if span.context is None else fetch_outcome._replace(span=span.context)
        except Exception as exc:
            # A background refresh may have no waiting caller: then only the log shows an unexpected error.
            if (suppressed := self._log_sampler.take(type(exc).__name__)) is not None:
                log.exception(
                    "fetch_crashed", operation=key.operation, task_id=key.task_id, suppressed=suppressed
                )
            raise

    async def _fetch_with_lease(
        self, key: TaskKey, state: AwaitedQuery, requirement: Requirement
    ) -> FetchOutcome:
        deadline = self._clock() + self._timeout_seconds  # as all moments here, on `self._clock`
        for _ in range(_MAX_LEASES):
            # `acquire` looks for a snapshot again. Another replica may have stored one since the caller's
            # lookup, and the upstream must not be queried twice within one lifetime.
            lease = await self._store.acquire(key, requirement, timeout_seconds=deadline - self._clock())
            if not isinstance(lease, Lease):
                return FetchOutcome(lease)
            fetch_outcome = await self._query_upstream(lease, state, deadline)
            if fetch_outcome is not None:
                return fetch_outcome
        latest = self._store.last_known(key)
        return FetchOutcome(latest or UpstreamTimeout("other replicas took the lease each time"))

    async def _query_upstream(
        self, lease: Lease, state: AwaitedQuery, deadline: float
    ) -> FetchOutcome | None:
        """Query the upstream, and store and return the outcome; None if the lease must be acquired again."""
        key = lease.key
        started = self._clock()
        upstream_seconds = 0.0
        replaced: Snapshot | None = None

        def build(previous: Snapshot | None) -> Snapshot:
            nonlocal replaced
            replaced = previous
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
                is_refresh=self._store.last_known(key) is not None,
                timeout_seconds=deadline - started,
                on_expected_wait=partial(_report_queued, state),
                on_retry=partial(self._store.release_lease_early, lease),
                awaited_query=state,
            )
            state.runs_to_end = True
            upstream_seconds = self._clock() - started
            if not state.repeated:  # else an outage would count as the usual time
                self._on_query_duration(key.operation, upstream_seconds, state.seconds_before_call)
            stored = await self._store.commit(lease, build)
        except GatewayError as exc:
            failure = copy(exc)
            state.runs_to_end = True
            if isinstance(failure, UpstreamIsGateway):
                self._log_loop(failure)
            if isinstance(failure, _NOT_CACHED):
                await self._store.release_lease(lease)
            else:
                await self._store.store_failure(lease, failure, seconds=self._error_seconds)
            entry = self._store.current_entry(key)
            if entry is not None and entry.snapshot.version > lease.version:
                return FetchOutcome(entry.snapshot)  # another replica has succeeded meanwhile
            invoke_id = failure.invoke_id if isinstance(failure, UpstreamError) else None
            return FetchOutcome(failure, self._clock() - started, invoke_id)
        except BaseException:
            await self._store.release_lease(lease)
            raise
        if stored is None:
            return None
        self._record_transition(replaced, stored, response.data.get("status"))
        return FetchOutcome(stored, upstream_seconds, response.invoke_id)

    def _log_loop(self, failure: UpstreamIsGateway) -> None:
        if (suppressed := self._log_sampler.take(type(failure).__name__)) is not None:
            log.error("upstream_is_gateway", reason=str(failure), suppressed=suppressed)

    def _record_transition(self, previous: Snapshot | None, snapshot: Snapshot, raw_status: object) -> None:
        status = snapshot.status
        if status is None or (previous is not None and previous.status is status):
            return
        self._observed_counter(snapshot.key.operation, status).inc()
        if status is Status.UNKNOWN and (suppressed := self._log_sampler.take("status")) is not None:
            log.warning(
                "unknown_task_status",
                operation=snapshot.key.operation,
                task_id=snapshot.key.task_id,
                status=Excerpt(repr(raw_status)[:_MAX_STATUS_LENGTH], 100),
                suppressed=suppressed,
            )


def queued_error_future(state: AwaitedQuery) -> asyncio.Future[GatewayError]:
    """Return the future that resolves to an error when the query counts as queued."""
    if state.queued_error is None:
        state.queued_error = asyncio.get_running_loop().create_future()
    return state.queued_error


def _report_queued(state: AwaitedQuery, seconds: float) -> None:
    signal = queued_error_future(state)
    if not signal.done():
        failure = RateLimited(
            "the query is queued by the rate limiter for upstream calls", retry_after=seconds
        )
        signal.set_result(failure)
