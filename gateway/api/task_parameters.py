"""Parameters that identify tasks: one task ID in the path, or several in the query."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from urllib.parse import quote, unquote

from starlette.types import Scope

from gateway.api.requests import MAX_SHOWN_CHARS
from gateway.domain.errors import InvalidParameter, InvalidTaskId, PathNotFound
from gateway.domain.task import Operation, TaskKey, check_task_id

RESULTS = "/v1/results"  # results are below it
PROGRESS = "/v1/progress"  # the path of batches; single tasks are below it

_OPERATION = {"sd": Operation.SD_GET_PROGRESS, "comfy": Operation.COMFY_GET_PROGRESS}
_RESULT_OPERATION = {"sd": Operation.SD_GET_RESULT, "comfy": Operation.COMFY_GET_RESULT}


class TaskParameters:
    """Parses task keys. `operations` are the enabled ones; `max_tasks` is the maximum per request."""

    def __init__(self, operations: Collection[Operation], *, max_tasks: int) -> None:
        self._operations = {api: op for api, op in _OPERATION.items() if op in operations}
        self._enabled = frozenset(operations)
        self._max_tasks = max_tasks

    def in_path(self, scope: Scope, parameters: dict[str, list[str]]) -> TaskKey:
        """Return the task of the path parameter `taskId`. Raises: RequestError."""
        task_id = self._task_id_in_path(scope)
        return TaskKey(self._operation(parameters), _checked(task_id))

    def result_in_path(
        self, scope: Scope, parameters: dict[str, list[str]]
    ) -> tuple[TaskKey, TaskKey | None]:
        """Return the keys of the result and of the progress of the task in the path.

        The second is None if the operation for progress is switched off. Raises: RequestError; PathNotFound
        if the operation for results is switched off.
        """
        task_id = _checked(self._task_id_in_path(scope))
        api = parameters["api"][0] if "api" in parameters else "sd"
        operation = _RESULT_OPERATION.get(api)
        if operation is None:
            raise InvalidParameter(f"query parameter 'api' must be one of: {', '.join(_RESULT_OPERATION)}")
        if operation not in self._enabled:
            raise PathNotFound(f"the operation {operation} is switched off (upstream.operations)")
        progress = self._operations.get(api)
        return TaskKey(operation, task_id), None if progress is None else TaskKey(progress, task_id)

    def _task_id_in_path(self, scope: Scope) -> str:
        task_id: str = scope["path_params"]["taskId"]
        # The server has decoded the path. A literal slash makes it another path, which does not exist. An
        # encoded slash (%2F) is part of the task ID, and is rejected as an invalid task ID.
        if "/" in task_id and unquote(scope["raw_path"].rpartition(b"/")[2]) != task_id:
            raise PathNotFound("no such path; /openapi.json lists those that exist")
        return task_id

    def in_query(self, parameters: dict[str, list[str]]) -> Sequence[TaskKey]:
        """Return the tasks of the query's `taskId`, in order, without duplicates. Raises: RequestError."""
        operation = self._operation(parameters)
        task_ids = list(dict.fromkeys(parameters.get("taskId", ())))
        if not 1 <= len(task_ids) <= self._max_tasks:
            raise InvalidParameter(f"query parameter 'taskId' must be given 1 to {self._max_tasks} times")
        return [TaskKey(operation, _checked(task_id)) for task_id in task_ids]

    def _operation(self, parameters: dict[str, list[str]]) -> Operation:
        operation = self._operations.get(parameters["api"][0] if "api" in parameters else "sd")
        if operation is None:
            raise InvalidParameter(f"query parameter 'api' must be one of: {', '.join(self._operations)}")
        return operation


def checked_task_id(task_id: str, *, comma_hint: str = "") -> str:
    """Return the task ID if it is valid.

    Raises: InvalidTaskId, which names it, because there may be many, with `comma_hint` if it has a comma.
    """
    try:
        return check_task_id(task_id)
    except InvalidTaskId as exc:
        shown = ascii(task_id) if len(task_id) <= MAX_SHOWN_CHARS else f"a text of {len(task_id)} characters"
        hint = f"; {comma_hint}" if comma_hint and "," in task_id else ""
        raise InvalidTaskId(f"{shown} is not a task ID: {exc}{hint}") from None


def _checked(task_id: str) -> str:
    return checked_task_id(task_id, comma_hint="for several tasks, repeat the parameter: ?taskId=A&taskId=B")


class SimpleTargetParser:
    """Parses request targets of one task without percent-encoding and with no parameter but `api`.

    The path may begin with `root_path` or not, as in `middleware.HostAndPrefix`.
    """

    def __init__(self, operations: Collection[Operation], *, root_path: str) -> None:
        self._operations = {api.encode(): op for api, op in _OPERATION.items() if op in operations}
        self._default = self._operations.get(b"sd")
        # If our own path begins with the prefix, Starlette strips it from there: then it is not optional.
        optional = "" if f"{PROGRESS}/".startswith(f"{root_path}/") else "?"
        prefix = f"(?:{re.escape(quote(root_path))}){optional}" if root_path else ""
        pattern = rf"{prefix}{PROGRESS}/([A-Za-z0-9_-]{{1,64}})(?:\?api=([a-z]+))?"
        self._match = re.compile(pattern.encode()).fullmatch

    def parse(self, target: bytes) -> TaskKey | None:
        """Return the task of this target, or None for any other target, valid or not."""
        match = self._match(target)
        if match is None:
            return None
        task_id, api = match.groups()
        operation = self._default if api is None else self._operations.get(api)
        return None if operation is None else TaskKey(operation, task_id.decode())
