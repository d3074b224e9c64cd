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

from gateway.api.answers import HEADER_NAMES, answer
from gateway.api.caching import matches
from gateway.api.connection import HangUp, while_connected
from gateway.api.ratelimit import client_of
from gateway.api.requestlog import settled
from gateway.api.requests import Headers, header, query_parameters
from gateway.api.tasks import Tasks
from gateway.exceptions import InvalidParameter
from gateway.models import Snapshot, TaskKey
from gateway.readings import Failed, Reading
from gateway.service import ProgressService
from gateway.watch import Kind, Watch, Watcher

# RFC 7240, 4.3: `wait=10`, perhaps among other preferences.
_PREFER_WAIT = re.compile(r"(?:^|,)\s*wait\s*=\s*\"?(\d{1,9})\"?\s*(?:[;,]|$)", re.IGNORECASE)
_SECONDS = re.compile(r"\d{1,9}(\.\d{1,9})?")


class ProgressEndpoint:
    """Answers for one task."""

    def __init__(
        self, service: ProgressService, watch: Watch, *, tasks: Tasks, max_wait_seconds: float
    ) -> None:
        self._service = service
        self._watch = watch
        self._tasks = tasks
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

    async def _read(self, scope: Scope, receive: Receive, key: TaskKey) -> Reading | Failed:
        """Ask, for as long as the caller waits. Raises: ClientDisconnect."""
        return await while_connected(scope, receive, self._service.read(key, client=client_of(scope)))

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
    ) -> Reading | Failed:
        """Watch until the task differs from what the caller knows, has ended, or `wait` has passed."""
        if known is None:
            on_arrival = self._service.lookup(key)
            known = on_arrival.snapshot.etag if on_arrival is not None else ""
        failed = False
        with self._watch.watching([key], Kind.LONGPOLL, client=client_of(scope)) as watcher:
            async with HangUp(scope, receive, watcher.hang_up):
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        failed = await _until_news(watcher, known)
        # The schedule has just renewed what the store holds: asking anew could cost a call more.
        reading = None if failed else self._service.current(key)
        return reading or await self._read(scope, receive, key)


async def _until_news(watcher: Watcher, known: str) -> bool:
    """Return when there is something to answer; tell whether it is a failure. Raises: ClientDisconnect."""
    while not watcher.leaving:
        for update in await watcher.take():
            if update.failure is not None or _is_news(update.snapshot, known):
                return update.failure is not None
        if watcher.hung_up:
            raise ClientDisconnect
    return False


def _is_news(snapshot: Snapshot | None, known: str) -> bool:
    return snapshot is not None and (snapshot.terminal or not matches(known, snapshot.etag))
