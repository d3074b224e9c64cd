"""GET /v1/progress/{taskId}: one task, at once or as a long poll.

A plain ASGI endpoint, for this is the hot path: on a hit the body and the ETag are the bytes
that were rendered when the snapshot was stored, and nothing is awaited but `send`.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from gateway.api.client_limits import ClientLimits, client_of
from gateway.api.progress_response import HEADER_NAMES, answer, matches
from gateway.api.request_log import settled
from gateway.api.requests import Headers, header, query_parameters
from gateway.api.server_extensions import DisconnectListener, while_connected
from gateway.api.task_parameters import Tasks
from gateway.domain.errors import GatewayError, InvalidParameter
from gateway.domain.snapshot import Snapshot, TaskKey
from gateway.progress.results import CacheResult, CacheStatus, FetchFailure
from gateway.progress.service import ProgressService
from gateway.watch.hub import SubscriptionKind, WatchHub
from gateway.watch.subscriber import Subscriber

# RFC 7240, 4.3: `wait=10`, perhaps among other preferences.
_PREFER_WAIT = re.compile(
    r"(?:^|,)[ \t]*wait[ \t]*=[ \t]*\"?([0-9]{1,9})\"?[ \t]*(?:[;,]|\Z)", re.IGNORECASE | re.ASCII
)
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


class ProgressEndpoint:
    """Answers for one task."""

    def __init__(
        self,
        service: ProgressService,
        watch: WatchHub,
        *,
        tasks: Tasks,
        clients: ClientLimits,
        max_wait_seconds: float,
    ) -> None:
        self._service = service
        self._watch = watch
        self._tasks = tasks
        self._clients = clients
        self._max_wait_seconds = max_wait_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 200 with the task's progress, or 304 when the caller has it already."""
        parameters = query_parameters(scope, "api", "wait")
        key = self._tasks.in_path(scope, parameters)
        known = header(scope["headers"], b"if-none-match")
        wait, headers = self._wait(scope, parameters)
        if wait:
            outcome = await self._changed(scope, receive, key, known, wait)
        else:
            outcome = self._service.lookup(key) or await self._read(scope, receive, key)
        status, values, body = answer(settled(scope, outcome), known)
        headers += zip(HEADER_NAMES[status], values, strict=True)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    async def _read(self, scope: Scope, receive: Receive, key: TaskKey) -> CacheResult | FetchFailure:
        """Ask, for as long as the caller waits. Raises: ClientDisconnect."""
        return await while_connected(scope, receive, self._service.get(key, client=client_of(scope)))

    def _wait(self, scope: Scope, parameters: dict[str, list[str]]) -> tuple[float, Headers]:
        """Return how many seconds the caller wants to wait, 0 for not at all, and how that is told."""
        if "wait" in parameters:
            value = parameters["wait"][0]
            if not _SECONDS.fullmatch(value):
                raise InvalidParameter("query parameter 'wait' must be a number of seconds, 0 or more")
            return min(float(value), self._max_wait_seconds), []
        prefer = header(scope["headers"], b"prefer")
        match = _PREFER_WAIT.search(prefer) if prefer is not None else None
        if match is None:
            return 0.0, []  # a preference that is not understood is ignored (RFC 7240, 2)
        wait = min(float(match[1]), self._max_wait_seconds)
        return wait, [(b"preference-applied", b"wait=%d" % wait), (b"vary", b"Prefer")]

    async def _changed(
        self, scope: Scope, receive: Receive, key: TaskKey, known: str | None, wait: float
    ) -> CacheResult | FetchFailure:
        """Watch until the task differs from what the caller knows, has ended, or `wait` has passed.

        All that goes upstream meanwhile goes by the watch's schedule, and the whole is counted as one lookup.
        """
        on_arrival = self._service.peek(key)
        if known is None:
            known = on_arrival.snapshot.etag if on_arrival is not None else ""
        failure: GatewayError | None = None
        with (
            self._clients.subscribed(scope),
            self._watch.watching([key], SubscriptionKind.LONGPOLL, client=client_of(scope)) as subscriber,
        ):
            async with DisconnectListener(scope, receive, subscriber.disconnect):
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        failure = await _until_news(subscriber, known)
        if failure is not None:
            outcome: CacheResult | FetchFailure = FetchFailure(key, failure, CacheStatus.NEGATIVE)
        elif (result := self._service.peek(key)) is not None:
            outcome = result if on_arrival is not None else result._replace(source=CacheStatus.MISS)
        else:
            # Nothing may be shown. As any query, it waits for the flight that the schedule has begun, or asks
            # anew where the schedule backs off after a failure.
            return await self._read(scope, receive, key)
        self._service.count(outcome)
        return outcome


async def _until_news(subscriber: Subscriber, known: str) -> GatewayError | None:
    """Return when there is something to answer: the failure, if it is one. Raises: ClientDisconnect.

    A failure that is there on arrival is not returned: it may be as old as the pause of the schedule.
    """
    new = not subscriber.woken
    while not subscriber.leaving:
        for update in await subscriber.take():
            if update.failure is not None:
                return update.failure if new else None
            if _is_news(update.snapshot, known):
                return None
        if subscriber.disconnected:
            raise ClientDisconnect
        new = True
    return None


def _is_news(snapshot: Snapshot | None, known: str) -> bool:
    return snapshot is not None and (snapshot.terminal or not matches(known, snapshot.etag))
