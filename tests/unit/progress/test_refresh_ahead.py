"""Refresh-ahead on a manual clock."""

from collections.abc import Iterator

import pytest

from gateway.domain.snapshot import Snapshot
from gateway.domain.task import Operation, Status, TaskKey
from gateway.progress.refresh_ahead import RefreshAhead
from tests.support.ticked import TickedLoop

OPERATION = Operation.SD_GET_PROGRESS
LIFETIME = 2.0


def snapshot(task_id: str = "a", operation: Operation = OPERATION) -> Snapshot:
    """Return a running task's snapshot."""
    return Snapshot(TaskKey(operation, task_id), 0.0, LIFETIME, b"", Status.RUNNING)


class Field:
    """A schedule, and the refreshes it started, each with its time and its iteration of the event loop."""

    def __init__(self, loop: TickedLoop) -> None:
        self.loop = loop
        self.started: list[tuple[tuple[TaskKey, int], float, int]] = []
        self.ahead = RefreshAhead(lambda *known: self.started.append((known, loop.time(), self.iteration)))
        self.iteration = 0

    def plan(self, *snapshots: Snapshot, age: float = 0.0) -> None:
        """Schedule refreshes for snapshots of one age."""
        self.loop.within(lambda: [self.ahead.schedule(known, age) for known in snapshots])

    def count_iterations(self, iterations: int) -> None:
        """Count the next iterations of the event loop."""
        self.iteration += 1
        if iterations:
            self.loop.call_soon(self.count_iterations, iterations - 1)


@pytest.fixture
def field() -> Iterator[Field]:
    loop = TickedLoop()
    yield Field(loop)
    assert not loop.faults
    loop.close()


def times(field: Field) -> list[float]:
    """Return when refreshes started, in seconds since the loop began."""
    return [round(when - 1000.0, 6) for _, when, _ in field.started]


def test_ahead_starts_early_enough_for_the_average_latency(field: Field) -> None:
    """The lead time is the moving average of the latency, for each operation separately."""
    field.ahead.observe_latency(OPERATION, 0.5)  # each moves the average by 0.3 of the difference: 0.15
    field.ahead.observe_latency(OPERATION, 1.0)  # 0.405
    field.plan(snapshot(), snapshot("b", Operation.COMFY_GET_PROGRESS), age=0.25)
    field.loop.advance(LIFETIME)
    assert times(field) == [LIFETIME - 0.25 - 0.405, LIFETIME - 0.25]


def test_ahead_starts_at_once_when_the_latency_exceeds_the_lifetime(field: Field) -> None:
    """If the latency exceeds the lifetime, the next refresh starts at once."""
    for _ in range(20):
        field.ahead.observe_latency(OPERATION, 2 * LIFETIME)
    field.plan(snapshot())
    assert times(field) == [0.0]


def test_ahead_newer_schedule_replaces_the_older_one(field: Field) -> None:
    """A task has one schedule: that of its newest snapshot."""
    old, new = snapshot(), snapshot()
    field.plan(old)
    field.loop.advance(1.0)
    field.plan(new)
    field.loop.advance(5.0)
    assert [known for known, _, _ in field.started] == [(new.key, new.version)]
    assert times(field) == [1.0 + LIFETIME]


def test_ahead_starts_a_few_per_iteration(field: Field) -> None:
    """Other callbacks run between the batches, and all refreshes start in the end."""
    crowd = [snapshot(str(number)) for number in range(10)]
    field.plan(*crowd)
    field.loop.call_later(LIFETIME, field.count_iterations, 20)
    field.loop.advance(LIFETIME)
    assert sorted(key for (key, _), _, _ in field.started) == [known.key for known in crowd]
    iterations = [iteration for _, _, iteration in field.started]
    assert max(iterations.count(iteration) for iteration in iterations) <= 4
    assert iterations == sorted(iterations)


def test_ahead_closed_starts_nothing(field: Field) -> None:
    """After closing, neither scheduled nor due refreshes start."""
    field.plan(*(snapshot(str(number)) for number in range(10)))
    field.loop.call_later(
        LIFETIME, lambda: field.loop.call_soon(lambda: field.loop.call_soon(field.ahead.close))
    )
    field.loop.advance(LIFETIME + 1)
    assert 0 < len(field.started) < 10
    before = len(field.started)
    field.plan(snapshot("late"))
    field.ahead.close()
    field.loop.advance(LIFETIME + 1)
    assert len(field.started) == before
