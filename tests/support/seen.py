"""Builds snapshots from responses of the upstream."""

import json
import time
from typing import Any

from gateway.domain.entity_tag import EntityTags
from gateway.domain.envelope import read_envelope
from gateway.domain.snapshot import Snapshot, build_snapshot
from gateway.domain.task import Status, TaskKey

TAGS = EntityTags(lambda: "secret key")


def answered(key: TaskKey, status: str = "running", **data: Any) -> bytes:
    """Return the envelope of a successful response."""
    data = {"taskId": key.task_id, "status": status, "progress": 0.5} | data
    return json.dumps({"status": 10, "apiInvokeId": "i_1", "data": data}).encode()


def seen(
    key: TaskKey,
    status: str = "running",
    *,
    at: float | None = None,
    lifetime: float = 2.0,
    version: int = 1,
    previous: Snapshot | None = None,
    tags: EntityTags = TAGS,
    **data: Any,
) -> Snapshot:
    """Return the snapshot of a response with this data, fetched at `at` or now, after `previous`."""
    envelope = answered(key, status, **data)
    return build_snapshot(
        read_envelope(envelope, key, redact=str).data,
        envelope,
        key,
        fetched_at=time.monotonic() if at is None else at,
        lifetimes=dict.fromkeys([None, *Status], lifetime),
        previous=previous,
        tags=tags,
        version=version,
    )


def said(snapshot: Snapshot | None) -> str | None:
    """Return the message in the envelope of a snapshot."""
    assert snapshot is not None
    message: str | None = json.loads(snapshot.envelope)["data"].get("message")
    return message
