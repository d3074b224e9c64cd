"""The watch hub: schedules the refreshes of watched tasks, and publishes changes to their subscribers.

    first subscriber -> start the task's schedule (`schedule.py`), which refreshes its snapshot
    a stored change, fetched by any request or replica -> pending -> publish
        -> written directly to subscribers whose readers keep up
        -> else put into the slot -> sent by the subscriber's stream or long poll
    last subscriber has left, or the task has ended -> the schedule ends

A slot holds the latest update of a task and no backlog: a slow reader skips intermediate states. The store
owns and counts the bodies. Schedules and slots keep updates without large bodies (`subscriber.py`), and the
body is looked up when an update is sent. If the store has evicted it, the subscriber receives the next
refresh.

Stored changes are published a few at a time in the next turns of the event loop. Schedules that wake
together also receive their responses together. All are parsed first, while that code is in the processor's
caches. Then a few changes are published per turn of the event loop, and other requests are served between
the turns.
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

_BACKLOG_TURNS = 8  # turns of the event loop in which about two thirds of a backlog are published


class SubscriptionKind(StrEnum):
    """How a client follows a task: by an event stream or by a long poll."""

    EVENTS = "events"
    LONGPOLL = "longpoll"


# Writes an update to the subscribers that can receive it at once, and returns the others.
DirectDelivery = Callable[[Update, Collection[Subscriber]], Iterable[Subscriber]]


class WatchHub:
    """Holds every subscriber, and one schedule for each watched task.

    `direct_delivery` is tried before an update is put into slots. By default it delivers nothing. `clock` is
    the clock of `Snapshot.fetched_at`.
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

        `client` is the client on whose behalf the schedules call the upstream. Raises: Overloaded when
        `watch.max_watchers` subscriptions are open.
        """
        if len(self._subscribers) >= self._settings.max_watchers:
            raise Overloaded(
                "the gateway has reached its limit of open streams and long polls", retry_after=5.0
            )
        subscriber = Subscriber(keys, client, complete=self._with_body, refetch=self._refetch)
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
        """Publish all pending snapshots, then tell current and future subscribers that they must end."""
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
        # The lookup comes first, because it can activate a snapshot that is due in the store. That snapshot
        # is published before this subscriber is added: the client may already have read it from another
        # replica, and must not receive an older one.
        current = self._service.peek(key)
        self._publish_pending(key)
        # Add the subscriber before it gets the current snapshot: a change in between would be lost otherwise.
        schedule.subscribers.add(subscriber)
        self._service.join(key, subscriber.client)
        latest = schedule.latest
        if latest is None:
            return  # the first refresh is in progress
        if current is not None or latest.snapshot is None or _is_final(latest):
            update = latest if current is None else Update(key, current.snapshot)
            subscriber.put(update if update.same_content(latest) else latest, latest)
            return
        # The latest snapshot is too old to send: the upstream is slow, or it fails and the schedule backs off
        # for longer than stale-if-error. Refresh now; one call serves all subscribers that joined meanwhile.
        schedule.must_notify.add(subscriber)
        self._refresher.restart(schedule)

    def _leave(self, key: TaskKey, subscriber: Subscriber) -> None:
        schedule = self._schedules.get(key)
        if schedule is None or subscriber not in schedule.subscribers:
            return
        schedule.subscribers.discard(subscriber)
        schedule.must_notify.discard(subscriber)
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
            for _ in range(1 + len(self._pending_keys) // _BACKLOG_TURNS):
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
            self._refresher.restart(schedule)  # a query of this or another replica got a response

    def _publish(self, update: Update) -> None:
        schedule = self._schedules.get(update.key)
        if schedule is None or (_is_final(schedule.latest) and not _is_final(update)):
            return  # after an eviction the store may accept a running snapshot of an ended task
        audience = schedule.must_notify if update.same_content(schedule.latest) else schedule.subscribers
        schedule.latest = reduced = update.without_large_body()
        for subscriber in self.direct_delivery(update, audience):
            subscriber.put(update, reduced)
        schedule.must_notify.clear()

    def _with_body(self, reduced: Update, subscriber: Subscriber) -> Update | None:
        """Return an update with its latest body; None if the store has evicted it."""
        snapshot = self._peek_stale(reduced.key)
        self._publish_pending(reduced.key)  # the lookup may have delivered a change, as in `_join`
        if subscriber.has_pending(reduced.key) or snapshot is None:
            return None
        return None if _is_final(reduced) and not snapshot.terminal else Update(reduced.key, snapshot)

    def _refetch(self, key: TaskKey, subscriber: Subscriber) -> None:
        """Refresh a task whose body was evicted, and send the result to this subscriber."""
        schedule = self._schedules.get(key)
        if schedule is None or subscriber not in schedule.subscribers:
            return
        schedule.must_notify.add(subscriber)
        if not schedule.refreshing and not schedule.backing_off:
            self._refresher.restart(schedule)


def _is_final(update: Update | None) -> bool:
    return update is not None and update.snapshot is not None and update.snapshot.terminal
