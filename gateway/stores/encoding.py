"""Snapshots and failures as bytes that another replica reads, of whatever version it is.

    stored: head LF snapshot        snapshot: JSON header LF envelope body        failure: JSON

What is read may be anything: another version's, another task's, cut off, or garbage that
somebody wrote by hand. It is checked to the last byte, and refused rather than guessed at. The head has what
the server compares, in its own time; `scripts.py` writes it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

from gateway.exceptions import GatewayError, UpstreamDetail, UpstreamError, UpstreamRejected
from gateway.models import Operation, Snapshot, Status, TaskKey, render_json

_DIGEST_BYTES = 12
_HEAD = re.compile(rb"sdg2 (\d{1,16}) (\d{1,16}) \d{1,16} (\d{1,16}) [01]\n")


class Undecodable(ValueError):
    """Bytes that no gateway of this version wrote for this task."""


class Head(NamedTuple):
    """What stands before a stored snapshot; the moments are the server's, in microseconds."""

    stamp: int
    fetched: int
    shown: int


def split_stored(value: bytes) -> tuple[Head, bytes]:
    """Part a stored snapshot's head from its encoding. Raises: Undecodable."""
    head = _HEAD.match(value)
    if head is None:
        raise Undecodable("no head")
    return Head(*map(int, head.groups())), value[head.end() :]


def encode_snapshot(snapshot: Snapshot) -> bytes:
    """Encode all but the moment of fetching and the stamp."""
    header = {
        "operation": snapshot.key.operation,
        "taskId": snapshot.key.task_id,
        "lifetime": snapshot.lifetime,
        "status": snapshot.status,
        "progress": snapshot.progress,
        "eta": snapshot.eta_seconds,
        "etag": snapshot.etag,
        "envelope": len(snapshot.envelope),
        "digest": _digest(snapshot.envelope + snapshot.body),
    }
    return b"%b\n%b%b" % (render_json(header), snapshot.envelope, snapshot.body)


def decode_snapshot(encoded: bytes, key: TaskKey, *, fetched_at: float, stamp: int) -> Snapshot:
    """Decode a snapshot of this very task. Raises: Undecodable."""
    head, _, content = encoded.partition(b"\n")
    try:
        header = json.loads(head)
        about = TaskKey(Operation(header["operation"]), header["taskId"])
        if about != key or header["digest"] != _digest(content):
            raise Undecodable("not this task's, or damaged")
        status = header["status"]
        snapshot = Snapshot(
            key,
            fetched_at,
            float(header["lifetime"]),
            content[: int(header["envelope"])],
            None if status is None else Status(status),
            _number(header["progress"]),
            _number(header["eta"]),
            content[int(header["envelope"]) :],
            str(header["etag"]),
            stamp,
        )
    except (ValueError, TypeError, LookupError, RecursionError) as exc:
        raise Undecodable("not a snapshot") from exc
    return snapshot


def encode_failure(key: TaskKey, error: GatewayError) -> bytes:
    """Encode an upstream's failure to answer for a task."""
    detail = error.detail if isinstance(error, UpstreamError) else None
    envelope = error.envelope if isinstance(error, UpstreamRejected) else b""
    return render_json(
        {
            "operation": key.operation,
            "taskId": key.task_id,
            "kind": type(error).__name__,
            "message": str(error),
            "retryAfter": error.retry_after,
            "detail": None if detail is None else asdict(detail),
            # Bytes as they came, and in whatever encoding: Latin-1 keeps each of them.
            "envelope": envelope.decode("latin-1"),
        }
    )


def decode_failure(encoded: bytes, key: TaskKey) -> GatewayError:
    """Decode a failure of this very task. Raises: Undecodable."""
    try:
        value = json.loads(encoded)
        if (value["operation"], value["taskId"]) != key:
            raise Undecodable("not this task's")
        kind = _KINDS[value["kind"]]
        message = str(value["message"])
        detail = None if value["detail"] is None else UpstreamDetail(**value["detail"])
        if issubclass(kind, UpstreamRejected):
            return kind(
                message, envelope=value["envelope"].encode("latin-1"), detail=detail or UpstreamDetail()
            )
        return kind(message, detail=detail, retry_after=_number(value["retryAfter"]))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as exc:
        raise Undecodable("not a failure") from exc


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).hexdigest()


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _kinds(kind: type[UpstreamError]) -> Iterator[type[UpstreamError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _kinds(child)


_KINDS = {kind.__name__: kind for kind in _kinds(UpstreamError)}
