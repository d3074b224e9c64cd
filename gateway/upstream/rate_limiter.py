"""The rate limiter: issues a permit for each upstream call. One limit applies to all operations and tasks.

    acquire -> a token is available and no query is queued -> permit
            -> the token would come after the deadline -> RateLimiterExhausted, at once
            -> else queue: renewals | first queries, served alternately -> permit

It is a token bucket. `AdaptiveLimit` sets its rate from the settings and from throttling responses. A query
is a *renewal* if an older snapshot of its task is known, and a *first query* otherwise.

Renewals are served first in, first out. A task has one query at a time, so no task is served twice before all
others. First queries are served round robin over clients (`FairQueue`): a client that requests many new tasks
delays another client by only one call per round. The two queues are served alternately, so that both make
progress. A timer runs until the next token is available, and then serves the queues. Use the limiter on the
event loop's thread only.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from typing import Protocol, Self

import structlog

from gateway.domain.errors import RateLimiterExhausted, UpstreamRejected, UpstreamThrottled
from gateway.upstream.adaptive_limit import AdaptiveLimit
from gateway.upstream.demand import Demand
from gateway.upstream.fair_queue import FairQueue
from gateway.upstream.shared_permits import SharedPermits, TakePermits

NOTICEABLE_SECONDS = 0.1  # callers for which a stale snapshot is available do not wait longer than this

# Size of the bucket, as the time in which it fills. With a larger bucket, an upstream that counts calls per
# second would refuse a part of a burst. With a smaller one, queries would be queued even if a page requests
# only a few tasks at once.
_BURST_SECONDS = 0.1
_ROUNDING = 1e-9  # tokens; tolerance for rounding errors
_TIMER_SECONDS = 0.001  # resolution of the event loop's timers; an earlier timer would find no token yet

log = structlog.get_logger(__name__)


class Timer(Protocol):
    """What `call_later` returns."""

    def cancel(self) -> None:
        """Cancel the callback."""


class Permit:
    """The right to make one call: a context manager. A permit that was not consumed returns its token.

    When the context exits, `on_end` is called with the permit and the exception, or None.

    Attributes:
        sent_at: When the call was sent; None before `consume`.
        revoked: The upstream has throttled a call since the permit was issued. If the permit is not consumed
            yet, the query must acquire a new one. The reason: before the first throttling response there may
            be no limit, and very many permits may be outstanding.
    """

    __slots__ = ("_clock", "_on_end", "revoked", "sent_at")

    def __init__(
        self, clock: Callable[[], float], on_end: Callable[[Permit, BaseException | None], None]
    ) -> None:
        self._clock = clock
        self._on_end = on_end
        self.sent_at: float | None = None
        self.revoked = False

    def __enter__(self) -> Self:
        """Return the permit."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Pass the outcome of the call to `on_end`."""
        self._on_end(self, error)

    def consume(self) -> None:
        """Record that the call is sent now."""
        self.sent_at = self._clock()


class _Waiter:
    """A queued query. It implements `QueueEntry`, whose methods have an effect for first queries only.

    The result of `future` is 0.0 when the query gets a permit. If the permit would come after `deadline`, the
    result is the `retry_after` of the error, in seconds.
    """

    __slots__ = ("_queue", "deadline", "future", "on_queued")

    def __init__(
        self, deadline: float, on_queued: Callable[[float], None], queue: FairQueue[_Waiter] | None
    ) -> None:
        self.future: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self.deadline = deadline
        self.on_queued = on_queued
        self._queue = queue

    @property
    def renewal(self) -> bool:
        """Tell whether an older snapshot of the task is known."""
        return self._queue is None

    def join(self, client: bytes) -> None:
        """See `QueueEntry`."""
        if self._queue is not None:
            self._queue.join(self, client)

    def leave(self, client: bytes, others: Iterable[bytes]) -> None:
        """See `QueueEntry`."""
        if self._queue is not None:
            self._queue.leave(self, client, others)


