"""Server-sent events: progress that comes by itself, for one task or for many.

    open -> retry -> one event per task -> one per change -> end      (the WHATWG's event-stream format)

An update is encoded once and the same bytes go to every watcher of its task. A reader that is
slow finds the newest state when it is back: `send` waits while its socket is full, and the
slots keep no backlog.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable, Sequence

from starlette.types import Receive, Scope, Send

from gateway.api.problems import document, lookup
from gateway.api.requests import header, noticing_hang_up, query_parameters
from gateway.api.tasks import Tasks
from gateway.metrics import Metrics
from gateway.models import TaskKey, render_json
from gateway.watch import Kind, Update, Watch, Watcher

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx, and what descends from it, would hold events back
]
_RETRY_MS = 2000
_FAREWELL_MS = (500, 5000)  # reconnects of a whole gateway's streams, spread out


class EventsEndpoint:
    """Streams the progress of the tasks that a request names."""

    def __init__(self, watch: Watch, *, tasks: Tasks, metrics: Metrics, heartbeat_seconds: float) -> None:
        self._watch = watch
        self._tasks = tasks
        self._sent = {name: metrics.events_sent.labels(name).inc for name in ("progress", "problem", "end")}
        self._heartbeat_seconds = heartbeat_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until every task has ended, the reader leaves or the gateway does."""
        keys = self._keys(scope)
        end_id = _end_id(keys)
        if header(scope, b"last-event-id") == end_id:
            # All was told: 204 is what stops an EventSource from coming back.
            await send({"type": "http.response.start", "status": 204, "headers": _HEADERS[1:2]})
            await send({"type": "http.response.body"})
            return
        if scope["method"] == "HEAD":
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            await send({"type": "http.response.body"})
            return
        with self._watch.watching(keys, Kind.EVENTS) as watcher:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            await send(_part(b"retry: %d\n\n" % _RETRY_MS))
            async with noticing_hang_up(receive, watcher.hang_up):
                heart = Heart(self._heartbeat_seconds, watcher.ring)
                try:
                    await self._stream(scope, watcher, heart, end_id, send)
                finally:
                    heart.stop()

    def _keys(self, scope: Scope) -> Sequence[TaskKey]:
        if "taskId" in scope["path_params"]:
            return [self._tasks.in_path(scope, query_parameters(scope, "api"))]
        return self._tasks.in_query(query_parameters(scope, "api", repeated="taskId"))

    async def _stream(self, scope: Scope, watcher: Watcher, heart: Heart, end_id: str, send: Send) -> None:
        running = set(watcher.keys)
        while not watcher.hung_up:
            parts = []
            for update in await watcher.take():
                parts.append(self._encode(update, scope))
                if update.snapshot is not None and update.snapshot.terminal:
                    running.discard(update.key)
            if heart.due():
                parts.append(b": still here\n\n")
            if not running:
                self._sent["end"]()
                parts.append(b"event: end\nid: %s\ndata: {}\n\n" % end_id.encode())
            elif watcher.leaving:
                spread = random.randint(*_FAREWELL_MS)  # noqa: S311  # spreads load, hides nothing
                parts.append(b": the gateway restarts\nretry: %d\n\n" % spread)
            if not running or watcher.leaving:
                await send(_part(b"".join(parts), last=True))
                return
            if parts:
                await send(_part(b"".join(parts)))

    def _encode(self, update: Update, scope: Scope) -> bytes:
        if update.snapshot is not None:
            self._sent["progress"]()
            if not update.encoded:
                etag = update.snapshot.etag.strip('"').encode()
                update.encoded = b"event: progress\nid: %s\ndata: %s\n\n" % (etag, update.snapshot.body)
            return update.encoded
        assert update.failure is not None  # noqa: S101  # an update has one or the other
        self._sent["problem"]()
        status, title = lookup(update.failure)
        problem = document(update.failure, status, title, request_id=scope["state"]["request_id"])
        return b"event: problem\ndata: %s\n\n" % render_json({"taskId": update.key.task_id, **problem})


class Heart:
    """Rings every so many seconds; `due` tells once for each ring."""

    def __init__(self, seconds: float, ring: Callable[[], None]) -> None:
        self._seconds = seconds
        self._ring = ring
        self._due = False
        self._timer = asyncio.get_running_loop().call_later(seconds, self._beat)

    def due(self) -> bool:
        """Tell whether the heart has beaten since the last call."""
        due, self._due = self._due, False
        return due

    def stop(self) -> None:
        """Beat no more."""
        self._timer.cancel()

    def _beat(self) -> None:
        self._due = True
        self._ring()
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._beat)


def _part(chunk: bytes, *, last: bool = False) -> dict[str, object]:
    return {"type": "http.response.body", "body": chunk, "more_body": not last}


def _end_id(keys: Sequence[TaskKey]) -> str:
    # Of these very tasks: the end of others does not end this stream. Any replica makes the same.
    tasks = "\n".join(f"{key.operation} {key.task_id}" for key in keys)
    return f"end-{hashlib.blake2b(tasks.encode(), digest_size=12).hexdigest()}"
