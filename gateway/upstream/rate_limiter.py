"""The budget of upstream calls: whose turn it is, over all operations and tasks.

    turn -> a token is there, nobody queues -> go
         -> it would come after the caller's deadline -> BudgetSpent, at once
         -> else queue: renewals | first questions, served in turn -> go

A token bucket, filled at the pace (`pace.py`) that the settings and the upstream's refusals allow. Renewals
are served in order: a task has one flight at a time, so that is a round robin of the known tasks. First
questions are served round robin over clients (`fairqueue.py`): a client may name any number of new tasks, and
delays another client by one call a round. The two queues take turns, so that neither starves the other.
Waiters are woken, never polled: one timer runs to the next token. For the event loop's thread only.
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

NOTICEABLE_SECONDS = 0.1  # a wait that somebody who has another answer should be spared

# What a silence saves up. An upstream that counts by the second refuses what exceeds its count, so there is
# no second's worth; but a page's few tasks need not come one by one either.
_BURST_SECONDS = 0.1
_ROUNDING = 1e-9  # of a token
_TIMER_SECONDS = 0.001  # timers have that resolution: sooner than this the token is not there either

log = structlog.get_logger(__name__)


class Timer(Protocol):
    """What `call_later` returns."""

    def cancel(self) -> None:
        """Call nothing."""


class Permit:
    """One call's place in the budget: to be entered at once; given back at its end unless the call was made.

    `learn` is told of the end, and of the error that it ended with. `void`: upstream has slowed us down since
    it was given. Whoever still waits, for a connection say, is to ask again: given without a limit, turns
    might be any number.
    """

    __slots__ = ("_clock", "_learn", "sent_at", "void")

    def __init__(
        self, clock: Callable[[], float], learn: Callable[[Permit, BaseException | None], None]
    ) -> None:
        self._clock = clock
        self._learn = learn
        self.sent_at: float | None = None
        self.void = False

    def __enter__(self) -> Self:
        """Do nothing: it is open since it was given."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """End it; how the call ended says what upstream bears."""
        self._learn(self, error)

    def spend(self) -> None:
        """Note that the call is being made, now."""
        self.sent_at = self._clock()


class _Waiter:
    """A query that waits for its turn. `future` gets 0 for its turn, or the seconds for which it is refused.

    In the queue of first questions it is the `Place` of its demand.
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
    def first(self) -> bool:
        """Tell whether it is a first question."""
        return self._queue is not None

    def join(self, client: bytes) -> None:
        """See `Place`."""
        if self._queue is not None:
            self._queue.join(self, client)

    def leave(self, client: bytes, others: Iterable[bytes]) -> None:
        """See `Place`."""
        if self._queue is not None:
            self._queue.leave(self, client, others)


