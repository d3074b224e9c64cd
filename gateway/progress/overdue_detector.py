"""Overdue updates: whether a stale snapshot should have been replaced by now, and why it was not.

    the last query failed, or a failure of the task is cached  -> that failure
    the query takes too long: a call of it has failed          -> the failure of that call
                              it waits for something           -> the error if its deadline passed now

A query takes too long after `MIN_OVERDUE_AFTER_SECONDS`, or after twice the usual time if the upstream is
usually slower. Without the second rule, each update of a slow upstream would count as overdue. The usual time
is that of a call: a wait for a permit or a slot is a reason why an update is overdue.
"""

from __future__ import annotations

from collections.abc import Callable

from gateway.domain.errors import CircuitOpen, GatewayError
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import TaskKey
from gateway.stores.base import Store
from gateway.upstream.awaited_query import AwaitedQuery

# Subscribers learn of an outage within one lifetime + 2 s. The rest of the 2 s is for the delay of the
# refresh (`schedules.py`) and for a busy event loop.
MIN_OVERDUE_AFTER_SECONDS = 1.5
_LATENCY_WEIGHT = 0.3  # of the newest latency in the moving average


class OverdueDetector:
    """Detects overdue updates, and knows the reason: why a stale snapshot is not replaced.

    `in_flight_query_of` returns the query in flight for a task, or None. `clock` is the clock of
    `Snapshot.fetched_at` and of `AwaitedQuery.in_flight_since`.
    """

    def __init__(
        self,
        store: Store,
        in_flight_query_of: Callable[[TaskKey], AwaitedQuery | None],
        *,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._in_flight_query_of = in_flight_query_of
        self._clock = clock
        self._average_latency = 0.0
        self._latest_latency = 0.0

    @property
    def overdue_after_seconds(self) -> float:
        """How long a query may take until the update counts as overdue."""
        # The smaller of the two: after an outage, one late response does not raise the limit.
        return max(MIN_OVERDUE_AFTER_SECONDS, 2 * min(self._average_latency, self._latest_latency))

    def observe_latency(self, seconds: float) -> None:
        """Record how long the call of a query took, without the wait before it, if it succeeded at once."""
        self._average_latency += _LATENCY_WEIGHT * (seconds - self._average_latency)
        self._latest_latency = seconds

    def record_failure(self, key: TaskKey, failure: GatewayError) -> None:
        """Record that a query has failed, if it should have replaced a stale snapshot."""
        entry = self._store.entry(key)
        if entry is None or entry.snapshot.fresh(self._clock()):
            return
        # The failure that has opened the circuit says more than the open circuit.
        if entry.failure is None or not isinstance(failure, CircuitOpen):
            entry.failure = failure

    def error(self, key: TaskKey) -> GatewayError | None:
        """Return the failure because of which the update of a task is overdue.

        It is None without a snapshot, if the snapshot is final or fresh, and while its update is not overdue.
        """
        entry = self._store.entry(key)
        if entry is None or not self._is_stale(entry.snapshot):
            return None
        return entry.failure or self._store.cached_failure(key) or self._failure_of_slow_query(key)

    def seconds_until_check(self, key: TaskKey) -> float:
        """Return in how many seconds to call `error` again, if it has just returned None."""
        query = self._in_flight_query_of(key)
        elapsed = 0.0 if query is None else max(self._clock() - query.in_flight_since, 0.0)
        left = self.overdue_after_seconds - elapsed
        return left if left > 0 else self.overdue_after_seconds

    def error_of_slow_query(self, query: AwaitedQuery) -> GatewayError:
        """Return the error for a query in flight that takes too long."""
        return query.failure or query.make_deadline_error()

    def _is_stale(self, snapshot: Snapshot) -> bool:
        return not snapshot.terminal and not snapshot.fresh(self._clock())

    def _failure_of_slow_query(self, key: TaskKey) -> GatewayError | None:
        query = self._in_flight_query_of(key)
        if query is None or self._clock() - query.in_flight_since < self.overdue_after_seconds:
            return None
        return self.error_of_slow_query(query)
