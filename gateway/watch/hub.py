"""The watch hub: schedules the queries for watched tasks, and publishes changes to their subscribers.

    first subscriber -> start the schedule of the task (`schedules.py`), which queries it repeatedly
    the store reports a new snapshot, fetched for any caller or by any replica -> publish it soon
        -> write it directly to streams that have no unsent data (`api/events.py`)
        -> for all other subscribers, keep it as unsent -> the stream or long poll sends it
    last subscriber has left, or the task has ended -> the schedule ends

If a task is overdue (`progress/overdue_detector.py`), its subscribers receive an overdue notice. In a stream,
this is the event `stale`. The subscribers receive another overdue notice when the problem code changes, and
when the task is no longer overdue.

A subscriber keeps only the latest unsent update of each task: a slow client skips intermediate states. The
store keeps the bodies, and limits their memory. The hub keeps updates without their large bodies
(`Update.without_large_body`). A subscriber keeps the large body of at most one unsent update. When it sends
the other updates, it takes their bodies from the store. If the store has evicted a body, the task is queried
again, and the subscriber receives the new snapshot.

Schedules that wake together receive their responses at about the same time. All responses are parsed and
stored first, while the code for this is in the processor's caches. The changes are published afterwards, a
few in each iteration of the event loop, so that other requests are served in between.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

from gateway.domain.errors import GatewayError, Overloaded
from gateway.domain.paced_callbacks import PacedCallbacks
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import TaskKey
from gateway.progress.service import ProgressService
from gateway.progress.unanswered_tasks import UnansweredTasks, too_many_tasks
from gateway.settings.model import Watch as WatchSettings
from gateway.stores.base import Store
from gateway.telemetry.metrics import Metrics
from gateway.watch.schedules import Schedules
from gateway.watch.subscriber import OverdueNotice, Subscriber, SubscriptionKind, Update
from gateway.watch.watched_task import WatchedTask

# Each iteration of the event loop publishes one snapshot, and an eighth of those that are unpublished.
_BACKLOG_DIVISOR = 8
# Subscribers that wake in one iteration. A long poll takes 60 microseconds to respond.
_WAKE_UPS_PER_ITERATION = 64


class WatchHub:
    """Holds every subscriber, and one schedule for each watched task.

    `direct_delivery_hook`, which `api/events.py` replaces, receives each update and its recipients. It
    returns the subscribers that must keep the update as unsent: by default, all. `unanswered_tasks` counts
    the tasks without a snapshot: those with subscribers, and those of waiting requests. `clock`: that of
    `fetched_at`.
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
        self.unanswered_tasks = UnansweredTasks()
        self._last_known = store.last_known
        self._paced_wake_ups = PacedCallbacks(per_iteration=_WAKE_UPS_PER_ITERATION)
        self._watched: dict[TaskKey, WatchedTask] = {}
        self._subscribers: set[Subscriber] = set()
        self._overdue_keys: set[TaskKey] = set()
        self._schedules = Schedules(
            service,
            publish_unpublished=self._publish_unpublished,
            publish=self._publish,
            update_overdue_error=self._update_overdue_error,
            on_refresh_overdue=self._on_refresh_overdue,
            unknown_task_seconds=settings.unknown_task_seconds,
            clock=clock,
        )
        # Tasks in the order in which their snapshots arrived; some may have been published meanwhile.
        self._unpublished_keys: deque[TaskKey] = deque()
        self._shutting_down = False
        self.direct_delivery_hook: Callable[[Update, Collection[Subscriber]], Iterable[Subscriber]] = (
            lambda _, subscribers: subscribers
        )
        self._gauges = {kind: metrics.subscribers.labels(kind) for kind in SubscriptionKind}
        metrics.subscribers_limit.set(settings.max_watchers)
        metrics.watched_tasks.set_function(self._watched.__len__)
        metrics.overdue_tasks.set_function(self._overdue_keys.__len__)
        store.add_snapshot_listener(self._add_unpublished, is_watched=self._watched.__contains__)

    @contextmanager
    def counted_as_unanswered(self, keys: Sequence[TaskKey], *, client: bytes) -> Iterator[None]:
        """While the context is open, count the new tasks as unanswered. Afterwards `subscribe` counts them.

        Do not `await` between the end of this context and `subscribe`. Raises: Overloaded.
        """
        new = sum(map(self.would_add_unanswered_task, keys))
        if not self.unanswered_tasks.has_room(client, new):
            raise too_many_tasks()
        with self.unanswered_tasks.counted(client, new):
            yield

    def would_add_unanswered_task(self, key: TaskKey) -> bool:
        """Tell whether a task is not watched yet, and the store has no snapshot of it, however old."""
        return key not in self._watched and self._last_known(key) is None

    @contextmanager
    def subscribe(
        self,
        keys: Sequence[TaskKey],
        kind: SubscriptionKind,
        *,
        client: bytes = b"",
        seen_revisions: Mapping[TaskKey, int] = MappingProxyType({}),
    ) -> Iterator[Subscriber]:
        """Subscribe to these tasks while the context is open.

        The first updates are the current snapshots, if they may be served. `client` identifies the client in
        the fair queues for upstream calls (`upstream/query_queue.py`).
        Raises: Overloaded when `watch.max_watchers` subscriptions are open.
        """
        if len(self._subscribers) >= self._settings.max_watchers:
            raise Overloaded(
                "the gateway has reached its limit of open streams and long polls", retry_after=5.0
            )
        subscriber = Subscriber(
            keys,
            client,
            wake_ups=self._paced_wake_ups,
            seen_revisions=seen_revisions,
            load_body=self._publish_and_load_body,
            refetch=self._refetch,
        )
        subscriber.must_end = self._shutting_down
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

    async def read_arrived_messages(self) -> None:
        """Read the messages of other replicas that have arrived; `subscribe` then finds their snapshots."""
        await self._service.read_arrived_messages()

    def begin_shutdown(self) -> None:
        """Publish all unpublished snapshots, then mark current and future subscribers as shutting down."""
        self._shutting_down = True
        for key in tuple(self._watched):
            self._publish_unpublished(key)
        for subscriber in self._subscribers:
            subscriber.must_end = True
            subscriber.wake()

    async def aclose(self) -> None:
        """End every schedule, and wait until all have ended."""
        for watched in self._watched.values():
            self._schedules.stop(watched)
        await self._schedules.wait_stopped()

    def _start_watching(self, key: TaskKey, client: bytes) -> WatchedTask:
        watched = self._watched[key] = WatchedTask(key)
        if self._last_known(key) is None:
            self._count_as_unanswered(watched, client)
        # A cached snapshot is sent at once, before the first refresh.
        result = self._service.peek(key)
        if result is not None:
            watched.published_update = Update(key, result.snapshot).without_large_body()
            self._update_overdue_error(watched, self._service.overdue_detector.error(key))
        self._schedules.start(watched)
        return watched

    def _add_to_task(self, key: TaskKey, subscriber: Subscriber) -> None:
        watched = self._watched.get(key) or self._start_watching(key, subscriber.client)
        seen_revision = subscriber.seen_revisions.get(key, 0)
        watched.seen_revision = max(watched.seen_revision, seen_revision)
        # Publish the unpublished snapshot before the subscriber is added, so that it receives the latest one.
        # This method does not await, so no change is lost between the steps.
        self._publish_unpublished(key)
        servable_result = self._service.peek(key, seen_revision)
        watched.subscribers.add(subscriber)
        self._service.add_caller(key, subscriber.client)
        published = watched.published_update
        if published is None:
            return  # the schedule has no response yet
        can_send = servable_result is not None or published.snapshot is None or published.is_final
        if can_send and not watched.not_found:
            # Only `servable_result` has a large body. Send it if it has the published content.
            # The contents differ if the store has lost the published snapshot of an ended task.
            update = published if servable_result is None else Update(key, servable_result.snapshot)
            if subscriber.put(update if update.has_same_content(published) else published, published):
                self._put_overdue_notice(watched, [subscriber])
                return
        # The published update is not sent, for one of these reasons:
        # - The task counts as not found, but the upstream may know the task by now.
        # - The store has no snapshot that may be served: the snapshot is too old, evicted or outdated.
        # - The client has received a newer snapshot.
        # So start a refresh. All subscribers that join before it ends share its in-flight request.
        watched.subscribers_awaiting_refresh.add(subscriber)
        self._schedules.refresh_now(watched)

    def _remove_from_task(self, key: TaskKey, subscriber: Subscriber) -> None:
        watched = self._watched.get(key)
        if watched is None or subscriber not in watched.subscribers:
            return
        watched.subscribers.discard(subscriber)
        watched.subscribers_awaiting_refresh.discard(subscriber)
        self._service.remove_caller(key, subscriber.client)
        if not watched.subscribers:
            del self._watched[key]
            self._overdue_keys.discard(key)
            self._stop_counting_as_unanswered(watched)
            self._schedules.stop(watched)
        elif watched.counted_for_client == subscriber.client:  # count it for another one
            self._stop_counting_as_unanswered(watched)
            self._count_as_unanswered(watched, next(iter(watched.subscribers)).client)

    def _count_as_unanswered(self, watched: WatchedTask, client: bytes) -> None:
        watched.counted_for_client = client
        self.unanswered_tasks.add(client)

    def _stop_counting_as_unanswered(self, watched: WatchedTask) -> None:
        if watched.counted_for_client is not None:
            self.unanswered_tasks.remove(watched.counted_for_client)
            watched.counted_for_client = None

    def _add_unpublished(self, snapshot: Snapshot) -> None:
        watched = self._watched.get(snapshot.key)
        if watched is None:
            return
        if watched.unpublished_snapshot is None:
            if not self._unpublished_keys:
                asyncio.get_running_loop().call_soon(self._publish_some)
            self._unpublished_keys.append(snapshot.key)
        elif watched.unpublished_snapshot.terminal and not snapshot.terminal:
            return
        watched.unpublished_snapshot = snapshot

    def _publish_some(self) -> None:
        """Publish the unpublished snapshots of a few tasks, and of more tasks when the backlog is longer."""
        try:
            for _ in range(1 + len(self._unpublished_keys) // _BACKLOG_DIVISOR):
                self._publish_unpublished(self._unpublished_keys.popleft())
        finally:
            if self._unpublished_keys:
                asyncio.get_running_loop().call_soon(self._publish_some)

    def _publish_unpublished(self, key: TaskKey) -> None:
        """Publish the unpublished snapshot of a task, if there is one."""
        watched = self._watched.get(key)
        if watched is None or watched.unpublished_snapshot is None:
            return
        snapshot, watched.unpublished_snapshot = watched.unpublished_snapshot, None
        self._publish(Update(key, snapshot))
        self._update_overdue_error(watched, None)
        if watched.backing_off:
            self._schedules.refresh_now(watched)  # the upstream responds again, to this or another replica

    def _publish(self, update: Update) -> None:
        watched = self._watched.get(update.key)
        if watched is None or (watched.has_ended and not update.is_final):
            # The task has ended: drop every update that is not final. If the store has evicted the terminal
            # snapshot, it may report one that is not terminal.
            return
        watched.unpublished_failure = None  # older than this update
        if update.snapshot is not None:
            self._stop_counting_as_unanswered(watched)
            watched.mark_found()
        recipients = (
            watched.subscribers_awaiting_refresh
            if update.has_same_content(watched.published_update)
            else watched.subscribers
        )
        watched.published_update = reduced = update.without_large_body()
        remaining = self.direct_delivery_hook(update, recipients)
        # `put` refuses the update if the client has a newer one. The subscriber then awaits a refresh.
        have_newer = {each for each in remaining if not each.put(update, reduced)}
        if watched.overdue_error is not None:
            self._put_overdue_notice(watched, recipients - have_newer)
        watched.subscribers_awaiting_refresh = have_newer

    def _update_overdue_error(self, watched: WatchedTask, failure: GatewayError | None) -> None:
        """Record why the task is overdue, if it is, and notify the subscribers of a change of the code."""
        before, watched.overdue_error = watched.overdue_error, failure
        if (before and before.code) == (failure and failure.code):
            return
        if failure is None:
            self._overdue_keys.discard(watched.key)
        else:
            self._overdue_keys.add(watched.key)
        self._put_overdue_notice(watched, watched.subscribers - watched.subscribers_awaiting_refresh)

    def _on_refresh_overdue(self, watched: WatchedTask, failure: GatewayError) -> None:
        """Record that a refresh takes too long. Subscribers that await it may receive the stale snapshot."""
        published = watched.published_update
        if published is None or watched.subscribers_awaiting_refresh:
            result = self._service.peek(watched.key)
            update = None if result is None or watched.not_found else Update(watched.key, result.snapshot)
            if update is not None and (published is None or update.has_same_content(published)):
                self._publish(update)
        self._update_overdue_error(watched, failure)

    def _put_overdue_notice(self, watched: WatchedTask, subscribers: Iterable[Subscriber]) -> None:
        """Put the overdue notice of a task into subscribers that have received its snapshot.

        Do nothing if the last published update is a failure, which tells of the problem already.
        """
        if watched.published_update is None or (snapshot := watched.published_update.snapshot) is None:
            return
        # The store may have a newer snapshot: use its age.
        snapshot = self._last_known(watched.key) or snapshot
        notice = OverdueNotice(watched.key, watched.overdue_error, snapshot.fetched_at)
        for subscriber in subscribers:
            subscriber.put_overdue_notice(notice)

    def _publish_and_load_body(self, reduced: Update, subscriber: Subscriber) -> Update | None:
        """Publish the unpublished snapshot, if any; then return the latest snapshot with its body, or None.

        None means that the subscriber has a newer update to send, that the store has no snapshot, or that the
        task has ended and the snapshot in the store is not terminal.
        """
        self._publish_unpublished(reduced.key)
        snapshot = self._last_known(reduced.key)
        if subscriber.has_unsent(reduced.key) or snapshot is None:
            return None
        return None if reduced.is_final and not snapshot.terminal else Update(reduced.key, snapshot)

    def _refetch(self, key: TaskKey, subscriber: Subscriber) -> None:
        """Query a task whose body was evicted, and send the snapshot to this subscriber."""
        watched = self._watched.get(key)
        if watched is None or subscriber not in watched.subscribers:
            return
        watched.subscribers_awaiting_refresh.add(subscriber)
        if not watched.refreshing and not watched.backing_off:
            self._schedules.refresh_now(watched)
