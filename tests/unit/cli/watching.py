"""Tasks for tests of `sd-gateway watch`, without a network."""

from dataclasses import dataclass
from typing import Any

from gateway.cli.watch.events import Problem, Progress, Stale
from gateway.cli.watch.tasks import WatchedTasks


@dataclass
class Clock:
    """A simulated clock."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def progress(task_id: str = "A", status: str = "running", **more: Any) -> Progress:
    """Return what the gateway sends about a task."""
    ended = status in {"succeeded", "failed", "canceled"}
    data = {
        "taskId": task_id,
        "status": status,
        "progress": 1 if status == "succeeded" else 0.25,
        "queueRemaining": None,
        "etaSeconds": None,
        "message": None,
        "terminal": ended,
    }
    return Progress.model_validate(data | more)


def stale(task_id: str = "A", **more: Any) -> Stale:
    """Return what the gateway sends when an update is overdue."""
    data = {"taskId": task_id, "api": "sd", "stale": "upstream-credentials", "ageSeconds": 12.0}
    return Stale.model_validate(data | {"title": "The vendor refuses our credentials"} | more)


def rejected(task_id: str = "A") -> Problem:
    """Return what the gateway sends about a task that the vendor does not know."""
    detail = "the upstream rejected the query"
    return Problem.model_validate(
        {
            "taskId": task_id,
            "code": "upstream-rejected",
            "detail": detail,
            "upstream": {"errMessage": "no task"},
        }
    )


def watched(*task_ids: str, api: str = "sd") -> tuple[WatchedTasks, Clock]:
    """Return the tasks, A by default, and their clock."""
    clock = Clock()
    return WatchedTasks(task_ids or ("A",), api=api, clock=clock), clock


def line(tasks: WatchedTasks, task_id: str = "A") -> str:
    """Return the line of a task."""
    task = tasks.find(task_id)
    assert task is not None
    return tasks.line(task)
