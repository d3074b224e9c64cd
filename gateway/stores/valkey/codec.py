"""Encodes snapshots and failures for other replicas, possibly of other versions of the gateway.

    stored value: head LF snapshot        snapshot, failure: DIGEST SP header LF envelope

Stored values are untrusted input: they may come from another version, belong to another task, be truncated,
or be forged. Every byte is checked. Only the vendor's envelope reaches clients: body and ETag are rendered
from it again, as for a response from the upstream. The head has the fields that the scripts compare, with
times of the server's clock; `commit.lua` writes it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any, NamedTuple

import msgspec

from gateway.domain.envelope import read_envelope, read_rejection
from gateway.domain.errors import (
    CircuitOpen,
    CredentialsRefused,
    GatewayError,
    RateLimiterExhausted,
    UpstreamDetail,
    UpstreamError,
    UpstreamRejected,
)
from gateway.domain.snapshot import Snapshot, render_json, restore_snapshot
from gateway.domain.task import TaskKey
from gateway.stores.valkey.clock_sync import MICROSECONDS

_DIGEST_BYTES = 12
_HEAD = re.compile(rb"sdg3 (\d{1,16}) (\d{1,16}) (\d{1,16}) (\d{1,16}) ([01])\n")
_LONGEST_LIFETIME = 2_592_000_000_000  # microseconds: the maximum of the `cache` settings
_LONGEST_FAILURE_SECONDS = 2_592_000.0  # the same maximum
_LONGEST_RETRY_SECONDS = 3600.0  # the maximum that `signed_request.py` accepts from the upstream
_LONGEST_TEXT = 500
_LONGEST_HEADER = 16_384
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class InvalidStoredValue(ValueError):
    """A value that no gateway of this version wrote for this task."""


class Head(NamedTuple):
    """The head of a stored snapshot; times of the server's clock, in microseconds."""

    version: int
    fetched: int
    lifetime: int
    shown: int
    terminal: bool


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    """The header of a snapshot's envelope. `progress` is the minimum for later snapshots of a running task.

    `version` and `lifetime` repeat the head, which the digest does not cover.
    """

    operation: str
    task: str
    progress: float | None
    version: int
    lifetime: int


class _Failure(msgspec.Struct, forbid_unknown_fields=True):
    operation: str
    task: str
    kind: str
    message: str
    retry_after: float | None
    detail: dict[str, str | None] | None


def split_stored(value: bytes) -> tuple[Head, bytes]:
    """Split a stored snapshot into head and encoding. Raises: InvalidStoredValue."""
    head = _HEAD.match(value)
    if head is None:
        raise InvalidStoredValue("no head")
    version, fetched, lifetime, shown, terminal = map(int, head.groups())
    if lifetime > _LONGEST_LIFETIME:
        raise InvalidStoredValue("lifetime out of range")
    return Head(version, fetched, lifetime, shown, bool(terminal)), value[head.end() :]


def encode_snapshot(snapshot: Snapshot) -> bytes:
    """Encode the envelope and the progress; the head has the rest."""
    header = {
        "operation": snapshot.key.operation,
        "task": snapshot.key.task_id,
        "progress": snapshot.progress,
        "version": snapshot.version,
        "lifetime": lifetime_of(snapshot),
    }
    return _sealed(header, snapshot.envelope)


def lifetime_of(snapshot: Snapshot) -> int:
    """Return a snapshot's lifetime for the head, in microseconds."""
    return min(round(snapshot.lifetime * MICROSECONDS), _LONGEST_LIFETIME)


def decode_snapshot(encoded: bytes, key: TaskKey, head: Head, *, fetched_at: float) -> Snapshot:
    """Decode a snapshot of this task. Raises: InvalidStoredValue."""
    header, envelope = _unsealed(encoded, _HEADER)
    if header.operation != key.operation or header.task != key.task_id:
        raise InvalidStoredValue("value of another task")
    if header.version != head.version or header.lifetime != head.lifetime:
        raise InvalidStoredValue("head and header differ")
    try:
        snapshot = restore_snapshot(
            read_envelope(envelope, key, redact=str).data,
            envelope,
            key,
            progress=header.progress,
            fetched_at=fetched_at,
            lifetime=head.lifetime / MICROSECONDS,
            version=head.version,
        )
    except GatewayError as exc:
        raise InvalidStoredValue("not an envelope of this task") from exc
    if snapshot.terminal is not head.terminal or snapshot.progress != header.progress:
        raise InvalidStoredValue("contradictory fields")
    return snapshot


