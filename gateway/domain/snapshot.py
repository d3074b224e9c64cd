"""What an upstream answer means: from the envelope's data to an immutable Snapshot.

    bytes -> read_envelope (is it one, and for this very task?) -> data -> observe -> Snapshot

The first step is `envelopes.py`.

A Snapshot carries everything a caller may be sent as bytes that were rendered once: the
envelope as it came for the drop-in paths, and the simplified JSON with its ETag. The
vendor's wire names (`taskId`, `etaRelative`, ...) are known here, in `api/` and in the
simulator, nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple, NoReturn

import msgspec

from gateway.domain.errors import InvalidTaskId, UpstreamInvalid
from gateway.domain.json_text import one_line

_TASK_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MOST_UNFINISHED = 0.999  # only success is 1
# A number in a string, as some JSON libraries write it.
_DECIMAL = re.compile(r"[+-]?[0-9]{1,400}(?:\.[0-9]{1,400})?(?:[eE][+-]?[0-9]{1,9})?")


class Operation(StrEnum):
    """The upstream operations that the gateway may call; the value is the path's last segment.

    `path` is the same upstream and on the gateway's drop-in side, `api` that of the simplified paths:
    `sd` or `comfy`. `is_result`: it answers with a result, which has no progress to fold.
    """

    SD_GET_PROGRESS = "sd_get_progress"
    COMFY_GET_PROGRESS = "comfy_get_progress"
    SD_GET_RESULT = "sd_get_result"
    COMFY_GET_RESULT = "comfy_get_result"

    def __init__(self, name: str) -> None:
        self.path = f"/scc/{name}"
        self.api = name.partition("_")[0]
        self.is_result = name.endswith("_result")


class Status(StrEnum):
    """A task's status in the gateway's words."""

    WAITING = "waiting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    UNKNOWN = "unknown"

    @property
    def terminal(self) -> bool:
        """Whether the task's story ends here."""
        return self in _TERMINAL


_TERMINAL = frozenset({Status.SUCCEEDED, Status.FAILED, Status.CANCELED})

# The sd reference spells success `successed`, the comfy reference and the SDKs `succeeded`;
# the SDKs know both spellings of canceled.
_VENDOR_STATUS = {
    "waiting": Status.WAITING,
    "running": Status.RUNNING,
    "successed": Status.SUCCEEDED,
    "succeeded": Status.SUCCEEDED,
    "failed": Status.FAILED,
    "canceled": Status.CANCELED,
    "cancelled": Status.CANCELED,
}


class TaskKey(NamedTuple):
    """What a snapshot, a flight or a remembered failure is about."""

    operation: Operation
    task_id: str


