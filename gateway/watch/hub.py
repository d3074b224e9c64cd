"""The watch hub: schedules the refreshes of watched tasks, and publishes changes to their subscribers.

    first subscriber -> start the task's schedule (`schedule.py`), which refreshes its snapshot
    a stored change, fetched by any request or replica -> pending -> publish
        -> written directly to subscribers whose clients keep up
        -> else kept as unsent -> sent by the subscriber's stream or long poll
    last subscriber has left, or the task has ended -> the schedule ends

A subscriber keeps only the latest unsent update of each task: a slow client skips intermediate states. The
store owns the bodies and limits their memory. Schedules and subscribers keep updates without large bodies
(`subscriber.py`). The body is looked up when an update is sent. If the store has evicted it, the task is
refreshed, and the subscriber receives the result.

Schedules that wake together also receive their responses together. The responses are all parsed and stored
first, while that code is in the processor's caches. The changes are published afterwards, a few in each
iteration of the event loop, so that other requests are served in between.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum

from gateway.domain.errors import Overloaded
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import TaskKey
from gateway.progress.service import ProgressService
from gateway.settings.model import Watch as WatchSettings
from gateway.stores.base import Store
from gateway.telemetry.metrics import Metrics
from gateway.watch.schedule import Refresher, Schedule
from gateway.watch.subscriber import Subscriber, Update

# Iterations of the event loop in which about two thirds of the pending snapshots are published.
_BACKLOG_ITERATIONS = 8


class SubscriptionKind(StrEnum):
    """How a client follows a task: by an event stream or by a long poll."""

    EVENTS = "events"
    LONGPOLL = "longpoll"


# Writes an update to the connections that can take it now, and returns the subscribers of the others.
DirectDelivery = Callable[[Update, Collection[Subscriber]], Iterable[Subscriber]]


class WatchHub:
    """Holds every subscriber, and one schedule for each watched task.

    `direct_delivery` is tried first. The subscribers that it returns keep the update as unsent. By default it
    returns all of them. `clock` is the clock of `Snapshot.fetched_at`.
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
        self._peek_stale = store.peek_stale
        self._schedules: dict[TaskKey, Schedule] = {}
        self._subscribers: set[Subscriber] = set()
        self._refresher = Refresher(
            service, publish_pending=self._publish_pending, publish=self._publish, clock=clock
        )
        self._pending_keys: deque[TaskKey] = deque()  # tasks whose schedule has a pending snapshot
        self._shutting_down = False
        self.direct_delivery: DirectDelivery = lambda _, subscribers: subscribers
        self._gauges = {kind: metrics.subscribers.labels(kind) for kind in SubscriptionKind}
        metrics.watched_tasks.set_function(self._schedules.__len__)
        store.on_change(self._add_pending)

    @contextmanager
    def subscribe(
        self, keys: Sequence[TaskKey], kind: SubscriptionKind, *, client: bytes = b""
    ) -> Iterator[Subscriber]:
        """Subscribe to these tasks while the context is open; the first updates are the current snapshots.

        `client` identifies the client in the fair queue of upstream calls. Raises: Overloaded when
        `watch.max_watchers` subscriptions are open.
        """
        if len(self._subscribers) >= self._settings.max_watchers:
            raise Overloaded(
                "the gateway has reached its limit of open streams and long polls", retry_after=5.0
            )
        subscriber = Subscriber(keys, client, load_body=self._load_body, refetch=self._refetch)
        subscriber.shutting_down = self._shutting_down
        if self._shutting_down:
            subscriber.wake()
        self._subscribers.add(subscriber)
        self._gauges[kind].inc()
        try:
            for key in keys:
                self._join(key, subscriber)
            yield subscriber
        finally:
            for key in keys:
                self._leave(key, subscriber)
            self._subscribers.discard(subscriber)
            self._gauges[kind].dec()

    def announce_shutdown(self) -> None:
        """Publish all pending snapshots, then mark current and future subscribers as shutting down."""
        self._shutting_down = True
        for key in tuple(self._schedules):
            self._publish_pending(key)
        for subscriber in self._subscribers:
            subscriber.shutting_down = True
            subscriber.wake()

    async def aclose(self) -> None:
        """End every schedule, and wait until all have ended."""
        for schedule in self._schedules.values():
            self._refresher.stop(schedule)
        await self._refresher.wait_stopped()

    def _join(self, key: TaskKey, subscriber: Subscriber) -> None:
        schedule = self._schedules.get(key)
        if schedule is None:
            schedule = self._schedules[key] = Schedule(key)
            # A cached snapshot is sent at once, before the first refresh.
            result = self._service.peek(key)
            schedule.latest = (
                Update(key, result.snapshot).without_large_body() if result is not None else None
            )
            self._refresher.start(schedule)
        # This lookup may make a newer snapshot visible. It is published before the subscriber gets `latest`:
        # the client may have read it from another replica already, and must not receive an older one.
        current = self._service.peek(key)
        self._publish_pending(key)
        # The subscriber is added before it gets the current snapshot. Otherwise a change in between is lost.
        schedule.subscribers.add(subscriber)
        self._service.join(key, subscriber.client)
        latest = schedule.latest
        if latest is None:
            return  # the first refresh is in progress
        if current is not None or latest.snapshot is None or _is_final(latest):
            update = latest if current is None else Update(key, current.snapshot)
            subscriber.put(update if update.same_content(latest) else latest, latest)
            return
        # The latest snapshot is too old to send: the upstream is slow, or the schedule backs off for longer
        # than `cache.stale_if_error_seconds`. One refresh serves all subscribers that join before it ends.
        schedule.awaiting_refresh.add(subscriber)
        self._refresher.restart(schedule)

    def _leave(self, key: TaskKey, subscriber: Subscriber) -> None:
        schedule = self._schedules.get(key)
        if schedule is None or subscriber not in schedule.subscribers:
            return
        schedule.subscribers.discard(subscriber)
        schedule.awaiting_refresh.discard(subscriber)
        self._service.leave(key, subscriber.client)
        if not schedule.subscribers:
            del self._schedules[key]
            self._refresher.stop(schedule)

    def _add_pending(self, snapshot: Snapshot) -> None:
        schedule = self._schedules.get(snapshot.key)
        if schedule is None:
            return
        if schedule.pending is None:
            if not self._pending_keys:
                asyncio.get_running_loop().call_soon(self._publish_some)
            self._pending_keys.append(snapshot.key)
        elif schedule.pending.terminal and not snapshot.terminal:
            return
        schedule.pending = snapshot

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
        schedule = self._schedules.get(key)
        if schedule is None or schedule.pending is None:
            return
        snapshot, schedule.pending = schedule.pending, None
        self._publish(Update(key, snapshot))
        if schedule.backing_off:
            self._refresher.restart(schedule)  # the upstream has answered a query of this or another replica

    def _publish(self, update: Update) -> None:
        schedule = self._schedules.get(update.key)
        if schedule is None or (_is_final(schedule.latest) and not _is_final(update)):
            return  # a task that has ended does not run again; a store that evicted its snapshot cannot know
        recipients = (
            schedule.awaiting_refresh if update.same_content(schedule.latest) else schedule.subscribers
        )
        schedule.latest = reduced = update.without_large_body()
        for subscriber in self.direct_delivery(update, recipients):
            subscriber.put(update, reduced)
        schedule.awaiting_refresh.clear()

    def _load_body(self, reduced: Update, subscriber: Subscriber) -> Update | None:
        """Return the latest form of an update, with its body. None if the store has evicted the body.

        None, too, if a newer update is unsent by now: the subscriber sends that one.
        """
        snapshot = self._peek_stale(reduced.key)
        self._publish_pending(reduced.key)  # the lookup may have made one visible, as in `_join`
        if subscriber.has_unsent(reduced.key) or snapshot is None:
            return None
        return None if _is_final(reduced) and not snapshot.terminal else Update(reduced.key, snapshot)

    def _refetch(self, key: TaskKey, subscriber: Subscriber) -> None:
        """Refresh a task whose body was evicted, and send the result to this subscriber."""
        schedule = self._schedules.get(key)
        if schedule is None or subscriber not in schedule.subscribers:
            return
        schedule.awaiting_refresh.add(subscriber)
        if not schedule.refreshing and not schedule.backing_off:
            self._refresher.restart(schedule)


def _is_final(update: Update | None) -> bool:
    return update is not None and update.snapshot is not None and update.snapshot.terminal
