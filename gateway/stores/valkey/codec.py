"""Snapshots and failures as bytes that another replica reads, of whatever version it is.

    stored: head LF snapshot        snapshot, failure: DIGEST SP header LF envelope

What is read may be anything: another version's, another task's, cut off, or written by hand to do harm. So it
is checked to the last byte, and nothing that a caller is sent is taken from it but the vendor's envelope:
body and tag are made anew from that, in the same way as when it came from upstream. The head has what
the server compares, in its own time; `scripts.py` writes it.
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
    GatewayError,
    RateLimiterExhausted,
    UpstreamCredentials,
    UpstreamDetail,
    UpstreamError,
    UpstreamOpen,
    UpstreamRejected,
)
from gateway.domain.snapshot import Snapshot, observe_again, render_json
from gateway.domain.task import TaskKey
from gateway.stores.valkey.clock_sync import MICROSECONDS

_DIGEST_BYTES = 12
_HEAD = re.compile(rb"sdg3 (\d{1,16}) (\d{1,16}) (\d{1,16}) (\d{1,16}) ([01])\n")
_LONGEST_LIFETIME = 2_592_000_000_000  # microseconds: what `cache` allows
_LONGEST_FAILURE_SECONDS = 2_592_000.0  # the same
_LONGEST_RETRY_SECONDS = 3600.0  # what `calls.py` believes of upstream
_LONGEST_TEXT = 500
_LONGEST_HEADER = 16_384
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class InvalidStoredValue(ValueError):
    """Bytes that no gateway of this version wrote for this task."""


class Head(NamedTuple):
    """What stands before a stored snapshot; times are the server's, in microseconds."""

    version: int
    fetched: int
    lifetime: int
    shown: int
    terminal: bool


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    """What stands before an envelope. `progress` is the mark below which a running task's never falls.

    `version` and `lifetime` are those of the head, which is not sealed.
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
    """Part a stored snapshot's head from its encoding. Raises: Undecodable."""
    head = _HEAD.match(value)
    if head is None:
        raise InvalidStoredValue("no head")
    version, fetched, lifetime, shown, terminal = map(int, head.groups())
    if lifetime > _LONGEST_LIFETIME:
        raise InvalidStoredValue("a lifetime beyond every setting")
    return Head(version, fetched, lifetime, shown, bool(terminal)), value[head.end() :]


def encode_snapshot(snapshot: Snapshot) -> bytes:
    """Encode what the head does not have: the envelope, and how far the task was before."""
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
    """Decode a snapshot of this very task. Raises: Undecodable."""
    header, envelope = _opened(encoded, _HEADER)
    if header.operation != key.operation or header.task != key.task_id:
        raise InvalidStoredValue("not this task's")
    if header.version != head.version or header.lifetime != head.lifetime:
        raise InvalidStoredValue("under another's head")
    try:
        snapshot = observe_again(
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
        raise InvalidStoredValue("contradicts itself")
    return snapshot


def encode_failure(key: TaskKey, error: GatewayError) -> bytes:
    """Encode an upstream's failure to answer for a task; of a rejection the envelope says it all."""
    detail = error.detail if isinstance(error, UpstreamError) else None
    envelope = error.envelope if isinstance(error, UpstreamRejected) else b""
    said = None if detail is None or envelope else {n: _plain(text) for n, text in asdict(detail).items()}
    header = {
        "operation": key.operation,
        "task": key.task_id,
        "kind": type(error).__name__,
        "message": str(error),
        "retry_after": error.retry_after,
        "detail": said,
    }
    return _sealed(header, envelope)


def decode_failure(encoded: bytes, key: TaskKey) -> UpstreamError:
    """Decode a failure of this very task. Raises: Undecodable."""
    header, envelope = _opened(encoded, _FAILURE)
    kind = _KINDS.get(header.kind)
    if header.operation != key.operation or header.task != key.task_id or kind is None:
        raise InvalidStoredValue("not this task's")
    if kind is UpstreamRejected:
        try:
            return read_rejection(envelope)
        except GatewayError as exc:
            raise InvalidStoredValue("not a rejected envelope") from exc
    detail = header.detail
    texts = [header.message, *(text for text in (detail or {}).values() if text is not None)]
    if envelope or any(len(text) > _LONGEST_TEXT or _CONTROL.search(text) for text in texts):
        raise InvalidStoredValue("not what an upstream's failure says")
    if detail is not None and detail.keys() != _DETAILS:
        raise InvalidStoredValue("not what an upstream's failure says")
    if header.retry_after is not None and not 0 <= header.retry_after <= _LONGEST_RETRY_SECONDS:
        raise InvalidStoredValue("a time beyond every setting")
    return kind(
        header.message,
        detail=None if detail is None else UpstreamDetail(**detail),
        retry_after=header.retry_after,
    )


def failure_seconds(milliseconds: bytes | int) -> float:
    """Return for how long a failure is remembered. Raises: Undecodable."""
    if isinstance(milliseconds, bytes):
        milliseconds = int(milliseconds) if re.fullmatch(rb"\d{1,12}", milliseconds) else -1
    seconds = milliseconds / 1000
    if not 0 <= seconds <= _LONGEST_FAILURE_SECONDS:
        raise InvalidStoredValue("a time beyond every setting")
    return seconds


def _sealed(header: dict[str, Any], envelope: bytes) -> bytes:
    content = b"%b\n%b" % (render_json(header), envelope)
    return b"%b %b" % (_digest(content), content)


def _opened(encoded: bytes, shape: msgspec.json.Decoder[Any]) -> tuple[Any, bytes]:
    digest, _, content = encoded.partition(b" ")
    if digest != _digest(content):
        raise InvalidStoredValue("damaged")
    header, _, envelope = content.partition(b"\n")
    if len(header) > _LONGEST_HEADER:
        raise InvalidStoredValue("a header beyond every size")
    try:
        return shape.decode(header), envelope
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidStoredValue("not a header") from exc


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).hexdigest().encode()


def _plain(text: str | None) -> str | None:
    return None if text is None else _CONTROL.sub(" ", text)[:_LONGEST_TEXT]


def _kinds(kind: type[UpstreamError]) -> Iterator[type[UpstreamError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _kinds(child)


# What is never shared is no value: our own limits, an open circuit, and refused credentials (`service.py`).
_NEVER_SHARED = (UpstreamCredentials, RateLimiterExhausted, UpstreamOpen)
_KINDS = {kind.__name__: kind for kind in _kinds(UpstreamError) if not issubclass(kind, _NEVER_SHARED)}
_DETAILS = {field.name for field in fields(UpstreamDetail)}
_HEADER = msgspec.json.Decoder(_Header)
_FAILURE = msgspec.json.Decoder(_Failure)
