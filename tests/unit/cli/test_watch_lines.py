"""The lines of `sd-gateway watch` in a pipe: few, but enough to see that it works."""

from gateway.cli.watch.lines import ProgressLines
from gateway.cli.watch.tasks import WatchedTasks
from tests.unit.cli.watching import progress, rejected, stale, watched


def written(tasks: WatchedTasks) -> tuple[ProgressLines, list[str]]:
    """Return the lines, and the list to which they are written."""
    lines: list[str] = []
    return ProgressLines(tasks, lines.append), lines


def test_lines_for_status_and_ten_percent() -> None:
    """A line is written for a change of status and after each 10 %, not for each change."""
    tasks, _ = watched()
    lines, out = written(tasks)
    sent = [progress(status="waiting", progress=0, queueRemaining=queue) for queue in (3, 2)]
    sent += [progress(progress=number / 100) for number in range(0, 100, 3)]
    sent += [progress(status="succeeded"), progress(status="succeeded")]
    for content in sent:
        task = tasks.update(content)
        assert task is not None
        lines.update(task)
    percents = [0, 12, 21, 30, 42, 51, 60, 72, 81, 90]
    running = [f"A: running, {percent} %" for percent in percents]
    assert out == ["A: waiting, 0 %, 3 in the queue", *running, "A: succeeded, 100 %"]


def test_lines_for_problems_and_overdue_updates() -> None:
    """Problems and overdue updates have a line when they begin and when they end, each once."""
    tasks, clock = watched()
    lines, out = written(tasks)
    unchanged = stale(stale=None)
    for content in (rejected(), rejected(), progress(), stale(), stale(ageSeconds=20), unchanged, unchanged):
        task = tasks.update(content)
        assert task is not None
        lines.update(task)
        clock.now += 1
    assert out == [
        "A: Not found: the vendor does not know this ID; try --api comfy (no task)",
        "A: running, 25 %",
        "A: running, 25 %, last update 12 s ago: The vendor refuses our credentials",
        "A: running, 25 %",
    ]


def test_lines_every_thirty_seconds() -> None:
    """After 30 s, a task with small changes has a line; without any, one line counts all tasks."""
    tasks, clock = watched("A", "B")
    lines, out = written(tasks)
    for content in (progress("A"), progress("B", "succeeded")):
        task = tasks.update(content)
        assert task is not None
        lines.update(task)
    out.clear()
    tasks.update(progress("A", progress=0.26))
    clock.now += 29
    lines.tick()
    assert out == []
    clock.now += 1
    lines.tick()
    lines.tick()
    assert out == ["A: running, 26 %"]
    clock.now += 30
    lines.tick()
    assert out[1:] == ["1 of 2 ended: 1 running, 1 succeeded"]


def test_count_is_not_repeated_without_a_connection() -> None:
    """While the gateway cannot be reached, the line with the counts is written once, and again afterwards."""
    tasks, clock = watched()
    lines, out = written(tasks)
    tasks.disconnect()
    for _ in range(3):
        clock.now += 30
        lines.tick()
    assert out == ["0 of 1 ended: 1 loading"]
    tasks.connect()
    clock.now += 30
    lines.tick()
    assert out == ["0 of 1 ended: 1 loading"] * 2
