"""Which tasks a request names: one in its path, or several in its query."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from urllib.parse import unquote

from starlette.types import Scope

from gateway.exceptions import InvalidParameter, PathNotFound
from gateway.models import Operation, TaskKey, check_task_id

_OPERATION = {"sd": Operation.SD_GET_PROGRESS, "comfy": Operation.COMFY_GET_PROGRESS}


class Tasks:
    """Reads task keys. `operations` are those switched on, `most` bounds the tasks of one request."""

    def __init__(self, operations: Collection[Operation], *, most: int) -> None:
        self._operations = {api: op for api, op in _OPERATION.items() if op in operations}
        self._most = most

    def in_path(self, scope: Scope, parameters: dict[str, list[str]]) -> TaskKey:
        """Return the task of a path with `taskId` in it. Raises: RequestError."""
        task_id: str = scope["path_params"]["taskId"]
        # The server has decoded the path. A slash that was sent as one makes it another path, which
        # does not exist; one that was sent as %2F belongs to a task ID, and is wrong there.
        if "/" in task_id and unquote(scope["raw_path"].rpartition(b"/")[2]) != task_id:
            raise PathNotFound("no such path; /openapi.json lists those that exist")
        return TaskKey(self._operation(parameters), check_task_id(task_id))

    def in_query(self, parameters: dict[str, list[str]]) -> Sequence[TaskKey]:
        """Return the tasks named by `taskId`, duplicates folded, in order. Raises: RequestError."""
        operation = self._operation(parameters)
        task_ids = list(dict.fromkeys(parameters.get("taskId", ())))
        if not 1 <= len(task_ids) <= self._most:
            raise InvalidParameter(f"query parameter 'taskId' must be given 1 to {self._most} times")
        return [TaskKey(operation, check_task_id(task_id)) for task_id in task_ids]

    def _operation(self, parameters: dict[str, list[str]]) -> Operation:
        operation = self._operations.get(parameters["api"][0] if "api" in parameters else "sd")
        if operation is None:
            raise InvalidParameter(f"query parameter 'api' must be one of: {', '.join(self._operations)}")
        return operation
