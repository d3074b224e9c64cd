"""What `sd-gateway watch` says about its tasks."""

import pytest

from gateway.cli.watch.events import Problem
from tests.unit.cli.watching import line, progress, rejected, stale, watched


def test_time_left_counts_down() -> None:
    """The time left counts down between two events, but not below zero."""
    tasks, clock = watched()
    tasks.update(progress(etaSeconds=3727))
    left = []
    for _ in range(4):
        left.append(line(tasks).partition("%, ")[2])
        clock.now += 1850
    assert left == ["1:02:07 left", "31:17 left", "0:27 left", "any moment now"]


def test_time_left_stops_without_a_connection() -> None:
    """While the connection is lost, the time left does not change; then it counts from the last update."""
    tasks, clock = watched()
    tasks.update(progress(etaSeconds=100))
    clock.now += 10
    tasks.disconnect()
    clock.now += 30
    tasks.disconnect()
    assert line(tasks) == "running, 25 %, 1:30 left"
    assert tasks.eta_seconds() == 90
    tasks.connect()
    assert line(tasks) == "running, 25 %, 1:00 left"


def test_overdue_update_is_said_with_its_age() -> None:
    """An overdue update is named with its age and reason; the time left does not change until the next."""
    tasks, clock = watched()
    tasks.update(progress(etaSeconds=100, message="step 5"))
    clock.now += 10
    tasks.update(stale(ageSeconds=12.0))
    clock.now += 13
    said = "running, 25 %, 1:30 left, last update 25 s ago: The vendor refuses our credentials"
    assert line(tasks) == said
    tasks.update(stale(stale=None))
    assert line(tasks) == "running, 25 %, 1:17 left, step 5"


@pytest.mark.parametrize("resume", ["progress", "connect"])
def test_overdue_update_ends(resume: str) -> None:
    """New progress ends it, and so does a new connection, on which the gateway says it again."""
    tasks, _ = watched()
    tasks.update(progress())
    tasks.update(stale())
    if resume == "progress":
        tasks.update(progress())
    else:
        tasks.connect()
    assert line(tasks) == "running, 25 %"


def test_overdue_update_without_a_title_has_that_of_its_code() -> None:
    """A code without a title is explained; an unknown code is shown as it is."""
    tasks, _ = watched()
    tasks.update(progress())
    tasks.update(stale(stale="upstream-timeout", title=""))
    assert line(tasks).endswith(": Upstream timeout")
    tasks.update(stale(stale="new-code", title=""))
    assert line(tasks).endswith(": new-code")


@pytest.mark.parametrize(("api", "other"), [("sd", "comfy"), ("comfy", "sd")])
def test_unknown_task_is_not_found(api: str, other: str) -> None:
    """A task whose every query is rejected is not found; the hint names the other API."""
    tasks, _ = watched(api=api)
    tasks.update(rejected())
    said = f"Not found: the vendor does not know this ID; try --api {other} (no task)"
    assert line(tasks) == said
    assert not tasks.succeeded


def test_task_that_vanishes_has_an_error() -> None:
    """A task that was known before has an error, and keeps its percentage."""
    tasks, _ = watched()
    tasks.update(progress())
    tasks.update(rejected())
    assert line(tasks) == "error, 25 %, the upstream rejected the query: no task"
    tasks.update(Problem(taskId="A", title="It broke"))
    assert line(tasks) == "error, 25 %, It broke"


def test_percentage_is_rounded_down() -> None:
    """100 % is shown only at the end."""
    tasks, _ = watched()
    tasks.update(progress(progress=0.999))
    assert line(tasks) == "running, 99 %"


def test_running_tasks_come_first() -> None:
    """Then come problems, waiting tasks, and those that have ended."""
    tasks, _ = watched("done", "queued", "busy", "lost", "new", "broken")
    tasks.update(progress("done", "succeeded"))
    tasks.update(progress("queued", "waiting"))
    tasks.update(progress("busy"))
    tasks.update(rejected("lost"))
    tasks.update(progress("broken", "failed"))
    ordered = [task.task_id for task in tasks.ordered()]
    assert ordered == ["busy", "lost", "queued", "new", "broken", "done"]
    assert tasks.counts() == "1 running, 1 not found, 1 waiting, 1 loading, 1 failed, 1 succeeded"


def test_sum_of_all_tasks() -> None:
    """The sum is 1 only if all have succeeded; its time left is the longest, if every open task has one."""
    tasks, _ = watched("A", "B")
    tasks.update(progress("A", progress=0.5, etaSeconds=10))
    assert (tasks.fraction, tasks.eta_seconds()) == (0.25, None)
    tasks.update(progress("B", progress=0.5, etaSeconds=20))
    assert (tasks.fraction, tasks.eta_seconds()) == (0.5, 20)
    tasks.update(progress("A", "failed", progress=0.5))
    tasks.update(progress("B", "succeeded"))
    assert (tasks.ended, tasks.fraction, tasks.eta_seconds(), tasks.succeeded) == (2, 0.75, None, False)


def test_unknown_task_counts_as_ended_after_a_while() -> None:
    """A task that the vendor rejects for 30 s counts as ended; it does not if it is known before."""
    tasks, clock = watched("A", "B", "C")
    tasks.update(progress("A", etaSeconds=100))
    for task_id in ("B", "C"):
        tasks.update(rejected(task_id))
    clock.now += 29
    tasks.update(rejected("B"))
    tasks.update(progress("C", "waiting"))
    assert tasks.summary() == "0 of 3 ended: 1 running, 1 not found, 1 waiting"
    clock.now += 1
    tasks.update(progress("C", "succeeded"))
    assert tasks.summary() == "2 of 3 ended: 1 running, 1 not found, 1 succeeded"
    assert tasks.eta_seconds() == 70


def test_unknown_task_has_ended_at_the_end_of_the_stream() -> None:
    """The gateway may wait for a shorter time: at its `end`, all tasks have ended."""
    tasks, _ = watched()
    tasks.update(rejected())
    assert tasks.summary() == "0 of 1 ended: 1 not found"
    tasks.end()
    assert tasks.summary() == "1 of 1 ended: 1 not found"
