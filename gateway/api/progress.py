"""GET /v1/progress/{taskId}: the progress of one task, immediately or as a long poll.

This is the hot path, hence a plain ASGI endpoint. On a hit, body and ETag were rendered when the snapshot was
stored, and nothing but `send` is awaited.
"""

from __future__ import annotations

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from gateway.api.client_limits import ClientLimits, client_key
from gateway.api.progress_response import HEADER_NAMES, build_response, seen_revision_of
from gateway.api.request_log import record_outcome
from gateway.api.requests import FAILURE, LONG_POLL, free_headers, header, query_parameters
from gateway.api.server_extensions import DisconnectListener, require_connected, while_connected
from gateway.api.task_parameters import TaskParameters
from gateway.api.wait_parameter import requested_wait
from gateway.domain.entity_tag import EntityTags, matches, possible_tags
from gateway.domain.errors import GatewayError, UpstreamRejected
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import TaskKey
from gateway.progress.outcomes import CacheStatus, LookupFailure, LookupSuccess
from gateway.progress.service import ProgressService
from gateway.watch.hub import WatchHub
from gateway.watch.subscriber import Subscriber, SubscriptionKind, Update


class ProgressEndpoint:
    """Responds with the progress of one task."""

    def __init__(
        self,
        service: ProgressService,
        hub: WatchHub,
        *,
        tasks: TaskParameters,
        tags: EntityTags,
        clients: ClientLimits,
        max_wait_seconds: float,
    ) -> None:
        self._service = service
        self._hub = hub
        self._tasks = tasks
        self._tags = tags
        self._clients = clients
        self._max_wait_seconds = max_wait_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond 200 with the task's progress, or 304 when the client has the current representation."""
        if FAILURE in scope["state"]:
            raise scope["state"].pop(FAILURE)
        parameters = query_parameters(scope, "api", "wait")
        key = self._tasks.in_path(scope, parameters)
        if_none_match = header(scope["headers"], b"if-none-match")
        wait, headers = requested_wait(scope, parameters, longest=self._max_wait_seconds)
        if wait:
            scope["state"][LONG_POLL] = True
            free_headers(scope)
            if_none_match = if_none_match and possible_tags(if_none_match)  # it is kept for the wait
            outcome = await self._wait_for_change(scope, receive, key, if_none_match, wait)
        else:
            seen_revision = seen_revision_of(self._service, self._tags, key, if_none_match)
            hit = self._service.lookup(key, seen_revision)
            outcome = hit or await self._read_after_miss(scope, receive, key, seen_revision)
        status, values, body = build_response(record_outcome(scope, outcome), if_none_match)
        headers += zip(HEADER_NAMES[status], values, strict=True)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    async def _read_after_miss(
        self, scope: Scope, receive: Receive, key: TaskKey, seen_revision: int
    ) -> LookupSuccess | LookupFailure:
        """Return the result for the task. Raises: ClientDisconnect when the client disconnects first."""
        result = self._service.get_after_miss(key, client=client_key(scope), seen_revision=seen_revision)
        return await while_connected(scope, receive, result)

    async def _wait_for_change(
        self, scope: Scope, receive: Receive, key: TaskKey, if_none_match: str | None, wait: float
    ) -> LookupSuccess | LookupFailure:
        """Wait until the task differs from the client's representation or has ended, up to `wait` seconds.

        Only the hub's schedule calls the upstream meanwhile, and the long poll counts as one lookup.
        """
        require_connected(scope)
        client = client_key(scope)
        with self._hub.counted_as_unanswered([key], client=client):
            await self._service.read_arrived_messages()
        seen_revision = seen_revision_of(self._service, self._tags, key, if_none_match)
        on_arrival = self._service.peek(key, seen_revision)
        known_on_arrival = on_arrival is not None
        if if_none_match is None:
            if_none_match = on_arrival.snapshot.etag if on_arrival is not None else ""
        del on_arrival  # its body may be large, and the wait long
        change = _Change(key, if_none_match)
        with (
            self._clients.subscription(scope),
            self._hub.subscribe(
                [key],
                SubscriptionKind.LONGPOLL,
                client=client,
                seen_revisions={key: seen_revision} if seen_revision else {},
            ) as subscriber,
        ):
            async with DisconnectListener(scope, receive, subscriber.disconnect, tasks=1):
                with subscriber.expiring(wait):
                    await change.wait(subscriber)
            await self._service.read_arrived_messages()
        outcome: LookupSuccess | LookupFailure
        if (result := self._service.peek(key, seen_revision)) is not None:  # it may be newer than a failure
            outcome = result if known_on_arrival else result._replace(cache_status=CacheStatus.MISS)
        elif change.failure is not None:
            outcome = LookupFailure(key, change.failure, CacheStatus.NEGATIVE)
        else:
            # There is no current snapshot. Like any lookup, join the schedule's in-flight request, or start
            # one if the schedule backs off after a failure.
            return await self._read_after_miss(scope, receive, key, seen_revision)
        self._service.count_lookup(outcome)
        return outcome


class _Change:
    """Waits for a change of a task. `failure` is the failure to respond with; None if there is none.

    It ignores a failure that the hub already has when the long poll arrives, because that failure may be as
    old as the back-off of the schedule. The upstream rejects a new task for a moment. So a rejection is
    returned only at the end of the wait, or when the task counts as not found.
    """

    def __init__(self, key: TaskKey, if_none_match: str) -> None:
        self._key = key
        self._if_none_match = if_none_match
        self.failure: GatewayError | None = None

    async def wait(self, subscriber: Subscriber) -> None:
        """Return when there is a change. Raises: ClientDisconnect."""
        awaited = not subscriber.woken
        while not subscriber.must_end:
            # No variable has an update while this waits: its body may be large.
            if any(self._ends_wait(update, awaited) for update in await subscriber.next_updates()):
                return
            if subscriber.disconnected:
                raise ClientDisconnect
            if self._key in subscriber.not_found_keys:
                return
            awaited = True

    def _ends_wait(self, update: Update, awaited: bool) -> bool:  # noqa: FBT001 - private
        self.failure = update.failure if awaited else None
        is_rejected = isinstance(update.failure, UpstreamRejected)
        return not is_rejected and (update.failure is not None or self._is_change(update.snapshot))

    def _is_change(self, snapshot: Snapshot | None) -> bool:
        return snapshot is not None and (snapshot.terminal or not matches(self._if_none_match, snapshot.etag))
