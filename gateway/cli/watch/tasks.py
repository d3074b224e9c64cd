"""What `sd-gateway watch` knows about its tasks, and the words for it.

The estimate of the time left counts down only while updates arrive. It stops when the connection is lost, and
when the gateway says that an update is overdue.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from gateway.cli.watch.events import UNKNOWN_TASK_SECONDS, Content, Problem, Progress, Stale
from gateway.cli.watch.words import NOT_FOUND, UNKNOWN_ID, ago, problem_title, time_left

_REJECTED = "upstream-rejected"
# Running tasks come first, because a low screen does not show all.
_ORDER = ("running", "error", NOT_FOUND, "waiting", "loading", "unknown", "failed", "canceled", "succeeded")


class WatchedTask:
    """The last known state of a task. `images`: what became of its images, for display."""

    def __init__(self, task_id: str, *, hint: str) -> None:
        self.task_id = task_id
        self.progress: Progress | None = None
        self.problem: Problem | None = None
        self.stale: Stale | None = None
        self.images = ""
        self._hint = hint
        self._received_at = 0.0
        self._stale_at = 0.0
        self._rejected_at: float | None = None

    def update(self, content: Content, now: float) -> None:
        """Record what the gateway sent."""
        match content:
            case Progress():
                self.progress, self.problem, self.stale, self._received_at = content, None, None, now
            case Problem():
                self.problem, self.stale = content, None
            case Stale(stale=code):
                self.stale, self._stale_at = (content if code else None), now
        if not self.not_found:
            self._rejected_at = None
        elif self._rejected_at is None:
            self._rejected_at = now

    @property
    def ended(self) -> bool:
        """Whether the status is final."""
        return self.progress is not None and self.progress.terminal

    def rejected_seconds(self, now: float) -> float:
        """Return how long the vendor has rejected every query for the task."""
        return 0.0 if self._rejected_at is None else now - self._rejected_at

    @property
    def succeeded(self) -> bool:
        """Whether the task has succeeded."""
        return self.progress is not None and self.progress.status == "succeeded"

    @property
    def not_found(self) -> bool:
        """Whether the vendor has rejected every query for the task."""
        return self.progress is None and self.problem is not None and self.problem.code == _REJECTED

    @property
    def state(self) -> str:
        """The status, or "loading", "error" or "not found"."""
        if self.not_found:
            return NOT_FOUND
        if self.problem:
            return "error"
        return self.progress.status if self.progress else "loading"

    @property
    def stale_title(self) -> str:
        """Why the update is overdue, or ""."""
        return (self.stale.title or problem_title(self.stale.stale or "")) if self.stale else ""

    @property
    def fraction(self) -> float:
        """The progress, from 0 to 1."""
        return self.progress.progress if self.progress else 0.0

    @property
    def percent(self) -> str:
        """The progress as text, rounded down, so that 100 % appears only at the end."""
        return f"{int(self.fraction * 100)} %" if self.progress else ""

    def eta_seconds(self, now: float, *, frozen_at: float | None = None) -> float | None:
        """Return the estimate of the time left; None if there is none. It counts down until `frozen_at`."""
        if self.progress is None or self.ended or not self.progress.eta_seconds:
            return None
        until = min(now, now if frozen_at is None else frozen_at, self._stale_at if self.stale else now)
        return max(self.progress.eta_seconds - (until - self._received_at), 0.0)

    def details(self, now: float, *, frozen_at: float | None = None) -> str:
        """Return everything that is known besides state and percentage."""
        if self.problem:
            return self._problem_text(self.problem)
        if self.progress is None:
            return ""
        parts = []
        if self.progress.queue_remaining is not None:
            parts.append(f"{self.progress.queue_remaining} in the queue")
        if (seconds := self.eta_seconds(now, frozen_at=frozen_at)) is not None:
            parts.append(time_left(seconds))
        if self.stale:
            age = self.stale.age_seconds + now - self._stale_at
            parts.append(f"last update {ago(age)}: {self.stale_title}")
        elif self.progress.message and not self.images:
            parts.append(self.progress.message)
        if self.images:
            parts.append(self.images)
        return ", ".join(parts)

    def line(self, now: float, *, frozen_at: float | None = None) -> str:
        """Return all that is known, for a line of its own."""
        details = self.details(now, frozen_at=frozen_at)
        if self.not_found:
            return f"{self.state.capitalize()}: {details}"
        return ", ".join(filter(None, (self.state, self.percent, details)))

    def _problem_text(self, problem: Problem) -> str:
        if not self.not_found:
            return problem.text
        quoted = f" ({problem.upstream_message})" if problem.upstream_message else ""
        return f"{UNKNOWN_ID}{self._hint}{quoted}"


class WatchedTasks:
    """The tasks of one command, in the order of its arguments.

    `frozen_at`: the time at which the connection was lost, or None.
    """

    def __init__(
        self, task_ids: Sequence[str], *, api: str = "sd", clock: Callable[[], float] = time.monotonic
    ) -> None:
        other = "comfy" if api == "sd" else "sd"
        self.clock = clock
        self.frozen_at: float | None = None
        self._at_end = False
        self._tasks = {task_id: WatchedTask(task_id, hint=f"; try --api {other}") for task_id in task_ids}

    def __iter__(self) -> Iterator[WatchedTask]:
        return iter(self._tasks.values())

    def __len__(self) -> int:
        return len(self._tasks)

    def find(self, task_id: str) -> WatchedTask | None:
        """Return a task, or None if it is not watched."""
        return self._tasks.get(task_id)

    def update(self, content: Content) -> WatchedTask | None:
        """Record what the gateway sent; return the task, or None if it is not watched."""
        task = self._tasks.get(content.task_id)
        if task is not None:
            task.update(content, self.clock())
        return task

    def disconnect(self) -> None:
        """Stop the countdowns."""
        if self.frozen_at is None:
            self.frozen_at = self.clock()

    def connect(self) -> None:
        """Resume the countdowns. The gateway says again which updates are overdue."""
        self.frozen_at = None
        for task in self:
            task.stale = None

    @property
    def succeeded(self) -> bool:
        """Whether every task has succeeded."""
        return all(task.succeeded for task in self)

    def end(self) -> None:
        """Record the end of the stream: all tasks have ended, also those that the vendor does not know."""
        self._at_end = True

    def has_ended(self, task: WatchedTask) -> bool:
        """Whether a task counts as ended: its status is final, or the vendor has rejected it for a while."""
        if task.not_found:
            return self._at_end or task.rejected_seconds(self.clock()) >= UNKNOWN_TASK_SECONDS
        return task.ended

    @property
    def ended(self) -> int:
        """The number of tasks that count as ended."""
        return sum(map(self.has_ended, self))

    def summary(self) -> str:
        """Return how many tasks have ended, and the number of tasks in each state."""
        return f"{self.ended} of {len(self)} ended: {self.counts()}"

    @property
    def fraction(self) -> float:
        """The mean progress. It is 1 only if every task has succeeded, as in a batch of the gateway."""
        return sum(task.fraction for task in self) / len(self)

    def eta_seconds(self) -> float | None:
        """Return the time until all tasks have ended; None if the estimate of any is missing."""
        now = self.clock()
        open_tasks = [task for task in self if not self.has_ended(task)]
        estimates = [task.eta_seconds(now, frozen_at=self.frozen_at) for task in open_tasks]
        known = [seconds for seconds in estimates if seconds is not None]
        return max(known) if known and len(known) == len(estimates) else None

    def ordered(self) -> list[WatchedTask]:
        """Return the running tasks first, and those that have succeeded last."""
        rank = {state: number for number, state in enumerate(_ORDER)}
        return sorted(self, key=lambda task: rank.get(task.state, rank["unknown"]))

    def line(self, task: WatchedTask) -> str:
        """Return all that is known about a task."""
        return task.line(self.clock(), frozen_at=self.frozen_at)

    def details(self, task: WatchedTask) -> str:
        """Return what is known about a task besides state and percentage."""
        return task.details(self.clock(), frozen_at=self.frozen_at)

    def counts(self, tasks: Sequence[WatchedTask] | None = None) -> str:
        """Return the number of tasks in each state, such as "2 running, 1 succeeded"."""
        counted = Counter(task.state for task in (self.ordered() if tasks is None else tasks))
        return ", ".join(f"{number} {state}" for state, number in counted.items())
