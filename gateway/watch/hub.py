"""The watch hub: schedules the refreshes of watched tasks, and publishes changes to their subscribers.

    first subscriber -> start the task's schedule (`refresher.py`), which refreshes its snapshot
    the store reports a new snapshot, fetched by any request or replica -> pending -> publish
        -> write it directly to the streams that have no unsent data
        -> for all other subscribers, keep it as unsent -> the stream or long poll sends it
    last subscriber has left, or the task has ended -> the schedule ends

If a snapshot is old because its update is overdue, the subscribers learn this once for each problem code, and
again when it is up to date (`progress/overdue.py`).

A subscriber keeps only the latest unsent update of each task: a slow client skips intermediate states. Bodies
are kept in the store, which limits their memory. Schedules and subscribers keep updates from which large
bodies are removed, with one exception (`subscriber.py`). A large body is looked up in the store when the
update is sent. If the store has evicted it, the task is refreshed, and the subscriber receives the result.

Schedules that wake together receive their responses at about the same time. All responses are parsed and
stored first, while that code is in the processor's caches. The changes are published afterwards, a few in
each iteration of the event loop, so that other requests are served in between.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from types import MappingProxyType

from gateway.domain.errors import GatewayError, Overloaded
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import TaskKey
from gateway.progress.service import ProgressService
from gateway.settings.model import Watch as WatchSettings
from gateway.stores.base import Store
from gateway.telemetry.metrics import Metrics
from gateway.watch.refresher import Refresher, WatchedTask
from gateway.watch.subscriber import Staleness, Subscriber, Update

# Each iteration of the event loop publishes one pending snapshot, and an eighth of all pending ones in
# addition.
_BACKLOG_ITERATIONS = 8


class SubscriptionKind(StrEnum):
    """How a client follows a task: by an event stream or by a long poll."""

    EVENTS = "events"
    LONGPOLL = "longpoll"


# Writes an update to the connections that can take it now, and returns all other subscribers.
DirectDelivery = Callable[[Update, Collection[Subscriber]], Iterable[Subscriber]]


class WatchHub:
    """Holds every subscriber, and one schedule for each watched task.

    `direct_delivery` is called with each update. The subscribers that it returns keep the update as unsent.
    By default it returns all subscribers. `clock` is the clock of `Snapshot.fetched_at`.
    """

    def __init__(
        self,
        settings: WatchSettings,
        *,
        service: ProgressService,
        store: Store,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._service = service
        self._last_known = store.last_known
        self._watched: dict[TaskKey, WatchedTask] = {}
        self._subscribers: set[Subscriber] = set()
        self._overdue_keys: set[TaskKey] = set()
        self._refresher = Refresher(
            service,
            publish_pending=self._publish_pending,
            publish=self._publish,
            mark_unknown=self._mark_unknown,
            set_overdue=self._set_overdue,
            unknown_task_seconds=settings.unknown_task_seconds,
            clock=clock,
        )
        self._pending_keys: deque[TaskKey] = deque()  # tasks whose schedule has a pending snapshot
        self._shutting_down = False
        self.direct_delivery: DirectDelivery = lambda _, subscribers: subscribers
        self._gauges = {kind: metrics.subscribers.labels(kind) for kind in SubscriptionKind}
        metrics.subscribers_limit.set(settings.max_watchers)
        metrics.watched_tasks.set_function(self._watched.__len__)
        metrics.snapshots_stale.set_function(self._overdue_keys.__len__)
        store.on_change(self._add_pending, is_watched=self._watched.__contains__)

    @contextmanager
    def subscribe(
        self,
        keys: Sequence[TaskKey],
        kind: SubscriptionKind,
        *,
        client: bytes = b"",
        seen_revisions: Mapping[TaskKey, int] = MappingProxyType({}),
    ) -> Iterator[Subscriber]:
        """Subscribe to these tasks while the context is open; the first updates are the current snapshots.

        `client` identifies the client in the fair queue of upstream calls. Raises: Overloaded when
        `watch.max_watchers` subscriptions are open.
        """
        if len(self._subscribers) >= self._settings.max_watchers:
            raise Overloaded(
                "the gateway has reached its limit of open streams and long polls", retry_after=5.0
            )
        subscriber = Subscriber(
            keys, client, seen_revisions=seen_revisions, load_body=self._load_body, refetch=self._refetch
        )
        subscriber.shutting_down = self._shutting_down
        if self._shutting_down:
            subscriber.wake()
        self._subscribers.add(subscriber)
        self._gauges[kind].inc()
        try:
            for key in keys:
                self._add_to_task(key, subscriber)
            yield subscriber
        finally:
            for key in keys:
                self._remove_from_task(key, subscriber)
            self._subscribers.discard(subscriber)
            self._gauges[kind].dec()

    async def catch_up(self) -> None:
        """Read the messages of other replicas, so that `subscribe` finds their snapshots."""
        await self._service.catch_up()

    def announce_shutdown(self) -> None:
        """Publish all pending snapshots, then mark current and future subscribers as shutting down."""
        self._shutting_down = True
        for key in tuple(self._watched):
            self._publish_pending(key)
        for subscriber in self._subscribers:
            subscriber.shutting_down = True
            subscriber.wake()

    async def aclose(self) -> None:
        """End every schedule, and wait until all have ended."""
        for watched in self._watched.values():
            self._refresher.stop(watched)
        await self._refresher.wait_stopped()

    def _add_to_task(self, key: TaskKey, subscriber: Subscriber) -> None:
        watched = self._watched.get(key)
        if watched is None:
            watched = self._watched[key] = WatchedTask(key)
            # A cached snapshot is sent at once, before the first refresh.
            result = self._service.peek(key)
            watched.latest = Update(key, result.snapshot).without_large_body() if result is not None else None
            self._set_overdue(watched, self._service.overdue.reason(key) if result is not None else None)
            self._refresher.start(watched)
        seen_revision = subscriber.seen_revisions.get(key, 0)
        watched.seen_revision = max(watched.seen_revision, seen_revision)
        current = self._service.peek(key, seen_revision)
        # Publish a pending snapshot first. The new subscriber then receives it as `latest`.
        self._publish_pending(key)
        # The subscriber is added before it gets the current snapshot. Otherwise a change in between is lost.
        watched.subscribers.add(subscriber)
        self._service.add_subscriber(key, subscriber.client)
        latest = watched.latest
        if latest is None:
            return  # the first query is in progress
        if not watched.is_unknown and (current is not None or latest.snapshot is None or _is_final(latest)):
            update = latest if current is None else Update(key, current.snapshot)
            if subscriber.put(update if update.has_same_content(latest) else latest, latest):
                self._put_staleness(watched, [subscriber])
                return
        # `latest` is too old to send: the upstream is slow, the schedule backs off for longer than
        # `cache.stale_if_error_seconds`, or the task may have become known since it was rejected. One refresh
        # serves all subscribers that join before it ends.
        watched.subscribers_without_latest.add(subscriber)
        self._refresher.restart(watched)

    def _remove_from_task(self, key: TaskKey, subscriber: Subscriber) -> None:
        watched = self._watched.get(key)
        if watched is None or subscriber not in watched.subscribers:
            return
        watched.subscribers.discard(subscriber)
        watched.subscribers_without_latest.discard(subscriber)
        self._service.remove_subscriber(key, subscriber.client)
        if not watched.subscribers:
            del self._watched[key]
            self._overdue_keys.discard(key)
            self._refresher.stop(watched)

    def _add_pending(self, snapshot: Snapshot) -> None:
        watched = self._watched.get(snapshot.key)
        if watched is None:
            return
        if watched.pending is None:
            if not self._pending_keys:
                asyncio.get_running_loop().call_soon(self._publish_some)
            self._pending_keys.append(snapshot.key)
        elif watched.pending.terminal and not snapshot.terminal:
            return
        watched.pending = snapshot

    def _publish_some(self) -> None:
        """Publish a few of the pending snapshots: at least one, and more when the backlog is longer."""
        try:
            for _ in range(1 + len(self._pending_keys) // _BACKLOG_ITERATIONS):
                self._publish_pending(self._pending_keys.popleft())
        finally:
            if self._pending_keys:
                asyncio.get_running_loop().call_soon(self._publish_some)

    def _publish_pending(self, key: TaskKey) -> None:
        """Publish the pending snapshot of a task, if there is one."""
        watched = self._watched.get(key)
        if watched is None or watched.pending is None:
            return
        snapshot, watched.pending = watched.pending, None
        self._publish(Update(key, snapshot))
        self._set_overdue(watched, None)
        if watched.backing_off:
            self._refresher.restart(watched)  # the upstream responds again, to this or another replica

    def _publish(self, update: Update) -> None:
        watched = self._watched.get(update.key)
        if watched is None or (_is_final(watched.latest) and not _is_final(update)):
            # A task that has ended does not run again. But the store may have evicted its terminal snapshot,
            # and then accepts one that is not terminal.
            return
        if update.snapshot is not None:
            self._mark_known(watched)
        recipients = (
            watched.subscribers_without_latest
            if update.has_same_content(watched.latest)
            else watched.subscribers
        )
        watched.latest = reduced = update.without_large_body()
        have_newer = [
            subscriber
            for subscriber in self.direct_delivery(update, recipients)
            if not subscriber.put(update, reduced)
        ]
        if watched.overdue is not None:
            self._put_staleness(watched, [each for each in recipients if each not in have_newer])
        watched.subscribers_without_latest.intersection_update(have_newer)

    def _set_overdue(self, watched: WatchedTask, failure: GatewayError | None) -> None:
        """Record why the snapshot is old, if it is, and notify the subscribers of a change."""
        before, watched.overdue = watched.overdue, failure
        if (before and before.code) == (failure and failure.code):
            return
        if failure is None:
            self._overdue_keys.discard(watched.key)
        else:
            self._overdue_keys.add(watched.key)
        self._put_staleness(watched, watched.subscribers - watched.subscribers_without_latest)

    def _put_staleness(self, watched: WatchedTask, subscribers: Iterable[Subscriber]) -> None:
        """Notify these subscribers, which have the snapshot, unless the task has a problem instead."""
        if watched.latest is None or (snapshot := watched.latest.snapshot) is None:
            return
        latest = self._last_known(watched.key) or snapshot
        staleness = Staleness(watched.key, watched.overdue, latest.fetched_at)
        for subscriber in subscribers:
            subscriber.put_staleness(staleness)

    def _mark_unknown(self, watched: WatchedTask) -> None:
        watched.is_unknown = True
        for subscriber in watched.subscribers:
            if watched.key not in subscriber.unknown_keys:
                subscriber.unknown_keys |= {watched.key}
                subscriber.wake()

    def _mark_known(self, watched: WatchedTask) -> None:
        watched.rejected_since = None
        if watched.is_unknown:
            watched.is_unknown = False
            for subscriber in watched.subscribers:
                subscriber.unknown_keys -= {watched.key}

    def _load_body(self, reduced: Update, subscriber: Subscriber) -> Update | None:
        """Return an update with the latest snapshot of the task and its body, or None.

        It is None if the store has evicted the snapshot, or if the subscriber gets a newer unsent update
        during this call. In the second case the subscriber sends the newer update.
        """
        snapshot = self._last_known(reduced.key)
        self._publish_pending(reduced.key)
        if subscriber.has_unsent(reduced.key) or snapshot is None:
            return None
        return None if _is_final(reduced) and not snapshot.terminal else Update(reduced.key, snapshot)

    def _refetch(self, key: TaskKey, subscriber: Subscriber) -> None:
        """Refresh a task whose body was evicted, and send the result to this subscriber."""
        watched = self._watched.get(key)
        if watched is None or subscriber not in watched.subscribers:
            return
        watched.subscribers_without_latest.add(subscriber)
        if not watched.refreshing and not watched.backing_off:
            self._refresher.restart(watched)


def _is_final(update: Update | None) -> bool:
    return update is not None and update.snapshot is not None and update.snapshot.terminal
