"""The rate limiter: issues a permit for an upstream call. One limit applies to all operations and tasks.

    acquire -> a token is available and no query is queued  -> permit
            -> the expected wait is longer than the timeout -> RateLimited, at once
            -> else wait in the queue (`query_queue.py`)   -> permit

If replicas share a rate limit, a query also needs a shared permit (`shared_permits.py`). A permit is used for
one call, and for the repeats of this call with a corrected clock or another key pair. Every other call needs
a permit of its own. The limiter is a token bucket. `AdaptiveRateLimit` sets its rate from the settings and
from throttling responses. A timer runs until the next token is available, and then serves the queue. Use the
limiter on the event loop's thread only.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Protocol, Self

import structlog

from gateway.domain.errors import RateLimited, UpstreamRejected, UpstreamThrottled
from gateway.upstream.adaptive_rate_limit import AdaptiveRateLimit
from gateway.upstream.awaited_query import AwaitedQuery
from gateway.upstream.query_queue import QueryQueue, QueuedQuery
from gateway.upstream.shared_permits import SharedPermits, TakePermits

# Shortest expected wait that `acquire` reports when a query is put into the queue. While it is in the queue,
# shorter waits are reported, too. After a report, the progress service serves a stale snapshot.
MIN_REPORTED_WAIT_SECONDS = 0.1
# A query at the head of the queue still gets a permit up to this long after its timeout: the timer that
# serves the queue may fire late. Expected waits are compared with the timeout without this tolerance.
_TIMEOUT_TOLERANCE_SECONDS = 0.1

# The bucket holds as many tokens as the rate yields in 0.1 s, but at least one. With a larger bucket, an
# upstream that counts calls per second would refuse a part of a burst. With a smaller one, queries would be
# queued even if a page requests only a few tasks at once.
_BURST_SECONDS = 0.1
_SECONDS_BETWEEN_NOTIFICATIONS = 0.2  # see `_on_shared_reply`; one round takes 14 ms for 5,000 queries
_ROUNDING = 1e-9  # tokens; tolerance for rounding errors
# Resolution of the event loop's timers, and smallest `retry_after` of an error.
_TIMER_RESOLUTION_SECONDS = 0.001

log = structlog.get_logger(__name__)


class Timer(Protocol):
    """What `call_later` returns."""

    def cancel(self) -> None:
        """Cancel the callback."""


class Permit:
    """The right to make one call, and its repeats with a corrected clock or another key pair.

    Use it as a context manager. When the context exits, `on_end` is called with the permit and the exception
    of the context, or None. If the call was not sent by then, the rate limiter puts the token of the permit
    back, unless the permit is revoked.

    Attributes:
        sent_at: When the call was sent; None before `mark_sent`.
        revoked: If the call is not sent yet, the query must acquire a new permit. The reason: the upstream
            has throttled another call, made by this or another replica, and would refuse this call.
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

    def mark_sent(self) -> None:
        """Record that the call is sent now."""
        self.sent_at = self._clock()


