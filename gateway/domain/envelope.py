"""Parses the envelope of an upstream response and checks that it is for the requested task.

`json_text.py` parses the bytes; `rejection_redaction.py` redacts envelopes that report a failure.
"""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from gateway.domain.errors import ResponseForAnotherTask, UpstreamInvalid, UpstreamRejected
from gateway.domain.json_text import ABSENT, read_object, replace_constants, value
from gateway.domain.rejection_redaction import Envelope as EnvelopeText
from gateway.domain.rejection_redaction import detail, displayable, rejected, rejection
from gateway.domain.task import TaskKey
from gateway.domain.vendor_values import Repair, find_repairs, number

_SUCCESS = 10  # the call succeeded; says nothing about the task


class Envelope(NamedTuple):
    """The content of a successful envelope.

    Attributes:
        data: The members of the envelope's `data` that describe progress, as far as they are present; objects
            and arrays as JSON text.
        invoke_id: The vendor's ID of the call, not redacted.
        repairs: What was wrong with the response, although its meaning is plain.
    """

    data: dict[str, Any]
    invoke_id: str | None
    repairs: tuple[Repair, ...] = ()


class _Data(msgspec.Struct, rename="camel"):
    """The members of `data` that describe progress, as JSON text."""

    task_id: msgspec.Raw = ABSENT
    status: msgspec.Raw = ABSENT
    progress: msgspec.Raw = ABSENT
    last_queue_remaining: msgspec.Raw = ABSENT
    eta_relative: msgspec.Raw = ABSENT
    message: msgspec.Raw = ABSENT
    state: msgspec.Raw = ABSENT


def read_envelope(body: bytes, key: TaskKey, *, redact: Callable[[str], str]) -> Envelope:
    """Return the content of a successful envelope for the requested task.

    Args:
        body: The response body.
        key: The requested operation and task.
        redact: Removes secrets from the texts of a rejection.

    Raises:
        UpstreamRejected: The envelope's `status` is not 10.
        ResponseForAnotherTask: The envelope is for another task.
        UpstreamInvalid: The body is not an envelope.
    """
    try:
        envelope, repairs = _read_text(body)
        status = None if envelope is None else value(envelope.status)
        if type(status) is not int:
            status, repairs = _read_call_status(status, repairs)
        if envelope is None or type(status) is not int:
            raise UpstreamInvalid("the upstream's answer is not an envelope")
        if status != _SUCCESS:
            raise rejection(body, envelope, status, redact)
        data = _read_data(envelope.data)
    except ValueError as exc:
        raise UpstreamInvalid("the upstream's answer is not JSON") from exc
    if data is None:
        raise UpstreamInvalid("the upstream's envelope has no data")
    # The vendor's reference lists no taskId for results: it may be absent there, but never a different one.
    may_be_absent = key.operation.is_result and data.get("taskId") is None
    if data.get("taskId") != key.task_id and not may_be_absent:
        raise ResponseForAnotherTask("the upstream answered for another task")
    if not key.operation.is_result and (found := find_repairs(data)):
        repairs = tuple(dict.fromkeys(repairs + found))
    return Envelope(data, displayable(envelope.api_invoke_id, str), repairs)


def read_rejection(body: bytes) -> UpstreamRejected:
    """Return the exception for the envelope of a rejection; the envelope is already redacted.

    Raises:
        UpstreamInvalid: The body is not the envelope of a rejection.
    """
    try:
        envelope, _ = _read_text(body)
        status = None if envelope is None else value(envelope.status)
        if type(status) is not int:
            status, _ = _read_call_status(status, ())
        if envelope is None or type(status) is not int or status == _SUCCESS:
            raise UpstreamInvalid("the envelope is not a rejection")
        return rejected(body, detail(envelope, str))
    except ValueError as exc:
        raise UpstreamInvalid("the envelope is not JSON") from exc


def read_data_text(body: bytes) -> bytes:
    """Return the member `data` of a successful envelope as JSON text; NaN and Infinity in it become null.

    Raises:
        UpstreamInvalid: The body is not an envelope with data.
    """
    try:
        envelope, _ = _read_text(body)
    except ValueError as exc:
        raise UpstreamInvalid("the envelope is not JSON") from exc
    if envelope is None or envelope.data is ABSENT:
        raise UpstreamInvalid("the upstream's envelope has no data")
    return bytes(envelope.data)


def _read_text(body: bytes) -> tuple[EnvelopeText | None, tuple[Repair, ...]]:
    """Return the members of the envelope, or None for JSON that is not an object. Raises: ValueError."""
    try:
        return read_object(body, _ENVELOPE), ()
    except ValueError:
        without_mark = body.removeprefix(BOM_UTF8)  # RFC 8259, 8.1: a parser may ignore it
        repaired = replace_constants(without_mark)
        repairs = (
            *((Repair.BYTE_ORDER_MARK,) if without_mark is not body else ()),
            *((Repair.CONSTANT,) if repaired is not without_mark else ()),
        )
        if not repairs:
            raise
    return read_object(repaired, _ENVELOPE), repairs


def _read_call_status(status: Any, repairs: tuple[Repair, ...]) -> tuple[Any, tuple[Repair, ...]]:
    """Return the status as an integer if its meaning is plain: 10.0, or "10"; otherwise unchanged."""
    whole = number(status)
    if whole is None or not whole.is_integer():
        return status, repairs
    return int(whole), (*repairs, Repair.NUMBER_IN_TEXT) if isinstance(status, str) else repairs


def _read_data(text: msgspec.Raw) -> dict[str, Any] | None:
    # The text is valid JSON: it was checked as a part of the envelope.
    try:
        members = _DATA.decode(text) if text is not ABSENT else None
    except msgspec.ValidationError:
        return None
    if members is None:
        return None
    parts = zip(_NAMES, msgspec.structs.astuple(members), strict=True)
    return {name: value(raw) for name, raw in parts if raw is not ABSENT}


def read_task_id(body: bytes) -> Any:
    """Return the `taskId` of a request body, of any type.

    Raises:
        ValueError: The body is not JSON.
        TypeError: The body is not an object.
    """
    members = read_object(body, _DATA)
    if members is None:
        raise TypeError("not an object")
    return value(members.task_id)


_ENVELOPE = msgspec.json.Decoder(EnvelopeText)
_DATA = msgspec.json.Decoder(_Data)
_NAMES = [member.encode_name for member in msgspec.structs.fields(_Data)]
