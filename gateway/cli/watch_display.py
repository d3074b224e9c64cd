"""`sd-gateway watch`: shows the progress of tasks as bars in a terminal, as lines in a pipe, or as JSON.

    follow -> ProgressDisplay -> a live bar per task    in a terminal
                              -> a line per change      otherwise
           -> the event as one line of JSON             with --json

Connection errors are shown above the bars, or written to standard error.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import httpx
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gateway.cli.watch_client import follow
from gateway.cli.watch_events import Event, Problem, Progress
from gateway.domain.printable import json_text, printable

_STYLES = {"succeeded": "green", "failed": "red", "canceled": "yellow"}
_BAR_WIDTH = 8, 30  # columns: minimum, maximum
_BESIDE = 45  # columns for status, percentage and details of most tasks
_NARROW = 50  # columns: narrower terminals show no bars, to leave room for the details
_FRAMES_PER_SECOND = 4
_MINUTE, _HOUR = 60, 3600


def watch(gateway: httpx.URL, task_ids: Sequence[str], *, api: str, as_json: bool) -> bool:
    """Show these tasks on standard output until all have ended; return whether all have succeeded.

    Raises: StreamRefused.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the locale may not support the vendor's Chinese messages
    display = ProgressDisplay(gateway, task_ids)
    console = Console()
    # Not console.is_terminal: with FORCE_COLOR, as in CI, rich treats a pipe as a terminal.
    is_live = sys.stdout.isatty() and not console.is_dumb_terminal and not as_json

    def pause(seconds: float, reason: str) -> None:
        if not is_live and reason != display.trouble:
            sys.stderr.write(f"sd-gateway: {display.name}: {reason}; reconnecting\n")
        display.trouble = reason
        time.sleep(seconds)

    def notify(text: str) -> None:
        display.notice = text
        if not is_live:
            sys.stderr.write(f"sd-gateway: {display.name}: {text}\n")

    frames = Live(
        get_renderable=lambda: display.render(console.width),
        console=console,
        refresh_per_second=_FRAMES_PER_SECOND,
    )
    with frames if is_live else nullcontext():
        for event in follow(gateway, display.task_ids, api=api, pause=pause, notify=notify):
            line = display.update(event)
            if as_json:
                print(json_text(json.dumps({"event": event.name, **event.data})), flush=True)  # noqa: T201
            elif line and not is_live:
                print(line, flush=True)  # noqa: T201
    return display.succeeded


def name(gateway: httpx.URL) -> str:
    """Return the URL of a gateway for display: without its password."""
    return printable(f"{gateway.scheme}://{gateway.netloc.decode()}{gateway.path.rstrip('/')}")


class ProgressDisplay:
    """The last known state of each task, as text and as bars.

    `trouble`: why there is no connection. `notice`: why the connection is not an event stream.
    """

    def __init__(
        self, gateway: httpx.URL, task_ids: Sequence[str], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name(gateway)
        self.task_ids = list(dict.fromkeys(task_ids))
        self.trouble = self.notice = ""
        self._clock = clock
        self._rows = {task_id: _Row() for task_id in self.task_ids}

    @property
    def succeeded(self) -> bool:
        """Whether every task has succeeded."""
        return all(row.status == "succeeded" for row in self._rows.values())

    def update(self, event: Event) -> str:
        """Record a change; return it as a line, or "" if that would repeat the previous one."""
        self.trouble = ""
        if event.content is None or event.content.task_id not in self._rows:
            return ""
        row = self._rows[event.content.task_id]
        before = row.line()
        row.update(event.content, self._clock())
        return "" if row.line() == before else f"{event.content.task_id}: {row.line()}"

    def render(self, width: int) -> Group:
        """Return the display as a renderable for a terminal of `width` columns."""
        ended = sum(row.ended for row in self._rows.values())
        head = Text(f"{self.name}: {ended} of {len(self._rows)} ended", style="dim")
        if self.trouble:
            head = Text(f"{self.name}: {self.trouble}; reconnecting", style="yellow")
        notice = [Text(self.notice, style="yellow")] if self.notice else []
        longest = max(len(task_id) for task_id in self._rows)
        least, most = _BAR_WIDTH
        bar_width = min(max(width - longest - _BESIDE, least), most)
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(no_wrap=True, max_width=max(width // 3, least))
        table.add_column(no_wrap=True)
        if width >= _NARROW:
            table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, justify="right")
        table.add_column(ratio=1)
        for task_id, row in self._rows.items():
            bar = ProgressBar(
                total=1.0,
                completed=row.fraction,
                width=bar_width,
                complete_style=row.style or "cyan",
                finished_style=row.style,
            )
            table.add_row(
                Text(task_id, overflow="ellipsis"),
                Text(row.state, style=row.style),
                *([bar] if width >= _NARROW else []),
                row.percent,
                Text(row.details(self._clock() - row.received_at)),
            )
        return Group(head, *notice, table)


class _Row:
    def __init__(self) -> None:
        self.progress: Progress | None = None
        self.problem: Problem | None = None
        self.received_at = 0.0

    def update(self, content: Progress | Problem, now: float) -> None:
        if isinstance(content, Problem):
            self.problem = content
        else:
            self.progress, self.problem, self.received_at = content, None, now

    @property
    def status(self) -> str:
        return self.progress.status if self.progress else ""

    @property
    def ended(self) -> bool:
        return self.progress is not None and self.progress.terminal

    @property
    def state(self) -> str:
        return "error" if self.problem else self.status or "loading"

    @property
    def style(self) -> str:
        return "red" if self.problem else _STYLES.get(self.status, "")

    @property
    def fraction(self) -> float:
        return self.progress.progress if self.progress else 0.0

    @property
    def percent(self) -> str:
        return f"{int(self.fraction * 100)} %" if self.progress else ""  # rounded down: 100 % only at the end

    def details(self, seconds_ago: float = 0.0) -> str:
        if self.problem:
            return self.problem.text
        if self.progress is None:
            return ""
        parts = []
        if self.progress.queue_remaining is not None:
            parts.append(f"{self.progress.queue_remaining} in the queue")
        if self.progress.eta_seconds and not self.ended:
            parts.append(_time_left(self.progress.eta_seconds - seconds_ago))
        if self.progress.message:
            parts.append(self.progress.message)
        return ", ".join(parts)

    def line(self) -> str:
        return ", ".join(filter(None, (self.state, self.percent, self.details())))


def _time_left(seconds: float) -> str:
    if seconds < 1:
        return "any moment now"
    if seconds < _MINUTE:
        return f"{int(seconds)} s left"
    if seconds < _HOUR:
        return f"{int(seconds // _MINUTE)} min {int(seconds % _MINUTE)} s left"
    return f"{int(seconds // _HOUR)} h {int(seconds % _HOUR // _MINUTE)} min left"
