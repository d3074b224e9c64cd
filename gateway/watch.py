"""Watching: one schedule per watched task, however many watch it.

    first watcher -> schedule: get_fresh, sleep for the snapshot's lifetime, again
    a failure -> back off, until a stored change tells that upstream answers
    a stored change, whoever fetched it -> wait -> publish -> straight to those who keep up,
                                                           -> else the slot -> its stream or long poll
    last watcher gone, or the task has ended -> the schedule ends

A slot holds the newest update of each task and no backlog: a reader that is slow skips what it missed. The
bodies are the store's, which counts them. Schedules and slots hold notes (`watchers.py`). A body is looked up
when it is written. If it has made room, it is asked for again.

A change waits to be told until the event loop's next turns, each of which tells a few. Those of schedules
that woke together come together, too: so all their answers are read first, with what that takes in the
processor's caches, and callers who ask meanwhile are answered in between.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum

import structlog

from gateway.alarms import Alarms
from gateway.exceptions import GatewayError, Overloaded
from gateway.metrics import Metrics
from gateway.models import Snapshot, TaskKey
from gateway.readings import Failed
from gateway.sampling import Sampler
from gateway.service import ProgressService
from gateway.settings import Watch as WatchSettings
from gateway.stores import Store
from gateway.watchers import Update, Watcher

_LEAST_SECONDS = 0.2  # between two ticks, whatever the lifetimes say
# The loop's clock counts in milliseconds and may wake a sleeper that much early: a tick that finds
# its snapshot still fresh would bring nothing, and the next one would come late.
_TIMER_SECONDS = 0.002
_LATE_SHARE = 0.05  # of a pause between two ticks, for schedules to wake together
_BACKLOG_TURNS = 8  # of the event loop, in which about two thirds of the changes that wait are told
_BACKOFF_SECONDS = 1.0  # after a failure; doubled up to
_LONGEST_BACKOFF_SECONDS = 30.0  # whatever upstream wishes: a stream is to notice that it is back
_BUG = GatewayError("the gateway has a bug; its log says more")

log = structlog.get_logger(__name__)


class Kind(StrEnum):
    """The two ways to watch."""

    EVENTS = "events"
    LONGPOLL = "longpoll"


@dataclass(slots=True, eq=False)
class _Schedule:
    """A watched task: who watches it, the note of what they were told last, and the task that ticks.

    `untold` came when that was too old to be shown, or would be told it now that its body has made room.
    `pending`: stored, and to be told in a moment.
    `asking`: the tick waits for an answer. `backing_off`: it rests after a failure.
    """

    watchers: set[Watcher] = field(default_factory=set)
    untold: set[Watcher] = field(default_factory=set)
    latest: Update | None = None
    pending: Snapshot | None = None
    ticking: asyncio.Task[None] | None = None
    asking: bool = False
    backing_off: bool = False


# Hands an update to those whom it can tell at once, and returns the others.
Deliver = Callable[[Update, Collection[Watcher]], Iterable[Watcher]]


class Watch:
    """Holds every watcher and every schedule. `clock` is the snapshots' clock.

    `deliver` goes before the slots; until somebody sets another it tells nobody.
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
        self._recall = store.recall
        self._clock = clock
        self._schedules: dict[TaskKey, _Schedule] = {}
        self._watchers: set[Watcher] = set()
        self._alarms = Alarms()
        self._to_tell: deque[TaskKey] = deque()  # whose changes wait
        self._ended: set[asyncio.Task[None]] = set()
        self._leaving = False
        self._sampler = Sampler()
        self.deliver: Deliver = lambda _, watchers: watchers
        self._gauges = {kind: metrics.watchers.labels(kind) for kind in Kind}
        metrics.watched_tasks.set_function(self._schedules.__len__)
        store.on_change(self._note_change)

    @contextmanager
    def watching(self, keys: Sequence[TaskKey], kind: Kind, *, client: bytes = b"") -> Iterator[Watcher]:
        """Watch these tasks while the context is open; the first updates are what is known now.

        `client` tells on whose behalf schedules ask. Raises: Overloaded at `watch.max_watchers`.
        """
        if len(self._watchers) >= self._settings.max_watchers:
            raise Overloaded("the gateway has as many watchers as it may", retry_after=5.0)
        watcher = Watcher(keys, client, find=self._find, ask=self._ask_again)
        watcher.leaving = self._leaving
        if self._leaving:
            watcher.ring()
        self._watchers.add(watcher)
        self._gauges[kind].inc()
        try:
            for key in keys:
                self._join(key, watcher)
            yield watcher
        finally:
            for key in keys:
                self._leave(key, watcher)
            self._watchers.discard(watcher)
            self._gauges[kind].dec()

    def say_farewell(self) -> None:
        """Tell every watcher, and every one still to come, that the gateway is leaving."""
        self._leaving = True
        for key in tuple(self._schedules):
            self._tell(key)
        for watcher in self._watchers:
            watcher.leaving = True
            watcher.ring()

    async def aclose(self) -> None:
        """End every schedule, and wait until all have ended."""
        for schedule in self._schedules.values():
            self._stop(schedule)
        await asyncio.gather(*self._ended, return_exceptions=True)

    def _join(self, key: TaskKey, watcher: Watcher) -> None:
        schedule = self._schedules.get(key)
        if schedule is None:
            schedule = self._schedules[key] = _Schedule()
            # Known already, maybe: then the watcher is told at once, before the first tick.
            reading = self._service.current(key)
            schedule.latest = Update(key, reading.snapshot).note() if reading is not None else None
            self._start(key, schedule)
        # Looked for first, for what is due in the store arrives with that; then told to the others: whoever
        # joins may have read it elsewhere, and is to hear of nothing older.
        current = self._service.current(key)
        self._tell(key)
        # Registered first, told second: a change between the two would be lost the other way round.
        schedule.watchers.add(watcher)
        self._service.join(key, watcher.client)
        latest = schedule.latest
        if latest is None:
            return  # the first tick is under way
        if current is not None or latest.snapshot is None or _is_final(latest):
            known = latest if current is None else Update(key, current.snapshot)
            watcher.offer(known if known.says_the_same(latest) else latest, latest)
            return
        # Upstream takes its time, or fails and the schedule has backed off for longer than a snapshot may
        # cover that. Whoever comes now gets what a query would: the answer of one call, all together.
        schedule.untold.add(watcher)
        self._restart(key, schedule)

    def _leave(self, key: TaskKey, watcher: Watcher) -> None:
        schedule = self._schedules.get(key)
        if schedule is None or watcher not in schedule.watchers:
            return
        schedule.watchers.discard(watcher)
        schedule.untold.discard(watcher)
        self._service.leave(key, watcher.client)
        if not schedule.watchers:
            del self._schedules[key]
            self._stop(schedule)

    def _start(self, key: TaskKey, schedule: _Schedule) -> None:
        schedule.ticking = asyncio.create_task(self._tick(key, schedule))

    def _restart(self, key: TaskKey, schedule: _Schedule) -> None:
        self._stop(schedule)
        self._start(key, schedule)

    def _stop(self, schedule: _Schedule) -> None:
        if schedule.ticking is not None:
            schedule.ticking.cancel()
            self._ended.add(schedule.ticking)
            schedule.ticking.add_done_callback(self._ended.discard)
            schedule.ticking = None  # a cancelled task holds its frames, and they the schedule
            schedule.asking = schedule.backing_off = False

    async def _tick(self, key: TaskKey, schedule: _Schedule) -> None:
        """Keep a watched task's snapshot fresh until it has ended; being cancelled is the normal end."""
        backoff = _BACKOFF_SECONDS
        company = 1
        while True:
            schedule.asking = True
            snapshot, failure = await self._ask(key, schedule)
            schedule.asking = False
            if snapshot is not None and snapshot.terminal:
                return
            fine = snapshot is not None and failure is None
            if snapshot is not None and failure is None:
                left = snapshot.lifetime - (self._clock() - snapshot.fetched_at)
                pause = max(left + _TIMER_SECONDS, _LEAST_SECONDS)
            else:
                pause = max(backoff, (failure or _BUG).retry_after or 0.0)
            del snapshot, failure  # a pause holds no bodies
            if fine:
                backoff = _BACKOFF_SECONDS
                company = await self._alarms.sleep(pause, late=_LATE_SHARE * pause, company=company)
            else:
                backoff = min(2 * backoff, _LONGEST_BACKOFF_SECONDS)
                schedule.backing_off = True
                await asyncio.sleep(min(pause, _LONGEST_BACKOFF_SECONDS))
                schedule.backing_off = False

    async def _ask(self, key: TaskKey, schedule: _Schedule) -> tuple[Snapshot | None, GatewayError | None]:
        """Ask once, and tell the watchers; return the snapshot, and the failure that it covers or meets.

        A bug is a failure like another: one that ended the schedule would leave its watchers without a word.
        """
        try:
            outcome = await self._service.get_fresh(key, client=None)
            if isinstance(outcome, Failed):
                self._tell(key)  # what came before it
                self._publish(Update(key, failure=outcome.failure))
                return None, outcome.failure
            if outcome.snapshot is not schedule.pending:  # else it waits to be told
                self._tell(key)
                self._publish(Update(key, outcome.snapshot))
        except Exception as exc:
            if (suppressed := self._sampler.take(type(exc).__name__)) is not None:
                log.exception(
                    "bug in a schedule", operation=key.operation, task_id=key.task_id, suppressed=suppressed
                )
            with suppress(Exception):  # what failed may have been the publishing
                self._publish(Update(key, failure=_BUG))
            return None, _BUG
        return outcome.snapshot, outcome.failure

    def _note_change(self, snapshot: Snapshot) -> None:
        schedule = self._schedules.get(snapshot.key)
        if schedule is None:
            return
        if schedule.pending is None:
            if not self._to_tell:
                asyncio.get_running_loop().call_soon(self._tell_some)
            self._to_tell.append(snapshot.key)
        elif schedule.pending.terminal and not snapshot.terminal:
            return
        schedule.pending = snapshot

    def _tell_some(self) -> None:
        """Tell a few of the changes that wait, one at least; the more wait, the more."""
        try:
            for _ in range(1 + len(self._to_tell) // _BACKLOG_TURNS):
                self._tell(self._to_tell.popleft())
        finally:
            if self._to_tell:
                asyncio.get_running_loop().call_soon(self._tell_some)

    def _tell(self, key: TaskKey) -> None:
        """Tell the change of a task that waits to be told, if there is one."""
        schedule = self._schedules.get(key)
        if schedule is None or schedule.pending is None:
            return
        snapshot, schedule.pending = schedule.pending, None
        self._publish(Update(key, snapshot))
        if schedule.backing_off:
            self._restart(key, schedule)  # a query, or another replica, got an answer

    def _publish(self, update: Update) -> None:
        schedule = self._schedules.get(update.key)
        if schedule is None or (_is_final(schedule.latest) and not _is_final(update)):
            return  # a store forgets, and might let a task run again whose schedule has ended
        audience = schedule.untold if update.says_the_same(schedule.latest) else schedule.watchers
        schedule.latest = note = update.note()
        for watcher in self.deliver(update, audience):
            watcher.offer(update, note)
        schedule.untold.clear()

    def _find(self, note: Update, watcher: Watcher) -> Update | None:
        """Return what a note is of, as new as it is now; None: the store has let it go."""
        snapshot = self._recall(note.key)
        self._tell(note.key)  # as in `_join`; it may be in the watcher's slot then
        if watcher.is_offered(note.key) or snapshot is None or (_is_final(note) and not snapshot.terminal):
            return None
        return Update(note.key, snapshot)

    def _ask_again(self, key: TaskKey, watcher: Watcher) -> None:
        """Ask at once for what the store has let go, and tell this watcher."""
        schedule = self._schedules.get(key)
        if schedule is None or watcher not in schedule.watchers:
            return
        schedule.untold.add(watcher)
        if not schedule.asking and not schedule.backing_off:
            self._restart(key, schedule)


def _is_final(update: Update | None) -> bool:
    return update is not None and update.snapshot is not None and update.snapshot.terminal
