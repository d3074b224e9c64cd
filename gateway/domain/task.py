"""A task: the operation that queries it, its ID and its status."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import NamedTuple

from gateway.domain.errors import InvalidTaskId

_TASK_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Operation(StrEnum):
    """The upstream operations that the gateway may call; the value is the last segment of the path.

    Attributes:
        path: The URL path, the same for the upstream and for the gateway's vendor-compatible paths.
        api: The name of the vendor API in the simplified paths, `sd` or `comfy`.
        is_result: Whether the operation returns a result. Its snapshots have no status and no progress.
    """

    SD_GET_PROGRESS = "sd_get_progress"
    COMFY_GET_PROGRESS = "comfy_get_progress"
    SD_GET_RESULT = "sd_get_result"
    COMFY_GET_RESULT = "comfy_get_result"

    def __init__(self, name: str) -> None:
        self.path = f"/scc/{name}"
        self.api = name.partition("_")[0]
        self.is_result = name.endswith("_result")


class Status(StrEnum):
    """The status of a task, as the gateway reports it."""

    WAITING = "waiting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    UNKNOWN = "unknown"

    @property
    def terminal(self) -> bool:
        """Whether the status is final: the task has succeeded, failed or been canceled."""
        return self in _TERMINAL


_TERMINAL = frozenset({Status.SUCCEEDED, Status.FAILED, Status.CANCELED})


class TaskKey(NamedTuple):
    """The key of cache entries, in-flight requests and subscriptions: an operation and a task ID."""

    operation: Operation
    task_id: str


def check_task_id(task_id: str) -> str:
    """Return the task ID if it is valid.

    Raises:
        InvalidTaskId: It is not 1 to 64 characters of `A-Z a-z 0-9 _ -`.
    """
    if not _TASK_ID.fullmatch(task_id):
        raise InvalidTaskId("a task ID is 1 to 64 characters of A-Z a-z 0-9 _ -")
    return task_id
