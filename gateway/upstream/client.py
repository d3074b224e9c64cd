"""The upstream client: runs a query with its deadline and retries, within all limits for upstream calls.

    circuit breaker -> end of a credential trial -> permit of the rate limiter -> concurrency slot -> call
    the call fails  -> retry, from the start, while the deadline and the retry policy allow it
    no response yet -> perhaps a second call, if a snapshot of the task is known (`hedging.py`)

A query may need several calls: see `retry_policy.py` for all reasons to repeat a call. The query runs in the
asyncio task of an in-flight request, not in the asyncio task of a caller. This module enforces the
concurrency limit, `upstream.max_in_flight`. A call keeps its slot until its response has arrived or
`upstream.attempt_timeout_seconds` have passed, even after the deadline of the query. A call is not made if
neither a caller nor the gateway needs the response any more (`awaited_query.py`), or if less time is left
than the upstream usually takes. A deadline is a moment on the clock of the event loop.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count

from gateway.domain.errors import (
    CircuitOpen,
    GatewayError,
    Overloaded,
    RateLimited,
    TimestampRefused,
    UnattributedResponse,
    UpstreamError,
    UpstreamThrottled,
    UpstreamTimeout,
)
from gateway.domain.task import Operation, TaskKey
from gateway.settings.model import Upstream as UpstreamSettings
from gateway.telemetry.metrics import Metrics
from gateway.upstream.awaited_query import AwaitedQuery, make_upstream_timeout
from gateway.upstream.circuit_breaker import CircuitBreaker, State
from gateway.upstream.concurrency_limit import ConcurrencyLimit
from gateway.upstream.credential_rotation import CredentialRotation
from gateway.upstream.credentials import KeyPair
from gateway.upstream.hedging import Hedging, MustCallAgain
from gateway.upstream.rate_limiter import Permit, RateLimiter
from gateway.upstream.retry_policy import RetryPolicy
from gateway.upstream.shared_permits import TakePermits
from gateway.upstream.signed_calls import ParsedResponse, SignedCalls

_LATENCY_WEIGHT = 0.3  # weight of the latest response in the moving average of the latency


def _permit_deadline_error() -> GatewayError:
    return RateLimited("the rate limit for upstream calls is exhausted", retry_after=1.0)


def _concurrency_deadline_error() -> GatewayError:
    return Overloaded("the limit of concurrent upstream calls is reached", retry_after=1.0)


@dataclass(slots=True, eq=False)
class _Query:
    """A running query. `call_numbers` numbers all its calls from 0, hedged calls included."""

    key: TaskKey
    is_refresh: bool
    on_expected_wait: Callable[[float], None]
    began: float
    deadline: float
    state: AwaitedQuery
    call_numbers: Iterator[int] = field(default_factory=count)


class _PermitRevoked(Exception):
    """The permit was revoked before the call was sent (see `Permit.revoked`)."""


class UpstreamClient:
    """Queries the upstream.

    `take_permits` takes permits from the rate limiter that replicas share; None without such a limiter.
    `announce_throttling` announces a throttling response to the other replicas. `Store` describes both.
    """

    def __init__(
        self,
        settings: UpstreamSettings,
        *,
        signed_calls: SignedCalls,
        rotation: CredentialRotation,
        metrics: Metrics,
        take_permits: TakePermits | None,
        announce_throttling: Callable[[float | None], Awaitable[None]],
    ) -> None:
        self._announce_throttling = announce_throttling
        self._settings = settings
        self._signed_calls = signed_calls
        self._rotation = rotation
        self._metrics = metrics
        self._concurrency_limit = ConcurrencyLimit(settings.max_in_flight)
        metrics.upstream_in_flight_limit.set(settings.max_in_flight)
        self._retry_policy = RetryPolicy(settings.retries)
        self._rate_limiter = RateLimiter(settings.requests_per_second, take_permits=take_permits)
        metrics.upstream_rate_limit.set_function(lambda: self._rate_limiter.per_second)
        self._breakers = {operation: self._make_breaker(operation) for operation in Operation}
        # The series start at 0: `rate()` does not see an increase from an absent series to 1.
        self._abandoned = {operation: metrics.upstream_abandoned.labels(operation) for operation in Operation}
        # A call that takes longer than this is slow: half the maximum duration of a call. It has two uses.
        # 1. The circuit breaker counts a cancelled call as a failure only if it was slow.
        # 2. A query waits for a permit only if enough time is left after the wait: this time, or the usual
        #    duration of a call, whichever is longer.
        self._slow_call_seconds = min(settings.attempt_timeout_seconds, settings.timeout_seconds) / 2
        # Moving averages; 0.0 before the first response.
        self._latency_seconds = dict.fromkeys(Operation, 0.0)
        self._hedging: Hedging[_Query, ParsedResponse] = Hedging(
            self._make_hedged_call, usual_seconds=lambda query: self._latency_seconds[query.key.operation]
        )

    @property
    def problem_codes(self) -> list[str]:
        """The problem codes of the upstream's present failures; empty if it works."""
        last_error = self._signed_calls.last_problem_code
        codes = [last_error] if last_error else []
        if any(breaker.state is not State.CLOSED for breaker in self._breakers.values()):
            codes.append(CircuitOpen.code)
        if self._rate_limiter.has_learned_limit:
            codes.append(UpstreamThrottled.code)
        return list(dict.fromkeys(codes))

    @cached_property
    def _now(self) -> Callable[[], float]:
        # The clock of the event loop. Under Python 3.11, each `get_running_loop` makes a system call.
        return asyncio.get_running_loop().time

    def slow_down(self, retry_after: float | None) -> None:
        """Lower the rate limit because a replica has announced that the upstream throttles."""
        self._rate_limiter.slow_down(retry_after=retry_after)

    async def query(
        self,
        key: TaskKey,
        *,
        is_refresh: bool = False,
        timeout_seconds: float = math.inf,
        on_expected_wait: Callable[[float], None] = lambda _: None,
        on_retry: Callable[[], None] = lambda: None,
        awaited_query: AwaitedQuery | None = None,
    ) -> ParsedResponse:
        """Query a task, with retries, within `upstream.timeout_seconds` and `timeout_seconds`.

        Args:
            key: The task.
            is_refresh: An older snapshot of the task is known.
            timeout_seconds: Limit for the whole query, in addition to the setting.
            on_expected_wait: See `RateLimiter.acquire`.
            on_retry: Called before each retry, but not before a repeat on a new connection.
            awaited_query: The waiting callers; None if the gateway itself needs the response. Its
                attribute `runs_to_end` is True while a call is on the wire, and after the query's last call.

        Raises:
            UpstreamError: There is no response, or it is an error.
            Overloaded: No concurrency slot was free early enough before the deadline.
        """
        seconds = min(self._settings.timeout_seconds, timeout_seconds)
        now = self._now()
        deadline = now + seconds
        state = awaited_query or AwaitedQuery(keep_without_callers=True)
        query = _Query(key, is_refresh, on_expected_wait, now, deadline, state)
        self._retry_policy.on_query()
        retries = 0
        failure: UpstreamError | None = None
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    try:
                        return await self._hedging.run(query, self._call_within_limits)
                    except MustCallAgain:
                        query.state.repeated = True
                        continue
                    except (RateLimited, Overloaded, CircuitOpen) as exc:
                        # No call was made this time. The error of an earlier call is more informative.
                        raise copy(failure or exc) from None
                    except UpstreamError as exc:
                        if isinstance(exc, UpstreamThrottled):
                            await self._announce_throttling(exc.retry_after)
                        delay = self._delay_before_next_call(exc, retries, query)
                        if delay is None:
                            raise
                        query.state.runs_to_end = False
                        query.state.repeated = True
                        query.state.failure = failure = copy(exc)
                    retries += self._record_repeat(key.operation, failure, on_retry)
                    await asyncio.sleep(delay)
        except TimeoutError:
            raise query.state.make_deadline_error() from None
        except asyncio.CancelledError:
            if query.state.dropped:
                self._abandoned[key.operation].inc()
            raise

    def _record_repeat(
        self, operation: Operation, failure: UpstreamError, on_retry: Callable[[], None]
    ) -> int:
        """Count a repeat; return the number of retries that it uses: 0 for a repeat on a new connection."""
        self._metrics.upstream_retries.labels(operation, failure.code).inc()
        if isinstance(failure, UnattributedResponse):
            return 0
        on_retry()
        return 1

    async def _call_within_limits(self, query: _Query) -> ParsedResponse:
        """Make one call within all limits: circuit breaker, credential trial, rate limiter, concurrency slot.

        If the permit is revoked before the call is sent, the steps begin again. The call is repeated after a
        clock correction, and with another key pair. Failures are retried in `query`, and not here.
        """
        operation = query.key.operation
        while True:
            self._breakers[operation].check()  # an open circuit fails the query before it waits for anything
            query.state.make_deadline_error = make_upstream_timeout
            await self._rotation.wait_for_trial(operation)
            query.state.make_deadline_error = _permit_deadline_error
            # The permit is acquired before the slot: a query that waits for a permit must not hold a slot.
            with await self._rate_limiter.acquire(
                is_refresh=query.is_refresh,
                timeout_seconds=self._max_queue_seconds(query),
                on_expected_wait=query.on_expected_wait,
                awaited_query=query.state,
            ) as permit:
                query.state.make_deadline_error = make_upstream_timeout
                try:
                    return await self._rotation.use(
                        operation, partial(self._call_with_clock_correction, query, permit)
                    )
                except _PermitRevoked:
                    continue

    async def _make_hedged_call(self, query: _Query) -> ParsedResponse:
        """Make another call for a query whose call has no response yet."""
        self._metrics.upstream_retries.labels(query.key.operation, UpstreamTimeout.code).inc()
        query.state.repeated = True
        # The hedged call has a state of its own, because `_call` sets `runs_to_end` to False before it sends
        # a call. With a common state, the query could be dropped while its first call is on the wire.
        state = AwaitedQuery(keep_without_callers=True)
        hedged = _Query(query.key, True, lambda _: None, self._now(), query.deadline, state)  # noqa: FBT003
        hedged.call_numbers = query.call_numbers
        try:
            async with asyncio.timeout_at(query.deadline):
                return await self._call_within_limits(hedged)
        except TimeoutError:
            raise make_upstream_timeout() from None

    def _max_queue_seconds(self, query: _Query) -> float:
        """Return how long a query may wait for a permit and still have enough time for a response."""
        needed = max(self._slow_call_seconds, self._latency_seconds[query.key.operation])
        return query.deadline - needed - self._now()

    async def _call_with_clock_correction(
        self, query: _Query, permit: Permit, pair: KeyPair
    ) -> ParsedResponse:
        offset = self._signed_calls.clock_offset
        try:
            return await self._call(query, permit, pair)
        except TimestampRefused as exc:
            # The first refusal corrects the clock. All other calls in flight are refused, too. Each refused
            # call is signed again and repeated once. The retry budget would not be enough for all these
            # repeats, so the repeats do not use the budget. The retry metric counts them.
            if self._signed_calls.clock_offset == offset:
                raise
            self._metrics.upstream_retries.labels(query.key.operation, exc.code).inc()
        return await self._call(query, permit, pair)

    async def _call(self, query: _Query, permit: Permit, pair: KeyPair) -> ParsedResponse:
        operation, state = query.key.operation, query.state
        state.runs_to_end = False
        if not state.wanted:
            state.on_unwanted(state)
            await asyncio.sleep(0)  # raises CancelledError: `on_unwanted` has cancelled this asyncio task
        if permit.sent_at is None:
            state.make_deadline_error = _concurrency_deadline_error
        slot = await self._concurrency_limit.acquire(state, is_refresh=query.is_refresh)
        try:
            self._check_can_send(query, permit)
            began = self._now()
            state.make_deadline_error = make_upstream_timeout
            with self._breakers[operation].guard(
                is_refresh=query.is_refresh, cancelled_fails_after_seconds=self._slow_call_seconds
            ):
                permit.mark_sent()
                state.runs_to_end = True
                state.seconds_before_call = began - query.began
                with self._hedging.sending(query):
                    response = await self._signed_calls.send(
                        query.key, pair, number=next(query.call_numbers), on_upstream_done=slot.on_call_end
                    )
        except BaseException as exc:
            if isinstance(exc, asyncio.CancelledError) and state.runs_to_end:  # the call is on the wire
                slot.on_query_cancelled()
            else:
                slot.release()
            raise
        slot.release()
        self._update_latency(operation, self._now() - began)
        return response

    def _check_can_send(self, query: _Query, permit: Permit) -> None:
        """Check that the call may still be sent, and that enough time is left for its response.

        Raises:
            _PermitRevoked: The permit was revoked before the call was sent.
            GatewayError: Less time is left than a response usually takes (see `make_deadline_error`).
        """
        if permit.revoked and permit.sent_at is None:
            raise _PermitRevoked
        if query.deadline - self._now() < self._latency_seconds[query.key.operation]:
            raise query.state.make_deadline_error()

    def _update_latency(self, operation: Operation, seconds: float) -> None:
        average = self._latency_seconds[operation] or seconds
        self._latency_seconds[operation] = average + _LATENCY_WEIGHT * (seconds - average)

    def _delay_before_next_call(self, error: UpstreamError, retries: int, query: _Query) -> float | None:
        """Return the delay in seconds, or None if the query must fail; see `RetryPolicy.take_retry`."""
        if not query.state.wanted:
            return None
        latest_start = query.deadline - self._latency_seconds[query.key.operation]
        max_delay_seconds = latest_start - self._now()
        return self._retry_policy.take_retry(error, retries=retries, max_delay_seconds=max_delay_seconds)

    def _make_breaker(self, operation: Operation) -> CircuitBreaker:
        gauges = {state: self._metrics.upstream_circuit_state.labels(operation, state) for state in State}

        def update_gauges(now: State) -> None:
            for state, gauge in gauges.items():
                gauge.set(state is now)

        update_gauges(State.CLOSED)
        return CircuitBreaker(operation, on_change=update_gauges)
