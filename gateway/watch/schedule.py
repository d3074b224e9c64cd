"""The refresh schedule of a task with subscribers.

refresh -> success: sleep for the snapshot's lifetime -> refresh -> ... -> terminal snapshot: end
-> failure: back off, or until the store receives a snapshot from elsewhere -> refresh
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import structlog

from gateway.domain.errors import GatewayError
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import TaskKey
from gateway.progress.results import FetchFailure
from gateway.progress.service import ProgressService
from gateway.telemetry.log_sampling import LogSampler
from gateway.watch.coalesced_timers import CoalescedTimers
from gateway.watch.subscriber import Subscriber, Update

_MIN_INTERVAL_SECONDS = 0.2  # between two refreshes, even with shorter lifetimes
# A timer may fire a millisecond early. The snapshot would then still be fresh, the refresh would do nothing,
# and the next one would be late.
_TIMER_RESOLUTION_SECONDS = 0.002
_MAX_DELAY_SHARE = 0.05  # of the time between two refreshes, for schedules to wake together
_BACKOFF_SECONDS = 1.0  # after the first failure; doubled after each further one
_MAX_BACKOFF_SECONDS = 30.0  # also bounds the upstream's Retry-After: streams must notice its recovery
_BUG = GatewayError("internal error; see the log of the gateway")

log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class Schedule:
    """The state of one watched task.

    `latest` is the last published update, without a large body. `pending` is a stored snapshot that is
    published in one of the next turns of the event loop. `must_notify` are subscribers that receive the next
    update even if it repeats `latest`: when they joined, `latest` was too old to send, or its body has been
    evicted since. `refreshing`: the task waits for the service. `backing_off`: it waits after a failure.
    """

    key: TaskKey
    subscribers: set[Subscriber] = field(default_factory=set)
    must_notify: set[Subscriber] = field(default_factory=set)
    latest: Update | None = None
    pending: Snapshot | None = None
    task: asyncio.Task[None] | None = None
    refreshing: bool = False
    backing_off: bool = False


class Refresher:
    """Runs schedules: refreshes each task through the service, and publishes the results.

    `publish_pending` publishes the task's pending snapshot, if there is one. `publish` publishes an update.
    `clock` is the clock of `Snapshot.fetched_at`.
    """

    def __init__(
        self,
        service: ProgressService,
        *,
        publish_pending: Callable[[TaskKey], None],
        publish: Callable[[Update], None],
        clock: Callable[[], float],
    ) -> None:
        self._service = service
        self._publish_pending = publish_pending
        self._publish = publish
        self._clock = clock
        self._timers = CoalescedTimers()
        self._stopping: set[asyncio.Task[None]] = set()
        self._log_sampler = LogSampler()

    def start(self, schedule: Schedule) -> None:
        """Refresh the task now, and then whenever its snapshot expires."""
        schedule.task = asyncio.create_task(self._run(schedule))

    def restart(self, schedule: Schedule) -> None:
        """Refresh the task now instead of when the current pause is over."""
        self.stop(schedule)
        self.start(schedule)

    def stop(self, schedule: Schedule) -> None:
        """Cancel the schedule's task."""
        if schedule.task is not None:
            schedule.task.cancel()
            self._stopping.add(schedule.task)
            schedule.task.add_done_callback(self._stopping.discard)
            schedule.task = None  # breaks a reference cycle: the task's frames refer to the schedule
            schedule.refreshing = schedule.backing_off = False

    async def wait_stopped(self) -> None:
        """Wait until every stopped schedule has ended."""
        await asyncio.gather(*self._stopping, return_exceptions=True)

    async def _run(self, schedule: Schedule) -> None:
        """Keep the task's snapshot fresh until the task has ended. Cancellation is the normal end."""
        backoff = _BACKOFF_SECONDS
        group_size = 1
        while True:
            schedule.refreshing = True
            snapshot, failure = await self._refresh(schedule)
            schedule.refreshing = False
            if snapshot is not None and snapshot.terminal:
                return
            success = snapshot is not None and failure is None
            if snapshot is not None and failure is None:
                left = snapshot.lifetime - (self._clock() - snapshot.fetched_at)
                pause = max(left + _TIMER_RESOLUTION_SECONDS, _MIN_INTERVAL_SECONDS)
            else:
                pause = max(backoff, (failure or _BUG).retry_after or 0.0)
            del snapshot, failure  # no body is kept in memory during the pause
            if success:
                backoff = _BACKOFF_SECONDS
                group_size = await self._timers.sleep(
                    pause, max_delay=_MAX_DELAY_SHARE * pause, group_size=group_size
                )
            else:
                backoff = min(2 * backoff, _MAX_BACKOFF_SECONDS)
                schedule.backing_off = True
                await asyncio.sleep(min(pause, _MAX_BACKOFF_SECONDS))
                schedule.backing_off = False

    async def _refresh(self, schedule: Schedule) -> tuple[Snapshot | None, GatewayError | None]:
        """Refresh once and publish the result; return the snapshot and the failure, both when it is stale.

        A bug is reported like any failure: if it ended the schedule, subscribers would wait without notice.
        """
        key = schedule.key
        try:
            outcome = await self._service.get_fresh(key, client=None)
            if isinstance(outcome, FetchFailure):
                self._publish_pending(key)  # the older one first
                self._publish(Update(key, failure=outcome.failure))
                return None, outcome.failure
            if outcome.snapshot is not schedule.pending:  # a pending snapshot keeps its place in the queue
                self._publish_pending(key)
                self._publish(Update(key, outcome.snapshot))
        except Exception as exc:
            if (suppressed := self._log_sampler.take(type(exc).__name__)) is not None:
                log.exception(
                    "bug_in_schedule", operation=key.operation, task_id=key.task_id, suppressed=suppressed
                )
            with suppress(Exception):  # the bug may be in `_publish`
                self._publish(Update(key, failure=_BUG))
            return None, _BUG
        return outcome.snapshot, outcome.failure
