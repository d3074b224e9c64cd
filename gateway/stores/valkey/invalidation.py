"""What is stored and published: from the server's bytes to a copy, and to whoever waits for it."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

from gateway.domain.task import Operation, TaskKey
from gateway.stores.memory import MemoryStore
from gateway.stores.valkey.clock_sync import MICROSECONDS, ServerClock
from gateway.stores.valkey.codec import (
    InvalidStoredValue,
    decode_failure,
    decode_snapshot,
    failure_seconds,
    split_stored,
)
from gateway.stores.valkey.local_cache import LocalCache
from gateway.stores.valkey.subscription import NEWS_SECONDS
from gateway.telemetry.log_sampling import LogSampler
from gateway.telemetry.metrics import Metrics

_SUBJECT = re.compile(rb"([SFR])([a-z_]+)/([A-Za-z0-9_-]{1,64})\n")
_SLOWED = re.compile(rb"T([0-9]{0,9})")
_LONGEST_SLOWED_SECONDS = 3600.0  # what `calls.py` believes of upstream itself
_FUTURE = 3600 * MICROSECONDS  # what is from further ahead is no snapshot for the scripts either

log = structlog.get_logger(__name__)


class InvalidationMessages:
    """Takes up what comes of the tasks that are held here or waited for.

    `server` returns the clock of the server that has a task. `on_throttled` is told of an upstream that has
    slowed a replica down, and for how many seconds, if it said so.
    """

    def __init__(
        self,
        local_cache: LocalCache,
        *,
        memory: MemoryStore,
        metrics: Metrics,
        server: Callable[[TaskKey], ServerClock],
        on_throttled: Callable[[float | None], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._local_cache = local_cache
        self._memory = memory
        self._metrics = metrics
        self._server = server
        self._on_slowed = on_throttled
        self._clock = clock
        self._log_sampler = LogSampler(clock=clock)
        self._waiting: dict[TaskKey, asyncio.Future[None]] = {}

    @contextmanager
    def awaited(self, key: TaskKey) -> Iterator[asyncio.Future[None]]:
        """Give a future that is done as soon as there is news of a task; it has one flight at a time."""
        awaited = self._waiting[key] = asyncio.get_running_loop().create_future()
        try:
            yield awaited
        finally:
            del self._waiting[key]

    def wake_all(self) -> None:
        """Let nobody wait any more: no news will come."""
        for key in list(self._waiting):
            self._wake(key)

    def take_up(self, key: TaskKey, value: bytes) -> None:
        """Take up a stored snapshot. Raises: Undecodable."""
        head, encoded = split_stored(value)
        server, now = self._server(key), self._clock()
        if max(head.version, head.fetched, head.shown) > server.servers(now) + _FUTURE:
            raise InvalidStoredValue("from the future")
        # Never from our future: there it would be fresh for longer than its lifetime.
        snapshot = decode_snapshot(encoded, key, head, fetched_at=min(server.ours(head.fetched), now))
        self._local_cache.take_up(snapshot, shown_at=self.shown_at(key, head.shown))

    def shown_at(self, key: TaskKey, moment: int) -> float:
        """Return when a snapshot is shown here, by the server's moment; never later than news may be."""
        return min(self._server(key).ours(moment), self._clock() + NEWS_SECONDS)

    def receive(self, message: bytes) -> None:
        """Take up what a replica, perhaps this one, has published."""
        subject = _SUBJECT.match(message)
        if subject is None:
            if (throttled_now := _SLOWED.fullmatch(message)) is not None:
                self._on_slowed(
                    min(float(throttled_now[1]), _LONGEST_SLOWED_SECONDS) if throttled_now[1] else None
                )
            return  # else a probe, or nothing of ours
        try:
            key = TaskKey(Operation(subject[2].decode()), subject[3].decode())
        except ValueError:  # an operation of a later version
            return
        if key not in self._waiting and self._local_cache.latest(key) is None:
            return
        rest = message[subject.end() :]
        try:
            if subject[1] == b"S":
                self.take_up(key, rest)
            elif subject[1] == b"F":
                milliseconds, _, encoded = rest.partition(b"\n")
                failure, seconds = decode_failure(encoded, key), failure_seconds(milliseconds)
                self._memory.keep_failure(key, failure, seconds=seconds)
        except InvalidStoredValue as exc:
            self.note_senseless(exc)
        self._wake(key)

    def note_senseless(self, why: InvalidStoredValue) -> None:
        """Count a value that is as good as none, and tell of it."""
        self._metrics.store_errors.labels("read").inc()
        if (suppressed := self._log_sampler.take("read")) is not None:
            log.warning("senseless value in the store", reason=str(why), suppressed=suppressed)

    def _wake(self, key: TaskKey) -> None:
        awaited = self._waiting.get(key)
        if awaited is not None and not awaited.done():
            awaited.set_result(None)
