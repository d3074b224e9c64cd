"""The upstream client: runs a query with its deadline and retries, within all limits for upstream calls.

    deadline, retries -> circuit breaker -> rate limiter -> credential rotation -> concurrency limit -> call

A query may need several calls. It runs in the asyncio task of an in-flight request, not in a caller's. The
concurrency limit is `upstream.max_in_flight`; the transport has none. A call counts towards it for as long as
the upstream works on the call, even after the deadline of the query. A call is not made if its response is
not wanted any more (`demand.py`), or if less time is left than the upstream usually takes.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Protocol

from gateway.domain.errors import (
    CircuitOpen,
    GatewayError,
    Overloaded,
    RateLimiterExhausted,
    TimestampRefused,
    UpstreamError,
    UpstreamThrottled,
    UpstreamTimeout,
)
from gateway.domain.task import Operation, TaskKey
from gateway.settings.model import Upstream as UpstreamSettings
from gateway.telemetry.metrics import Metrics
from gateway.upstream.circuit_breaker import CircuitBreaker, State
from gateway.upstream.credential_rotation import CredentialRotation
from gateway.upstream.credentials import KeyPair
from gateway.upstream.demand import Demand
from gateway.upstream.rate_limiter import NOTICEABLE_SECONDS, Permit, RateLimiter, burst_size
from gateway.upstream.retry_policy import RetryPolicy
from gateway.upstream.signed_request import ParsedResponse, SignedRequests

_LATENCY_WEIGHT = 0.3  # weight of the latest response in the moving average of the latency


def _rate_limit_error() -> GatewayError:
    return RateLimiterExhausted("the rate limit for upstream calls is exhausted", retry_after=1.0)


def _concurrency_error() -> GatewayError:
    return Overloaded("the limit of concurrent upstream calls is reached", retry_after=1.0)


def _timeout_error() -> GatewayError:
    return UpstreamTimeout("the upstream did not answer in time")


@dataclass(slots=True)
class _Query:
    """A running query.

    `make_timeout_error` makes the error to raise if the deadline passes now: it depends on what the query
    waits for. `call_numbers` counts the calls from 0. An attempt has more than one call after a clock
    correction, and when other key pairs are tried.
    """

    key: TaskKey
    renewal: bool
    on_queued: Callable[[float], None]
    deadline: float
    demand: Demand
    make_timeout_error: Callable[[], GatewayError] = _rate_limit_error
    call_numbers: Iterator[int] = field(default_factory=count)


class _PermitRevoked(Exception):
    """The upstream throttled another call after the permit was issued, and before this call was sent."""


class _ConcurrentCall:
    """A call that counts towards the concurrency limit, which the caller has acquired for it.

    It counts until the query has parsed the response. If the query is cancelled, it counts until the upstream
    has ended the call.
    """

    __slots__ = ("_cancelled", "_ended", "_limit")

    def __init__(self, limit: asyncio.Semaphore) -> None:
        self._limit: asyncio.Semaphore | None = limit
        self._ended = self._cancelled = False

    def end(self) -> None:
        """Record that the upstream has ended the call. The query may still parse the response."""
        self._ended = True
        if self._cancelled:
            self.release()

    def cancel(self) -> None:
        """Record that the query was cancelled while the call was in flight."""
        self._cancelled = True
        if self._ended:
            self.release()

    def release(self) -> None:
        """Stop counting the call. A second release has no effect."""
        limit, self._limit = self._limit, None
        if limit is not None:
            limit.release()


class TakeSharedToken(Protocol):
    """Takes one call out of the rate limit that all replicas share; see `Store.token`."""

    async def __call__(self, per_second: float, *, saved: float, timeout_seconds: float) -> float:
        """Return the seconds to wait before the call. Raises: RateLimiterExhausted."""


class UpstreamClient:
    """Queries the upstream.

    `take_shared_token` takes a call out of the configured rate limit, which replicas share.
    `announce_throttling` notifies the other replicas of a throttling response. See `Store` for both.
    """

    def __init__(
        self,
        settings: UpstreamSettings,
        *,
        signed_requests: SignedRequests,
        rotation: CredentialRotation,
        metrics: Metrics,
        take_shared_token: TakeSharedToken,
        announce_throttling: Callable[[float | None], Awaitable[None]],
    ) -> None:
        self._take_shared_token = take_shared_token
        self._announce_throttling = announce_throttling
        self._settings = settings
        self._signed_requests = signed_requests
        self._rotation = rotation
        self._metrics = metrics
        self._concurrency_limit = asyncio.Semaphore(settings.max_in_flight)
        self._retry_policy = RetryPolicy(settings.retries)
        self._rate_limiter = RateLimiter(settings.requests_per_second)
        metrics.upstream_budget.set_function(lambda: self._rate_limiter.per_second)
        self._breakers = {operation: self._make_breaker(operation) for operation in Operation}
        # The series start at 0: `rate()` does not see an increase from an absent series to 1.
        self._abandoned = {operation: metrics.upstream_abandoned.labels(operation) for operation in Operation}
        # Half the time of an attempt: the upstream can be expected to respond within it. If the query's
        # deadline cancels a call earlier, the circuit breaker does not count a failure. A query does not wait
        # for a permit that would leave less time: its call would be cancelled soon after it is sent.
        self._min_response_seconds = min(settings.attempt_timeout_seconds, settings.timeout_seconds) / 2
        # Moving averages; 0.0 before the first response.
        self._latency_seconds = dict.fromkeys(Operation, 0.0)

    @property
    def troubles(self) -> list[str]:
        """The problem codes of what is wrong with the upstream now; empty if it works."""
        last_error = self._signed_requests.last_error_code
        codes = [last_error] if last_error else []
        if any(breaker.state is not State.CLOSED for breaker in self._breakers.values()):
            codes.append(CircuitOpen.code)
        if self._rate_limiter.has_learned_limit:
            codes.append(UpstreamThrottled.code)
        return list(dict.fromkeys(codes))

    def slow_down(self, retry_after: float | None) -> None:
        """Lower the rate limit because the upstream throttled a call of another replica."""
        self._rate_limiter.slow_down(retry_after=retry_after)

    async def query(
        self,
        key: TaskKey,
        *,
        renewal: bool = False,
        timeout_seconds: float = math.inf,
        on_queued: Callable[[float], None] = lambda _: None,
        demand: Demand | None = None,
    ) -> ParsedResponse:
        """Query a task, with retries, within `upstream.timeout_seconds` and `timeout_seconds`.

        Args:
            key: The task.
            renewal: An older snapshot of the task is known.
            timeout_seconds: Limit for the whole query, in addition to the setting.
            on_queued: Called with the expected wait in seconds if the rate limiter queues the query.
            demand: The waiting callers. Its `committed` is set while a call is on the wire. None means that
                the gateway itself needs the response.

        Raises:
            UpstreamError: There is no response, or it is an error.
            Overloaded: The concurrency limit was reached until the deadline.
        """
        seconds = min(self._settings.timeout_seconds, timeout_seconds)
        deadline = asyncio.get_running_loop().time() + seconds
        query = _Query(key, renewal, on_queued, deadline, demand or Demand(background=True))
        self._retry_policy.on_query()
        retries = 0
        failure: UpstreamError | None = None
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    try:
                        return await self._attempt(query)
                    except (RateLimiterExhausted, Overloaded, CircuitOpen) as refused:
                        # No call was made. If an earlier call failed, its error says more.
                        raise copy(failure or refused) from None
                    except UpstreamError as exc:
                        if isinstance(exc, UpstreamThrottled):
                            await self._announce_throttling(exc.retry_after)
                        delay = self._retry_delay(exc, retries, query)
                        if delay is None:
                            raise
                        query.demand.committed = False
                        failure = copy(exc)
                    self._metrics.upstream_retries.labels(key.operation, failure.code).inc()
                    retries += 1
                    await asyncio.sleep(delay)
        except TimeoutError:
            raise query.make_timeout_error() from None
        except asyncio.CancelledError:
            if query.demand.dropped:
                self._abandoned[key.operation].inc()
            raise

    async def _attempt(self, query: _Query) -> ParsedResponse:
        operation = query.key.operation
        while True:
            self._breakers[operation].check()  # do not queue for a call that will not be made
            query.make_timeout_error = _timeout_error
            await self._rotation.wait_for_probe(operation)
            query.make_timeout_error = _rate_limit_error
            # The permit comes first: a query that waits for one must not count towards the concurrency limit.
            with await self._rate_limiter.acquire(
                renewal=query.renewal,
                timeout_seconds=self._seconds_left_to_queue(query),
                on_queued=query.on_queued,
                demand=query.demand,
            ) as permit:
                await self._wait_for_shared_token(query)
                query.make_timeout_error = _timeout_error
                try:
                    return await self._rotation.use(
                        operation, partial(self._call_with_clock_correction, query, permit)
                    )
                except _PermitRevoked:
                    continue

    def _seconds_left_to_queue(self, query: _Query) -> float:
        """Return how long a query may queue and still have enough time for a response."""
        needed = max(self._min_response_seconds, self._latency_seconds[query.key.operation])
        return query.deadline - needed - asyncio.get_running_loop().time()

    async def _wait_for_shared_token(self, query: _Query) -> None:
        """Wait for the configured rate limit, which replicas share. Raises: RateLimiterExhausted.

        Only the configured limit is shared. The limit that a replica learns from throttling is its own, but
        each throttling response lowers it in all replicas (`slow_down`).
        """
        per_second = self._settings.requests_per_second
        if not per_second:
            return
        left = self._seconds_left_to_queue(query)
        wait = await self._take_shared_token(per_second, saved=burst_size(per_second), timeout_seconds=left)
        if wait >= NOTICEABLE_SECONDS:
            query.on_queued(wait)
        if wait:
            await asyncio.sleep(wait)

    async def _call_with_clock_correction(
        self, query: _Query, permit: Permit, pair: KeyPair
    ) -> ParsedResponse:
        offset = self._signed_requests.clock_offset
        try:
            return await self._call(query, permit, pair)
        except TimestampRefused as exc:
            # The first refusal corrects the clock. The other calls in flight are refused, too, and each is
            # signed and sent again once. These repeats do not use the retry budget, which may be too small.
            if self._signed_requests.clock_offset == offset:
                raise
            self._metrics.upstream_retries.labels(query.key.operation, exc.code).inc()
        return await self._call(query, permit, pair)

    async def _call(self, query: _Query, permit: Permit, pair: KeyPair) -> ParsedResponse:
        operation, demand = query.key.operation, query.demand
        demand.committed = False
        if not demand.wanted:
            demand.drop(demand)
            await asyncio.sleep(0)  # `drop` cancels this task: the cancellation is raised here
        make_timeout_error = query.make_timeout_error
        query.make_timeout_error = _concurrency_error if permit.sent_at is None else make_timeout_error
        await self._concurrency_limit.acquire()
        call = _ConcurrentCall(self._concurrency_limit)
        try:
            began = self._check_before_sending(query, permit)
            query.make_timeout_error = make_timeout_error
            with self._breakers[operation].guard(no_response_seconds=self._min_response_seconds):
                permit.consume()
                demand.committed = True
                response = await self._signed_requests.send(
                    query.key, pair, number=next(query.call_numbers), on_complete=call.end
                )
        except asyncio.CancelledError:
            if demand.committed:  # the call is in flight, and the upstream works on it
                call.cancel()
            else:
                call.release()
            raise
        except BaseException:
            call.release()
            raise
        call.release()
        self._update_latency(operation, asyncio.get_running_loop().time() - began)
        return response

    def _check_before_sending(self, query: _Query, permit: Permit) -> float:
        """Return the present time of the event loop, if the call should still be made.

        Raises:
            _PermitRevoked: The upstream has throttled a call since the permit was issued.
            GatewayError: Less time is left than a response usually takes.
        """
        if permit.revoked and permit.sent_at is None:
            raise _PermitRevoked
        now = asyncio.get_running_loop().time()
        if query.deadline - now < self._latency_seconds[query.key.operation]:
            raise query.make_timeout_error()
        return now

    def _update_latency(self, operation: Operation, seconds: float) -> None:
        average = self._latency_seconds[operation] or seconds
        self._latency_seconds[operation] = average + _LATENCY_WEIGHT * (seconds - average)

    def _retry_delay(self, error: UpstreamError, retries: int, query: _Query) -> float | None:
        """Return the delay before the next attempt, or None if the query must fail with `error`."""
        if not query.demand.wanted:
            return None
        latest_start = query.deadline - self._latency_seconds[query.key.operation]
        seconds_left = latest_start - asyncio.get_running_loop().time()
        return self._retry_policy.delay(error, retries=retries, seconds_left=seconds_left)

    def _make_breaker(self, operation: Operation) -> CircuitBreaker:
        gauges = {state: self._metrics.upstream_circuit_state.labels(operation, state) for state in State}

        def update_gauges(now: State) -> None:
            for state, gauge in gauges.items():
                gauge.set(state is now)

        update_gauges(State.CLOSED)
        return CircuitBreaker(operation, on_change=update_gauges)
