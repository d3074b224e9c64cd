"""The schedules: each keeps the snapshot of one watched task fresh.

    refresh -> terminal snapshot: end
            -> other snapshot: sleep until it expires -> refresh
            -> failure: back off                      -> refresh

While the upstream fails, one of the schedules that back off refreshes its task each second. When such a
refresh succeeds, the upstream has recovered, and all schedules continue. So subscribers learn of the recovery
within two seconds, and the upstream receives few calls until then. Schedules whose queries the upstream has
rejected take no part in this: the upstream works, and only does not know their tasks.

The hub learns why the update of a task is overdue: after a failed refresh, and when a refresh takes too long
(`progress/overdue_detector.py`). A back-off ends early if another query stores a snapshot of the task. The
upstream rejects queries for a new task for a moment, because it does not know the task yet. The task counts
as not found only when its queries have been rejected for `watch.unknown_task_seconds`; the schedule then
continues. The hub (`hub.py`) starts a schedule for the first subscriber of a task, and stops it after the
last one.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import structlog

from gateway.domain.errors import GatewayError, UpstreamRejected
from gateway.domain.paced_callbacks import PacedCallbacks
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import TaskKey
from gateway.progress.outcomes import LookupFailure
from gateway.progress.service import ProgressService
from gateway.telemetry.log_sampling import LogSampler
from gateway.watch.coalesced_timers import CoalescedTimers
from gateway.watch.subscriber import Update
from gateway.watch.watched_task import WatchedTask

_MIN_INTERVAL_SECONDS = 0.2  # between two refreshes, even with shorter lifetimes
# A timer may fire a millisecond early. Without this margin the snapshot would then still be fresh, the
# refresh would do nothing, and the next one would be late.
_TIMER_RESOLUTION_SECONDS = 0.002
# Schedules that are due at about the same time wake together. Each accepts a delay of up to this share of the
# time between two refreshes.
_MAX_DELAY_SHARE = 0.05
_MAX_DELAY_SECONDS = 0.25  # subscribers must learn of an outage within one lifetime + 2 s
_BACKOFF_SECONDS = 1.0  # after the first failure; doubled after each further one
_MAX_BACKOFF_SECONDS = 30.0  # also bounds the upstream's Retry-After: streams must notice its recovery
_PROBE_SECONDS = 1.0  # between two refreshes of schedules that back off
_PER_ITERATION = 20  # schedules that continue in one iteration of the event loop after a recovery
_SUBSCRIBERS_OF_WEIGHT = 8  # to send them a failure weighs as much as another failure
_INTERNAL_ERROR = GatewayError("internal error; see the log of the gateway")

log = structlog.get_logger(__name__)


class _BackOff(NamedTuple):
    """A schedule that backs off. It does not continue before `not_before`, unless the upstream recovers."""

    sleeper: asyncio.Future[None]
    not_before: float


class Schedules:
    """Runs the schedules: queries each watched task through the service, and publishes the results.

    `publish_unpublished` publishes the task's unpublished snapshot, if there is one. `publish` publishes an
    update. `update_overdue_error` is called after each refresh that returns a snapshot, with the error
    because of which the update is overdue, or None. `on_refresh_overdue` is called with the reason while a
    refresh takes too long. `clock` is that of `Snapshot.fetched_at`.
    """

    def __init__(
        self,
        service: ProgressService,
        *,
        publish_unpublished: Callable[[TaskKey], None],
        publish: Callable[[Update], None],
        update_overdue_error: Callable[[WatchedTask, GatewayError | None], None],
        on_refresh_overdue: Callable[[WatchedTask, GatewayError], None],
        unknown_task_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._service = service
        self._publish_unpublished = publish_unpublished
        self._publish = publish
        self._update_overdue_error = update_overdue_error
        self._on_refresh_overdue = on_refresh_overdue
        self._unknown_task_seconds = unknown_task_seconds
        self._clock = clock
        self._timers = CoalescedTimers()
        self._turns = PacedCallbacks()
        self._stopping: set[asyncio.Task[None]] = set()
        self._backing_off: dict[WatchedTask, _BackOff] = {}  # the one that has waited longest first
        self._probe_timer: asyncio.TimerHandle | None = None
        self._probed_at = -math.inf
        self._log_sampler = LogSampler()

    def start(self, watched: WatchedTask) -> None:
        """Start the runner: refresh the task now, and then whenever its snapshot expires."""
        watched.runner = asyncio.create_task(self._run(watched))

    def refresh_now(self, watched: WatchedTask) -> None:
        """Refresh the task now, without waiting for the end of the current pause."""
        # The timer is kept. Otherwise clients that subscribe again and again would postpone it.
        check_timer, watched.check_timer = watched.check_timer, None
        self.stop(watched)
        watched.check_timer = check_timer
        self.start(watched)

    def stop(self, watched: WatchedTask) -> None:
        """Cancel the runner."""
        if watched.runner is not None:
            watched.runner.cancel()
            self._stopping.add(watched.runner)
            watched.runner.add_done_callback(self._stopping.discard)
            watched.runner = None  # breaks a reference cycle: the runner's frames refer to the watched task
        self._end_refresh(watched)
        watched.backing_off = False

    async def wait_stopped(self) -> None:
        """Wait until the runners of all stopped schedules have ended."""
        await asyncio.gather(*self._stopping, return_exceptions=True)

    async def _run(self, watched: WatchedTask) -> None:
        """Keep the snapshot fresh until the task has ended, or until the runner is cancelled."""
        backoff, group_size = _BACKOFF_SECONDS, 1
        upstream_failed = False  # since the last success
        while True:
            self._begin_refresh(watched)
            snapshot, failure = await self._refresh(watched)
            self._end_refresh(watched)
            if snapshot is not None and snapshot.terminal:
                return
            success = snapshot is not None and failure is None
            if snapshot is not None and failure is None:
                left = snapshot.lifetime - (self._clock() - snapshot.fetched_at)
                pause = max(left + _TIMER_RESOLUTION_SECONDS, _MIN_INTERVAL_SECONDS)
            else:
                retry_after = (failure or _INTERNAL_ERROR).retry_after or 0.0
                pause = min(max(backoff, retry_after), _MAX_BACKOFF_SECONDS)
                rejected = isinstance(failure, UpstreamRejected)
                if rejected:  # the upstream works
                    pause = min(pause, self._seconds_until_not_found(watched))
                    if watched.not_found:  # the tasks of one stream must not be queried at the same time
                        pause *= random.uniform(0.5, 1.0)  # noqa: S311  # not security-relevant
            del snapshot, failure  # no body is kept in memory during the pause
            if success:
                if upstream_failed:
                    self._end_back_offs()
                backoff, upstream_failed = _BACKOFF_SECONDS, False
                group_size = await self._timers.sleep(
                    pause,
                    max_delay=min(_MAX_DELAY_SHARE * pause, _MAX_DELAY_SECONDS),
                    group_size=group_size,
                )
            else:
                backoff = min(2 * backoff, _MAX_BACKOFF_SECONDS)
                watched.backing_off = True
                if rejected:
                    await asyncio.sleep(pause + _TIMER_RESOLUTION_SECONDS)
                else:
                    upstream_failed = True
                    await self._back_off(watched, pause, min(retry_after, pause))
                watched.backing_off = False

    async def _back_off(self, watched: WatchedTask, seconds: float, least_seconds: float) -> None:
        """Sleep for `seconds`, or until another schedule finds that the upstream has recovered."""
        loop = asyncio.get_running_loop()
        least_seconds = max(least_seconds, _PROBE_SECONDS) + _TIMER_RESOLUTION_SECONDS
        back_off = _BackOff(loop.create_future(), loop.time() + least_seconds)
        self._backing_off[watched] = back_off
        if self._probe_timer is None:
            self._schedule_probe()
        try:
            async with asyncio.timeout(seconds + _TIMER_RESOLUTION_SECONDS):
                await back_off.sleeper
        except TimeoutError:
            pass
        finally:
            if self._backing_off.get(watched) is back_off:
                del self._backing_off[watched]
            if not self._backing_off and self._probe_timer is not None:
                self._probe_timer.cancel()
                self._probe_timer = None

    def _probe(self) -> None:
        """Let the schedule continue that has backed off for longest; repeat this while any backs off."""
        now = self._probed_at = asyncio.get_running_loop().time()
        for watched, back_off in self._backing_off.items():
            if back_off.not_before <= now:
                del self._backing_off[watched]
                _wake(back_off)
                break
        self._schedule_probe()

    def _schedule_probe(self) -> None:
        self._probe_timer = None
        if self._backing_off:
            first = min(back_off.not_before for back_off in self._backing_off.values())
            when = max(first, self._probed_at + _PROBE_SECONDS)
            self._probe_timer = asyncio.get_running_loop().call_at(when, self._probe)

    def _end_back_offs(self) -> None:
        """Let the schedules continue that back off, a few in each iteration of the event loop."""
        waiting = list(self._backing_off.values())
        self._backing_off.clear()

        def wake_some() -> None:
            for back_off in waiting[:_PER_ITERATION]:
                _wake(back_off)
            del waiting[:_PER_ITERATION]
            if waiting:
                asyncio.get_running_loop().call_soon(wake_some)

        wake_some()

    async def _refresh(self, watched: WatchedTask) -> tuple[Snapshot | None, GatewayError | None]:
        """Refresh once and publish the result. Return the snapshot or None, and the failure or None.

        Both are returned if a stale snapshot is served instead of a failure. An unexpected exception is
        published as a failure. It does not end the schedule, because the subscribers would then wait forever.
        """
        key = watched.key
        try:
            outcome = await self._service.query_if_stale(key, seen_revision=watched.seen_revision)
            if isinstance(outcome, LookupFailure):
                self._publish_unpublished(key)  # it is older than the failure
                if isinstance(outcome.failure, UpstreamRejected):
                    self._note_rejection(watched)
                self._publish_in_turn(watched, outcome.failure)
                return None, outcome.failure
            if outcome.snapshot is not watched.unpublished_snapshot:  # else the hub publishes it soon
                self._publish_unpublished(key)
                if not self._has_newer(outcome.snapshot):
                    self._publish(Update(key, outcome.snapshot))
                detector = self._service.overdue_detector
                self._update_overdue_error(watched, outcome.failure and detector.error(key))
        except Exception as exc:
            if (suppressed := self._log_sampler.take(type(exc).__name__)) is not None:
                log.exception(
                    "bug_in_schedule", operation=key.operation, task_id=key.task_id, suppressed=suppressed
                )
            with suppress(Exception):  # the bug may be in `_publish`
                self._publish(Update(key, failure=_INTERNAL_ERROR))
            return None, _INTERNAL_ERROR
        return outcome.snapshot, outcome.failure

    def _has_newer(self, snapshot: Snapshot) -> bool:
        """Tell whether another replica's newer snapshot came before the schedule continued.

        The store decides, not `published_update`: if the store has lost that one, and its clock or the local
        one was set back, newer snapshots have smaller versions for a while.
        """
        latest = self._service.peek(snapshot.key)
        return latest is not None and not snapshot.may_follow(latest.snapshot.revision)

    def _publish_in_turn(self, watched: WatchedTask, failure: GatewayError) -> None:
        """Publish a failure. If many tasks fail together, they take turns.

        If the task fails again before its turn, the newer failure is published instead. If another update
        comes first, none is.
        """
        has_turn = watched.unpublished_failure is not None
        watched.unpublished_failure = failure
        if not has_turn:
            weight = 1 + len(watched.subscribers) // _SUBSCRIBERS_OF_WEIGHT
            publish = partial(self._publish_failure, watched)
            self._turns.add(asyncio.get_running_loop(), publish, weight=weight, client=b"")

    def _publish_failure(self, watched: WatchedTask) -> None:
        failure, watched.unpublished_failure = watched.unpublished_failure, None
        if failure is not None and watched.subscribers and watched.unpublished_snapshot is None:
            self._publish(Update(watched.key, failure=failure))
            watched.notify_not_found()

    def _begin_refresh(self, watched: WatchedTask) -> None:
        watched.refreshing = True
        if watched.check_timer is None:
            self._schedule_check(watched, self._service.overdue_detector.overdue_after_seconds)

    def _end_refresh(self, watched: WatchedTask) -> None:
        watched.refreshing = False
        if watched.check_timer is not None:
            watched.check_timer.cancel()
            watched.check_timer = None

    def _schedule_check(self, watched: WatchedTask, delay: float) -> None:
        watched.check_timer = asyncio.get_running_loop().call_later(delay, self._check_refresh, watched)

    def _check_refresh(self, watched: WatchedTask) -> None:
        """Report the refresh if it takes too long. Check again later: the reason may change."""
        detector = self._service.overdue_detector
        reason = detector.error(watched.key)
        if reason is None:
            # The query may have begun a moment after the refresh.
            delay = detector.seconds_until_check(watched.key)
            self._schedule_check(watched, max(delay, _TIMER_RESOLUTION_SECONDS))
        else:
            self._schedule_check(watched, detector.overdue_after_seconds)
            self._on_refresh_overdue(watched, reason)

    def _seconds_until_not_found(self, watched: WatchedTask) -> float:
        """Return the seconds until the task counts as not found if it is rejected again, at least 1."""
        if watched.rejected_since is None or watched.not_found:
            return math.inf
        left = watched.rejected_since + self._unknown_task_seconds - self._clock()
        return max(left + _TIMER_RESOLUTION_SECONDS, _BACKOFF_SECONDS)

    def _note_rejection(self, watched: WatchedTask) -> None:
        now = self._clock()
        if watched.rejected_since is None:
            watched.rejected_since = now
        if now - watched.rejected_since >= self._unknown_task_seconds:
            watched.not_found = True  # the subscribers are notified when the rejection is published


def _wake(back_off: _BackOff) -> None:
    if not back_off.sleeper.done():
        back_off.sleeper.set_result(None)
