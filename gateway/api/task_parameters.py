"""Which tasks a request names: one in its path, or several in its query."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from urllib.parse import quote, unquote

from starlette.types import Scope

from gateway.domain.errors import InvalidParameter, PathNotFound
from gateway.domain.task import Operation, TaskKey, check_task_id

PROGRESS = "/v1/progress"  # the path of many tasks, and of each one below it

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


class PlainTargets:
    """Recognizes a request's target when it names one task in the plainest way there is.

    `root_path` may stand before the path or not, as for `middleware.Admission`.
    """

    def __init__(self, operations: Collection[Operation], *, root_path: str) -> None:
        self._operations = {api.encode(): op for api, op in _OPERATION.items() if op in operations}
        self._default = self._operations.get(b"sd")
        # Where our own path begins with the prefix, Starlette takes it for one: then it must be there.
        optional = "" if f"{PROGRESS}/".startswith(f"{root_path}/") else "?"
        prefix = f"(?:{re.escape(quote(root_path))}){optional}" if root_path else ""
        pattern = rf"{prefix}{PROGRESS}/([A-Za-z0-9_-]{{1,64}})(?:\?api=([a-z]+))?"
        self._match = re.compile(pattern.encode()).fullmatch

    def task(self, target: bytes) -> TaskKey | None:
        """Return its task, or None: it may name none, or be wrong."""
        match = self._match(target)
        if match is None:
            return None
        task_id, api = match.groups()
        operation = self._default if api is None else self._operations.get(api)
        return None if operation is None else TaskKey(operation, task_id.decode())
