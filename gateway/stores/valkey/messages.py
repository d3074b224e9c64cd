"""The messages between replicas.

    S task LF version revision age lifetime terminal    a snapshot was stored
    E task                                              a lease ended without a snapshot
    Q task                                              the server needs a snapshot of the task
    T seconds                                           the upstream throttles; its Retry-After, or nothing

A task is named `operation/task ID`. Messages are untrusted input, like stored values.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from gateway.domain.task import Operation, TaskKey
from gateway.stores.valkey.codec import LONGEST_RETRY_SECONDS, InvalidStoredValue, StoredMetadata

SNAPSHOT_STORED = b"S"
LEASE_ENDED = b"E"
SNAPSHOT_MISSING = b"Q"

_TASK_MESSAGE = re.compile(
    rb"([SEQ])([a-z_]+)/([A-Za-z0-9_-]{1,64})(?:\n(\d{1,16}) (\d{1,16}) (\d{1,16}) (\d{1,16}) ([01]))?"
)
_THROTTLING_MESSAGE = re.compile(rb"T([0-9]{0,9})")


class TaskMessage(NamedTuple):
    """A message about a task.

    `kind` is one of the constants of this module. `metadata` and `revision` describe the stored snapshot, if
    there is one; else they are None and 0.
    """

    kind: bytes
    key: TaskKey
    metadata: StoredMetadata | None
    revision: int


class ThrottlingMessage(NamedTuple):
    """A message that the upstream throttles. `retry_after`: its Retry-After in seconds, if it sent one."""

    retry_after: float | None


def parse_message(message: bytes) -> TaskMessage | ThrottlingMessage | None:
    """Return the content of a message; None if this version does not know such a message."""
    throttling = _THROTTLING_MESSAGE.fullmatch(message)
    if throttling is not None:
        return ThrottlingMessage(min(float(throttling[1]), LONGEST_RETRY_SECONDS) if throttling[1] else None)
    match = _TASK_MESSAGE.fullmatch(message)
    if match is None:
        return None
    kind, operation, task_id, *numbers = match.groups()
    try:
        key = TaskKey(Operation(operation.decode()), task_id.decode())
        if numbers[0] is None:
            return TaskMessage(kind, key, None, 0)
        version, revision, *metadata = map(int, numbers)
        return TaskMessage(kind, key, StoredMetadata.checked(version, *metadata), revision)
    except (InvalidStoredValue, ValueError):  # for example an operation that only a later version knows
        return None
