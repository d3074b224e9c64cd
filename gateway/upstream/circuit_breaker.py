"""The circuit breaker: an upstream that is ill is left alone, and asked now and then whether it is better.

    closed     calls pass; when too many of the recent ones ended ill -> open
    open       every call is refused, for a second at first -> half-open
    half-open  one call passes, the probe; the others are refused
                   it ends well -> closed        it ends ill -> open, for twice as long as the last time

One breaker per operation: they are different services behind one API gateway. For the event loop's
thread only.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum

import structlog

from gateway.domain.errors import (
    UpstreamBusy,
    UpstreamOpen,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnreachable,
)

# What says that the upstream is ill, whatever was asked. Not among them: refused credentials and
# throttling, which are handled elsewhere, and answers that make no sense: those a task ID of a caller's
# own making might provoke, and no caller is to open the circuit for all. They say nothing either way.
ILL = (UpstreamBusy, UpstreamTimeout, UpstreamUnreachable)

# Ten seconds see an outage while its first callers still wait (the default deadline), and forget one
# that has passed. Ten outcomes: a few unlucky queries with their retries are no outage. Half of them:
# an upstream that answers more often than not is worth the retries, which then mostly succeed.
_WINDOW_SECONDS = 10
_LEAST_OUTCOMES = 10
_ILL_SHARE = 0.5
_OPEN_SECONDS = 1.0
_LONGEST_OPEN_SECONDS = 30.0
_PROBE_SECONDS = 1.0  # to come back after, while a probe is in the air

log = structlog.get_logger(__name__)


class State(StrEnum):
    """Where a circuit stands; the `state` of `upstream_circuit_state`."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class CircuitBreaker:
    """The circuit of one operation. `clock` is monotonic, in seconds; `on_change` is told every new state."""

    def __init__(
        self,
        operation: str,
        *,
        on_change: Callable[[State], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._operation = operation
        self._on_change = on_change
        self._clock = clock
        self._state = State.CLOSED
        # Counts the transitions: a call's outcome matters only to the state in which it took off.
        self._era = 0
        self._seconds: deque[_Second] = deque()
        self._open_seconds = _OPEN_SECONDS
        self._open_until = 0.0
        self._probing = False

    @property
    def state(self) -> State:
        """Where the circuit stands. Half-open it becomes by the first call after its time."""
        return self._state

    def check(self) -> None:
        """Refuse a call that could not pass now, before it queues for anything. Raises: UpstreamOpen."""
        if self._state is State.OPEN and (left := self._open_until - self._clock()) > 0:
            raise UpstreamOpen(_REFUSAL, retry_after=left)
        if self._probing:
            raise UpstreamOpen(_REFUSAL, retry_after=_PROBE_SECONDS)

    @contextmanager
    def guard(self, *, silence_seconds: float = math.inf) -> Iterator[None]:
        """Let one call through and learn from how it ends. Raises: UpstreamOpen, before it begins.

        No exception and UpstreamRejected: well. `ILL`, and a call that is cancelled after
        `silence_seconds` without an answer: ill. Anything else says nothing; a probe that ends so
        leaves its place to the next call.
        """
        self.check()
        if self._state is State.OPEN:
            self._enter(State.HALF_OPEN)
        self._probing = self._state is State.HALF_OPEN
        era, began = self._era, self._clock()
        well: bool | None = None
        try:
            yield
            well = True
        except UpstreamRejected:
            well = True
            raise
        except ILL:
            well = False
            raise
        except asyncio.CancelledError:
            if self._clock() - began >= silence_seconds:
                well = False
            raise
        finally:
            if era == self._era:
                self._learn(well)

    def _learn(self, well: bool | None) -> None:  # noqa: FBT001  # three verdicts: well, ill, none
        if self._state is State.HALF_OPEN:  # and this was the probe: nobody else took off in this era
            self._probing = False
            if well:
                self._open_seconds = _OPEN_SECONDS
                self._enter(State.CLOSED)
            elif well is not None:
                self._open_seconds = min(2 * self._open_seconds, _LONGEST_OPEN_SECONDS)
                self._open()
        elif well is not None and self._too_ill(well=well):
            self._open()

    def _too_ill(self, *, well: bool) -> bool:
        """Count an outcome; tell whether the circuit is to open."""
        now = int(self._clock())
        while self._seconds and self._seconds[0].number <= now - _WINDOW_SECONDS:
            self._seconds.popleft()
        if not self._seconds or self._seconds[-1].number != now:
            self._seconds.append(_Second(now))
        self._seconds[-1].outcomes += 1
        if well:
            return False
        self._seconds[-1].ill += 1
        outcomes = sum(second.outcomes for second in self._seconds)
        ill = sum(second.ill for second in self._seconds)
        return outcomes >= _LEAST_OUTCOMES and ill >= _ILL_SHARE * outcomes

    def _open(self) -> None:
        self._open_until = self._clock() + self._open_seconds
        self._enter(State.OPEN)

    def _enter(self, state: State) -> None:
        self._state = state
        self._era += 1
        self._seconds.clear()
        self._on_change(state)
        seconds = {"seconds": self._open_seconds} if state is State.OPEN else {}
        level = log.info if state is State.CLOSED else log.warning
        level("circuit breaker", operation=self._operation, state=state, **seconds)


class _Second:
    """The outcomes of one second of the clock: a window of seconds is bounded, one of outcomes is not."""

    __slots__ = ("ill", "number", "outcomes")

    def __init__(self, number: int) -> None:
        self.number = number
        self.outcomes = 0
        self.ill = 0


_REFUSAL = "the upstream is unwell and is left alone for a while"
