"""The circuit breaker: stops calls to a failing upstream, and probes it until it has recovered.

    closed     calls pass; when too many recent calls failed -> open
    open       every call is refused, for a second -> half-open
    half-open  one call per second passes, a probe; all others are refused
                   a probe succeeds -> closed        it fails -> open
                   it says nothing about the upstream's health -> the next call is a probe, too

A probe per second is no load, and clients learn of the upstream's recovery within two seconds. The next
probe does not wait for the response to the previous one: if the upstream is silent, that would take
`upstream.attempt_timeout_seconds`.

A client can invent task IDs, and some may make the upstream fail. Such a task never becomes known, so its
query is not a refresh. Failures of queries that are not refreshes count only if no refresh has succeeded
within the window. So such a client does not open the circuit while the tasks of others are refreshed.

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
_PROBE_INTERVAL_SECONDS = 1.0

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
        # While open, the end of the open period; while half-open, the time of the next probe.
        self._next_probe_at = 0.0

    @property
    def state(self) -> State:
        """The state of the circuit. The first call after the open period makes it half-open."""
        return self._state

    def check(self) -> None:
        """Refuse a call that could not pass now, before it queues for anything. Raises: CircuitOpen."""
        if self._state is not State.CLOSED and (left := self._next_probe_at - self._clock()) > 0:
            raise CircuitOpen(_OPEN_MESSAGE, retry_after=left)

    @contextmanager
    def guard(
        self, *, is_refresh: bool = False, cancelled_fails_after_seconds: float = math.inf
    ) -> Iterator[None]:
        """Let one call pass and record its outcome. Raises: CircuitOpen, before the call begins.

        `is_refresh`: an older snapshot of the task is known.

        A call is a success if it raises no exception or UpstreamRejected. It is a failure if it raises one of
        `FAILURES`, or if it is cancelled after `cancelled_fails_after_seconds` without a response. Other
        exceptions do not count. If a probe ends with one of them, the next call becomes a probe.
        """
        self.check()
        if self._state is State.OPEN:
            self._enter(State.HALF_OPEN)
        transitions, began = self._transitions, self._clock()
        if self._state is State.HALF_OPEN:
            self._next_probe_at = began + _PROBE_INTERVAL_SECONDS
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
            if self._clock() - began >= cancelled_fails_after_seconds:
                success = False
            raise
        finally:
            if transitions == self._transitions:
                self._record(success, is_refresh=is_refresh)

    def _record(self, success: bool | None, *, is_refresh: bool) -> None:  # noqa: FBT001  # or no outcome
        if self._state is State.HALF_OPEN:  # only probes can begin and end in one half-open period
            if success:
                self._enter(State.CLOSED)
            elif success is None:
                self._next_probe_at = self._clock()
            else:
                self._open()
        elif success is not None and self._reaches_threshold(success=success, is_refresh=is_refresh):
            self._open()

    def _reaches_threshold(self, *, success: bool, is_refresh: bool) -> bool:
        """Count an outcome; tell whether the circuit must open."""
        now = int(self._clock())
        while self._seconds and self._seconds[0].second <= now - _WINDOW_SECONDS:
            self._seconds.popleft()
        if not self._seconds or self._seconds[-1].second != now:
            self._seconds.append(_SecondCounts(now))
        self._seconds[-1].add(success=success, is_refresh=is_refresh)
        if success:
            return False
        outcomes = sum(counts.outcomes for counts in self._seconds)
        failures = sum(counts.failures for counts in self._seconds)
        if any(counts.refresh_successes for counts in self._seconds):
            ignored = sum(counts.first_failures for counts in self._seconds)
            outcomes, failures = outcomes - ignored, failures - ignored
        return outcomes >= _MIN_OUTCOMES and failures >= _FAILURE_SHARE * outcomes

    def _open(self) -> None:
        self._next_probe_at = self._clock() + _OPEN_SECONDS
        self._enter(State.OPEN)

    def _enter(self, state: State) -> None:
        before, self._state = self._state, state
        self._transitions += 1
        self._seconds.clear()
        self._on_change(state)
        # Probes change the state every second; the log has only the begin and the end of the outage.
        if state is State.CLOSED:
            log.info("circuit_breaker_changed", operation=self._operation, state=state)
        elif before is State.CLOSED:
            log.warning("circuit_breaker_changed", operation=self._operation, state=state)


class _SecondCounts:
    """The outcomes of one second. Counts per second need bounded memory; a list of outcomes would not."""

    __slots__ = ("failures", "first_failures", "outcomes", "refresh_successes", "second")

    def __init__(self, second: int) -> None:
        self.second = second
        self.outcomes = 0
        self.failures = 0
        self.first_failures = 0  # of queries that are not refreshes
        self.refresh_successes = 0

    def add(self, *, success: bool, is_refresh: bool) -> None:
        """Count an outcome."""
        self.outcomes += 1
        self.failures += not success
        self.first_failures += not success and not is_refresh
        self.refresh_successes += success and is_refresh


_OPEN_MESSAGE = "circuit breaker open: the upstream has been failing"
