"""The messages between replicas, and the requests that wait for a message.

    S subject LF version revision age lifetime terminal    a snapshot was stored
    E subject                                              a lease ended without a snapshot
    Q subject                                              asks for a snapshot; the server has none
    T seconds                                              the upstream throttles; its Retry-After, or nothing

`subject` names the task: operation/task ID. Messages are untrusted input, like stored values.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from gateway.domain.task import Operation, TaskKey
from gateway.stores.valkey.codec import LONGEST_RETRY_SECONDS, InvalidStoredValue, StoredSnapshot

_ANNOUNCEMENT = re.compile(
    rb"([SEQ])([a-z_]+)/([A-Za-z0-9_-]{1,64})(?:\n(\d{1,16}) (\d{1,16}) (\d{1,16}) (\d{1,16}) ([01]))?"
)
_THROTTLED = re.compile(rb"T([0-9]{0,9})")


class Announcement(NamedTuple):
    """A message about a task. `stored` and `revision` describe the stored snapshot, if there is one."""

    kind: bytes
    key: TaskKey
    stored: StoredSnapshot | None
    revision: int


class Throttled(NamedTuple):
    """A message that the upstream throttles. `retry_after`: its Retry-After in seconds, if it sent one."""

    retry_after: float | None


def parse(message: bytes) -> Announcement | Throttled | None:
    """Return the content of a message; None for one that this version does not know."""
    throttled = _THROTTLED.fullmatch(message)
    if throttled is not None:
        return Throttled(min(float(throttled[1]), LONGEST_RETRY_SECONDS) if throttled[1] else None)
    match = _ANNOUNCEMENT.fullmatch(message)
    if match is None:
        return None
    kind, operation, task_id, *numbers = match.groups()
    try:
        key = TaskKey(Operation(operation.decode()), task_id.decode())
        if numbers[0] is None:
            return Announcement(kind, key, None, 0)
        version, revision, *facts = map(int, numbers)
        return Announcement(kind, key, StoredSnapshot.checked(version, *facts), revision)
    except (InvalidStoredValue, ValueError):  # for example an operation that only a later version knows
        return None


class Waiters:
    """The requests that wait for a message about their task: one per task."""

    def __init__(self) -> None:
        self._waiting: dict[TaskKey, asyncio.Future[None]] = {}

    def __contains__(self, key: TaskKey) -> bool:
        """Tell whether a request waits for a message about this task."""
        return key in self._waiting

    @contextmanager
    def message_about(self, key: TaskKey) -> Iterator[asyncio.Future[None]]:
        """Return a future that completes when the next message about a task arrives."""
        message = self._waiting[key] = asyncio.get_running_loop().create_future()
        try:
            yield message
        finally:
            if self._waiting.get(key) is message:
                del self._waiting[key]

    def wake(self, key: TaskKey) -> None:
        """Complete the future of a task, if there is one."""
        message = self._waiting.get(key)
        if message is not None and not message.done():
            message.set_result(None)

    def wake_all(self) -> None:
        """Complete all futures, because messages may have been missed, or no more will arrive."""
        for key in tuple(self._waiting):
            self.wake(key)
