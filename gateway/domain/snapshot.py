"""Converts the data of an upstream envelope into an immutable Snapshot.

    bytes -> `envelope.read_envelope`: valid, and for the requested task?
          -> data -> `build_snapshot` -> Snapshot

A Snapshot holds every response body as bytes that are rendered once: the envelope as received for the
vendor-compatible paths, and the simplified JSON with its ETag. The vendor's names of the members of
`data` (`etaRelative`, ...) are known only in this package, in `api/` and in the simulator.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from typing import Any, NoReturn

import msgspec
from msgspec.structs import force_setattr, replace

from gateway.domain.entity_tag import EntityTags
from gateway.domain.errors import UpstreamInvalid
from gateway.domain.json_text import one_line
from gateway.domain.task import Status, TaskKey
from gateway.domain.vendor_values import eta_seconds, number, queue_length, vendor_status

_MAX_UNFINISHED = 0.999  # 1 means that the task has succeeded


class Snapshot(msgspec.Struct, frozen=True, eq=False):
    """One upstream response for one task. A frozen dataclass would take seven times as long to create.

    Attributes:
        key: The operation and task ID.
        fetched_at: When the response had arrived, in seconds on the process's monotonic clock.
        lifetime: How long the snapshot is fresh, in seconds.
        envelope: The upstream response body as received.
        status: The status of the task; None for results.
        progress: 0 to 1; None for results.
        eta_seconds: Estimated time left, in seconds; None if unknown, and for results.
        body: The simplified JSON; empty for results.
        etag: The strong ETag of `body`; empty for results.
        version: When the replica asked for the lease of the query, in microseconds since 1970. The version
            is raised if it would not be larger than each known version and revision of the task. So a later
            lease has a larger version.
        revision: When a response with this body first arrived, in microseconds since 1970. Later snapshots
            with the same body keep it. A response describes some moment between its version and its arrival.
            So a snapshot whose version is at least this revision is not older, even if it comes from another
            replica whose query overlapped.
        terminal: Whether the status is final: no later response changes the task. It follows from `status`.
    """

    key: TaskKey
    fetched_at: float
    lifetime: float
    envelope: bytes
    status: Status | None = None
    progress: float | None = None
    eta_seconds: float | None = None
    body: bytes = b""
    etag: str = ""
    version: int = 0
    revision: int = 0
    terminal: bool = False

    def __post_init__(self) -> None:
        """Set `terminal`."""
        force_setattr(self, "terminal", self.status is not None and self.status.terminal)

    def may_follow(self, revision: int) -> bool:
        """Return whether the snapshot is not older than the body with this revision, or is final."""
        return self.version >= revision or self.revision == revision or self.terminal

    def fresh(self, now: float) -> bool:
        """Return whether the snapshot is still fresh. `now` is on the clock of `fetched_at`."""
        return now - self.fetched_at < self.lifetime


def version_now() -> int:
    """Return the present moment on the scale of versions."""
    return int(time.time() * 1_000_000)


def strict_json(body: bytes) -> Any:
    """Parse JSON as RFC 8259 defines it: UTF-8, finite numbers, no NaN or Infinity.

    Raises:
        ValueError: The text is not such JSON, or it nests too deep for the stack.
    """
    try:
        return _DECODER.decode(body.decode())
    except RecursionError as exc:
        raise ValueError("nested too deep") from exc


def build_snapshot(
    data: Mapping[str, Any],
    envelope: bytes,
    key: TaskKey,
    *,
    fetched_at: float,
    lifetimes: Mapping[Status | None, float],
    previous: Snapshot | None,
    tags: EntityTags,
    version: int = 0,
) -> Snapshot:
    """Return the snapshot of an upstream response, given the previous snapshot of the task.

    Two guarantees depend on `previous`: a terminal status is final, and progress never decreases while a task
    stays running. (The vendor's number does decrease: it may jump back at 65 %.)

    Args:
        data: The `data` member of the response, as in `envelope.Envelope`.
        envelope: The response body as received.
        key: The operation and task ID.
        fetched_at: When the response had arrived, in seconds on the monotonic clock.
        lifetimes: How long a snapshot is fresh, in seconds, by status; results are under None.
        previous: The latest known snapshot of the task, or None.
        tags: Issues the entity tag.
        version: The version of the new snapshot.

    Raises:
        UpstreamInvalid: `data` nests too deep to be rendered.
    """
    if key.operation.is_result:
        return Snapshot(key, fetched_at, lifetimes[None], envelope, version=version, revision=version)
    status = vendor_status(data)
    if previous is not None and previous.terminal and previous.status is not status:
        return replace(previous, fetched_at=fetched_at, version=version)
    floor = previous.progress if previous is not None and previous.status is Status.RUNNING else None
    return _render(
        data,
        envelope,
        key,
        progress_floor=floor or 0.0,
        fetched_at=fetched_at,
        lifetime=lifetimes[status],
        version=version,
        revision=max(version, version_now()),
        previous=previous,
        tags=tags,
    )


def restore_snapshot(
    data: Mapping[str, Any],
    envelope: bytes,
    key: TaskKey,
    *,
    progress: float | None,
    fetched_at: float,
    lifetimes: Mapping[Status | None, float],
    longest_lifetime: float,
    version: int,
    revision: int,
    tags: EntityTags,
) -> Snapshot:
    """Return the snapshot of a stored envelope.

    Args:
        data: As in `build_snapshot`, like the arguments that are not listed.
        envelope: The envelope.
        key: The operation and task ID.
        progress: The progress that was stored with it.
        fetched_at: When the response had arrived, in seconds on the monotonic clock.
        lifetimes: How long a snapshot is fresh here, in seconds, by status; results are under None.
        longest_lifetime: How long the snapshot is fresh where it was fetched. The shorter lifetime counts.
        version: The stored version.
        revision: The stored revision.
        tags: Issues the entity tag.

    Raises:
        UpstreamInvalid: `data` nests too deep to be rendered.
    """
    if key.operation.is_result:
        lifetime = min(lifetimes[None], longest_lifetime)
        return Snapshot(key, fetched_at, lifetime, envelope, version=version, revision=revision)
    return _render(
        data,
        envelope,
        key,
        progress_floor=progress or 0.0,
        fetched_at=fetched_at,
        lifetime=min(lifetimes[vendor_status(data)], longest_lifetime),
        version=version,
        revision=revision,
        tags=tags,
    )


def _render(
    data: Mapping[str, Any],
    envelope: bytes,
    key: TaskKey,
    *,
    progress_floor: float,
    fetched_at: float,
    lifetime: float,
    version: int,
    tags: EntityTags,
    revision: int,
    previous: Snapshot | None = None,
) -> Snapshot:
    """Render `data`. `progress_floor` is the minimum progress of a running task.

    The revision is that of the previous snapshot if that has the same body.
    """
    status = vendor_status(data)
    progress = 1.0
    if status is not Status.SUCCEEDED:
        least = progress_floor if status is Status.RUNNING else 0.0
        progress = min(max(number(data.get("progress")) or 0.0, least), _MAX_UNFINISHED)
    eta = 0.0 if status.terminal else eta_seconds(data)
    message = data.get("message")
    members = {
        "taskId": key.task_id,
        "api": key.operation.api,
        "status": status,
        "progress": progress,
        "queueRemaining": queue_length(data) if status is Status.WAITING else None,
        "etaSeconds": eta,
        "message": message if isinstance(message, str) else None,
        "terminal": status.terminal,
    }
    try:
        head = _encode(members)  # takes an eighth of the time of `render_json`; all numbers are finite
    except UnicodeEncodeError:  # the message has a lone surrogate
        head = render_json(members)
    body = b'%b,"state":%b}' % (head[:-1], _state(data.get("state")))
    if previous is not None and previous.body == body:
        revision = previous.revision
    etag = tags.issue(key, body, revision)
    return Snapshot(key, fetched_at, lifetime, envelope, status, progress, eta, body, etag, version, revision)


def render_json(value: Any) -> bytes:
    """Encode compact JSON in UTF-8.

    Raises:
        UpstreamInvalid: The value nests too deep.
    """
    try:
        text = _ENCODER.encode(value)
    except RecursionError as exc:
        raise UpstreamInvalid("the upstream's answer nests too deep") from exc
    # A lone surrogate has no UTF-8 encoding; the handler writes it as a JSON escape.
    return text.encode(errors="backslashreplace")


def _state(state: Any) -> bytes:
    """Return the vendor's object with its line breaks removed; null for anything that is not an object."""
    if isinstance(state, msgspec.Raw):
        return one_line(state) if bytes(state).startswith(b"{") else b"null"
    return render_json(state if isinstance(state, dict) else None)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large for a float")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# Module level: json.loads and json.dumps create a new decoder or encoder for each call with options.
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
_encode = msgspec.json.Encoder().encode
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
