"""Reads an envelope: from its bytes to the data of the very task that was asked for.

`jsontext.py` reads the bytes, `rejections.py` makes what says no safe to show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from gateway.domain.errors import UpstreamInvalid, UpstreamRejected
from gateway.domain.json_text import ABSENT, read_object, value
from gateway.domain.rejection import Envelope as EnvelopeText
from gateway.domain.rejection import detail, rejected, rejection, shown
from gateway.domain.snapshot import TaskKey

_SUCCESS = 10  # the envelope's verdict on the call; not on the task


class Envelope(NamedTuple):
    """What a successful envelope holds: the task's `data`, and the vendor's id of the call, redacted.

    `data` has the members that say how far the task is, if they are there; objects and arrays as JSON text.
    """

    data: dict[str, Any]
    invoke_id: str | None


class _Data(msgspec.Struct, rename="camel"):
    """The members of `data` that say how far a task is, as JSON text."""

    task_id: msgspec.Raw = ABSENT
    status: msgspec.Raw = ABSENT
    progress: msgspec.Raw = ABSENT
    last_queue_remaining: msgspec.Raw = ABSENT
    eta_relative: msgspec.Raw = ABSENT
    message: msgspec.Raw = ABSENT
    state: msgspec.Raw = ABSENT


def read_envelope(body: bytes, key: TaskKey, *, redact: Callable[[str], str]) -> Envelope:
    """Return what is in a successful envelope for the task that was asked for.

    `redact` cleans whatever of a refusal may be shown. Raises: UpstreamRejected for an envelope
    whose `status` is not 10, UpstreamInvalid for anything else.
    """
    try:
        envelope = read_object(body, _ENVELOPE)
        status = None if envelope is None else value(envelope.status)
        if envelope is None or type(status) is not int:
            raise UpstreamInvalid("the upstream's answer is not an envelope")
        if status != _SUCCESS:
            raise rejection(body, envelope, status, redact)
        data = _read_data(envelope.data)
    except ValueError as exc:
        raise UpstreamInvalid("the upstream's answer is not JSON") from exc
    if data is None:
        raise UpstreamInvalid("the upstream's envelope has no data")
    # The reference lists no taskId for results: there it may be absent, but never another one.
    absent_is_fine = key.operation.is_result and data.get("taskId") is None
    if data.get("taskId") != key.task_id and not absent_is_fine:
        raise UpstreamInvalid("the upstream answered for another task")
    return Envelope(data, shown(envelope.api_invoke_id, redact))


def read_rejection(body: bytes) -> UpstreamRejected:
    """Return the failure that a rejected envelope means, which was made safe to show before.

    Raises: UpstreamInvalid when it is none.
    """
    try:
        envelope = read_object(body, _ENVELOPE)
        status = None if envelope is None else value(envelope.status)
        if envelope is None or type(status) is not int or status == _SUCCESS:
            raise UpstreamInvalid("the envelope is not one that says no")
        return rejected(body, detail(envelope, str))
    except ValueError as exc:
        raise UpstreamInvalid("the envelope is not JSON") from exc


def _read_data(text: msgspec.Raw) -> dict[str, Any] | None:
    # Its whole is checked already, as a part of the envelope.
    try:
        members = _DATA.decode(text) if text is not ABSENT else None
    except msgspec.ValidationError:
        return None
    if members is None:
        return None
    parts = zip(_NAMES, msgspec.structs.astuple(members), strict=True)
    return {name: value(raw) for name, raw in parts if raw is not ABSENT}


def read_task_id(body: bytes) -> Any:
    """Return the `taskId` of a request's body, whatever it is.

    Raises: ValueError for what is not JSON, TypeError for what is not an object.
    """
    members = read_object(body, _DATA)
    if members is None:
        raise TypeError("not an object")
    return value(members.task_id)


_ENVELOPE = msgspec.json.Decoder(EnvelopeText)
_DATA = msgspec.json.Decoder(_Data)
_NAMES = [member.encode_name for member in msgspec.structs.fields(_Data)]
