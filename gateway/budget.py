"""The budget of upstream calls: whose turn it is, over all operations and tasks.

    turn -> a token is there, nobody queues -> go
         -> it would come after the caller's deadline -> BudgetSpent, at once
         -> else queue: renewals | first questions, served in turn, each in order -> go

A token bucket, filled at the pace (`pace.py`) that the settings and the upstream's refusals allow. A
task has one flight at a time, so first come, first served is a round robin of the tasks; the two
queues keep a crowd of new task IDs and the renewals of known tasks from starving each other.
Waiters are woken, never polled: one timer runs to the next token. For the event loop's thread only.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import NamedTuple, Protocol, Self

import structlog

from gateway.exceptions import BudgetSpent, UpstreamRejected, UpstreamThrottled
from gateway.pace import Pace

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


class Turn:
    """One call's place in the budget: to be entered at once; given back at its end unless the call was made.

    `learn` is told of the end, and of the error that it ended with. `void`: upstream has slowed us down since
    it was given. Whoever still waits, for a connection say, is to ask again: given without a limit, turns
    might be any number.
    """

    __slots__ = ("_clock", "_learn", "sent_at", "void")

    def __init__(
        self, clock: Callable[[], float], learn: Callable[[Turn, BaseException | None], None]
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


class _Waiter(NamedTuple):
    deadline: float
    held_up: Callable[[float], None]


# A waiter's future gets the seconds for which it is refused, or 0: its turn.
_Queue = OrderedDict[asyncio.Future[float], _Waiter]


class Budget:
    """Gives turns at `requests_per_second` (0: as many as the upstream bears). `clock` is monotonic."""

    def __init__(
        self,
        requests_per_second: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        call_later: Callable[[float, Callable[[], None]], Timer] | None = None,
    ) -> None:
        self._pace = Pace(requests_per_second or math.inf)
        self._clock = clock
        self._call_later = call_later
        self._queues: dict[bool, _Queue] = {True: OrderedDict(), False: OrderedDict()}  # by `renewal`
        self._next = True  # the queue that is served next
        self._turns: set[Turn] = set()  # given, and not over
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
    def slowed(self) -> bool:
        """Tell whether the upstream's refusals slow us now."""
        self._relax()
        return self._pace.slowed

    def expected_wait(self, *, renewal: bool) -> float:
        """Return for how many seconds a call that asked now would wait."""
        self._fill()
        own, other = len(self._queues[renewal]), len(self._queues[not renewal])
        # The other queue is served as often as ours while we wait, once more if it is its turn.
        return self._wait_behind(own + min(other, own + (self._next is not renewal)))

    async def turn(
        self, *, renewal: bool, patience_seconds: float, held_up: Callable[[float], None] = lambda _: None
    ) -> Turn:
        """Wait for a turn: `with await budget.turn(...) as turn`. Who makes the call says `turn.spend()`.

        `renewal`: an older snapshot of the task is known. `held_up` is told the seconds to wait as
        soon as they are noticeable. Raises: BudgetSpent when they exceed `patience_seconds`.
        """
        self._relax()
        wait = self.expected_wait(renewal=renewal)
        if wait == 0 and not self._anybody_waits():
            self._level -= 1
        elif wait > patience_seconds:
            raise _spent(wait)
        else:
            if wait >= NOTICEABLE_SECONDS:
                held_up(wait)
            await self._queue(_Waiter(self._clock() + patience_seconds, held_up), renewal=renewal)
        turn = Turn(self._clock, self._end)
        self._turns.add(turn)
        return turn

    def slow_down(self, *, retry_after: float | None) -> None:
        """Learn from a refusal that another met with, just now."""
        self._slow_down(self._clock(), retry_after)

    async def _queue(self, waiter: _Waiter, *, renewal: bool) -> None:
        future: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        queue = self._queues[renewal]
        queue[future] = waiter
        self._serve()
        try:
            refused = await future
        except asyncio.CancelledError:
            queue.pop(future, None)
            if future.cancelled():
                self._serve()  # the timer may have been this one's
            elif future.result() == 0:
                # Its turn came in the very turn of the loop in which it was cancelled: the next one's now.
                self._give_back()
            raise
        if refused:
            raise _spent(refused)

    def _end(self, turn: Turn, error: BaseException | None) -> None:
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
        while self._wait_behind(0) == 0 and (future := self._pop()) is not None:
            self._level -= 1
            future.set_result(0.0)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._anybody_waits():
            call_later = self._call_later or asyncio.get_running_loop().call_later
            self._timer = call_later(max(self._wait_behind(0), _TIMER_SECONDS), self._serve)

    def _pop(self) -> asyncio.Future[float] | None:
        for renewal in (self._next, not self._next):
            while self._queues[renewal]:
                future, _ = self._queues[renewal].popitem(last=False)
                if not future.done():  # else it was cancelled, and its task has not run since
                    self._next = not renewal
                    return future
        return None

    def _slow_down(self, sent_at: float, retry_after: float | None) -> None:
        self._fill()
        now, before = self._clock(), self._pace.slowed
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
        for queue, future, waiter in list(self._in_order()):
            wait = self._wait_behind(ahead)
            if future.done() or now + wait > waiter.deadline:
                del queue[future]
                if not future.done():
                    future.set_result(wait)
            else:
                ahead += 1
                waiter.held_up(wait)

    def _in_order(self) -> Iterator[tuple[_Queue, asyncio.Future[float], _Waiter]]:
        queues = self._queues[self._next], self._queues[not self._next]
        for pair in zip_longest(*(queue.items() for queue in queues)):
            for queue, entry in zip(queues, pair, strict=True):
                if entry is not None:
                    yield (queue, *entry)

    def _anybody_waits(self) -> bool:
        return any(self._queues.values())

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
            full = saved_up(per_second)
            # What was given back may lie above the brim: it is not lost.
            self._level = max(self._level, min(self._level + gained, full))
        self._filled_at = now

    def _relax(self) -> None:
        # While somebody waits the limit is not idle: it grows, and is lifted when it is out of the way.
        if not self._anybody_waits() and self._pace.relax(self._clock()):
            log.info("slowed down by the upstream no more")


def saved_up(per_second: float) -> float:
    """Return how many calls a silence saves up at that pace."""
    return max(per_second * _BURST_SECONDS, 1.0)


def _spent(wait: float) -> BudgetSpent:
    return BudgetSpent("the budget of upstream calls is spent for now", retry_after=wait)
