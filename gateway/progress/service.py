"""The progress service: answers callers from the store, or from the upstream through single flight.

    fresh snapshot                       -> answer at once
    stale, within stale-while-revalidate -> answer at once, and start one in-flight request in the background,
                                            unless one is in flight or a failure of the task is cached
    else, no failure of the task cached  -> all callers wait for one in-flight request
    the query fails, or failure cached   -> stale-if-error: a snapshot that is young enough, else the failure
    the query counts as queued           -> stale-if-error at once, else wait; the query continues
    the query takes too long             -> the same
    all callers leave, no call in flight -> the query is dropped, unless the gateway itself needs the response
    a fresh snapshot is read twice       -> refresh-ahead (`refresh_ahead.py`)

An in-flight request is the query for a task with the steps before and after the query (`fetching.py`). A
query *counts as queued* when the rate limiter first reports a wait for it (`on_expected_wait` of
`RateLimiter.acquire`). `overdue_detector.py` decides whether a query takes too long.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from gateway.domain.entity_tag import EntityTags
from gateway.domain.errors import GatewayError, UpstreamTimeout
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import Operation, TaskKey
from gateway.progress.fetching import Fetcher, queued_error_future
from gateway.progress.in_flight_requests import InFlightRequests
from gateway.progress.lookup_metrics import LookupMetrics
from gateway.progress.outcomes import CacheStatus, FetchOutcome, LookupFailure, LookupSuccess
from gateway.progress.overdue_detector import OverdueDetector
from gateway.progress.refresh_ahead import RefreshAhead
from gateway.progress.serve_stale_rules import ServeStaleRules
from gateway.settings.model import Cache as CacheSettings
from gateway.stores.base import CacheEntry, Requirement, Store
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.tracing import NoTracing, Tracing
from gateway.upstream.awaited_query import AwaitedQuery
from gateway.upstream.client import UpstreamClient

# If the snapshot that an in-flight request returns is older than the one that the client has seen, the caller
# waits for the next in-flight request. This is the maximum number of in-flight requests that it waits for.
_MAX_CONSECUTIVE_WAITS = 3
_REFRESH_AHEAD_READS = 2  # the second read of a fresh snapshot schedules its refresh ahead of expiry
_HIT = CacheStatus.HIT  # a constant, because the lookup of an enum member takes 50 ns at each hit


class ProgressService:
    """Returns snapshots to callers, and to the schedules of watched tasks.

    `settings` is the section `cache` of the settings. `timeout_seconds` limits an in-flight request: the wait
    for another replica's lease and the query together. `clock` is the clock of `Snapshot.fetched_at`.

    Attributes:
        overdue_detector: Tells whether the update of a task is overdue, and why.
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
        tracing: Tracing | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._store = store
        self._clock = clock
        self._refresh_ahead = RefreshAhead(self._start_refresh_ahead)
        self._fetcher = Fetcher(
            settings,
            store=store,
            upstream=upstream,
            metrics=metrics,
            tags=tags,
            timeout_seconds=timeout_seconds,
            on_query_duration=self._observe_query_duration,
            tracing=tracing or NoTracing(),
            clock=clock,
        )
        self._in_flight: InFlightRequests[TaskKey, FetchOutcome] = InFlightRequests(self._fetch)
        self.overdue_detector = OverdueDetector(store, self._in_flight.in_flight_query_of, clock=clock)
        self._serve_stale_rules = ServeStaleRules(settings, store, clock=clock)
        self._metrics = LookupMetrics(metrics, settings)

    def lookup(self, key: TaskKey, seen_revision: int = 0) -> LookupSuccess | None:
        """Return the snapshot in the store, and count a lookup. Return None if none may be served.

        If the snapshot is stale, a background refresh is started, unless a failure of the task is cached. If
        the result is None, no lookup is counted and no refresh is started. `seen_revision`: a snapshot that
        is not terminal must not be older than the body with this revision.
        """
        entry = self._store.current_entry(key)
        if entry is None:
            return None
        snapshot = entry.snapshot
        if seen_revision and not snapshot.may_follow(seen_revision):
            return None
        age = self._clock() - snapshot.fetched_at
        if age < snapshot.lifetime:
            self._on_hit(entry, age)
            return LookupSuccess(snapshot, age, _HIT, entry=entry)
        result = self._serve_stale_rules.serve_stale(snapshot, age)
        if result is None:
            return None
        if result.failure is None:
            self._in_flight.join_or_start(key, keep_without_callers=True)
        self._metrics.count(key.operation, CacheStatus.STALE)
        self._metrics.record_age(snapshot, age)
        return result._replace(entry=entry)

    def may_serve_again(self, entry: CacheEntry, now: float) -> bool:
        """Tell whether an entry from an earlier `lookup` may be served again at `now`; if so, count a lookup.

        The method does not check whether the refresh of a stale snapshot has failed. So the calling code
        must call `lookup` from time to time (`_STALE_REUSE_SECONDS` in `api/cached_responses.py`).
        """
        if not self._store.is_current(entry):
            return False
        snapshot = entry.snapshot
        age = now - snapshot.fetched_at
        if age < snapshot.lifetime:
            self._on_hit(entry, age)
            return True
        if age >= snapshot.lifetime + self._settings.stale_while_revalidate_seconds:
            return False
        self._metrics.count(snapshot.key.operation, CacheStatus.STALE)
        self._metrics.record_age(snapshot, age)
        return True

    async def get(
        self, key: TaskKey, *, client: bytes = b"", seen_revision: int = 0
    ) -> LookupSuccess | LookupFailure:
        """Return a snapshot from the store or the upstream.

        If the query fails, and no stale snapshot may replace the failure, return the failure.

        `client` identifies the client in the fair queues for upstream calls. `seen_revision`: the client has
        received the body with this revision, and must not receive an older body unless the older one is
        terminal. If this coroutine is cancelled, the caller leaves the in-flight request. When the last
        caller has left, the query is dropped, unless a call is on the wire or the gateway needs the response.
        """
        result = self.lookup(key, seen_revision)
        return result or await self.get_after_miss(key, client=client, seen_revision=seen_revision)

    async def get_after_miss(
        self, key: TaskKey, *, client: bytes = b"", seen_revision: int = 0
    ) -> LookupSuccess | LookupFailure:
        """Do the same as `get`, for a caller to which `lookup` has just returned None."""
        if await self._store.read_arrived_messages() and (result := self.lookup(key, seen_revision)):
            return result
        outcome = await self._get_after_miss(key, client, seen_revision=seen_revision)
        self._metrics.count(key.operation, outcome.cache_status)
        return outcome

    def refuse_lookup(self, key: TaskKey, failure: GatewayError) -> LookupFailure:
        """Count a lookup that is refused; return the cached failure of the task, or else `failure`."""
        self._metrics.count(key.operation, CacheStatus.NEGATIVE)
        return LookupFailure(key, self._store.cached_failure(key) or failure, CacheStatus.NEGATIVE)

    def count_lookup(self, outcome: LookupSuccess | LookupFailure) -> None:
        """Count one lookup with this outcome, for batches and long polls: their `peek` counts none."""
        self._metrics.count(outcome.key.operation, outcome.cache_status)
        if isinstance(outcome, LookupSuccess):
            self._metrics.record_age(outcome.snapshot, outcome.age)

    async def query_if_stale(self, key: TaskKey, *, seen_revision: int = 0) -> LookupSuccess | LookupFailure:
        """Return the snapshot if it is fresh, else wait for an in-flight request. For schedules.

        While a failure of the task is cached, no in-flight request is started. The outcome may be a failure,
        or a stale snapshot with the failure (stale-if-error). This method counts no lookup, and waits even
        for a query that counts as queued or takes too long. Call `add_caller` for each caller first.
        """
        entry = self._store.current_entry(key)
        if entry is None and await self._store.read_arrived_messages():
            entry = self._store.current_entry(key)
        snapshot = None if entry is None else entry.snapshot
        age = 0.0 if snapshot is None else self._clock() - snapshot.fetched_at
        if snapshot is None or age >= snapshot.lifetime or not snapshot.may_follow(seen_revision):
            return await self._get_after_miss(key, None, until_done=True, seen_revision=seen_revision)
        return LookupSuccess(snapshot, age, CacheStatus.HIT)

    def peek(self, key: TaskKey, seen_revision: int = 0) -> LookupSuccess | None:
        """Return the snapshot in the store, but count no lookup and start no refresh.

        `serve_stale` decides how old a stale snapshot may be. A stale snapshot is returned with the failure
        from `OverdueDetector.error`, or else with the cached failure, if there is one.
        """
        entry = self._store.current_entry(key)
        if entry is None:
            return None
        snapshot = entry.snapshot
        if seen_revision and not snapshot.may_follow(seen_revision):
            return None
        age = self._clock() - snapshot.fetched_at
        if age < snapshot.lifetime:
            return LookupSuccess(snapshot, age, CacheStatus.HIT)
        return self._serve_stale_rules.serve_stale(snapshot, age, self.overdue_detector.error(key))

    def age(self, snapshot: Snapshot) -> float:
        """Return the age of a snapshot, in seconds."""
        return self._clock() - snapshot.fetched_at

    async def read_arrived_messages(self) -> None:
        """Read the messages of other replicas that have arrived; see `Store.read_arrived_messages`."""
        await self._store.read_arrived_messages()

    def add_caller(self, key: TaskKey, client: bytes) -> None:
        """Count a client as a caller of each in-flight request for the task, until `remove_caller`."""
        self._in_flight.add_caller(key, client)

    def remove_caller(self, key: TaskKey, client: bytes) -> None:
        """Undo one `add_caller` with the same arguments."""
        self._in_flight.remove_caller(key, client)

    async def aclose(self) -> None:
        """Cancel every in-flight request, and start no more."""
        self._refresh_ahead.close()
        await self._in_flight.aclose()

    def _on_hit(self, entry: CacheEntry, age: float) -> None:
        snapshot = entry.snapshot
        operation = snapshot.key.operation
        entry.reads += 1
        if entry.reads == _REFRESH_AHEAD_READS and not snapshot.terminal and not self._in_flight.closed:
            self._refresh_ahead.schedule(snapshot, age, start_early=entry.fetched_here)
        self._metrics.hits[operation].value += 1
        if not snapshot.terminal:
            self._metrics.observe_age[operation](age)

    async def _fetch(
        self, key: TaskKey, query: AwaitedQuery, requirement: Requirement | None
    ) -> FetchOutcome:
        query.in_flight_since = self._clock()
        fetch_outcome = await self._fetcher.fetch(key, query, requirement)
        if isinstance(fetch_outcome.snapshot_or_error, GatewayError):
            self.overdue_detector.record_failure(key, fetch_outcome.snapshot_or_error)
        return fetch_outcome

    def _observe_query_duration(
        self, operation: Operation, seconds: float, seconds_before_call: float
    ) -> None:
        self._refresh_ahead.observe_latency(operation, seconds)
        # Subtract the time in the queue. Otherwise, after a long queue, slow queries would not count as slow,
        # and their tasks not as overdue.
        self.overdue_detector.observe_latency(seconds - seconds_before_call)

    def _start_refresh_ahead(self, key: TaskKey, version: int) -> None:
        known = self._store.last_known(key)
        # A schedule or another replica may have replaced the snapshot meanwhile. In this case, the reads of
        # the new snapshot decide whether the new snapshot is refreshed ahead.
        if known is not None and known.version == version and self._store.cached_failure(key) is None:
            requirement = Requirement(newer_than=version)
            self._in_flight.join_or_start(key, keep_without_callers=True, requirement=requirement)

    async def _get_after_miss(
        self, key: TaskKey, client: bytes | None, *, until_done: bool = False, seen_revision: int = 0
    ) -> LookupSuccess | LookupFailure:
        """Wait for the in-flight request, or start one unless a failure is cached.

        `client`: None if `add_caller` has counted the callers already.
        `until_done`: wait even if the query counts as queued or takes too long.
        """
        if (failure := self._store.cached_failure(key)) is not None:
            if result := await self._load_announced_snapshot(key, seen_revision):
                return result
            return self._stale_if_error(LookupFailure(key, failure, CacheStatus.NEGATIVE), seen_revision)
        cache_status = CacheStatus.COLLAPSED if key in self._in_flight else CacheStatus.MISS
        known = self._store.last_known(key)
        if client is not None:
            self._in_flight.add_caller(key, client)
        try:
            # Without a stale snapshot to return, a caller gains nothing if it stops waiting early.
            until_done = until_done or not self._serve_stale_rules.may_replace_failure(known, seen_revision)
            requirement = Requirement(seen_revision=seen_revision)
            for _ in range(_MAX_CONSECUTIVE_WAITS):
                fetch_outcome = await self._join_query(key, requirement, until_done=until_done)
                fetched = fetch_outcome.snapshot_or_error
                if isinstance(fetched, GatewayError) or fetched.may_follow(seen_revision):
                    break
                # The in-flight request was started for another requirement: wait for a further one.
                requirement = requirement._replace(newer_than=fetched.version)
                await asyncio.sleep(0)  # lets `SingleFlight` forget an in-flight request that has just ended
            else:
                fetched = UpstreamTimeout("no response newer than the one that the client has")
        finally:
            if client is not None:
                self._in_flight.remove_caller(key, client)
        if isinstance(fetched, GatewayError):
            if result := await self._load_announced_snapshot(key, seen_revision):
                return result
            return self._stale_if_error(
                LookupFailure(key, fetched, cache_status, fetch_outcome), seen_revision
            )
        age, had_older_snapshot = self._clock() - fetched.fetched_at, known is not None
        self._metrics.record_age(fetched, age)
        return LookupSuccess(
            fetched, age, cache_status, had_older_snapshot=had_older_snapshot, fetch_outcome=fetch_outcome
        )

    async def _load_announced_snapshot(self, key: TaskKey, seen_revision: int) -> LookupSuccess | None:
        """Return the snapshot that another replica has announced, if any.

        Another replica may have a newer snapshot while the query of this replica waits or has failed.
        """
        if not await self._store.load_announced_snapshot(key):
            return None
        result = self.peek(key, seen_revision)
        if result is not None:
            self._metrics.record_age(result.snapshot, result.age)
        return result

    async def _join_query(self, key: TaskKey, requirement: Requirement, *, until_done: bool) -> FetchOutcome:
        """Wait for the in-flight request, or start one with this requirement.

        Without `until_done`, return an error as soon as the query counts as queued or takes too long.
        """
        query = self._in_flight.get_or_create_query(key)
        # A new in-flight request must satisfy all callers that wait, not only the one that starts it.
        query.seen_revision = max(query.seen_revision, requirement.seen_revision)
        requirement = requirement._replace(seen_revision=query.seen_revision)
        in_flight = self._in_flight.join_or_start(key, requirement=requirement)
        if until_done:
            return await asyncio.shield(in_flight)
        if in_flight.done():  # it ended in this iteration of the event loop
            return in_flight.result()
        queued_error = queued_error_future(query)
        elapsed = max(
            self._clock() - query.in_flight_since, 0.0
        )  # `in_flight_since` is infinite before it begins
        timeout = max(self.overdue_detector.overdue_after_seconds - elapsed, 0.0)
        await asyncio.wait((in_flight, queued_error), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if in_flight.done():
            return in_flight.result()
        query.keep_without_callers = True  # the query continues
        slow_error = self.overdue_detector.error_of_slow_query(query)
        return FetchOutcome(queued_error.result() if queued_error.done() else slow_error)

    def _stale_if_error(self, failure: LookupFailure, seen_revision: int) -> LookupSuccess | LookupFailure:
        outcome = self._serve_stale_rules.replace_failure(failure, seen_revision)
        if isinstance(outcome, LookupSuccess):
            self._metrics.record_age(outcome.snapshot, outcome.age)
        return outcome
