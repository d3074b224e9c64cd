"""The state of a watched task, which the hub (`hub.py`) and the schedules (`schedules.py`) share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from gateway.domain.errors import GatewayError
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import TaskKey
from gateway.watch.subscriber import Subscriber, Update


@dataclass(slots=True, eq=False)
class WatchedTask:
    """The state of one watched task.

    Attributes:
        key: The watched task.
        subscribers: All subscribers of the task.
        subscribers_awaiting_refresh: Subscribers that were not sent `published_update`. They receive the
            result of the next refresh, even if it has the same content. Either `published_update` could not
            be sent when the subscriber joined (`WatchHub`), or the store has evicted the body of an unsent
            update, or the client of the subscriber has received a newer snapshot.
        published_update: The last published update, without a large body. At the start of the schedule, the
            cached snapshot, or None.
        unpublished_snapshot: A newer snapshot, which the store has reported. It will be published in one of
            the next iterations of the event loop.
        unpublished_failure: A newer failure, which waits for its turn to be published. Every published update
            replaces it.
        counted_for_client: The client for which the task counts in `UnansweredTasks`; None if it does not.
        seen_revision: The newest revision that the client of any subscriber had received when it joined.
        runner: The asyncio task that runs the schedule; None when it is stopped.
        refreshing: The runner waits for the result of a refresh.
        backing_off: The runner sleeps after a failure.
        rejected_since: The time of the first query that the upstream rejected; None after a snapshot.
        not_found: The upstream has rejected all queries for `watch.unknown_task_seconds`.
        overdue_error: The error because of which the update is overdue; None if it is not overdue.
        check_timer: Checks whether the refresh takes too long; None when there is no refresh.
    """

    key: TaskKey
    subscribers: set[Subscriber] = field(default_factory=set)
    subscribers_awaiting_refresh: set[Subscriber] = field(default_factory=set)
    published_update: Update | None = None
    unpublished_snapshot: Snapshot | None = None
    unpublished_failure: GatewayError | None = None
    counted_for_client: bytes | None = None
    seen_revision: int = 0
    runner: asyncio.Task[None] | None = None
    refreshing: bool = False
    backing_off: bool = False
    rejected_since: float | None = None
    not_found: bool = False
    overdue_error: GatewayError | None = None
    check_timer: asyncio.TimerHandle | None = None

    @property
    def has_ended(self) -> bool:
        """Whether a terminal snapshot was published."""
        return self.published_update is not None and self.published_update.is_final

    def mark_found(self) -> None:
        """Record that the upstream knows the task."""
        self.rejected_since = None
        if self.not_found:
            self.not_found = False
            for subscriber in self.subscribers:
                subscriber.set_not_found(self.key, not_found=False)

    def notify_not_found(self) -> None:
        """If the task counts as not found, notify its subscribers."""
        if self.not_found:
            for subscriber in self.subscribers:
                subscriber.set_not_found(self.key, not_found=True)
