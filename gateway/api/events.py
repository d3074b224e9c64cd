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

from gateway.api.client_limits import ClientLimits, client_of
from gateway.api.heartbeats import HEARTBEAT, Heartbeats
from gateway.api.problems import document, lookup
from gateway.api.requests import header, query_parameters
from gateway.api.server_extensions import DisconnectListener, chunk, direct_transport_of
from gateway.api.task_parameters import Tasks
from gateway.api.trace_context import trace_parent
from gateway.domain.snapshot import Snapshot, render_json
from gateway.domain.task import TaskKey
from gateway.telemetry.metrics import Metrics
from gateway.watch.hub import SubscriptionKind, WatchHub
from gateway.watch.subscriber import Subscriber, Update

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
        self,
        watch: WatchHub,
        *,
        tasks: Tasks,
        clients: ClientLimits,
        metrics: Metrics,
        heartbeat_seconds: float,
    ) -> None:
        self._watch = watch
        self._tasks = tasks
        self._clients = clients
        self._sent = {name: metrics.events_sent.labels(name) for name in ("progress", "problem", "end")}
        watch.deliver = self._deliver
        self._pacemaker = Heartbeats(heartbeat_seconds)

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
            self._watch.watching(keys, SubscriptionKind.EVENTS, client=client_of(scope)) as subscriber,
        ):
            self._clients.charge(scope, len(keys))
            # Before the first `send`, which waits while the socket is full: the reader may leave meanwhile.
            async with DisconnectListener(scope, receive, subscriber.disconnect):
                await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                _forget_request(scope)
                await send(_part(b"retry: %d\n\n" % _RETRY_MS))
                subscriber.direct_transport = direct_transport_of(scope)
                with self._pacemaker.pacing(subscriber):
                    await self._stream(scope, subscriber, end_id, send)

    def _keys(self, scope: Scope) -> Sequence[TaskKey]:
        if "taskId" in scope["path_params"]:
            return [self._tasks.in_path(scope, query_parameters(scope, "api"))]
        return self._tasks.in_query(query_parameters(scope, "api", repeated="taskId"))

    async def _stream(self, scope: Scope, subscriber: Subscriber, end_id: str, send: Send) -> None:
        running = set(subscriber.keys)
        while not subscriber.disconnected:
            await subscriber.rings()
            await send(_part(b""))  # waits until the reader has read
            part, last = self._due(scope, subscriber, running, end_id)
            if part:
                await send(_part(part, last=last))
            del part
            if last:
                return

    def _due(
        self, scope: Scope, subscriber: Subscriber, running: set[TaskKey], end_id: str
    ) -> tuple[bytes, bool]:
        """Return what to write next, and whether the stream ends with it; `running` have not ended."""
        parts, size = [], 0
        for update in subscriber.updates():
            parts.append(self._encode(update, scope))
            size += len(parts[-1])
            if update.snapshot is not None and update.snapshot.terminal:
                running.discard(update.key)
            if size >= _PART_BYTES:
                break
        if subscriber.heartbeat_due:
            subscriber.heartbeat_due = False
            parts.append(HEARTBEAT)
        last = not running
        if last:
            self._sent["end"].inc()
            parts.append(b"event: end\nid: %s\ndata: {}\n\n" % end_id.encode())
        elif subscriber.leaving and subscriber.empty:
            last = True
            spread = random.randint(*_FAREWELL_MS)  # noqa: S311  # spreads load, hides nothing
            parts.append(b": the gateway restarts\nretry: %d\n\n" % spread)
        return b"".join(parts), last

    def _deliver(self, update: Update, subscribers: Collection[Subscriber]) -> Iterable[Subscriber]:
        """Write an event to those whose readers keep up, and return the others: their streams will send it.

        What belongs to one of thousands of readers is in none of the processor's caches: so the loop asks
        for nothing but the reader's transport, and one byte string goes to all.
        """
        snapshot = update.snapshot
        # Ends and problems are the stream's: the one closes it, the other names its request.
        if snapshot is None or snapshot.terminal:
            return subscribers
        event = _progress(snapshot)
        plain, with_heartbeat = chunk(event), chunk(HEARTBEAT + event)
        others = []
        for subscriber in subscribers:
            direct_transport = subscriber.idle_transport
            if direct_transport is None or direct_transport.get_write_buffer_size():
                others.append(subscriber)
            elif subscriber.heartbeat_due:
                subscriber.heartbeat_due = False
                direct_transport.write(with_heartbeat)
            else:
                direct_transport.write(plain)
        self._sent["progress"].value += len(subscribers) - len(others)
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
