"""Converts the data of an upstream envelope into an immutable Snapshot.

    bytes -> `envelope.read_envelope`: valid, and for the requested task?
          -> data -> `build_snapshot` -> Snapshot

A Snapshot holds every response body as bytes that are rendered once: the envelope as received for the
vendor-compatible paths, and the simplified JSON with its ETag. Only this module, `envelope.py`, `api/` and
the simulator know the vendor's member names (`taskId`, `etaRelative`, ...).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import msgspec

from gateway.domain.errors import UpstreamInvalid
from gateway.domain.json_text import one_line
from gateway.domain.task import Status, TaskKey

_MAX_UNFINISHED = 0.999  # 1 means that the task has succeeded
# A number in a string: some JSON libraries write numbers as strings.
_DECIMAL = re.compile(r"[+-]?[0-9]{1,400}(?:\.[0-9]{1,400})?(?:[eE][+-]?[0-9]{1,9})?")


# The vendor's sd reference spells success `successed`; its comfy reference and SDKs spell it `succeeded`.
# The SDKs accept both spellings of canceled.
_VENDOR_STATUS = {
    "waiting": Status.WAITING,
    "running": Status.RUNNING,
    "successed": Status.SUCCEEDED,
    "succeeded": Status.SUCCEEDED,
    "failed": Status.FAILED,
    "canceled": Status.CANCELED,
    "cancelled": Status.CANCELED,
}


@dataclass(slots=True, eq=False)
class Snapshot:
    """One upstream response for one task.

    Immutable except for the bookkeeping fields `read_count` and `current_until`.

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
        version: Orders the snapshots of a task: a query that was sent later has a larger version.
        read_count: Number of requests that this snapshot has answered.
        current_until: Set by the store, on the clock of `fetched_at`. From this moment on the store must be
            asked again, because a newer snapshot may be visible.
        terminal: Whether the status is final: no later response changes the task.
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
    read_count: int = 0
    current_until: float = math.inf
    terminal: bool = field(init=False)

    def __post_init__(self) -> None:
        self.terminal = self.status is not None and self.status.terminal

    def fresh(self, now: float) -> bool:
        """Return whether the snapshot is still fresh. `now` is on the clock of `fetched_at`."""
        return now - self.fetched_at < self.lifetime


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
        version: The version of the new snapshot.

    Raises:
        UpstreamInvalid: `data` nests too deep to be rendered.
    """
    if key.operation.is_result:
        return Snapshot(key, fetched_at, lifetimes[None], envelope, version=version)
    status = vendor_status(data)
    if previous is not None and previous.terminal and previous.status is not status:
        return replace(previous, fetched_at=fetched_at, version=version, read_count=0, current_until=math.inf)
    floor = previous.progress if previous is not None and previous.status is Status.RUNNING else None
    return _render(
        data,
        envelope,
        key,
        progress_floor=floor or 0.0,
        fetched_at=fetched_at,
        lifetime=lifetimes[status],
        version=version,
    )


def restore_snapshot(
    data: Mapping[str, Any],
    envelope: bytes,
    key: TaskKey,
    *,
    progress: float | None,
    fetched_at: float,
    lifetime: float,
    version: int,
) -> Snapshot:
    """Return the snapshot of a stored envelope; `progress` is the progress that was stored with it.

    The other arguments are those of `build_snapshot`.

    Raises:
        UpstreamInvalid: `data` nests too deep to be rendered.
    """
    if key.operation.is_result:
        return Snapshot(key, fetched_at, lifetime, envelope, version=version)
    return _render(
        data,
        envelope,
        key,
        progress_floor=progress or 0.0,
        fetched_at=fetched_at,
        lifetime=lifetime,
        version=version,
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
) -> Snapshot:
    """Render `data`. `progress_floor` is the minimum progress of a running task."""
    status = vendor_status(data)
    progress = 1.0
    if status is not Status.SUCCEEDED:
        least = progress_floor if status is Status.RUNNING else 0.0
        progress = min(max(_number(data.get("progress")) or 0.0, least), _MAX_UNFINISHED)
    eta = 0.0 if status.terminal else _eta(data.get("etaRelative"))
    message = data.get("message")
    head = render_json(
        {
            "taskId": key.task_id,
            "api": key.operation.api,
            "status": status,
            "progress": progress,
            "queueRemaining": _queue(data.get("lastQueueRemaining")) if status is Status.WAITING else None,
            "etaSeconds": eta,
            "message": message if isinstance(message, str) else None,
            "terminal": status.terminal,
        }
    )
    body = b'%b,"state":%b}' % (head[:-1], _state(data.get("state")))
    etag = f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'
    return Snapshot(key, fetched_at, lifetime, envelope, status, progress, eta, body, etag, version)


def vendor_status(data: Mapping[str, Any]) -> Status:
    """Return the status, ignoring case; UNKNOWN for a missing or unfamiliar one."""
    status = data.get("status")
    return _VENDOR_STATUS.get(status.lower(), Status.UNKNOWN) if isinstance(status, str) else Status.UNKNOWN


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


def _number(number: Any) -> float | None:
    if isinstance(number, str) and _DECIMAL.fullmatch(number):
        number = float(number)
    if isinstance(number, bool) or not isinstance(number, int | float):
        return None
    try:
        return float(number) if math.isfinite(number) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def _eta(value: Any) -> float | None:
    # 0 before the end means "unknown": the vendor's documented waiting task has it.
    number = _number(value)
    return number if number is not None and number > 0 else None


def _queue(value: Any) -> int | None:
    number = _number(value)
    return None if number is None else max(int(number), 0)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is too large for a float")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# Module level: json.loads and json.dumps create a new decoder or encoder for each call with options.
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
