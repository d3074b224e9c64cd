"""Server-sent events: the progress of one or many tasks as a stream (the WHATWG's event-stream format).

    open -> retry -> one event per task -> one event per change -> end

A `stale` event says that the update of a task is overdue, or with null that it is not any more. It follows
the `progress` event of the snapshot, and has no ID: a client that reconnects receives it again if it applies.

If the server supports it, an update is encoded once, and the same bytes are written directly to the
connection of every subscriber whose client keeps up. The streams of all other subscribers encode and send the
update themselves, in parts. They look up the latest update only when the socket can take it. So a slow client
receives the latest state.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Collection, Iterable, Sequence

from starlette.types import Receive, Scope, Send

from gateway.api.client_limits import ClientLimits, client_key
from gateway.api.heartbeats import HEARTBEAT, Heartbeats
from gateway.api.problems import problem_document, status_and_title
from gateway.api.progress_response import age_seconds
from gateway.api.requests import free_headers, header, query_parameters
from gateway.api.server_extensions import (
    DisconnectListener,
    chunk,
    client_transport_of,
    is_chunked,
    take_turn,
)
from gateway.api.task_parameters import TaskParameters
from gateway.domain.entity_tag import EntityTags
from gateway.domain.snapshot import Snapshot, render_json
from gateway.domain.task import TaskKey
from gateway.telemetry.metrics import Metrics
from gateway.watch.hub import WatchHub
from gateway.watch.subscriber import OverdueNotice, Subscriber, SubscriptionKind, Update

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # keeps nginx and its derivatives from buffering events
]
_LAST_EVENT_ID = ("lastEventId", "last-event-id")  # query parameters
_EVENTS = ("progress", "stale", "problem", "end")
_RETRY_MS = 2000
_PART_BYTES = 16_384  # maximum of events that are written together; a single event may be larger
_MAX_ID_CHARS = 64  # longer than our event IDs; each is compared with every task of the stream
_SHUTDOWN_RETRY_MS = (500, 5000)  # spreads the reconnects of all streams of this replica


class EventsEndpoint:
    """Streams the progress of the tasks that a request names."""

    def __init__(
        self,
        hub: WatchHub,
        *,
        tasks: TaskParameters,
        tags: EntityTags,
        clients: ClientLimits,
        metrics: Metrics,
        heartbeat_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hub = hub
        self._tasks = tasks
        self._tags = tags
        self._clients = clients
        self._sent = {name: metrics.events_sent.labels(name) for name in _EVENTS}
        hub.direct_delivery_hook = self._write_directly
        self._heartbeats = Heartbeats(heartbeat_seconds)
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until every task has ended, the client disconnects or the gateway shuts down."""
        names_task = "taskId" in scope["path_params"]
        parameters = query_parameters(scope, "api", *_LAST_EVENT_ID, repeated="" if names_task else "taskId")
        keys = [self._tasks.in_path(scope, parameters)] if names_task else self._tasks.in_query(parameters)
        scope["state"]["tasks"] = len(keys)  # for the request log
        end_id = _end_id(keys)
        last_event_id = _last_event_id(scope, parameters)
        del parameters  # the stream would keep them
        if last_event_id == end_id:
            # The stream was complete: 204 keeps an EventSource from reconnecting.
            await send({"type": "http.response.start", "status": 204, "headers": _HEADERS[1:2]})
            await send({"type": "http.response.body"})
            return
        if scope["method"] == "HEAD":
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            await send({"type": "http.response.body"})
            return
        with self._clients.subscription(scope):
            # Before the first `await`: requests that arrive together must not all pass before one has paid.
            self._clients.charge(scope, len(keys))
            client = client_key(scope)
            with self._hub.counted_as_unanswered(keys, client=client):
                await take_turn(scope, tasks=len(keys))
                await self._hub.read_arrived_messages()
            with self._hub.subscribe(
                keys,
                SubscriptionKind.EVENTS,
                client=client,
                seen_revisions=self._seen_revisions(keys, last_event_id),
            ) as subscriber:
                # Registered before the first `send`: the client may leave while that waits for a full socket.
                async with DisconnectListener(scope, receive, subscriber.disconnect, tasks=len(keys)):
                    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                    free_headers(scope)
                    await send(_part(b"retry: %d\n\n" % _RETRY_MS))
                    subscriber.client_transport = client_transport_of(scope)
                    subscriber.chunked = is_chunked(scope)
                    with self._heartbeats.sending_to(subscriber):
                        await self._stream(scope, subscriber, end_id, send)

    def _seen_revisions(self, keys: Sequence[TaskKey], last_event_id: str | None) -> dict[TaskKey, int]:
        """Return the revision that the client has received of the task of its last event."""
        if last_event_id is None:
            return {}
        revisions = {key: self._tags.revision(last_event_id, key) for key in keys}
        return {key: revision for key, revision in revisions.items() if revision}

    async def _stream(self, scope: Scope, subscriber: Subscriber, end_id: str, send: Send) -> None:
        running = set(subscriber.keys)
        while not subscriber.disconnected:
            await subscriber.wait()
            await send(_part(b""))  # waits until the socket is writable
            part, last = self._next_part(scope, subscriber, running, end_id)
            if part:
                await send(_part(part, last=last))
            del part
            if last:
                return

    def _next_part(
        self, scope: Scope, subscriber: Subscriber, running: set[TaskKey], end_id: str
    ) -> tuple[bytes, bool]:
        """Return the next bytes to write, and whether they end the stream; `running` are unfinished tasks."""
        parts, size = [], 0
        for update in subscriber.take_unsent():
            parts.append(self._encode(update, scope))
            size += len(parts[-1])
            if update.snapshot is not None and update.snapshot.terminal:
                running.discard(update.key)
            if size >= _PART_BYTES:
                subscriber.wake()  # the rest follows in the next part
                break
        parts += [self._encode_overdue_notice(notice) for notice in subscriber.take_overdue_notices()]
        if subscriber.heartbeat_due:
            subscriber.heartbeat_due = False
            parts.append(HEARTBEAT)
        last = all(key in subscriber.not_found_keys and not subscriber.has_unsent(key) for key in running)
        if last:
            self._sent["end"].inc()
            parts.append(b"event: end\nid: %s\ndata: {}\n\n" % end_id.encode())
        elif subscriber.must_end and not subscriber.woken:
            last = True
            retry = random.randint(*_SHUTDOWN_RETRY_MS)  # noqa: S311  # not security-relevant
            parts.append(b": the gateway restarts\nretry: %d\n\n" % retry)
        return b"".join(parts), last

    def _write_directly(self, update: Update, subscribers: Collection[Subscriber]) -> Iterable[Subscriber]:
        """Write an event to subscribers whose clients keep up; return the others, whose streams will send it.

        The state of thousands of subscribers does not fit into the processor's caches. The loop therefore
        touches little more than the transport, and all subscribers share the same byte strings.
        """
        snapshot = update.snapshot
        # Streams send these themselves: a terminal update ends the stream, a problem has the request ID.
        if snapshot is None or snapshot.terminal:
            return subscribers
        event = _progress(snapshot)
        with_heartbeat = HEARTBEAT + event
        event_chunk, with_heartbeat_chunk = chunk(event), chunk(with_heartbeat)
        remaining = []
        for subscriber in subscribers:
            client_transport = subscriber.transport_if_idle
            if client_transport is None or client_transport.get_write_buffer_size():
                remaining.append(subscriber)
            elif subscriber.heartbeat_due:
                subscriber.heartbeat_due = False
                client_transport.write(with_heartbeat_chunk if subscriber.chunked else with_heartbeat)
            else:
                client_transport.write(event_chunk if subscriber.chunked else event)
        self._sent["progress"].value += len(subscribers) - len(remaining)
        return remaining

    def _encode(self, update: Update, scope: Scope) -> bytes:
        if update.snapshot is not None:
            self._sent["progress"].inc()
            return _progress(update.snapshot)
        assert update.failure is not None  # noqa: S101  # an update has a snapshot or a failure
        self._sent["problem"].inc()
        status, title = status_and_title(update.failure)
        problem = problem_document(update.failure, status, title, request_id=scope["state"]["request_id"])
        return b"event: problem\ndata: %s\n\n" % render_json({"taskId": update.key.task_id, **problem})

    def _encode_overdue_notice(self, notice: OverdueNotice) -> bytes:
        self._sent["stale"].inc()
        failure = notice.failure
        data = {
            "taskId": notice.key.task_id,
            "api": notice.key.operation.api,
            "stale": notice.code,
            "ageSeconds": age_seconds(self._clock() - notice.fetched_at),
            "title": None if failure is None else status_and_title(failure)[1],
        }
        return b"event: stale\ndata: %s\n\n" % render_json(data)


