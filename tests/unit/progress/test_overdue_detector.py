"""Overdue updates: when a query in flight takes too long."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.domain.task import Operation, TaskKey
from gateway.progress.overdue_detector import MIN_OVERDUE_AFTER_SECONDS, OverdueDetector
from gateway.upstream.awaited_query import AwaitedQuery

KEY = TaskKey(Operation.SD_GET_PROGRESS, "A")


@pytest.mark.parametrize(
    ("in_flight_since", "overdue", "next_check"),
    [
        pytest.param(0.0, True, None, id="at the limit"),
        pytest.param(0.001, False, 0.001, id="it began after the timer of its check was set"),
        pytest.param(0.5, False, 0.5, id="another query has begun meanwhile"),
        pytest.param(math.inf, False, MIN_OVERDUE_AFTER_SECONDS, id="it has not begun"),
    ],
)
def test_query_in_flight(in_flight_since: float, overdue: bool, next_check: float | None) -> None:  # noqa: FBT001
    """The query is overdue from the limit on, and not a moment before; the next check is at the limit."""
    rules = overdue_detector(in_flight_since=in_flight_since, now=MIN_OVERDUE_AFTER_SECONDS, fresh=False)
    assert (rules.error(KEY) is not None) is overdue
    if next_check is not None:
        assert rules.seconds_until_check(KEY) == pytest.approx(next_check)


def test_slow_query_of_a_fresh_snapshot_is_checked_later() -> None:
    """The next check is not at once, although the query has taken long enough already."""
    rules = overdue_detector(in_flight_since=0.0, now=MIN_OVERDUE_AFTER_SECONDS, fresh=True)
    assert rules.error(KEY) is None
    assert rules.seconds_until_check(KEY) == MIN_OVERDUE_AFTER_SECONDS


def overdue_detector(*, in_flight_since: float, now: float, fresh: bool) -> OverdueDetector:
    """Return the rules for one task, whose query in flight began at this time."""
    snapshot = SimpleNamespace(terminal=False, fresh=lambda _: fresh)
    entry = SimpleNamespace(snapshot=snapshot, failure=None)
    store: Any = SimpleNamespace(entry=lambda _: entry, cached_failure=lambda _: None)
    state = AwaitedQuery()
    state.in_flight_since = in_flight_since
    return OverdueDetector(store, lambda _: state, clock=lambda: now)
