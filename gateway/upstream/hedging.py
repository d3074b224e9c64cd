"""Hedged calls: repeats a call that the upstream does not answer, to notice the end of an outage soon.

    a refresh has no response after `MIN_DELAY_SECONDS` -> one hedged call per second, for the oldest query
    the hedged call succeeds -> its response is that of the query
                             -> calls of other refreshes, sent at least `MIN_DELAY_SECONDS` before it and
                                still without a response, are given up: their queries send them again

Without this, a query that was sent during an outage would wait for `upstream.attempt_timeout_seconds`,
although the upstream answers again. Only refreshes are repeated: a client that has no snapshot waits anyway.
All queries together make at most one hedged call per second. The technique is called a hedged request (Dean
and Barroso, "The Tail at Scale", 2013).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Generic, Protocol, TypeVar

from gateway.domain.errors import GatewayError

# A hedged call is made after this time without a response, or after twice the usual time if that is longer.
MIN_DELAY_SECONDS = 1.5
_INTERVAL_SECONDS = 1.0  # between two hedged calls
_NOT_HEDGEABLE = nullcontext()

T = TypeVar("T")


class HedgedQuery(Protocol):
    """A query whose call can be repeated."""

    is_refresh: bool


Q = TypeVar("Q", bound=HedgedQuery)


class MustCallAgain(Exception):
    """The call must be sent again: the upstream has answered a call that was sent later."""


class _HedgeableCall(Generic[T]):
    """The call of a refresh, which may be hedged: when it was sent, and what ends it early."""

    __slots__ = ("interrupt", "later_answered", "response", "sent_at")

    def __init__(self, interrupt: asyncio.Timeout) -> None:
        self.interrupt = interrupt
        self.sent_at: float | None = None
        self.response: T | None = None
        self.later_answered = False


class Hedging(Generic[Q, T]):
    """Watches the calls of refreshes. Use it on the event loop's thread only.

    `make_call` makes a hedged call for a query. `usual_seconds` returns how long a call for it usually takes.
    """

    def __init__(
        self, make_call: Callable[[Q], Awaitable[T]], *, usual_seconds: Callable[[Q], float]
    ) -> None:
        self._make_call = make_call
        self._usual_seconds = usual_seconds
        self._hedgeable_calls: dict[Q, _HedgeableCall[T]] = {}
        self._on_wire: dict[Q, _HedgeableCall[T]] = {}  # by the time when the call was sent
        self._timer: asyncio.TimerHandle | None = None
        self._hedged_calls: set[asyncio.Task[None]] = set()

    async def run(self, query: Q, call: Callable[[Q], Awaitable[T]]) -> T:
        """Return the response of `call`, or of a hedged call.

        Raises:
            MustCallAgain: The call must be made again.
            Exception: What `call` raises.
        """
        if not query.is_refresh:
            return await call(query)
        try:
            async with asyncio.timeout(None) as interrupt:
                state = self._hedgeable_calls[query] = _HedgeableCall(interrupt)
                return await call(query)
        except TimeoutError:
            if state.response is not None:
                return state.response
            if state.later_answered:
                raise MustCallAgain from None
            raise
        finally:
            # Both refer to this task, which keeps its exception, whose traceback refers to this frame.
            del self._hedgeable_calls[query], state, interrupt

    def sending(self, query: Q) -> AbstractContextManager[None]:
        """Watch the call of a query while the context is open."""
        state = self._hedgeable_calls.get(query)
        return _NOT_HEDGEABLE if state is None else self._watching(query, state)

    @contextmanager
    def _watching(self, query: Q, state: _HedgeableCall[T]) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        state.sent_at = loop.time()
        self._on_wire[query] = state
        if self._timer is None:
            self._timer = loop.call_later(MIN_DELAY_SECONDS, self._check)
        try:
            yield
        finally:
            self._on_wire.pop(query, None)

    def _check(self) -> None:
        """Make a hedged call for the call that has waited longest, if that is too long; check again later."""
        self._timer = None
        if not self._on_wire:
            return
        loop = asyncio.get_running_loop()
        query, state = next(iter(self._on_wire.items()))
        waited = loop.time() - (state.sent_at or 0.0)
        left = max(MIN_DELAY_SECONDS, 2 * self._usual_seconds(query)) - waited
        if left <= 0:
            task = loop.create_task(self._run_hedged_call(query, state))
            self._hedged_calls.add(task)
            task.add_done_callback(self._hedged_calls.discard)
        self._timer = loop.call_later(left if left > 0 else _INTERVAL_SECONDS, self._check)

    async def _run_hedged_call(self, query: Q, state: _HedgeableCall[T]) -> None:
        sent_at = asyncio.get_running_loop().time()
        with suppress(GatewayError, MustCallAgain):
            state.response = await self._make_call(query)
            self._end_early(state)
            for other in list(self._on_wire.values()):
                if other is not state and (other.sent_at or sent_at) <= sent_at - MIN_DELAY_SECONDS:
                    other.later_answered = True
                    self._end_early(other)

    def _end_early(self, state: _HedgeableCall[T]) -> None:
        with suppress(RuntimeError):  # the call has ended meanwhile
            state.interrupt.reschedule(asyncio.get_running_loop().time())
