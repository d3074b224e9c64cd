"""Writes the changes of `sd-gateway watch` as lines, for pipes, log files and terminals without a cursor.

A task gets a line when its status changes, after each 10 %, and after 30 s if anything else has changed. If
nothing changes for 30 s, one line says how many tasks are in each state. Without a connection, this line is
not repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from gateway.cli.watch.tasks import WatchedTask, WatchedTasks

INTERVAL_SECONDS = 30.0


class _Written(NamedTuple):
    key: tuple[object, ...]
    line: str
    at: float


class ProgressLines:
    """Decides which changes are worth a line, and passes these lines to `write`."""

    def __init__(self, tasks: WatchedTasks, write: Callable[[str], None]) -> None:
        self._tasks = tasks
        self._write = write
        self._written: dict[str, _Written] = {}
        self._last_at = tasks.clock()
        self._last_summary = ""

    def update(self, task: WatchedTask) -> None:
        """Write a line if the status has changed, or the progress by 10 %."""
        written = self._written.get(task.task_id)
        if written is None or written.key != _key(task):
            self._write_task(task)

    def tick(self) -> None:
        """Write what has changed little for `INTERVAL_SECONDS`."""
        now = self._tasks.clock()
        for task in self._tasks:
            written = self._written.get(task.task_id)
            if written is None or task.ended or now - written.at < INTERVAL_SECONDS:
                continue
            if self._tasks.line(task) != written.line:
                self._write_task(task)
        if now - self._last_at >= INTERVAL_SECONDS:
            self._last_at = now
            told, self._last_summary = self._last_summary, self._tasks.summary()
            if self._tasks.frozen_at is None or told != self._last_summary:
                self._write(self._last_summary)

    def _write_task(self, task: WatchedTask) -> None:
        now, line = self._tasks.clock(), self._tasks.line(task)
        written = self._written.get(task.task_id)
        self._written[task.task_id] = _Written(_key(task), line, now)
        if written is None or written.line != line:
            self._last_at = now
            self._write(f"{task.task_id}: {line}")


def _key(task: WatchedTask) -> tuple[object, ...]:
    return (
        task.state,
        int(task.fraction * 10 + 1e-9),
        task.problem.text if task.problem else "",
        task.stale.stale if task.stale else "",
        task.images,
    )
