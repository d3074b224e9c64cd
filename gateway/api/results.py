"""GET /v1/results/{taskId}: the images of a task that has succeeded.

    the cached result is that of a finished task -> answer at once
    else the task's progress says                -> not succeeded: 409
                                                 -> succeeded: query the result

Cache and in-flight requests are shared with the vendor's path for results.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from cachetools import LRUCache
from starlette.types import Receive, Scope, Send

from gateway.api.client_limits import client_key
from gateway.api.progress_response import CACHE_NAMES, cache_values
from gateway.api.request_log import record_outcome
from gateway.api.requests import Headers, header, query_parameters
from gateway.api.server_extensions import while_connected
from gateway.api.task_parameters import TaskParameters
from gateway.domain.entity_tag import matches
from gateway.domain.errors import NotFinished
from gateway.domain.result import Result, read_result
from gateway.domain.snapshot import Snapshot, render_json, version_now
from gateway.domain.task import Status, TaskKey
from gateway.progress.outcomes import LookupSuccess
from gateway.progress.service import ProgressService

_MAX_BYTES = 4_194_304  # of rendered responses
_MAX_LAG_SECONDS = 2.0  # see `_result`


class _Rendered(NamedTuple):
    """The response for a snapshot, and the status in the vendor's result."""

    snapshot: Snapshot
    status: Status
    body: bytes
    etag: str


class ResultsEndpoint:
    """Responds with the image URLs and the vendor's data of a finished task."""

    def __init__(self, service: ProgressService, *, tasks: TaskParameters) -> None:
        self._service = service
        self._tasks = tasks
        self._rendered: LRUCache[TaskKey, _Rendered] = LRUCache(
            _MAX_BYTES, getsizeof=lambda rendered: len(rendered.body) + len(rendered.snapshot.envelope)
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond 200 with the result, or 304 when the client has it."""
        parameters = query_parameters(scope, "api")
        key, progress_key = self._tasks.result_in_path(scope, parameters)
        result, rendered = await self._result(scope, receive, key, progress_key)
        cache_control, *others = cache_values(result)
        # Private: the URLs give access to the images.
        headers: Headers = list(zip(CACHE_NAMES, (b"private, " + cache_control, *others), strict=True))
        headers.append((b"etag", rendered.etag.encode()))
        if_none_match = header(scope["headers"], b"if-none-match")
        if if_none_match is not None and matches(if_none_match, rendered.etag):
            await send({"type": "http.response.start", "status": 304, "headers": headers})
            await send({"type": "http.response.body"})
            return
        body = rendered.body
        headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    async def _result(
        self, scope: Scope, receive: Receive, key: TaskKey, progress_key: TaskKey | None
    ) -> tuple[LookupSuccess, _Rendered]:
        """Return the result of a task that has succeeded. Raises: NotFinished, or the failure of a query."""
        seen_revision = 0
        result = self._service.lookup(key)
        if result is not None:
            rendered = self._render(result.snapshot)
            if rendered.status is Status.SUCCEEDED:
                return record_outcome(scope, result), rendered
            # The vendor's path may have cached a result before the end of the task. A newer one is needed,
            # but if the vendor's result lags behind its progress, not with each request.
            seen_revision = version_now() - int(_MAX_LAG_SECONDS * 1_000_000)
        if progress_key is not None:
            progress = await self._get(scope, receive, progress_key, 0)
            left = progress.snapshot.lifetime - progress.age
            _check_finished(progress.snapshot.status or Status.UNKNOWN, retry_after=max(left, 1.0))
        result = await self._get(scope, receive, key, seen_revision)
        rendered = self._render(result.snapshot)
        # The progress counts if the result has no status.
        if rendered.status is not Status.UNKNOWN or progress_key is None:
            _check_finished(rendered.status, retry_after=_MAX_LAG_SECONDS)
        return result, rendered

    async def _get(self, scope: Scope, receive: Receive, key: TaskKey, seen_revision: int) -> LookupSuccess:
        query = self._service.get(key, client=client_key(scope), seen_revision=seen_revision)
        return record_outcome(scope, await while_connected(scope, receive, query))

    def _render(self, snapshot: Snapshot) -> _Rendered:
        key = snapshot.key
        rendered = self._rendered.get(key)
        if rendered is not None and rendered.snapshot is snapshot:
            return rendered
        result = read_result(snapshot.envelope, key.operation)
        body = _body(key, result)
        etag = f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'
        rendered = _Rendered(snapshot, result.status, body, etag)
        if len(body) + len(snapshot.envelope) <= _MAX_BYTES:
            self._rendered[key] = rendered
        return rendered


def _body(key: TaskKey, result: Result) -> bytes:
    head = render_json(
        {
            "taskId": key.task_id,
            "api": key.operation.api,
            "status": Status.SUCCEEDED,
            "images": [{"url": url} for url in result.image_urls],
        }
    )
    return b'%b,"result":%b}' % (head[:-1], result.data)


def _check_finished(status: Status, *, retry_after: float) -> None:
    """Raise NotFinished unless the task has succeeded; without `retry_after` if it never will."""
    if status is not Status.SUCCEEDED:
        raise NotFinished(
            f"the task has not succeeded; its status is {status}",
            task_status=status,
            retry_after=None if status.terminal else retry_after,
        )
