"""One question to the upstream: asked in its turn, again if that may help, and no longer than its deadline.

    query -> deadline, retries -> breaker -> budget -> rotation: which pair -> slot -> calls.make -> answer

Detached flights ask, never a caller's own task; the slots alone bound the calls in the air, so
nothing ever queues for a connection. A slot is taken for as long as upstream works on the call, also when
the query that made it has met its deadline. No call is made that nothing wants any more (`demand.py`), nor
one that has less time left than upstream usually takes.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Iterator
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Protocol

from gateway.breaker import Breaker, State
from gateway.budget import NOTICEABLE_SECONDS, Budget, Turn, saved_up
from gateway.calls import Answer, Calls
from gateway.credentials import Pair
from gateway.demand import Demand
from gateway.exceptions import (
    BudgetSpent,
    GatewayError,
    Overloaded,
    UpstreamClock,
    UpstreamError,
    UpstreamOpen,
    UpstreamThrottled,
    UpstreamTimeout,
)
from gateway.metrics import Metrics
from gateway.models import Operation, TaskKey
from gateway.rotation import Rotation
from gateway.settings import Upstream as UpstreamSettings

_BACKOFF_SECONDS = 0.1  # doubled by each retry, then taken at random between 0 and that
_RETRY_SHARE = 0.2  # of recent calls that may be retries: a sick upstream is not asked threefold
_RETRY_RESERVE = 10.0
_USUAL_WEIGHT = 0.3  # of the newest answer in the moving average of how long they take


def _no_turn() -> GatewayError:
    return BudgetSpent("the budget of upstream calls is spent for now", retry_after=1.0)


def _no_slot() -> GatewayError:
    return Overloaded("the gateway makes as many upstream calls as it may", retry_after=1.0)


def _no_answer() -> GatewayError:
    return UpstreamTimeout("the upstream did not answer in time")


@dataclass(slots=True)
class _Query:
    """A query under way. `late` makes what to tell if its deadline strikes now.

    `numbers` counts its calls: more than attempts, for another pair or the clock's correction may
    bring one more.
    """

    key: TaskKey
    renewal: bool
    held_up: Callable[[float], None]
    deadline: float
    demand: Demand
    late: Callable[[], GatewayError] = _no_turn
    numbers: Iterator[int] = field(default_factory=count)


class _Void(Exception):
    """The turn was taken back before the call was made."""


class _Slot:
    """One of the slots, given back once: when its query has its answer, or is gone and the call has ended."""

    __slots__ = ("_ended", "_gone", "_slots")

    def __init__(self, slots: asyncio.Semaphore) -> None:
        self._slots: asyncio.Semaphore | None = slots
        self._ended = self._gone = False

    def end_call(self) -> None:
        """Note that nothing of the call is under way any more. Its answer may still be read."""
        self._ended = True
        if self._gone:
            self.free()

    def leave(self) -> None:
        """Note that the query is gone: nothing reads the answer."""
        self._gone = True
        if self._ended:
            self.free()

    def free(self) -> None:
        """Give it back, unless it was already."""
        slots, self._slots = self._slots, None
        if slots is not None:
            slots.release()


class Token(Protocol):
    """Takes one call out of the budget that all replicas have in common; see `Store.token`."""

    async def __call__(self, per_second: float, *, saved: float, patience_seconds: float) -> float:
        """Return the seconds to wait for it. Raises: BudgetSpent."""


class Upstream:
    """Asks the upstream, by way of `calls`.

    `token`: the other replicas' say in the budget. `tell_slowed`: lets them know of a refusal; see `Store`.
    """

    def __init__(
        self,
        settings: UpstreamSettings,
        *,
        calls: Calls,
        rotation: Rotation,
        metrics: Metrics,
        token: Token,
        tell_slowed: Callable[[float | None], Awaitable[None]],
    ) -> None:
        self._token = token
        self._tell_slowed = tell_slowed
        self._settings = settings
        self._calls = calls
        self._rotation = rotation
        self._metrics = metrics
        self._slots = asyncio.Semaphore(settings.max_in_flight)
        self._retry_tokens = _RETRY_RESERVE
        self._budget = Budget(settings.requests_per_second)
        metrics.upstream_budget.set_function(lambda: self._budget.per_second)
        self._breakers = {operation: self._breaker(operation) for operation in Operation}
        # From 0 on: a rate does not see the increase from no series to 1.
        self._abandoned = {operation: metrics.upstream_abandoned.labels(operation) for operation in Operation}
        # Half an attempt's time. A silence that long, ended by the caller's deadline, speaks against
        # upstream: one that began just before the deadline was given no chance. And nobody queues for a turn
        # that leaves less: in a queue as long as the deadline every call would be given up once it is made.
        self._silence_seconds = min(settings.attempt_timeout_seconds, settings.timeout_seconds) / 2
        self._usual_seconds = dict.fromkeys(Operation, 0.0)  # that an answer takes: moving averages

    @property
    def troubles(self) -> list[str]:
        """The problem codes that describe how the upstream is doing; none: well."""
        codes = [self._calls.trouble] if self._calls.trouble else []
        if any(breaker.state is not State.CLOSED for breaker in self._breakers.values()):
            codes.append(UpstreamOpen.code)
        if self._budget.slowed:
            codes.append(UpstreamThrottled.code)
        return list(dict.fromkeys(codes))

    def slow_down(self, retry_after: float | None) -> None:
        """Do as if upstream had just refused a call of ours: it has one of another replica's."""
        self._budget.slow_down(retry_after=retry_after)

    async def query(
        self,
        key: TaskKey,
        *,
        renewal: bool = False,
        patience_seconds: float = math.inf,
        held_up: Callable[[float], None] = lambda _: None,
        demand: Demand | None = None,
    ) -> Answer:
        """Ask, again if that may help, until `upstream.timeout_seconds` or the patience have passed.

        Args:
            key: The task.
            renewal: An older answer is known.
            patience_seconds: The longest time that the answer is waited for.
            held_up: Called with the seconds when the query has to wait for the budget.
            demand: Who wants the answer; it records that a call is on the wire. None: the gateway itself.

        Raises:
            UpstreamError: There is no answer.
            Overloaded: No slot became free in time.
        """
        most = min(self._settings.timeout_seconds, patience_seconds)
        deadline = asyncio.get_running_loop().time() + most
        query = _Query(key, renewal, held_up, deadline, demand or Demand(background=True))
        self._retry_tokens = min(self._retry_tokens + _RETRY_SHARE, _RETRY_RESERVE)
        attempt = 0
        failure: UpstreamError | None = None
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    try:
                        return await self._ask(query)
                    except (BudgetSpent, Overloaded, UpstreamOpen) as refused:
                        # No call was made: what the one before met with says more.
                        raise copy(failure or refused) from None
                    except UpstreamError as exc:
                        if isinstance(exc, UpstreamThrottled):
                            await self._tell_slowed(exc.retry_after)
                        delay = self._delay(exc, attempt, query)
                        if delay is None:
                            raise
                        query.demand.committed = False
                        failure = copy(exc)
                    self._metrics.upstream_retries.labels(key.operation, failure.code).inc()
                    attempt += 1
                    await asyncio.sleep(delay)
        except TimeoutError:
            raise query.late() from None
        except asyncio.CancelledError:
            if query.demand.dropped:
                self._abandoned[key.operation].inc()
            raise

    async def _ask(self, query: _Query) -> Answer:
        operation = query.key.operation
        while True:
            self._breakers[operation].check()  # nobody queues for a call that will not be made
            query.late = _no_answer
            await self._rotation.settled(operation)
            query.late = _no_turn
            # The turn first: who waits for it holds no slot.
            with await self._budget.turn(
                renewal=query.renewal,
                patience_seconds=self._left_to_queue(query),
                held_up=query.held_up,
                demand=query.demand,
            ) as turn:
                await self._take_token(query)
                query.late = _no_answer
                try:
                    return await self._rotation.use(operation, partial(self._attempt, query, turn))
                except _Void:
                    continue

    def _left_to_queue(self, query: _Query) -> float:
        """Return for how many seconds a query may queue: then its call has time enough to be answered."""
        needed = max(self._silence_seconds, self._usual_seconds[query.key.operation])
        return query.deadline - needed - asyncio.get_running_loop().time()

    async def _take_token(self, query: _Query) -> None:
        """Wait for the replicas' common budget, too, where there is one. Raises: BudgetSpent.

        A limit that was learnt is a replica's own, what upstream lets through of its calls; but each
        refusal lowers it for all (`slow_down`).
        """
        per_second = self._settings.requests_per_second
        if not per_second:
            return
        left = self._left_to_queue(query)
        wait = await self._token(per_second, saved=saved_up(per_second), patience_seconds=left)
        if wait >= NOTICEABLE_SECONDS:
            query.held_up(wait)
        if wait:
            await asyncio.sleep(wait)

    async def _attempt(self, query: _Query, turn: Turn, pair: Pair) -> Answer:
        offset = self._calls.clock_offset
        try:
            return await self._call(query, turn, pair)
        except UpstreamClock as exc:
            # Of many calls in the air the first one's refusal corrects the clock for all: each is signed
            # again, once, and not out of the retries' budget, which is smaller than such a crowd.
            if self._calls.clock_offset == offset:
                raise
            self._metrics.upstream_retries.labels(query.key.operation, exc.code).inc()
        return await self._call(query, turn, pair)

    async def _call(self, query: _Query, turn: Turn, pair: Pair) -> Answer:
        operation, demand = query.key.operation, query.demand
        demand.committed = False
        if not demand.wanted:
            demand.drop(demand)
            await asyncio.sleep(0)  # which is cancelled
        late = query.late
        query.late = _no_slot if turn.sent_at is None else late
        await self._slots.acquire()
        slot = _Slot(self._slots)
        try:
            began = self._clear_to_send(query, turn)
            query.late = late
            with self._breakers[operation].guard(silence_seconds=self._silence_seconds):
                turn.spend()
                demand.committed = True
                answer = await self._calls.make(
                    query.key, pair, number=next(query.numbers), over=slot.end_call
                )
        except asyncio.CancelledError:
            if demand.committed:  # it is on the wire, and upstream works on it
                slot.leave()
            else:
                slot.free()
            raise
        except BaseException:
            slot.free()
            raise
        slot.free()
        self._learn(operation, asyncio.get_running_loop().time() - began)
        return answer

    def _clear_to_send(self, query: _Query, turn: Turn) -> float:
        """Return the loop's time, now that there is a slot.

        Raises:
            _Void: Upstream has slowed us down since the turn was given.
            GatewayError: Less time is left than an answer usually takes.
        """
        if turn.void and turn.sent_at is None:
            raise _Void
        now = asyncio.get_running_loop().time()
        if query.deadline - now < self._usual_seconds[query.key.operation]:
            raise query.late()
        return now

    def _learn(self, operation: Operation, seconds: float) -> None:
        """Note how long an answer took."""
        usual = self._usual_seconds[operation] or seconds
        self._usual_seconds[operation] = usual + _USUAL_WEIGHT * (seconds - usual)

    def _delay(self, failure: UpstreamError, attempt: int, query: _Query) -> float | None:
        """Return how long to wait before the next attempt, or None when none is due."""
        if not failure.transient or attempt >= self._settings.retries or self._retry_tokens < 1:
            return None
        if not query.demand.wanted:
            return None
        jittered = random.uniform(0, _BACKOFF_SECONDS * 2**attempt)  # noqa: S311  # spreads load, hides nothing
        delay = max(jittered, failure.retry_after or 0.0)
        needed = self._usual_seconds[query.key.operation]
        if asyncio.get_running_loop().time() + delay + needed >= query.deadline:
            return None
        self._retry_tokens -= 1
        return delay

    def _breaker(self, operation: Operation) -> Breaker:
        gauges = {state: self._metrics.upstream_circuit_state.labels(operation, state) for state in State}

        def show(now: State) -> None:
            for state, gauge in gauges.items():
                gauge.set(state is now)

        show(State.CLOSED)
        return Breaker(operation, on_change=show)
