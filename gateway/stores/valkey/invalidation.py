"""Applies stored and published values to the local cache, and wakes the requests that wait for them."""

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
_THROTTLED = re.compile(rb"T([0-9]{0,9})")
_LONGEST_THROTTLED_SECONDS = 3600.0  # the maximum that `signed_request.py` accepts from the upstream
_FUTURE = 3600 * MICROSECONDS  # the scripts, too, ignore snapshots from further in the future

log = structlog.get_logger(__name__)


class InvalidationMessages:
    """Applies messages about tasks that are in the local cache or awaited.

    `server` returns the clock of a task's server. `on_throttled` is called when the upstream throttles a
    replica, with the seconds of Retry-After, if known.
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
        self._on_throttled = on_throttled
        self._clock = clock
        self._log_sampler = LogSampler(clock=clock)
        self._waiting: dict[TaskKey, asyncio.Future[None]] = {}

    @contextmanager
    def awaited(self, key: TaskKey) -> Iterator[asyncio.Future[None]]:
        """Return a future that completes with the next message about a task. One per task at a time."""
        awaited = self._waiting[key] = asyncio.get_running_loop().create_future()
        try:
            yield awaited
        finally:
            del self._waiting[key]

    def wake_all(self) -> None:
        """Complete all futures: no more messages will arrive."""
        for key in list(self._waiting):
            self._wake(key)

    def apply(self, key: TaskKey, value: bytes) -> None:
        """Apply a stored snapshot. Raises: InvalidStoredValue."""
        head, encoded = split_stored(value)
        server, now = self._server(key), self._clock()
        if max(head.version, head.fetched, head.shown) > server.servers(now) + _FUTURE:
            raise InvalidStoredValue("time in the future")
        # Not in the local future: the snapshot would be fresh for longer than its lifetime.
        snapshot = decode_snapshot(encoded, key, head, fetched_at=min(server.ours(head.fetched), now))
        self._local_cache.apply(snapshot, shown_at=self.shown_at(key, head.shown))

    def shown_at(self, key: TaskKey, moment: int) -> float:
        """Convert the server time of activation to a local time, at most `NEWS_SECONDS` from now."""
        return min(self._server(key).ours(moment), self._clock() + NEWS_SECONDS)

    def receive(self, message: bytes) -> None:
        """Apply a message that a replica, possibly this one, has published."""
        subject = _SUBJECT.match(message)
        if subject is None:
            if (throttled := _THROTTLED.fullmatch(message)) is not None:
                self._on_throttled(
                    min(float(throttled[1]), _LONGEST_THROTTLED_SECONDS) if throttled[1] else None
                )
            return  # otherwise a probe, or a foreign message
        try:
            key = TaskKey(Operation(subject[2].decode()), subject[3].decode())
        except ValueError:  # an operation that only a later version knows
            return
        if key not in self._waiting and self._local_cache.latest(key) is None:
            return
        rest = message[subject.end() :]
        try:
            if subject[1] == b"S":
                self.apply(key, rest)
            elif subject[1] == b"F":
                milliseconds, _, encoded = rest.partition(b"\n")
                failure, seconds = decode_failure(encoded, key), failure_seconds(milliseconds)
                self._memory.keep_failure(key, failure, seconds=seconds)
        except InvalidStoredValue as exc:
            self.record_invalid(exc)
        self._wake(key)

    def record_invalid(self, reason: InvalidStoredValue) -> None:
        """Count and log a value that is treated as missing."""
        self._metrics.store_errors.labels("read").inc()
        if (suppressed := self._log_sampler.take("read")) is not None:
            log.warning("invalid_stored_value", reason=str(reason), suppressed=suppressed)

    def _wake(self, key: TaskKey) -> None:
        awaited = self._waiting.get(key)
        if awaited is not None and not awaited.done():
            awaited.set_result(None)