class RateLimiter:
    """Issues permits at `requests_per_second`. With 0, only throttling responses limit the rate.

    `clock` returns monotonic seconds. `take_shared` takes permits from the rate limiter that replicas share;
    a query then needs a token of this replica and a shared permit.
    """

    def __init__(
        self,
        requests_per_second: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        call_later: Callable[[float, Callable[[], None]], Timer] | None = None,
        take_shared: TakePermits | None = None,
    ) -> None:
        self._limit = AdaptiveLimit(requests_per_second or math.inf)
        self._clock = clock
        self._call_later = call_later
        self._renewals: OrderedDict[_Waiter, None] = OrderedDict()
        self._first_queries: FairQueue[_Waiter] = FairQueue()
        self._renewal_next = True  # which queue is served next
        self._permits: set[Permit] = set()  # outstanding
        self._tokens = 1.0
        self._refilled_at = clock()
        self._timer: Timer | None = None
        self._shared: SharedPermits | None = None
        if take_shared is not None and requests_per_second:
            self._shared = SharedPermits(
                take_shared,
                per_second=requests_per_second,
                burst=burst_size(requests_per_second),
                on_grant=self._on_shared_grant,
            )

    @property
    def per_second(self) -> float:
        """The present limit in calls per second, or `inf`. A read has no side effects: metrics read it."""
        now = self._clock()
        removable = not self._any_queued() and self._limit.can_remove(now)
        return self._limit.max_per_second if removable else self._limit.per_second(now)

    @property
    def has_learned_limit(self) -> bool:
        """Tell whether throttling by the upstream limits the rate now."""
        self._remove_limit_if_idle()
        return self._limit.has_learned_limit

    def expected_wait(self, *, renewal: bool, client: bytes = b"") -> float:
        """Return the seconds that a query of this client would wait if it called `acquire` now."""
        self._refill()
        same_queue, other_queue = len(self._renewals), len(self._first_queries)
        if not renewal:
            same_queue, other_queue = self._first_queries.count_ahead(client), same_queue
        # The queues are served alternately: for each query ahead in the same queue, one of the other queue is
        # served, and one more if the other queue is next.
        from_other_queue = min(other_queue, same_queue + (self._renewal_next is not renewal))
        elsewhere = 0 if self._shared is None else self._shared.queued_elsewhere(renewal=renewal)
        return self._wait_behind(same_queue + from_other_queue + elsewhere)

    async def acquire(
        self,
        *,
        renewal: bool,
        timeout_seconds: float,
        on_queued: Callable[[float], None] = lambda _: None,
        demand: Demand | None = None,
    ) -> Permit:
        """Wait for a permit: `with await limiter.acquire(...) as permit`, then `permit.consume()` to send.

        Args:
            renewal: An older snapshot of the task is known.
            timeout_seconds: The longest wait.
            on_queued: Called with the expected wait in seconds if that is at least `NOTICEABLE_SECONDS`.
                Called again, with the new expected wait, when throttling lowers the limit.
            demand: The clients whose callers wait for the response. A first query is queued for them. More
                clients may join while it is queued.

        Raises:
            RateLimiterExhausted: The expected wait exceeds the timeout. This may also happen to a query that
                is already queued: if the limit falls, or if queries of other clients are served before it.
        """
        self._remove_limit_if_idle()
        demand = demand or Demand(background=True)
        client = b"" if renewal else self._first_queries.shortest(demand.clients)
        wait = self.expected_wait(renewal=renewal, client=client)
        if wait == 0 and not self._any_queued() and self._take_shared(renewal=renewal):
            self._tokens -= 1
        elif wait > timeout_seconds:
            raise _exhausted(wait)
        else:
            if wait >= NOTICEABLE_SECONDS:
                on_queued(wait)
            deadline = self._clock() + timeout_seconds
            queue = None if renewal else self._first_queries
            await self._wait_in_queue(_Waiter(deadline, on_queued, queue), client, demand)
        permit = Permit(self._clock, self._on_permit_end)
        self._permits.add(permit)
        return permit

    def slow_down(self, *, retry_after: float | None) -> None:
        """Lower the limit because a replica has announced that the upstream throttles.

        Announcements of this replica have no further effect: its limit is already lowered.
        """
        self._slow_down(self._clock(), retry_after)

    async def _wait_in_queue(self, waiter: _Waiter, client: bytes, demand: Demand) -> None:
        future = waiter.future
        if waiter.renewal:
            self._renewals[waiter] = None
        else:
            self._first_queries.add(waiter, client)
        demand.queue_entry = waiter
        self._serve()
        try:
            retry_after = await future
        except asyncio.CancelledError:
            self._discard(waiter)
            if future.cancelled():
                self._serve()  # cancel the timer if no other query waits
            elif future.result() == 0:
                # The query got a permit, and was cancelled before it could use the permit.
                self._return_token()
            raise
        finally:
            demand.queue_entry = None
        if retry_after:
            raise _exhausted(retry_after)

    def _discard(self, waiter: _Waiter) -> None:
        self._renewals.pop(waiter, None)
        self._first_queries.discard(waiter)

    def _on_permit_end(self, permit: Permit, error: BaseException | None) -> None:
        self._permits.discard(permit)
        if permit.sent_at is None:
            if not permit.revoked:
                self._return_token()
        elif error is None or isinstance(error, UpstreamRejected):
            self._limit.on_accepted(self._clock(), sent_at=permit.sent_at)
        elif isinstance(error, UpstreamThrottled):
            self._slow_down(permit.sent_at, error.retry_after)

    def _return_token(self) -> None:
        self._tokens += 1
        if self._shared is not None:
            self._shared.put_back()
        self._serve()

    def _serve(self) -> None:
        """Wake as many waiters as there are tokens, and set the timer for the next token."""
        self._refill()
        while self._wait_behind(0) == 0 and (waiter := self._pop()) is not None:
            self._tokens -= 1
            waiter.future.set_result(0.0)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._shared is not None:
            # Request only permits that this replica can use now: other replicas cannot use the ones it holds.
            usable = math.floor(self._tokens + _ROUNDING) if self._wait_behind(0) == 0 else 0
            renewals = min(len(self._renewals), usable)
            first_queries = min(len(self._first_queries), usable)
            self._shared.request(renewals=renewals, first_queries=first_queries)
        if self._any_queued() and (self._shared is None or self._wait_behind(0) > 0):
            call_later = self._call_later or asyncio.get_running_loop().call_later
            self._timer = call_later(max(self._wait_behind(0), _TIMER_SECONDS), self._serve)

    def _pop(self) -> _Waiter | None:
        for renewal in (self._renewal_next, not self._renewal_next):
            if self._shared is not None and not self._shared.available(renewal=renewal):
                continue
            while (waiter := self._pop_one(renewal=renewal)) is not None:
                if waiter.future.done():
                    continue  # cancelled: its asyncio task will run soon, and call `_discard`
                if self._clock() > waiter.deadline + NOTICEABLE_SECONDS:
                    # It has waited too long: first queries of other clients were served before it, although
                    # they were queued later.
                    waiter.future.set_result(max(self._wait_behind(0), _TIMER_SECONDS))
                    continue
                self._take_shared(renewal=renewal)
                self._renewal_next = not renewal
                return waiter
        return None

    def _take_shared(self, *, renewal: bool) -> bool:
        return self._shared is None or self._shared.take(renewal=renewal)

    def _on_shared_grant(self) -> None:
        self._serve()
        if self._any_queued():  # other replicas may have queued more queries, which lengthen the wait
            self._recheck_deadlines(self._clock())

    def _pop_one(self, *, renewal: bool) -> _Waiter | None:
        if not renewal:
            return self._first_queries.pop()
        return self._renewals.popitem(last=False)[0] if self._renewals else None

    def _slow_down(self, sent_at: float, retry_after: float | None) -> None:
        self._refill()
        now, was_throttled = self._clock(), self._limit.has_learned_limit
        if not self._limit.on_throttled(now, sent_at=sent_at, retry_after=retry_after):
            return
        if not was_throttled:
            log.warning("upstream_throttled", per_second=round(self._limit.per_second(now), 1))
        for permit in self._permits:
            permit.revoked = True
        self._tokens = min(self._tokens, 1.0)
        self._recheck_deadlines(now)
        self._serve()

    def _recheck_deadlines(self, now: float) -> None:
        """Refuse the waiters that would be served after their deadline. Call `on_queued` of the others."""
        ahead = 0
        for waiter in list(self._in_order()):
            elsewhere = 0 if self._shared is None else self._shared.queued_elsewhere(renewal=waiter.renewal)
            wait = self._wait_behind(ahead + elsewhere)
            if waiter.future.done() or now + wait > waiter.deadline:
                self._discard(waiter)
                if not waiter.future.done():
                    waiter.future.set_result(wait)
            else:
                ahead += 1
                waiter.on_queued(wait)

    def _in_order(self) -> Iterator[_Waiter]:
        """Yield the waiters in the order in which they will be served."""
        queues = (self._renewals, self._first_queries)
        for pair in zip_longest(*(queues if self._renewal_next else reversed(queues))):
            for waiter in pair:
                if waiter is not None:
                    yield waiter

    def _any_queued(self) -> bool:
        return bool(self._renewals) or bool(self._first_queries)

    def _wait_behind(self, ahead: int) -> float:
        """Return the seconds until a token is available for a query behind `ahead` others."""
        now = self._clock()
        missing = ahead + 1 - self._tokens  # tokens
        refill_seconds = missing / self._limit.per_second(now) if missing > _ROUNDING else 0.0
        pause_seconds = max(self._limit.resumes_at - now, 0.0)
        return pause_seconds + refill_seconds

    def _refill(self) -> None:
        now = self._clock()
        per_second = self._limit.per_second(now)
        if per_second == math.inf:
            self._tokens = max(self._tokens, 1.0)
        else:
            gained = max(now - max(self._refilled_at, self._limit.resumes_at), 0.0) * per_second
            size = burst_size(per_second)
            # Tokens of unused permits are returned and kept, even beyond the size of the bucket.
            self._tokens = max(self._tokens, min(self._tokens + gained, size))
        self._refilled_at = now

    def _remove_limit_if_idle(self) -> None:
        # Not while queries are queued: they wait because of this limit. It rises until the queues are empty.
        if not self._any_queued() and self._limit.remove_if_unthrottled(self._clock()):
            log.info("upstream_throttling_ended")


def burst_size(per_second: float) -> float:
    """Return the size of the bucket, in tokens, at this rate."""
    return max(per_second * _BURST_SECONDS, 1.0)


def _exhausted(wait: float) -> RateLimiterExhausted:
    return RateLimiterExhausted("the rate limit for upstream calls is exhausted", retry_after=wait)
