"""A short run of `history.py` without faults: the machinery works, and nothing is violated."""

from tests.replicas.history import run
from tests.replicas.judging import violations


def test_history_without_faults() -> None:
    """Clients of all kinds see no violation while nothing fails.

    The limits are wide: other tests run at the same time, and may pause each process for a tenth of a second.
    """
    history = run(seed=1, seconds=4, names=[], store_timeout=1.0, late_seconds=1.0)
    assert violations(history) == []
    assert {answer.kind for answer in history.answers} == {"poll", "long poll", "batch", "stream"}
    assert {200, 304} <= {answer.status for answer in history.answers}
    assert len(history.calls) > 10
    assert len({report.replica for report in history.reports}) == 3
