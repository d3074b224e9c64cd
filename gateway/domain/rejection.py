"""An envelope that says no, made safe to show: byte for byte as it came, unless a secret is in it.

nothing found in the whole text   -> as it came
found, in a small envelope        -> string by string: all but the secrets stays
found, in a larger one            -> an envelope with the known fields, redacted
too large to be searched in one step -> the same, until `clean` has searched it piece by piece
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from os.path import commonprefix
from typing import Any

import msgspec

from gateway.domain.errors import UpstreamDetail, UpstreamRejected
from gateway.domain.json_text import ABSENT, plain_text, without_half_pairs

# Characters, or bytes, that are searched in one step of the event loop: some 2 ms.
STEP = 32_768
_OVERLAP = 2048  # of two pieces: a secret may lie across their border
_MOST_CLEANED = 8192  # bytes: string by string is some 100 times as slow as the search
_LONGEST_FIELD = 4096  # characters that are searched of a field
_DETAIL_LIMIT = 500  # characters of an upstream's own text that are worth showing


class Envelope(msgspec.Struct, rename="camel"):
    """The members of an envelope, as JSON text."""

    status: msgspec.Raw = ABSENT
    data: msgspec.Raw = ABSENT
    api_invoke_id: msgspec.Raw = ABSENT
    err_code: msgspec.Raw = ABSENT
    err_message: msgspec.Raw = ABSENT
    sub_err_code: msgspec.Raw = ABSENT
    sub_err_message: msgspec.Raw = ABSENT


def rejection(body: bytes, envelope: Envelope, status: int, redact: Callable[[str], str]) -> UpstreamRejected:
    """Return the failure that a rejected envelope means, safe to show."""
    said = detail(envelope, redact)
    known = {
        "status": status,
        "apiInvokeId": said.invoke_id,
        "data": None,
        "errCode": said.err_code,
        "errMessage": said.err_message,
        "subErrCode": said.sub_err_code,
        "subErrMessage": said.sub_err_message,
    }
    return rejected(_safe(body, redact) or _rendered(known), said)


def detail(envelope: Envelope, redact: Callable[[str], str]) -> UpstreamDetail:
    """Return what a rejected envelope says of itself, safe to show."""
    return UpstreamDetail(
        invoke_id=shown(envelope.api_invoke_id, redact),
        err_code=shown(envelope.err_code, redact),
        err_message=shown(envelope.err_message, redact),
        sub_err_code=shown(envelope.sub_err_code, redact),
        sub_err_message=shown(envelope.sub_err_message, redact),
    )


def rejected(envelope: bytes, said: UpstreamDetail) -> UpstreamRejected:
    """Return the failure that a rejected envelope means."""
    return UpstreamRejected("the upstream rejected the query", envelope=envelope, detail=said)


async def clean(body: bytes, redact: Callable[[str], str]) -> bool:
    """Tell whether a rejected envelope of any size has nothing to redact; other work goes on meanwhile."""
    text = plain_text(body)
    for start in range(0, len(text), STEP - _OVERLAP):
        piece = text[start : start + STEP]
        if redact(piece) != piece:
            return False
        await asyncio.sleep(0)
    return True


async def holds(body: bytes, found: Callable[[bytes], bool]) -> bool:
    """Tell whether something is found in a body of any size; other work goes on meanwhile."""
    for start in range(0, len(body), STEP - _OVERLAP):
        if found(body[start : start + STEP]):
            return True
        await asyncio.sleep(0)
    return False


def shown(raw: msgspec.Raw, redact: Callable[[str], str]) -> str | None:
    """Return what may be shown of a member: its text, redacted and cut, or None where it is null."""
    json_text = bytes(raw)
    if json_text in {b"", b"null"}:
        return None
    if json_text.startswith(b'"'):
        text: str = msgspec.json.decode(json_text)
    else:
        text = plain_text(json_text) if len(json_text) <= _LONGEST_FIELD else "[too long]"
    redacted = redact(text[:_LONGEST_FIELD])
    if len(text) > _LONGEST_FIELD:
        # A cut may leave half a secret. What is shown is the same wherever the cut is.
        earlier = redact(text[: _LONGEST_FIELD - _OVERLAP])
        redacted = commonprefix([redacted, earlier])  # noqa: RUF071  # of texts, not of paths
    return redacted[:_DETAIL_LIMIT]


def _safe(body: bytes, redact: Callable[[str], str]) -> bytes | None:
    """Return the envelope without secrets; None when that would take too long."""
    if len(body) > STEP:
        return None
    text = plain_text(body)
    if redact(text) == text:
        return body
    if len(body) > _MOST_CLEANED:
        return None
    try:
        envelope = msgspec.json.decode(without_half_pairs(body))
        cleaned = _cleaned(envelope, redact)
    except (msgspec.DecodeError, RecursionError):
        return None
    return body if cleaned == envelope else _rendered(cleaned)


def _cleaned(said: Any, redact: Callable[[str], str]) -> Any:
    # String by string: a mask over the raw text would miss a secret behind JSON's escapes, and would
    # take the closing quotes and braces with it.
    if isinstance(said, str):
        return redact(said)
    if isinstance(said, dict):
        return {redact(name): _cleaned(item, redact) for name, item in said.items()}
    return [_cleaned(item, redact) for item in said] if isinstance(said, list) else said


def _rendered(envelope: Any) -> bytes:
    return json.dumps(envelope, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace")
