"""Encodes snapshots and failures for other replicas, possibly of other versions of the gateway.

    snapshot, failure: DIGEST SP header LF envelope

Stored values are untrusted input: they may come from another version, belong to another task, be truncated,
or be forged. Every byte is checked. Only the vendor's envelope reaches clients: body and entity tag are
rendered from it again, as for a response from the upstream. The scripts compare the numbers of
`StoredMetadata`, which are stored in fields of their own beside the encoded value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from gateway.domain.entity_tag import EntityTags
from gateway.domain.envelope import read_envelope, read_rejection
from gateway.domain.errors import (
    GENERIC_TEXT,
    GatewayError,
    UpstreamBusy,
    UpstreamError,
    UpstreamForbidden,
    UpstreamInvalid,
    UpstreamRejected,
    UpstreamThrottled,
)
from gateway.domain.snapshot import Snapshot, render_json, restore_snapshot, version_now
from gateway.domain.task import Status, TaskKey

MICROS_PER_SECOND = 1_000_000
LONGEST_RETRY_SECONDS = 3600.0  # the maximum that `upstream/header_values.py` returns

_DIGEST_BYTES = 12
_MAX_EXACT = 2**53  # the scripts compute with doubles, which are exact below this number
_MAX_CLOCK_LEAD = 86_400 * MICROS_PER_SECOND  # by how much the clock of another replica may be ahead
_LONGEST_LIFETIME = 2_592_000_000_000  # in microseconds: the maximum of the `cache` settings
_MAX_HEADER_BYTES = 16_384

# Failures that other replicas would have, too. `UpstreamRejected` is also shared, with its envelope. Others
# may concern only this replica: no connection, a timeout, its limits.
_SHARED_FAILURES: dict[str, type[UpstreamError]] = {
    failure.__name__: failure
    for failure in (UpstreamBusy, UpstreamForbidden, UpstreamInvalid, UpstreamThrottled)
}


class InvalidStoredValue(ValueError):
    """A value that no gateway of this version wrote for this task."""


class StoredMetadata(NamedTuple):
    """What the scripts know about a stored snapshot, without its value; age and lifetime in microseconds.

    `age` is negative if the server's clock was set back after the snapshot was fetched.
    """

    version: int
    age: int
    lifetime: int
    terminal: int

    @classmethod
    def checked(cls, *metadata: Any) -> StoredMetadata:
        """Return the metadata of a reply or message, with all ranges checked. Raises: InvalidStoredValue."""
        if [type(each) for each in metadata] != [int] * 4:
            raise InvalidStoredValue("not four numbers")
        checked = cls(*metadata)
        in_range = (
            0 <= checked.version < version_now() + _MAX_CLOCK_LEAD
            and -_MAX_EXACT < checked.age < _MAX_EXACT
            and checked.terminal in (0, 1)
        )
        if not in_range or not 0 <= checked.lifetime <= _LONGEST_LIFETIME:
            raise InvalidStoredValue("number out of range")
        return checked

    def fetched_at(self, now: float) -> float:
        """Return when the snapshot was fetched, on the clock of `now`; stale if the age is negative."""
        return now - (self.age if self.age >= 0 else self.lifetime) / MICROS_PER_SECOND


class _SnapshotHeader(msgspec.Struct, forbid_unknown_fields=True):
    """The header of a snapshot's envelope. `progress` is the minimum for later snapshots of a running task.

    `version` and `lifetime` repeat members of `StoredMetadata`, which the digest does not cover.
    """

    operation: str
    task: str
    progress: float | None
    version: int
    revision: int
    lifetime: int


class _FailureHeader(msgspec.Struct, forbid_unknown_fields=True):
    operation: str
    task: str
    kind: str
    retry_after: float | None


def encode_snapshot(snapshot: Snapshot) -> bytes:
    """Encode the envelope and the progress."""
    header = {
        "operation": snapshot.key.operation,
        "task": snapshot.key.task_id,
        "progress": snapshot.progress,
        "version": snapshot.version,
        "revision": snapshot.revision,
        "lifetime": lifetime_of(snapshot),
    }
    return _with_digest(header, snapshot.envelope)


def lifetime_of(snapshot: Snapshot) -> int:
    """Return a snapshot's lifetime in microseconds."""
    return min(round(snapshot.lifetime * MICROS_PER_SECOND), _LONGEST_LIFETIME)


