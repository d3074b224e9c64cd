"""Server-sent events: progress that comes by itself, for one task or for many.

    open -> retry -> one event per task -> one per change -> end      (the WHATWG's event-stream format)

An update is encoded once and the same bytes go straight to the connection of every watcher of its task whose
reader keeps up, where the server lets us. The others' streams write it themselves, a part at a time, and take
up nothing while the socket is full. So a reader that is slow finds the newest state when it is back.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterable, Sequence

from starlette.types import Receive, Scope, Send

from gateway.api.connection import HangUp, chunk, outlet_of
from gateway.api.heartbeat import HEARTBEAT, Pacemaker
from gateway.api.problems import document, lookup
from gateway.api.ratelimit import Clients, client_of
from gateway.api.requests import header, query_parameters
from gateway.api.tasks import Tasks
from gateway.api.tracecontext import trace_parent
from gateway.metrics import Metrics
from gateway.models import Snapshot, TaskKey, render_json
from gateway.watch import Kind, Watch
from gateway.watchers import Update, Watcher

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx, and what descends from it, would hold events back
]
_RETRY_MS = 2000
_PART_BYTES = 16_384  # of events that are written together; one event may be larger
_FAREWELL_MS = (500, 5000)  # reconnects of a whole gateway's streams, spread out


class EventsEndpoint:
    """Streams the progress of the tasks that a request names."""

    def __init__(
        self, watch: Watch, *, tasks: Tasks, clients: Clients, metrics: Metrics, heartbeat_seconds: float
    ) -> None:
        self._watch = watch
        self._tasks = tasks
        self._clients = clients
        self._sent = {name: metrics.events_sent.labels(name) for name in ("progress", "problem", "end")}
        watch.deliver = self._deliver
        self._pacemaker = Pacemaker(heartbeat_seconds)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until every task has ended, the reader leaves or the gateway does."""
        keys = self._keys(scope)
        scope["state"]["tasks"] = len(keys)  # for the request's log line
        end_id = _end_id(keys)
        if header(scope["headers"], b"last-event-id") == end_id:
            # All was told: 204 is what stops an EventSource from coming back.
            await send({"type": "http.response.start", "status": 204, "headers": _HEADERS[1:2]})
            await send({"type": "http.response.body"})
            return
        if scope["method"] == "HEAD":
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            await send({"type": "http.response.body"})
            return
        with (
            self._clients.subscribed(scope),
            self._watch.watching(keys, Kind.EVENTS, client=client_of(scope)) as watcher,
        ):
            self._clients.charge(scope, len(keys))
            # Before the first `send`, which waits while the socket is full: the reader may leave meanwhile.
            async with HangUp(scope, receive, watcher.hang_up):
                await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                _forget_request(scope)
                await send(_part(b"retry: %d\n\n" % _RETRY_MS))
                watcher.outlet = outlet_of(scope)
                with self._pacemaker.pacing(watcher):
                    await self._stream(scope, watcher, end_id, send)

    def _keys(self, scope: Scope) -> Sequence[TaskKey]:
        if "taskId" in scope["path_params"]:
            return [self._tasks.in_path(scope, query_parameters(scope, "api"))]
        return self._tasks.in_query(query_parameters(scope, "api", repeated="taskId"))

    async def _stream(self, scope: Scope, watcher: Watcher, end_id: str, send: Send) -> None:
        running = set(watcher.keys)
        while not watcher.hung_up:
            await watcher.rings()
            await send(_part(b""))  # waits until the reader has read
            part, last = self._due(scope, watcher, running, end_id)
            if part:
                await send(_part(part, last=last))
            del part
            if last:
                return

    def _due(self, scope: Scope, watcher: Watcher, running: set[TaskKey], end_id: str) -> tuple[bytes, bool]:
        """Return what to write next, and whether the stream ends with it; `running` have not ended."""
        parts, size = [], 0
        for update in watcher.updates():
            parts.append(self._encode(update, scope))
            size += len(parts[-1])
            if update.snapshot is not None and update.snapshot.terminal:
                running.discard(update.key)
            if size >= _PART_BYTES:
                watcher.ring()  # for the others
                break
        if watcher.heartbeat_due:
            watcher.heartbeat_due = False
            parts.append(HEARTBEAT)
        last = not running
        if last:
            self._sent["end"].inc()
            parts.append(b"event: end\nid: %s\ndata: {}\n\n" % end_id.encode())
        elif watcher.leaving and not watcher.rung:
            last = True
            spread = random.randint(*_FAREWELL_MS)  # noqa: S311  # spreads load, hides nothing
            parts.append(b": the gateway restarts\nretry: %d\n\n" % spread)
        return b"".join(parts), last

    def _deliver(self, update: Update, watchers: Collection[Watcher]) -> Iterable[Watcher]:
        """Write an event to those whose readers keep up, and return the others: their streams will send it.

        What belongs to one of thousands of readers is in none of the processor's caches: so the loop asks
        for nothing but the reader's transport, and one byte string goes to all.
        """
        snapshot = update.snapshot
        # Ends and problems are the stream's: the one closes it, the other names its request.
        if snapshot is None or snapshot.terminal:
            return watchers
        event = _progress(snapshot)
        plain, with_heartbeat = chunk(event), chunk(HEARTBEAT + event)
        others = []
        for watcher in watchers:
            outlet = watcher.idle_outlet
            if outlet is None or outlet.get_write_buffer_size():
                others.append(watcher)
            elif watcher.heartbeat_due:
                watcher.heartbeat_due = False
                outlet.write(with_heartbeat)
            else:
                outlet.write(plain)
        self._sent["progress"].value += len(watchers) - len(others)
        return others

    def _encode(self, update: Update, scope: Scope) -> bytes:
        if update.snapshot is not None:
            self._sent["progress"].inc()
            return _progress(update.snapshot)
        assert update.failure is not None  # noqa: S101  # an update has one or the other
        self._sent["problem"].inc()
        status, title = lookup(update.failure)
        problem = document(update.failure, status, title, request_id=scope["state"]["request_id"])
        return b"event: problem\ndata: %s\n\n" % render_json({"taskId": update.key.task_id, **problem})


def _forget_request(scope: Scope) -> None:
    """Drop what a request has brought, but for what its log line tells: the stream may stay open for days."""
    parent = trace_parent(scope)
    headers = scope["headers"]
    kept = [] if parent is None else [parent.header]
    if isinstance(headers, list):
        headers[:] = kept  # the server and the middleware hold the same list
    scope["headers"] = kept
    scope["query_string"] = b""


def _progress(snapshot: Snapshot) -> bytes:
    return b"event: progress\nid: %s\ndata: %s\n\n" % (snapshot.etag.strip('"').encode(), snapshot.body)


def _part(body: bytes, *, last: bool = False) -> dict[str, object]:
    return {"type": "http.response.body", "body": body, "more_body": not last}


def _end_id(keys: Sequence[TaskKey]) -> str:
    # Of these very tasks: the end of others does not end this stream. Any replica makes the same.
    tasks = "\n".join(f"{key.operation} {key.task_id}" for key in keys)
    return f"end-{hashlib.blake2b(tasks.encode(), digest_size=12).hexdigest()}"
