"""The circuit breaker: stops calls to a failing upstream, and probes it until it has recovered.

    closed     calls pass; when too many recent calls failed -> open
    open       every call is refused, for a second at first -> half-open
    half-open  one call passes, the probe; all others are refused
                   the probe succeeds -> closed        it fails -> open, for twice as long as before

There is one circuit breaker per operation, because the operations are different services behind one API
gateway. Use it on the event loop's thread only.
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
    CircuitOpen,
    UpstreamBusy,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnreachable,
)

# Errors that mean that the upstream is failing, independently of the request. All other errors count neither
# as success nor as failure. The credential rotation and the rate limiter handle refused credentials and
# throttling. Invalid responses must not open the circuit, because a client may be able to cause them with a
# made-up task ID.
FAILURES = (UpstreamBusy, UpstreamTimeout, UpstreamUnreachable)

# Ten seconds, the default deadline of a query: an outage is detected while its first callers still wait, and
# soon forgotten after its end.
_WINDOW_SECONDS = 10
_MIN_OUTCOMES = 10  # a few failed queries with their retries are no outage
_FAILURE_SHARE = 0.5  # if the upstream responds to most calls, retries mostly succeed
_OPEN_SECONDS = 1.0
_MAX_OPEN_SECONDS = 30.0
_PROBE_RETRY_AFTER_SECONDS = 1.0  # `retry_after` of calls that are refused while a probe is in flight

log = structlog.get_logger(__name__)


class State(StrEnum):
    """The state of a circuit; the `state` label of `upstream_circuit_state`."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class CircuitBreaker:
    """The circuit of one operation.

    `clock` returns monotonic seconds. `on_change` is called with every new state.
    """

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
        # Number of transitions. If it changes during a call, the outcome of the call is ignored.
        self._transitions = 0
        self._seconds: deque[_SecondCounts] = deque()
        self._open_seconds = _OPEN_SECONDS
        self._open_until = 0.0
        self._probing = False

    @property
    def state(self) -> State:
        """The state of the circuit. The first call after the open period makes it half-open."""
        return self._state

    def check(self) -> None:
        """Refuse a call that could not pass now, before it queues for anything. Raises: CircuitOpen."""
        if self._state is State.OPEN and (left := self._open_until - self._clock()) > 0:
            raise CircuitOpen(_OPEN_MESSAGE, retry_after=left)
        if self._probing:
            raise CircuitOpen(_OPEN_MESSAGE, retry_after=_PROBE_RETRY_AFTER_SECONDS)

    @contextmanager
    def guard(self, *, no_response_seconds: float = math.inf) -> Iterator[None]:
        """Let one call pass and record its outcome. Raises: CircuitOpen, before the call begins.

        A call is a success if it raises no exception or UpstreamRejected. It is a failure if it raises one of
        `FAILURES`, or if it is cancelled after `no_response_seconds` without a response. Other exceptions do
        not count. If a probe ends with one of them, the next call becomes the probe.
        """
        self.check()
        if self._state is State.OPEN:
            self._enter(State.HALF_OPEN)
        self._probing = self._state is State.HALF_OPEN
        transitions, began = self._transitions, self._clock()
        success: bool | None = None
        try:
            yield
            success = True
        except UpstreamRejected:
            success = True
            raise
        except FAILURES:
            success = False
            raise
        except asyncio.CancelledError:
            if self._clock() - began >= no_response_seconds:
                success = False
            raise
        finally:
            if transitions == self._transitions:
                self._record(success)

    def _record(self, success: bool | None) -> None:  # noqa: FBT001  # success, failure or no outcome
        if self._state is State.HALF_OPEN:  # only the probe can begin and end in one half-open period
            self._probing = False
            if success:
                self._open_seconds = _OPEN_SECONDS
                self._enter(State.CLOSED)
            elif success is not None:
                self._open_seconds = min(2 * self._open_seconds, _MAX_OPEN_SECONDS)
                self._open()
        elif success is not None and self._reaches_threshold(success=success):
            self._open()

    def _reaches_threshold(self, *, success: bool) -> bool:
        """Count an outcome; tell whether the circuit must open."""
        now = int(self._clock())
        while self._seconds and self._seconds[0].second <= now - _WINDOW_SECONDS:
            self._seconds.popleft()
        if not self._seconds or self._seconds[-1].second != now:
            self._seconds.append(_SecondCounts(now))
        self._seconds[-1].outcomes += 1
        if success:
            return False
        self._seconds[-1].failures += 1
        outcomes = sum(counts.outcomes for counts in self._seconds)
        failures = sum(counts.failures for counts in self._seconds)
        return outcomes >= _MIN_OUTCOMES and failures >= _FAILURE_SHARE * outcomes

    def _open(self) -> None:
        self._open_until = self._clock() + self._open_seconds
        self._enter(State.OPEN)

    def _enter(self, state: State) -> None:
        self._state = state
        self._transitions += 1
        self._seconds.clear()
        self._on_change(state)
        seconds = {"seconds": self._open_seconds} if state is State.OPEN else {}
        log_change = log.info if state is State.CLOSED else log.warning
        log_change("circuit_breaker_changed", operation=self._operation, state=state, **seconds)


class _SecondCounts:
    """The outcomes of one second. Counts per second need bounded memory; a list of outcomes would not."""

    __slots__ = ("failures", "outcomes", "second")

    def __init__(self, second: int) -> None:
        self.second = second
        self.outcomes = 0
        self.failures = 0


_OPEN_MESSAGE = "circuit breaker open: the upstream has been failing"
