"""Encodes snapshots and failures for other replicas, possibly of other versions of the gateway.

    snapshot, failure: DIGEST SP header LF envelope

Stored values are untrusted input: they may come from another version, belong to another task, be truncated,
or be forged. Every byte is checked. Only the vendor's envelope reaches clients: body and entity tag are
rendered from it again, as for a response from the upstream. The facts that the scripts compare
(`StoredSnapshot`) are stored in fields of their own, beside the encoded value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from gateway.domain.entity_tag import EntityTags
from gateway.domain.envelope import read_envelope, read_rejection
from gateway.domain.errors import (
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

MICROSECONDS = 1_000_000
LONGEST_RETRY_SECONDS = 3600.0  # the maximum that `signed_request.py` accepts from the upstream

_DIGEST_BYTES = 12
_END = 2**53  # the scripts compute with doubles, which are exact below this number
_DAY = 86_400 * MICROSECONDS  # by how much the clock of another replica may be ahead
_LONGEST_LIFETIME = 2_592_000_000_000  # microseconds: the maximum of the `cache` settings
_LONGEST_HEADER = 16_384

# Failures that another replica would have, too, with the error text for its callers. `UpstreamRejected` is
# shared with its envelope. All other failures may concern only this replica: no connection, a timeout, its
# limits.
_SHARED: dict[type[UpstreamError], str] = {
    UpstreamBusy: "the upstream failed temporarily",
    UpstreamForbidden: "the upstream refused the query of this task",
    UpstreamInvalid: "the upstream's answer is not valid",
    UpstreamThrottled: "the upstream limits the rate of calls",
}
_KINDS = {kind.__name__: kind for kind in _SHARED}


class InvalidStoredValue(ValueError):
    """A value that no gateway of this version wrote for this task."""


class StoredSnapshot(NamedTuple):
    """The facts about a stored snapshot; age and lifetime in microseconds.

    `age` is negative if the server's clock was set back after the snapshot was fetched.
    """

    version: int
    age: int
    lifetime: int
    terminal: int

    @classmethod
    def checked(cls, *facts: Any) -> StoredSnapshot:
        """Return the facts in a reply or a message. Raises: InvalidStoredValue."""
        if [type(fact) for fact in facts] != [int] * 4:
            raise InvalidStoredValue("not four numbers")
        stored = cls(*facts)
        in_range = (
            0 <= stored.version < version_now() + _DAY
            and -_END < stored.age < _END
            and stored.terminal in (0, 1)
        )
        if not in_range or not 0 <= stored.lifetime <= _LONGEST_LIFETIME:
            raise InvalidStoredValue("number out of range")
        return stored

    def fetched_at(self, now: float) -> float:
        """Return when the snapshot was fetched, on the clock of `now`; stale if the age is negative."""
        return now - (self.age if self.age >= 0 else self.lifetime) / MICROSECONDS


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    """The header of a snapshot's envelope. `progress` is the minimum for later snapshots of a running task.

    `version` and `lifetime` repeat facts of `StoredSnapshot`, which the digest does not cover.
    """

    operation: str
    task: str
    progress: float | None
    version: int
    revision: int
    lifetime: int


class _Failure(msgspec.Struct, forbid_unknown_fields=True):
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
    return _sealed(header, snapshot.envelope)


def lifetime_of(snapshot: Snapshot) -> int:
    """Return a snapshot's lifetime in microseconds."""
    return min(round(snapshot.lifetime * MICROSECONDS), _LONGEST_LIFETIME)


def decode_snapshot(
    encoded: bytes,
    key: TaskKey,
    stored: StoredSnapshot,
    *,
    fetched_at: float,
    lifetimes: Mapping[Status | None, float],
    tags: EntityTags,
) -> Snapshot:
    """Decode a snapshot of this task. Raises: InvalidStoredValue.

    Its lifetime is the shorter one of the stored lifetime and `lifetimes`.
    """
    header, envelope = _unsealed(encoded, key, _HEADER)
    if header.version != stored.version or header.lifetime != stored.lifetime:
        raise InvalidStoredValue("facts and header differ")
    if not 0 < header.revision < version_now() + _DAY:
        raise InvalidStoredValue("revision out of range")
    try:
        snapshot = restore_snapshot(
            read_envelope(envelope, key, redact=str).data,
            envelope,
            key,
            progress=header.progress,
            fetched_at=fetched_at,
            lifetimes=lifetimes,
            longest_lifetime=stored.lifetime / MICROSECONDS,
            version=header.version,
            revision=header.revision,
            tags=tags,
        )
    except GatewayError as exc:
        raise InvalidStoredValue("not an envelope of this task") from exc
    if snapshot.terminal != stored.terminal or snapshot.progress != header.progress:
        raise InvalidStoredValue("contradictory fields")
    return snapshot


def encode_failure(key: TaskKey, error: GatewayError) -> bytes:
    """Encode a failure that other replicas would have, too; return b"" for any other."""
    envelope = error.envelope if isinstance(error, UpstreamRejected) else b""
    if not envelope and type(error) not in _SHARED:
        return b""
    kind = type(error).__name__
    return _sealed(
        {"operation": key.operation, "task": key.task_id, "kind": kind, "retry_after": error.retry_after},
        envelope,
    )


def decode_failure(encoded: bytes, key: TaskKey) -> UpstreamError:
    """Decode a failure of this task. Raises: InvalidStoredValue."""
    header, envelope = _unsealed(encoded, key, _FAILURE)
    if header.kind == UpstreamRejected.__name__:
        try:
            return read_rejection(envelope)
        except GatewayError as exc:
            raise InvalidStoredValue("not a rejected envelope") from exc
    kind = _KINDS.get(header.kind)
    if kind is None or envelope:
        raise InvalidStoredValue("failure of an unknown kind")
    if header.retry_after is not None and not 0 <= header.retry_after <= LONGEST_RETRY_SECONDS:
        raise InvalidStoredValue("retry_after out of range")
    return kind(_SHARED[kind], retry_after=header.retry_after)


def _sealed(header: dict[str, Any], envelope: bytes) -> bytes:
    content = b"%b\n%b" % (render_json(header), envelope)
    return b"%b %b" % (_digest(content), content)


def _unsealed(encoded: bytes, key: TaskKey, decoder: msgspec.json.Decoder[Any]) -> tuple[Any, bytes]:
    digest, _, content = encoded.partition(b" ")
    if digest != _digest(content):
        raise InvalidStoredValue("wrong digest")
    text, _, envelope = content.partition(b"\n")
    if len(text) > _LONGEST_HEADER:
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


_HEADER = msgspec.json.Decoder(_Header)
_FAILURE = msgspec.json.Decoder(_Failure)