class RateLimiter:
    """Issues permits at `requests_per_second`. If that is 0, only throttling responses limit the rate.

    `clock` returns monotonic seconds. `take_permits` takes shared permits from the store. If it is given and
    `requests_per_second` is not 0, a query also needs a shared permit while the store works.
    """

    def __init__(
        self,
        requests_per_second: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        call_later: Callable[[float, Callable[[], None]], Timer] | None = None,
        take_permits: TakePermits | None = None,
    ) -> None:
        self._limit = AdaptiveRateLimit(requests_per_second or math.inf)
        self._clock = clock
        self._next_notification_at = 0.0  # see `_on_shared_reply`
        self._call_later = call_later
        self._queue = QueryQueue()
        self._permits: set[Permit] = set()  # outstanding
        self._tokens = 1.0
        self._refilled_at = clock()
        self._timer: Timer | None = None
        self._shared: SharedPermits | None = None
        if take_permits is not None and requests_per_second:
            self._shared = SharedPermits(
                take_permits,
                per_second=requests_per_second,
                burst=burst_size(requests_per_second),
                on_reply=self._on_shared_reply,
            )

    @property
    def per_second(self) -> float:
        """The present limit in calls per second, or `inf`. Metrics read it, so it has no side effects."""
        return self._limit.per_second(self._clock()) if self.has_learned_limit else self._limit.max_per_second

    @property
    def has_learned_limit(self) -> bool:
        """Whether throttling responses limit the rate now. Reading it has no side effects.

        A limit that the next `acquire` would remove does not count.
        """
        removable = not self._queue and self._limit.can_remove(self._clock())
        return self._limit.has_learned_limit and not removable

    def expected_wait(self, *, is_refresh: bool, client: bytes = b"") -> float:
        """Return the seconds that a query of this client would wait if it called `acquire` now."""
        self._refill()
        ahead = self._queue.count_ahead(is_refresh=is_refresh, client=client)
        return self._seconds_until_token(ahead + self._ahead_in_other_replicas(is_refresh=is_refresh))

    async def acquire(
        self,
        *,
        is_refresh: bool,
        timeout_seconds: float,
        on_expected_wait: Callable[[float], None] = lambda _: None,
        awaited_query: AwaitedQuery | None = None,
    ) -> Permit:
        """Wait for a permit: `with await limiter.acquire(...) as permit`, then `permit.mark_sent()` to send.

        Args:
            is_refresh: An older snapshot of the task is known.
            timeout_seconds: The longest wait. The timer may add up to 0.1 s.
            on_expected_wait: Called with the expected wait in seconds, which may be 0, at these moments:
                - when the query is put into the queue, if the wait is at least `MIN_REPORTED_WAIT_SECONDS`
                - while the query is queued, each time the limit falls or a pause begins
                - while the query is queued, after a reply about shared permits, at most every 0.2 s
            awaited_query: The query and its waiting clients; None for a query of the gateway itself. Each
                client has a queue of first queries. The query enters the shortest queue of its clients.

        Raises:
            RateLimited: The expected wait exceeds the timeout. A query that is already queued may
                fail, too, when its expected wait becomes longer.
        """
        self._remove_unneeded_limit()
        awaited = awaited_query or AwaitedQuery(keep_without_callers=True)
        client = b"" if is_refresh else self._queue.client_with_shortest_queue(awaited.clients)
        wait = self.expected_wait(is_refresh=is_refresh, client=client)
        if wait == 0 and not self._queue and self._try_take_shared_permit(is_refresh=is_refresh):
            self._tokens -= 1
        elif wait > timeout_seconds:
            raise _rate_limit_error(wait)
        else:
            if wait >= MIN_REPORTED_WAIT_SECONDS:
                on_expected_wait(wait)
            expires_at = self._clock() + timeout_seconds
            query = self._queue.add(
                is_refresh=is_refresh, client=client, expires_at=expires_at, on_expected_wait=on_expected_wait
            )
            await self._wait_in_queue(query, awaited)
        permit = Permit(self._clock, self._on_permit_end)
        self._permits.add(permit)
        return permit

    def slow_down(self, *, retry_after: float | None) -> None:
        """Lower the limit because a replica has announced that the upstream throttles.

        A replica also receives its own announcement. This does not lower the limit again, because the limit
        falls at most once per second. But an announcement with a `retry_after` always starts a pause, and
        revokes all permits.
        """
        self._on_throttled(self._clock(), retry_after)

    async def _wait_in_queue(self, query: QueuedQuery, awaited: AwaitedQuery) -> None:
        future = query.future
        awaited.queue_entry = query
        self._serve_queue()
        try:
            refused_retry_after = await future
        except asyncio.CancelledError:
            self._queue.discard(query)
            if future.cancelled():
                self._serve_queue()  # cancel the timer if no other query waits
            elif future.result() is None:  # it has received a permit, and cannot use it
                self._return_token()
            raise
        finally:
            awaited.queue_entry = None
        if refused_retry_after is not None:
            raise _rate_limit_error(refused_retry_after)

    def _on_permit_end(self, permit: Permit, error: BaseException | None) -> None:
        self._permits.discard(permit)
        if permit.sent_at is None:
            if not permit.revoked:
                self._return_token()
        elif error is None or isinstance(error, UpstreamRejected):
            self._limit.on_accepted(self._clock(), sent_at=permit.sent_at)
        elif isinstance(error, UpstreamThrottled):
            self._on_throttled(permit.sent_at, error.retry_after)

    def _return_token(self) -> None:
        self._tokens += 1
        if self._shared is not None:
            self._shared.put_back()
        self._serve_queue()

    def _serve_queue(self) -> None:
        """Give permits to as many queries as there are tokens, and set the timer for the next token."""
        self._refill()
        while self._seconds_until_token(0) == 0 and (query := self._pop_next()) is not None:
            self._tokens -= 1
            query.future.set_result(None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wait = self._seconds_until_token(0)
        if self._shared is not None:
            # Permits that are taken here are lost for other replicas, so request only what can be used now.
            usable = math.floor(self._tokens + _ROUNDING) if wait == 0 else 0
            refreshes = min(self._queue.count(is_refresh=True), usable)
            first_queries = min(self._queue.count(is_refresh=False), usable)
            self._shared.request(refreshes=refreshes, first_queries=first_queries)
        # If there is a token (the wait is 0), the queries wait for shared permits, and need no timer.
        if self._queue and (self._shared is None or wait > 0):
            call_later = self._call_later or asyncio.get_running_loop().call_later
            self._timer = call_later(max(wait, _TIMER_RESOLUTION_SECONDS), self._serve_queue)

    def _pop_next(self) -> QueuedQuery | None:
        """Remove and return the next query that gets a permit, or None.

        Queries at the head of the queue whose timeout has passed are also removed, and fail.
        """
        for is_refresh in self._queue.service_order():
            if self._shared is not None and not self._shared.has_permit(is_refresh=is_refresh):
                continue
            while (query := self._queue.pop(is_refresh=is_refresh)) is not None:
                if query.future.done():
                    continue  # cancelled: its asyncio task will run soon
                if self._clock() > query.expires_at + _TIMEOUT_TOLERANCE_SECONDS:
                    # The wait was longer than expected: queries of other clients took their turn first.
                    query.future.set_result(max(self._seconds_until_token(0), _TIMER_RESOLUTION_SECONDS))
                    continue
                self._try_take_shared_permit(is_refresh=is_refresh)
                self._queue.record_served(is_refresh=is_refresh)
                return query
        return None

    def _try_take_shared_permit(self, *, is_refresh: bool) -> bool:
        return self._shared is None or self._shared.take(is_refresh=is_refresh)

    def _on_shared_reply(self) -> None:
        self._serve_queue()
        # Other replicas may lengthen the waits. Tell all queued queries, but not after each reply.
        if self._queue and self._clock() >= self._next_notification_at:
            self._next_notification_at = self._clock() + _SECONDS_BETWEEN_NOTIFICATIONS
            self._refuse_or_notify(self._clock())

    def _on_throttled(self, sent_at: float, retry_after: float | None) -> None:
        # Remove a learned limit that is not needed any more: `on_throttled` would lower it.
        self._remove_unneeded_limit()
        self._refill()
        now, was_throttled = self._clock(), self._limit.has_learned_limit
        if not self._limit.on_throttled(now, sent_at=sent_at, retry_after=retry_after):
            return
        if not was_throttled:
            log.warning("upstream_throttled", per_second=round(self._limit.per_second(now), 1))
        for permit in self._permits:
            permit.revoked = True
        self._tokens = min(self._tokens, 1.0)
        self._refuse_or_notify(now)
        self._serve_queue()

    def _refuse_or_notify(self, now: float) -> None:
        """Refuse the queries that would be served after their timeout; report the wait of the others."""
        ahead = 0
        for query in list(self._queue):
            wait = self._seconds_until_token(
                ahead + self._ahead_in_other_replicas(is_refresh=query.is_refresh)
            )
            if query.future.done() or now + wait > query.expires_at:
                self._queue.discard(query)
                if not query.future.done():
                    query.future.set_result(max(wait, _TIMER_RESOLUTION_SECONDS))
            else:
                ahead += 1
                query.on_expected_wait(wait)

    def _ahead_in_other_replicas(self, *, is_refresh: bool) -> int:
        """Return how many queries of other replicas are served before a query of this replica."""
        return 0 if self._shared is None else self._shared.ahead_in_other_replicas(is_refresh=is_refresh)

    def _seconds_until_token(self, ahead: int) -> float:
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
            # The refill stops at the size of the bucket. But tokens of unused permits are put back even into
            # a full bucket, because the upstream has received no call for them.
            self._tokens = max(self._tokens, min(self._tokens + gained, size))
        self._refilled_at = now

    def _remove_unneeded_limit(self) -> None:
        # The limit is not removed while queries are queued. It rises, so the queue becomes empty in the end.
        if not self._queue and self._limit.remove_if_unthrottled(self._clock()):
            log.info("upstream_throttling_ended")


def burst_size(per_second: float) -> float:
    """Return the size of the bucket, in tokens, at this rate."""
    return max(per_second * _BURST_SECONDS, 1.0)


def _rate_limit_error(wait: float) -> RateLimited:
    return RateLimited("the rate limit for upstream calls is exhausted", retry_after=wait)
