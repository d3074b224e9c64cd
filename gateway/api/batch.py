"""GET /v1/progress?taskId=A&taskId=B: many tasks in one response, each with its own snapshot or problem."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from starlette.types import Receive, Scope, Send

from gateway.api.client_limits import ClientLimits, client_key
from gateway.api.problems import problem_document, status_and_title
from gateway.api.requests import query_parameters
from gateway.api.server_extensions import while_connected
from gateway.api.task_parameters import TaskParameters
from gateway.domain.snapshot import Snapshot, render_json
from gateway.domain.task import Status, TaskKey
from gateway.progress.results import CacheResult, FetchFailure
from gateway.progress.service import ProgressService


class BatchEndpoint:
    """Responds with the progress of several tasks."""

    def __init__(self, service: ProgressService, *, tasks: TaskParameters, clients: ClientLimits) -> None:
        self._service = service
        self._tasks = tasks
        self._clients = clients

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond 200 with the items in the order of the query, and a summary."""
        keys = self._tasks.in_query(query_parameters(scope, "api", repeated="taskId"))
        self._clients.charge(scope, len(keys))
        outcomes = await self._read(scope, receive, keys)
        scope["state"]["outcomes"] = outcomes  # for the request log
        items: list[bytes] = []
        for outcome in outcomes:
            if isinstance(outcome, CacheResult):
                items.append(outcome.snapshot.body)
            else:
                status, title = status_and_title(outcome.failure)
                problem = problem_document(
                    outcome.failure, status, title, request_id=scope["state"]["request_id"]
                )
                items.append(render_json({"taskId": outcome.key.task_id, "error": problem}))
        snapshots = [outcome.snapshot for outcome in outcomes if isinstance(outcome, CacheResult)]
        summary = render_json(summarize(snapshots, errors=len(outcomes) - len(snapshots)))
        body = b'{"items":[%s],"summary":%s}' % (b",".join(items), summary)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"cache-control", b"no-store"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    async def _read(
        self, scope: Scope, receive: Receive, keys: Sequence[TaskKey]
    ) -> list[CacheResult | FetchFailure]:
        """Return the result of each task. Raises: ClientDisconnect when the client disconnects first."""
        cached = {key: self._service.lookup(key) for key in keys}
        missing = [key for key, result in cached.items() if result is None]
        if not missing:
            return [result for result in cached.values() if result is not None]
        client = client_key(scope)
        # Concurrency is bounded by the maximum number of tasks per request and by `upstream.max_in_flight`.
        reads = asyncio.gather(*(self._service.get(key, client=client) for key in missing))
        outcomes = cached | dict(zip(missing, await while_connected(scope, receive, reads), strict=True))
        return [outcome for outcome in outcomes.values() if outcome is not None]


def summarize(snapshots: list[Snapshot], *, errors: int) -> dict[str, Any]:
    """Return the summary of a batch: `progress` is the mean, `etaSeconds` the largest known value."""
    counts: dict[str, int] = dict.fromkeys(Status, 0)
    for snapshot in snapshots:
        counts[snapshot.status or Status.UNKNOWN] += 1
    etas = [snapshot.eta_seconds for snapshot in snapshots if snapshot.eta_seconds is not None]
    progress = sum(snapshot.progress or 0.0 for snapshot in snapshots)
    return {
        "total": len(snapshots) + errors,
        **counts,
        "errors": errors,
        "progress": round(progress / len(snapshots), 6) if snapshots else None,
        "etaSeconds": max(etas, default=None),
        "terminal": not errors and all(snapshot.terminal for snapshot in snapshots),
    }
