"""GET /v1/progress?taskId=A&taskId=B: many tasks in one response, each with its own snapshot or problem.

The response comes immediately, or as a long poll when the representation of one task changes.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from gateway.api.client_limits import ClientLimits, client_key
from gateway.api.problems import problem_document, status_and_title
from gateway.api.requests import LONG_POLL, header, query_parameters
from gateway.api.server_extensions import DisconnectListener, while_connected
from gateway.api.task_parameters import TaskParameters
from gateway.api.waiting import requested_wait
from gateway.domain.entity_tag import matches
from gateway.domain.errors import GatewayError
from gateway.domain.snapshot import Snapshot, render_json
from gateway.domain.task import Status, TaskKey
from gateway.progress.results import CacheResult, CacheStatus, FetchFailure
from gateway.progress.service import ProgressService
from gateway.watch.hub import SubscriptionKind, WatchHub
from gateway.watch.subscriber import Subscriber


class BatchEndpoint:
    """Responds with the progress of several tasks."""

    def __init__(
        self,
        service: ProgressService,
        hub: WatchHub,
        *,
        tasks: TaskParameters,
        clients: ClientLimits,
        max_wait_seconds: float,
    ) -> None:
        self._service = service
        self._hub = hub
        self._tasks = tasks
        self._clients = clients
        self._max_wait_seconds = max_wait_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond 200 with the items in the order of the request and a summary, or 304."""
        parameters = query_parameters(scope, "api", "wait", repeated="taskId")
        keys = self._tasks.in_query(parameters)
        if_none_match = header(scope["headers"], b"if-none-match")
        wait, headers = requested_wait(scope, parameters, longest=self._max_wait_seconds)
        self._clients.charge(scope, len(keys))
        if wait:
            scope["state"][LONG_POLL] = True
            outcomes = await self._wait_for_change(scope, receive, keys, if_none_match, wait)
        else:
            outcomes = await self._read(scope, receive, keys)
        scope["state"]["outcomes"] = outcomes  # for the request log
        tag = _tag(
            outcome.snapshot if isinstance(outcome, CacheResult) else outcome.failure for outcome in outcomes
        )
        # Weak: problems contain the ID of their request, and two representations may differ in it.
        headers += [(b"cache-control", b"no-store"), (b"etag", b"W/" + tag.encode())]
        if if_none_match is not None and matches(if_none_match, tag):
            await send({"type": "http.response.start", "status": 304, "headers": headers})
            await send({"type": "http.response.body"})
            return
        body = _body(outcomes, request_id=scope["state"]["request_id"])
        headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
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

    async def _wait_for_change(
        self,
        scope: Scope,
        receive: Receive,
        keys: Sequence[TaskKey],
        if_none_match: str | None,
        wait: float,
    ) -> list[CacheResult | FetchFailure]:
        """Wait until the representation differs from the client's, or every task has ended.

        Without If-None-Match, it must differ from the one on arrival. Only the hub's schedules call the
        upstream meanwhile. A task counts as one lookup.
        """
        await self._service.catch_up()
        on_arrival = {key: result.snapshot for key in keys if (result := self._service.peek(key)) is not None}
        if if_none_match is None:
            if_none_match = _tag(on_arrival[key] for key in keys) if len(on_arrival) == len(keys) else ""
        latest = _Latest(keys, on_arrival, if_none_match)
        with (
            self._clients.subscription(scope),
            self._hub.subscribe(keys, SubscriptionKind.LONGPOLL, client=client_key(scope)) as subscriber,
        ):
            async with DisconnectListener(scope, receive, subscriber.disconnect):
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await latest.wait_for_change(subscriber)
            await self._service.catch_up()
        known: dict[TaskKey, CacheResult | FetchFailure] = {}
        for key in keys:
            failure = latest.failure(key)
            outcome = FetchFailure(key, failure, CacheStatus.NEGATIVE) if failure else self._service.peek(key)
            if outcome is not None:
                self._service.count_lookup(outcome)
                known[key] = outcome
        missing = [key for key in keys if key not in known]
        if missing:  # as in `ProgressEndpoint`: join the schedules' in-flight requests
            known |= zip(missing, await self._read(scope, receive, missing), strict=True)
        return [known[key] for key in keys]


class _Latest:
    """The latest snapshot or failure of each task during a long poll."""

    def __init__(
        self, keys: Sequence[TaskKey], on_arrival: dict[TaskKey, Snapshot], if_none_match: str
    ) -> None:
        self._keys = keys
        self._latest: dict[TaskKey, Snapshot | GatewayError] = {**on_arrival}
        self._if_none_match = if_none_match

    def failure(self, key: TaskKey) -> GatewayError | None:
        """Return the failure of a task, if it has no newer snapshot."""
        latest = self._latest.get(key)
        return latest if isinstance(latest, GatewayError) else None

    async def wait_for_change(self, subscriber: Subscriber) -> None:
        """Return when the representation is complete, and has changed or ended. Raises: ClientDisconnect."""
        while not subscriber.shutting_down and not self._is_over(subscriber):
            for update in await subscriber.next_updates():
                latest = update.snapshot or update.failure
                if latest is not None:
                    self._latest[update.key] = latest
            if subscriber.disconnected:
                raise ClientDisconnect

    def _is_over(self, subscriber: Subscriber) -> bool:
        if len(self._latest) < len(self._keys):
            return False
        latest = [self._latest[key] for key in self._keys]
        return not matches(self._if_none_match, _tag(latest)) or all(
            value.terminal if isinstance(value, Snapshot) else key in subscriber.unknown_keys
            for key, value in zip(self._keys, latest, strict=True)
        )


def _tag(items: Iterable[Snapshot | GatewayError]) -> str:
    """Return the entity tag of a batch: it changes with the body of a task, and with its problem."""
    digest = hashlib.blake2b(digest_size=12)
    for item in items:
        text = item.etag.partition(".")[0] if isinstance(item, Snapshot) else f"{item.code} {item}"
        digest.update(f"{len(text)} {text}".encode())
    return f'"{digest.hexdigest()}"'


def _body(outcomes: Sequence[CacheResult | FetchFailure], *, request_id: str) -> bytes:
    items: list[bytes] = []
    for outcome in outcomes:
        if isinstance(outcome, CacheResult):
            items.append(outcome.snapshot.body)
        else:
            status, title = status_and_title(outcome.failure)
            problem = problem_document(outcome.failure, status, title, request_id=request_id)
            items.append(render_json({"taskId": outcome.key.task_id, "error": problem}))
    snapshots = [outcome.snapshot for outcome in outcomes if isinstance(outcome, CacheResult)]
    summary = render_json(summarize(snapshots, errors=len(outcomes) - len(snapshots)))
    return b'{"items":[%s],"summary":%s}' % (b",".join(items), summary)


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
