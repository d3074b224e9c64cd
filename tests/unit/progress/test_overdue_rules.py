"""Overdue updates: when a query in flight takes too long."""

from types import SimpleNamespace
from typing import Any

import pytest

from gateway.domain.task import Operation, TaskKey
from gateway.progress.overdue_rules import MIN_OVERDUE_AFTER_SECONDS, OverdueRules
from gateway.upstream.task_query_state import TaskQueryState

KEY = TaskKey(Operation.SD_GET_PROGRESS, "A")


@pytest.mark.parametrize(("late_seconds", "overdue"), [(0.001, True), (0.5, False)])
def test_query_that_begins_after_the_timer_of_its_check(late_seconds: float, *, overdue: bool) -> None:
    """The check finds it overdue: the next one would come 1.5 s later, too late for subscribers."""
    snapshot = SimpleNamespace(terminal=False, fresh=lambda _: False)
    entry = SimpleNamespace(snapshot=snapshot, failure=None)
    store: Any = SimpleNamespace(entry=lambda _: entry, cached_failure=lambda _: None)
    state = TaskQueryState()
    state.began_at = late_seconds
    updates = OverdueRules(store, lambda _: state, clock=lambda: MIN_OVERDUE_AFTER_SECONDS)
    assert (updates.error(KEY) is not None) is overdue
