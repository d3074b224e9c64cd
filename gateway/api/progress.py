"""GET /v1/progress/{taskId}: the simplified API.

A plain ASGI endpoint, for this is the hot path: on a hit the body and the ETag are the bytes
that were rendered when the snapshot was stored, and nothing is awaited but `send`.
"""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import unquote

from starlette.types import Receive, Scope, Send

from gateway.api.caching import cache_headers
from gateway.api.requests import query_parameters
from gateway.exceptions import InvalidParameter, PathNotFound
from gateway.models import Operation, TaskKey, check_task_id
from gateway.service import ProgressService

_OPERATION = {"sd": Operation.SD_GET_PROGRESS, "comfy": Operation.COMFY_GET_PROGRESS}


class ProgressEndpoint:
    """Answers for one task. `operations` are the upstream operations that are switched on."""

    def __init__(self, service: ProgressService, *, operations: Collection[Operation]) -> None:
        self._service = service
        self._operations = {api: op for api, op in _OPERATION.items() if op in operations}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 200 with the task's progress, or 304 when the caller has it already."""
        reading = await self._service.get(self._key(scope))
        snapshot = reading.snapshot
        headers = cache_headers(reading)
        headers.append((b"etag", snapshot.etag.encode()))
        if _matches(scope, snapshot.etag):
            await send({"type": "http.response.start", "status": 304, "headers": headers})
            await send({"type": "http.response.body"})
            return
        headers.append((b"content-type", b"application/json"))
        headers.append((b"content-length", b"%d" % len(snapshot.body)))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send(
            {"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else snapshot.body}
        )

    def _key(self, scope: Scope) -> TaskKey:
        api = query_parameters(scope, "api").get("api", "sd") if scope["query_string"] else "sd"
        operation = self._operations.get(api)
        if operation is None:
            raise InvalidParameter(f"query parameter 'api' must be one of: {', '.join(self._operations)}")
        task_id = scope["path_params"]["taskId"]
        # The server has decoded the path: a slash that was sent as one makes it another path, which
        # does not exist; one that was sent as %2F belongs to a task ID, and is wrong there.
        if "/" in task_id and unquote(scope["raw_path"].rpartition(b"/")[2]) != task_id:
            raise PathNotFound("no such path; /openapi.json lists those that exist")
        return TaskKey(operation, check_task_id(task_id))


def _matches(scope: Scope, etag: str) -> bool:
    """Tell whether If-None-Match names this representation (RFC 9110, 13.1.2: weak comparison)."""
    for name, value in scope["headers"]:
        if name == b"if-none-match":
            candidates = [part.strip().removeprefix("W/") for part in value.decode("latin-1").split(",")]
            if etag in candidates or candidates == ["*"]:
                return True
    return False