@dataclass(slots=True, eq=False)
class Snapshot:
    """One upstream answer for one task, which never changes.

    `fetched_at` is when the answer had arrived, in seconds on the process's monotonic clock;
    `lifetime` is how many seconds it counts as fresh. `version` orders the snapshots of a task: of two
    the one that was asked for later has the larger. `envelope` is the body as it came.
    For results `status`, `progress` and `eta_seconds` are None and `body` and `etag` empty. `terminal`, which
    follows from the status: no later answer can change it.

    Two fields are notes on it: `polls` counts its readers, and the store sets `shown_until`, the moment on
    the clock of `fetched_at` from which on it must be looked up again: its successor may be there.
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
    polls: int = 0
    shown_until: float = math.inf
    terminal: bool = field(init=False)

    def __post_init__(self) -> None:
        self.terminal = self.status in _TERMINAL

    def fresh(self, now: float) -> bool:
        """Tell whether it still counts as fresh. `now` is on the clock of `fetched_at`."""
        return now - self.fetched_at < self.lifetime


def check_task_id(task_id: str) -> str:
    """Return the task ID. Raises: InvalidTaskId."""
    if not _TASK_ID.fullmatch(task_id):
        raise InvalidTaskId("a task ID is 1 to 64 characters of A-Z a-z 0-9 _ -")
    return task_id


def strict_json(body: bytes) -> Any:
    """Parse JSON as RFC 8259 has it: UTF-8, finite numbers, nesting that fits the stack.

    Raises: ValueError, whatever is wrong.
    """
    try:
        return _DECODER.decode(body.decode())
    except RecursionError as exc:
        raise ValueError("nested too deep") from exc


def observe(
    data: Mapping[str, Any],
    envelope: bytes,
    key: TaskKey,
    *,
    fetched_at: float,
    lifetimes: Mapping[Status | None, float],
    previous: Snapshot | None,
    version: int = 0,
) -> Snapshot:
    """Make the snapshot that follows `previous`. `lifetimes` has results under None.

    `data`: as `envelopes.Envelope` has it.

    Two promises need the predecessor: a terminal answer is final, and progress never falls
    while a task stays running (the vendor's number does: it may jump back at 65 %).
    Raises: UpstreamInvalid when `data` nests too deep to be rendered.
    """
    if key.operation.is_result:
        return Snapshot(key, fetched_at, lifetimes[None], envelope, version=version)
    status = vendor_status(data)
    if previous is not None and previous.terminal and previous.status is not status:
        return replace(previous, fetched_at=fetched_at, version=version, polls=0, shown_until=math.inf)
    mark = previous.progress if previous is not None and previous.status is Status.RUNNING else None
    return _see(
        data,
        envelope,
        key,
        mark=mark or 0.0,
        fetched_at=fetched_at,
        lifetime=lifetimes[status],
        version=version,
    )


def observe_again(
    data: Mapping[str, Any],
    envelope: bytes,
    key: TaskKey,
    *,
    progress: float | None,
    fetched_at: float,
    lifetime: float,
    version: int,
) -> Snapshot:
    """Make anew the snapshot of an envelope that was observed before, and was at `progress` then."""
    if key.operation.is_result:
        return Snapshot(key, fetched_at, lifetime, envelope, version=version)
    return _see(
        data, envelope, key, mark=progress or 0.0, fetched_at=fetched_at, lifetime=lifetime, version=version
    )


def _see(
    data: Mapping[str, Any],
    envelope: bytes,
    key: TaskKey,
    *,
    mark: float,
    fetched_at: float,
    lifetime: float,
    version: int,
) -> Snapshot:
    """Make a snapshot of `data`. `mark`: the progress below which it does not fall while it runs."""
    status = vendor_status(data)
    progress = 1.0
    if status is not Status.SUCCEEDED:
        least = mark if status is Status.RUNNING else 0.0
        progress = min(max(_number(data.get("progress")) or 0.0, least), _MOST_UNFINISHED)
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
    """Return the status in the gateway's words, whatever its case; UNKNOWN for what was never seen before."""
    status = data.get("status")
    return _VENDOR_STATUS.get(status.lower(), Status.UNKNOWN) if isinstance(status, str) else Status.UNKNOWN


def render_json(value: Any) -> bytes:
    """Encode compact UTF-8 JSON. Raises: UpstreamInvalid when the value nests too deep."""
    try:
        text = _ENCODER.encode(value)
    except RecursionError as exc:
        raise UpstreamInvalid("the upstream's answer nests too deep") from exc
    # Half a surrogate pair has no UTF-8; its backslash form is JSON's own escape.
    return text.encode(errors="backslashreplace")


def _state(state: Any) -> bytes:
    """Return the vendor's object as it came, but on one line; null for anything else."""
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
    # 0 before the end means "not known": the documented waiting task has it.
    number = _number(value)
    return number if number is not None and number > 0 else None


def _queue(value: Any) -> int | None:
    number = _number(value)
    return None if number is None else max(int(number), 0)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number beyond every float")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# Made once: json.loads and json.dumps make new ones at every call that has options.
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