class RateLimiter:
    """Gives turns at `requests_per_second` (0: as many as the upstream bears). `clock` is monotonic."""

    def __init__(
        self,
        requests_per_second: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        call_later: Callable[[float, Callable[[], None]], Timer] | None = None,
    ) -> None:
        self._pace = AdaptiveLimit(requests_per_second or math.inf)
        self._clock = clock
        self._call_later = call_later
        self._renewals: OrderedDict[_Waiter, None] = OrderedDict()
        self._first: FairQueue[_Waiter] = FairQueue()  # questions about tasks of which no answer is known
        self._next = True  # whether a renewal is served next
        self._turns: set[Permit] = set()  # given, and not over
        self._level = 1.0  # tokens
        self._filled_at = clock()
        self._timer: Timer | None = None

    @property
    def per_second(self) -> float:
        """How many calls a second may be made now; `inf`: any number. Reading it changes nothing."""
        now = self._clock()
        relaxed = not self._anybody_waits() and self._pace.at_peace(now)
        return self._pace.most if relaxed else self._pace.per_second(now)

    @property
    def throttled_now(self) -> bool:
        """Tell whether the upstream's refusals slow us now."""
        self._relax()
        return self._pace.throttled_now

    def expected_wait(self, *, renewal: bool, client: bytes = b"") -> float:
        """Return for how many seconds a call that asked now, for this client, would wait."""
        self._fill()
        own, other = len(self._renewals), len(self._first)
        if not renewal:
            own, other = self._first.ahead(client), own
        # The other queue is served as often as ours while we wait, once more if it is its turn.
        return self._wait_behind(own + min(other, own + (self._next is not renewal)))

    async def turn(
        self,
        *,
        renewal: bool,
        timeout_seconds: float,
        on_queued: Callable[[float], None] = lambda _: None,
        demand: Demand | None = None,
    ) -> Permit:
        """Wait for a turn: `with await budget.turn(...) as turn`. Who makes the call says `turn.spend()`.

        Args:
            renewal: An older snapshot of the task is known.
            patience_seconds: The longest wait.
            held_up: Called with the seconds to wait as soon as they are noticeable.
            demand: The clients that a first question is asked for; others may join while it is queued.

        Raises:
            BudgetSpent: The wait would exceed the patience, or did, because other clients came.
        """
        self._relax()
        demand = demand or Demand(background=True)
        client = b"" if renewal else self._first.nearest(demand.clients)
        wait = self.expected_wait(renewal=renewal, client=client)
        if wait == 0 and not self._anybody_waits():
            self._level -= 1
        elif wait > timeout_seconds:
            raise _exhausted(wait)
        else:
            if wait >= NOTICEABLE_SECONDS:
                on_queued(wait)
            deadline = self._clock() + timeout_seconds
            await self._queue(_Waiter(deadline, on_queued, None if renewal else self._first), client, demand)
        turn = Permit(self._clock, self._end)
        self._turns.add(turn)
        return turn

    def slow_down(self, *, retry_after: float | None) -> None:
        """Learn from a refusal that another met with, just now."""
        self._slow_down(self._clock(), retry_after)

    async def _queue(self, waiter: _Waiter, client: bytes, demand: Demand) -> None:
        future = waiter.future
        if waiter.first:
            self._first.add(waiter, client)
        else:
            self._renewals[waiter] = None
        demand.place = waiter
        self._serve()
        try:
            refused = await future
        except asyncio.CancelledError:
            self._discard(waiter)
            if future.cancelled():
                self._serve()  # the timer may have been this one's
            elif future.result() == 0:
                # Its turn came in the very turn of the loop in which it was cancelled: the next one's now.
                self._give_back()
            raise
        finally:
            demand.place = None
        if refused:
            raise _exhausted(refused)

    def _discard(self, waiter: _Waiter) -> None:
        self._renewals.pop(waiter, None)
        self._first.discard(waiter)

    def _end(self, turn: Permit, error: BaseException | None) -> None:
        self._turns.discard(turn)
        if turn.sent_at is None:
            if not turn.void:
                self._give_back()
        elif error is None or isinstance(error, UpstreamRejected):
            self._pace.accepted(self._clock(), sent_at=turn.sent_at)
        elif isinstance(error, UpstreamThrottled):
            self._slow_down(turn.sent_at, error.retry_after)

    def _give_back(self) -> None:
        self._level += 1
        self._serve()

    def _serve(self) -> None:
        """Give turns to as many waiters as there are tokens, and set the timer for the next one."""
        self._fill()
        while self._wait_behind(0) == 0 and (waiter := self._pop()) is not None:
            self._level -= 1
            waiter.future.set_result(0.0)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._anybody_waits():
            call_later = self._call_later or asyncio.get_running_loop().call_later
            self._timer = call_later(max(self._wait_behind(0), _TIMER_SECONDS), self._serve)

    def _pop(self) -> _Waiter | None:
        for renewal in (self._next, not self._next):
            while (waiter := self._pop_one(renewal=renewal)) is not None:
                if waiter.future.done():
                    continue  # it was cancelled, and its task has not run since
                if self._clock() > waiter.deadline + NOTICEABLE_SECONDS:
                    # Admitted before other clients came, whose first questions went before.
                    waiter.future.set_result(max(self._wait_behind(0), _TIMER_SECONDS))
                    continue
                self._next = not renewal
                return waiter
        return None

    def _pop_one(self, *, renewal: bool) -> _Waiter | None:
        if not renewal:
            return self._first.pop()
        return self._renewals.popitem(last=False)[0] if self._renewals else None

    def _slow_down(self, sent_at: float, retry_after: float | None) -> None:
        self._fill()
        now, before = self._clock(), self._pace.throttled_now
        if not self._pace.throttled(now, sent_at=sent_at, retry_after=retry_after):
            return
        if not before:
            log.warning("slowed down by the upstream", per_second=round(self._pace.per_second(now), 1))
        for turn in self._turns:
            turn.void = True
        self._level = min(self._level, 1.0)
        self._look_again(now)
        self._serve()

    def _look_again(self, now: float) -> None:
        """Refuse those whose turn would now come too late, and tell the others what they are in for."""
        ahead = 0
        for waiter in list(self._in_order()):
            wait = self._wait_behind(ahead)
            if waiter.future.done() or now + wait > waiter.deadline:
                self._discard(waiter)
                if not waiter.future.done():
                    waiter.future.set_result(wait)
            else:
                ahead += 1
                waiter.on_queued(wait)

    def _in_order(self) -> Iterator[_Waiter]:
        queues = (self._renewals, self._first) if self._next else (self._first, self._renewals)
        for pair in zip_longest(*queues):
            for waiter in pair:
                if waiter is not None:
                    yield waiter

    def _anybody_waits(self) -> bool:
        return bool(self._renewals) or bool(self._first)

    def _wait_behind(self, ahead: int) -> float:
        """Return the seconds until there is a token beyond those for so many others."""
        now = self._clock()
        missing = ahead + 1 - self._level
        tokens = missing / self._pace.per_second(now) if missing > _ROUNDING else 0.0
        return max(self._pace.resumes_at - now, 0.0) + tokens

    def _fill(self) -> None:
        now = self._clock()
        per_second = self._pace.per_second(now)
        if per_second == math.inf:
            self._level = max(self._level, 1.0)
        else:
            gained = max(now - max(self._filled_at, self._pace.resumes_at), 0.0) * per_second
            full = burst_size(per_second)
            # What was given back may lie above the brim: it is not lost.
            self._level = max(self._level, min(self._level + gained, full))
        self._filled_at = now

    def _relax(self) -> None:
        # While somebody waits the limit is not idle: it grows, and is lifted when it is out of the way.
        if not self._anybody_waits() and self._pace.relax(self._clock()):
            log.info("slowed down by the upstream no more")


def burst_size(per_second: float) -> float:
    """Return how many calls a silence saves up at that pace."""
    return max(per_second * _BURST_SECONDS, 1.0)


def _exhausted(wait: float) -> RateLimiterExhausted:
    return RateLimiterExhausted("the budget of upstream calls is spent for now", retry_after=wait)
