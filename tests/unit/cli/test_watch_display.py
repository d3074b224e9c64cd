"""The screen of `sd-gateway watch`: one line per task at any size."""

from io import StringIO

import pytest
from rich.console import Console

from gateway.cli.watch.display import ProgressDisplay
from gateway.cli.watch.events import Problem
from gateway.cli.watch.tasks import WatchedTasks
from tests.unit.cli.watching import progress, rejected, stale, watched


def drawn(tasks: WatchedTasks, width: int = 80, height: int | None = None, **more: str) -> list[str]:
    """Return the lines of a display on a terminal of this size."""
    display = ProgressDisplay("http://host", tasks)
    for name, value in more.items():
        setattr(display, name, value)
    out = StringIO()
    Console(file=out, width=width).print(display.render(width, height))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_display_keeps_the_bar_beside_a_problem() -> None:
    """A task with a problem still shows its last progress."""
    tasks, _ = watched()
    tasks.update(progress())
    tasks.update(Problem(taskId="A", detail="no"))
    head, row = drawn(tasks)
    assert head == "http://host: 0 of 1 ended"
    assert row.split() == ["A", "error", "━━━━━━━╸", "25", "%", "no"]


def test_display_has_a_sum_for_several_tasks() -> None:
    """Above several tasks stands their sum."""
    tasks, _ = watched("A", "B")
    tasks.update(progress("A", etaSeconds=67))
    tasks.update(progress("B", "succeeded"))
    _, total, first, second = drawn(tasks)
    assert total.startswith("all tasks 1 of 2")
    assert total.endswith(" 62 % 1:07 left")
    assert (first[:9].strip(), second[:9].strip()) == ("A", "B")


def test_display_says_why_there_are_no_updates() -> None:
    """The first line names a lost connection; reasons and a notice have lines of their own."""
    tasks, _ = watched()
    tasks.update(progress())
    assert drawn(tasks, trouble="it broke")[0] == "http://host: it broke; reconnecting"
    assert drawn(tasks, 40, trouble="it broke; check --gateway")[:2] == [
        "http://host: it broke; check --gateway;",
        "reconnecting",
    ]
    assert drawn(tasks, notice="long polls")[1] == "long polls"
    tasks.update(stale())
    head, reason, row = drawn(tasks, 120)
    assert head == "http://host: 0 of 1 ended; upstream failing"
    assert reason == "The vendor refuses our credentials."
    assert row.endswith("last update 12 s ago: The vendor refuses our credentials")
    display = ProgressDisplay("http://host", tasks)
    display.gateway_troubles = ("Store: no connection", "The vendor refuses our credentials")
    out = StringIO()
    Console(file=out, width=40).print(display.render(40))
    reasons = " ".join(line.strip() for line in out.getvalue().splitlines()[1:3])
    assert reasons == "The vendor refuses our credentials. Store: no connection."


@pytest.mark.parametrize("width", [10, 20, 24, 40, 60, 80, 200])
def test_display_has_one_line_per_task_at_any_width(width: int) -> None:
    """Long IDs and texts need no second line and hide no status; a narrow screen has no bar."""
    tasks, _ = watched("A", "x" * 64, "B")
    tasks.update(progress("A", message="[bold]内存不足[/bold] " * 9))
    tasks.update(rejected("B"))
    lines = drawn(tasks, width, notice="a proxy buffers the event stream " * 9, trouble="lost " * 99)
    assert len(lines) == 3 + 1 + 3
    assert all(Console(width=999).render_str(line, markup=False).cell_len <= width for line in lines)
    assert ("━" in "".join(lines)) == (width >= 60)
    if width >= 20:
        assert " running" in lines[4]
    if width >= 24:
        assert " 25 %" in lines[4]
    cut = [task.task_id for task in ProgressDisplay("http://host", tasks).cut_tasks(width)]
    assert cut == [
        row for row, line in zip("AB", lines[4:6], strict=True) if line.endswith("…") or width < 40
    ]
    if width == 200:
        assert "[bold]内存不足[/bold]" in lines[4]
        assert "try --api comfy" in lines[5]


@pytest.mark.parametrize(("height", "shown", "more"), [(24, 20, 20), (6, 2, 38), (2, 1, 39), (100, 40, 0)])
def test_display_fits_a_low_screen(height: int, shown: int, more: int) -> None:
    """Running tasks come first, and the last line counts the tasks that are not shown."""
    names = [f"task-{number:02}" for number in range(40)]
    tasks, _ = watched(*names)
    for name in names:
        tasks.update(progress(name, "running" if name >= "task-38" else "waiting"))
    lines = drawn(tasks, 80, height)
    rows = [line for line in lines if line.startswith("task-")]
    assert len(rows) == shown
    assert rows[0].startswith("task-38")
    assert len(lines) < height or height == 2
    assert [line for line in lines if "more" in line] == (
        [f"… {more} more: {more - (shown < 2)} waiting".replace("1 running, ", "")]
        if more and shown >= 2
        else [f"… {more} more: 1 running, {more - 1} waiting"] * bool(more)
    )