def decode_snapshot(
    encoded: bytes,
    key: TaskKey,
    metadata: StoredMetadata,
    *,
    fetched_at: float,
    lifetimes: Mapping[Status | None, float],
    tags: EntityTags,
) -> Snapshot:
    """Decode a snapshot of this task. Raises: InvalidStoredValue.

    Its lifetime is the stored one, or the one in `lifetimes` if that is shorter.
    """
    header, envelope = _checked(encoded, key, _SNAPSHOT_HEADER)
    if header.version != metadata.version or header.lifetime != metadata.lifetime:
        raise InvalidStoredValue("metadata and header differ")
    if not 0 < header.revision < version_now() + _MAX_CLOCK_LEAD:
        raise InvalidStoredValue("revision out of range")
    try:
        snapshot = restore_snapshot(
            read_envelope(envelope, key, redact=str).data,
            envelope,
            key,
            progress=header.progress,
            fetched_at=fetched_at,
            lifetimes=lifetimes,
            longest_lifetime=metadata.lifetime / MICROS_PER_SECOND,
            version=header.version,
            revision=header.revision,
            tags=tags,
        )
    except GatewayError as exc:
        raise InvalidStoredValue("not an envelope of this task") from exc
    if snapshot.terminal != metadata.terminal or snapshot.progress != header.progress:
        raise InvalidStoredValue("contradictory fields")
    return snapshot


def encode_failure(key: TaskKey, error: GatewayError) -> bytes:
    """Encode a failure that other replicas would have, too; return b"" for any other."""
    envelope = error.envelope if isinstance(error, UpstreamRejected) else b""
    if not envelope and type(error) not in _SHARED_FAILURES.values():
        return b""
    kind = type(error).__name__
    return _with_digest(
        {"operation": key.operation, "task": key.task_id, "kind": kind, "retry_after": error.retry_after},
        envelope,
    )


def decode_failure(encoded: bytes, key: TaskKey) -> UpstreamError:
    """Decode a failure of this task. Raises: InvalidStoredValue."""
    header, envelope = _checked(encoded, key, _FAILURE_HEADER)
    if header.kind == UpstreamRejected.__name__:
        try:
            return read_rejection(envelope)
        except GatewayError as exc:
            raise InvalidStoredValue("not a rejected envelope") from exc
    failure = _SHARED_FAILURES.get(header.kind)
    if failure is None or envelope:
        raise InvalidStoredValue("failure of an unknown kind")
    if header.retry_after is not None and not 0 <= header.retry_after <= LONGEST_RETRY_SECONDS:
        raise InvalidStoredValue("retry_after out of range")
    return failure(GENERIC_TEXT[failure], retry_after=header.retry_after)


def _with_digest(header: dict[str, Any], envelope: bytes) -> bytes:
    content = b"%b\n%b" % (render_json(header), envelope)
    return b"%b %b" % (_digest(content), content)


def _checked(encoded: bytes, key: TaskKey, decoder: msgspec.json.Decoder[Any]) -> tuple[Any, bytes]:
    """Return header and envelope of a value, if digest and task are right. Raises: InvalidStoredValue."""
    digest, _, content = encoded.partition(b" ")
    if digest != _digest(content):
        raise InvalidStoredValue("wrong digest")
    text, _, envelope = content.partition(b"\n")
    if len(text) > _MAX_HEADER_BYTES:
        raise InvalidStoredValue("header too large")
    try:
        header = decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidStoredValue("invalid header") from exc
    if header.operation != key.operation or header.task != key.task_id:
        raise InvalidStoredValue("value of another task")
    return header, envelope


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).hexdigest().encode()


_SNAPSHOT_HEADER = msgspec.json.Decoder(_SnapshotHeader)
_FAILURE_HEADER = msgspec.json.Decoder(_FailureHeader)