def _last_event_id(scope: Scope, parameters: dict[str, list[str]]) -> str | None:
    """Return the ID of the client's last event, or None if there is none of ours.

    Polyfills of EventSource send it in the query, because a header would need a CORS preflight. The browser's
    own EventSource updates the header and repeats the query of its URL, so the header takes precedence.
    If the header is repeated, the last one counts, also if a proxy has joined them: our IDs contain no comma.
    """
    from_header = (header(scope["headers"], b"last-event-id") or "").rpartition(",")[2].strip()
    from_query = (parameters[name][0] for name in _LAST_EVENT_ID if name in parameters)
    last_event_id = from_header or next(filter(None, from_query), "")
    return last_event_id if 0 < len(last_event_id) <= _MAX_ID_CHARS else None


def _progress(snapshot: Snapshot) -> bytes:
    return b"event: progress\nid: %s\ndata: %s\n\n" % (snapshot.etag.strip('"').encode(), snapshot.body)


def _part(body: bytes, *, last: bool = False) -> dict[str, object]:
    return {"type": "http.response.body", "body": body, "more_body": not last}


def _end_id(keys: Sequence[TaskKey]) -> str:
    # Specific to the tasks: the end of another stream does not end this one. The same on every replica.
    tasks = "\n".join(f"{key.operation} {key.task_id}" for key in keys)
    return f"end-{hashlib.blake2b(tasks.encode(), digest_size=12).hexdigest()}"
