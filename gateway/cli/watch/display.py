"""Draws the tasks of `sd-gateway watch` in a terminal: one line per task, whatever the size of the screen.

Running tasks come first. If the screen is too low, the last line tells how many tasks are not shown. A narrow
screen first loses the bars, then the details, then the percentages.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Self

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gateway.cli.watch.tasks import WatchedTask, WatchedTasks
from gateway.cli.watch.words import NOT_FOUND, time_left

_STYLES = {"succeeded": "green", "failed": "red", "canceled": "yellow", "error": "red", NOT_FOUND: "red"}
_MIN_BAR, _MAX_BAR = 8, 30  # columns
_MIN_ID = 8
_STATE = 9  # columns of "succeeded"
_PERCENT = 5  # columns of "100 %"
_MIN_DETAILS, _DETAILS = 12, 24  # a time left, and the beginning of a message
_SECONDS_PER_FRAME = 0.25
_ALL = "all tasks"


class ProgressDisplay:
    """The state of the tasks as a renderable of rich.

    `trouble`: why there is no connection. `notice`: why the connection is not an event stream.
    `gateway_troubles`: what the gateway says about itself, as sentences.
    """

    def __init__(self, name: str, tasks: WatchedTasks) -> None:
        self.name = name
        self.trouble = self.notice = ""
        self.gateway_troubles: tuple[str, ...] = ()
        self._tasks = tasks

    def render(self, width: int, height: int | None = None) -> Group:
        """Return the display for a screen of `width` columns and `height` lines; None: without a limit."""
        lines: list[RenderableType] = [*self._head(width)]
        if self.notice:
            lines.append(_cut(self.notice, "yellow"))
        lines += [_cut(line, "yellow") for line in textwrap.wrap(self._reasons(), width)]
        tasks = self._tasks.ordered()
        has_sum = len(tasks) > 1
        hidden: list[WatchedTask] = []
        if height is not None:
            room = max(height - len(lines) - has_sum - 1, 1)  # the cursor stands in the last line
            if len(tasks) > room:
                room = max(room - 1, 1)
                tasks, hidden = tasks[:room], tasks[room:]
        table = self._table(width)
        if has_sum:
            self._add_sum(table)
        for task in tasks:
            self._add(table, task)
        lines.append(table.grid)
        if hidden:
            lines.append(_cut(f"… {len(hidden)} more: {self._tasks.counts(hidden)}", "dim"))
        return Group(*lines)

    def cut_tasks(self, width: int) -> list[WatchedTask]:
        """Return the tasks whose details do not fit a screen of `width` columns."""
        room = self._table(width).details_width
        return [task for task in self._tasks if cell_len(self._tasks.details(task)) > room]

    def _table(self, width: int) -> _Table:
        names = [task.task_id for task in self._tasks]
        return _Table(width, max(map(len, [*names, _ALL] if len(names) > 1 else names)))

    def _head(self, width: int) -> list[Text]:
        if self.trouble:
            text = f"{self.name}: {self.trouble}; reconnecting"
            wrapped = textwrap.wrap(text, width, break_on_hyphens=False, max_lines=2, placeholder="…")
            return [_cut(line, "yellow") for line in wrapped]
        failing = any(task.stale for task in self._tasks)
        text = f"{self.name}: {self._tasks.ended} of {len(self._tasks)} ended"
        return [_cut(f"{text}; upstream failing", "yellow") if failing else _cut(text, "dim")]

    def _reasons(self) -> str:
        """Return why updates fail, and what else is wrong: lines of tasks often have no room for it."""
        titles = [task.stale_title for task in self._tasks.ordered() if task.stale]
        return " ".join(f"{text}." for text in dict.fromkeys([*titles, *self.gateway_troubles]))

    def _add_sum(self, table: _Table) -> None:
        seconds = self._tasks.eta_seconds()
        table.add(
            Text(_ALL, style="bold"),
            Text(f"{self._tasks.ended} of {len(self._tasks)}"),
            self._tasks.fraction,
            f"{int(self._tasks.fraction * 100)} %",
            Text("" if seconds is None else time_left(seconds)),
        )

    def _add(self, table: _Table, task: WatchedTask) -> None:
        style = _STYLES.get(task.state, "")
        details = Text(self._tasks.details(task), style="yellow" if task.stale else "")
        state = Text(task.state, style=style)
        bar_style = "dim" if task.stale else style
        table.add(Text(task.task_id), state, task.fraction, task.percent, details, bar_style=bar_style)


class _Table:
    """A table for a screen of `width` columns, with as many columns of its own as fit.

    `longest`: the number of characters of the longest name.
    """

    def __init__(self, width: int, longest: int) -> None:
        self._has_percent = width >= _MIN_ID + _STATE + _PERCENT + 2
        rest = width - _STATE - 1 - (_PERCENT + 1) * self._has_percent - 1
        name = min(longest, max(width // 3, _MIN_ID), rest)
        rest -= name + 1
        bar = min(_MAX_BAR, max(rest - _DETAILS, min(_MIN_BAR, rest - _MIN_DETAILS)))
        self._bar = bar if bar >= _MIN_BAR else 0
        self.details_width = max(rest - (self._bar + 1 if self._bar else 0), 0)
        self.grid = Table.grid(padding=(0, 1), expand=True)
        self._add_column(name)
        self._add_column(_STATE)
        if self._bar:
            self._add_column(self._bar)
        if self._has_percent:
            self._add_column(_PERCENT, justify="right")
        self.grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")

    def _add_column(self, width: int, justify: Literal["left", "right"] = "left") -> None:
        self.grid.add_column(width=width, no_wrap=True, overflow="ellipsis", justify=justify)

    def add(
        self, name: Text, state: Text, fraction: float, percent: str, details: Text, *, bar_style: str = ""
    ) -> None:
        """Add a line."""
        bar = ProgressBar(
            total=1.0,
            completed=fraction,
            width=self._bar,
            complete_style=bar_style or "cyan",
            finished_style=bar_style,
        )
        cells: list[RenderableType] = [name, state]
        if self._bar:
            cells.append(bar)
        if self._has_percent:
            cells.append(percent)
        self.grid.add_row(*cells, details)


class LiveDisplay:
    """Keeps a display on the screen up to date. Use it with `with`; call `tick` often."""

    def __init__(
        self, display: ProgressDisplay, console: Console, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._display = display
        self._console = console
        self._clock = clock
        self._drawn_at = -_SECONDS_PER_FRAME
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="visible")

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave a last frame with every task on the screen, and show the cursor again."""
        self._live.update(self._display.render(self._console.width))
        self._live.__exit__(kind, exc, traceback)

    def tick(self) -> None:
        """Draw a frame, unless the last one is too recent."""
        now = self._clock()
        if now - self._drawn_at >= _SECONDS_PER_FRAME:
            self._drawn_at = now
            self._live.update(self._display.render(self._console.width, self._console.height), refresh=True)


def _cut(text: str, style: str) -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")