def encode_failure(key: TaskKey, error: GatewayError) -> bytes:
    """Encode an upstream failure for a task. For a rejection, the envelope is sufficient."""
    detail = error.detail if isinstance(error, UpstreamError) else None
    envelope = error.envelope if isinstance(error, UpstreamRejected) else b""
    texts = None if detail is None or envelope else {n: _plain(text) for n, text in asdict(detail).items()}
    header = {
        "operation": key.operation,
        "task": key.task_id,
        "kind": type(error).__name__,
        "message": str(error),
        "retry_after": error.retry_after,
        "detail": texts,
    }
    return _sealed(header, envelope)


def decode_failure(encoded: bytes, key: TaskKey) -> UpstreamError:
    """Decode a failure of this task. Raises: InvalidStoredValue."""
    header, envelope = _unsealed(encoded, _FAILURE)
    kind = _KINDS.get(header.kind)
    if header.operation != key.operation or header.task != key.task_id or kind is None:
        raise InvalidStoredValue("value of another task, or of an unknown kind")
    if kind is UpstreamRejected:
        try:
            return read_rejection(envelope)
        except GatewayError as exc:
            raise InvalidStoredValue("not a rejected envelope") from exc
    detail = header.detail
    texts = [header.message, *(text for text in (detail or {}).values() if text is not None)]
    if envelope or any(len(text) > _LONGEST_TEXT or _CONTROL.search(text) for text in texts):
        raise InvalidStoredValue("invalid texts of a failure")
    if detail is not None and detail.keys() != _DETAILS:
        raise InvalidStoredValue("invalid details of a failure")
    if header.retry_after is not None and not 0 <= header.retry_after <= _LONGEST_RETRY_SECONDS:
        raise InvalidStoredValue("retry_after out of range")
    return kind(
        header.message,
        detail=None if detail is None else UpstreamDetail(**detail),
        retry_after=header.retry_after,
    )


def failure_seconds(milliseconds: bytes | int) -> float:
    """Return how long a failure is cached, in seconds. Raises: InvalidStoredValue."""
    if isinstance(milliseconds, bytes):
        milliseconds = int(milliseconds) if re.fullmatch(rb"\d{1,12}", milliseconds) else -1
    seconds = milliseconds / 1000
    if not 0 <= seconds <= _LONGEST_FAILURE_SECONDS:
        raise InvalidStoredValue("lifetime of a failure out of range")
    return seconds


def _sealed(header: dict[str, Any], envelope: bytes) -> bytes:
    content = b"%b\n%b" % (render_json(header), envelope)
    return b"%b %b" % (_digest(content), content)


def _unsealed(encoded: bytes, decoder: msgspec.json.Decoder[Any]) -> tuple[Any, bytes]:
    digest, _, content = encoded.partition(b" ")
    if digest != _digest(content):
        raise InvalidStoredValue("wrong digest")
    header, _, envelope = content.partition(b"\n")
    if len(header) > _LONGEST_HEADER:
        raise InvalidStoredValue("header too large")
    try:
        return decoder.decode(header), envelope
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidStoredValue("invalid header") from exc


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).hexdigest().encode()


def _plain(text: str | None) -> str | None:
    return None if text is None else _CONTROL.sub(" ", text)[:_LONGEST_TEXT]


def _kinds(kind: type[UpstreamError]) -> Iterator[type[UpstreamError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _kinds(child)


# Failures of this replica are never shared: rate limits, an open circuit, refused credentials (`service.py`).
_NEVER_SHARED = (CredentialsRefused, RateLimiterExhausted, CircuitOpen)
_KINDS = {kind.__name__: kind for kind in _kinds(UpstreamError) if not issubclass(kind, _NEVER_SHARED)}
_DETAILS = {field.name for field in fields(UpstreamDetail)}
_HEADER = msgspec.json.Decoder(_Header)
_FAILURE = msgspec.json.Decoder(_Failure)
