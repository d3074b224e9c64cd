"""Redacts the envelope of a rejection. It stays byte for byte as received unless it contains a secret.

no secret in the text                 -> unchanged
a secret in a small envelope          -> redacted string by string; everything else stays
a secret in a larger envelope         -> an envelope with only the known fields, redacted
too large to search in one step       -> the same, until `is_free_of_secrets` has searched it piece by piece
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from os.path import commonprefix
from typing import Any

import msgspec

from gateway.domain.errors import UpstreamDetail, UpstreamRejected
from gateway.domain.json_text import ABSENT, plain_text, replace_lone_surrogates

# Characters, or bytes, that are searched without yielding to the event loop: about 2 ms.
SEARCH_PIECE_SIZE = 32_768
_OVERLAP = 2048  # of adjacent pieces: a secret may lie across their boundary
_MAX_CLEANED = 8192  # bytes: redaction string by string is about 100 times as slow as the search
_MAX_FIELD = 4096  # characters of a field that are searched
_DETAIL_LIMIT = 500  # characters of an upstream text that are shown


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
    """Return the exception for the envelope of a rejection, redacted."""
    redacted = detail(envelope, redact)
    known = {
        "status": status,
        "apiInvokeId": redacted.invoke_id,
        "data": None,
        "errCode": redacted.err_code,
        "errMessage": redacted.err_message,
        "subErrCode": redacted.sub_err_code,
        "subErrMessage": redacted.sub_err_message,
    }
    return rejected(_safe(body, redact) or _rendered(known), redacted)


def detail(envelope: Envelope, redact: Callable[[str], str]) -> UpstreamDetail:
    """Return the vendor's IDs, codes and messages of a rejection, redacted."""
    return UpstreamDetail(
        invoke_id=displayable(envelope.api_invoke_id, redact),
        err_code=displayable(envelope.err_code, redact),
        err_message=displayable(envelope.err_message, redact),
        sub_err_code=displayable(envelope.sub_err_code, redact),
        sub_err_message=displayable(envelope.sub_err_message, redact),
    )


def rejected(envelope: bytes, redacted: UpstreamDetail) -> UpstreamRejected:
    """Return the exception for an envelope and detail that are already redacted."""
    return UpstreamRejected("the upstream rejected the query", envelope=envelope, detail=redacted)


async def is_free_of_secrets(body: bytes, redact: Callable[[str], str]) -> bool:
    """Return whether the envelope of a rejection contains no secret.

    The body may have any size: it is searched in pieces, with a yield to the event loop before each.
    """
    await asyncio.sleep(0)  # the caller has just parsed the body
    text = plain_text(body)
    for start in range(0, len(text), SEARCH_PIECE_SIZE - _OVERLAP):
        await asyncio.sleep(0)
        piece = text[start : start + SEARCH_PIECE_SIZE]
        if redact(piece) != piece:
            return False
    return True


async def any_piece_matches(body: bytes, matches: Callable[[bytes], bool]) -> bool:
    """Return whether `matches` is true for any piece of the body.

    The body may have any size: it is searched in overlapping pieces, with a yield to the event loop after
    each.
    """
    for start in range(0, len(body), SEARCH_PIECE_SIZE - _OVERLAP):
        if matches(body[start : start + SEARCH_PIECE_SIZE]):
            return True
        await asyncio.sleep(0)
    return False


def displayable(raw: msgspec.Raw, redact: Callable[[str], str]) -> str | None:
    """Return a member as text, redacted and truncated to 500 characters; None if it is null or absent."""
    json_text = bytes(raw)
    if json_text in {b"", b"null"}:
        return None
    if json_text.startswith(b'"'):
        text: str = msgspec.json.decode(json_text)
    else:
        text = plain_text(json_text) if len(json_text) <= _MAX_FIELD else "[too long]"
    redacted = redact(text[:_MAX_FIELD])
    if len(text) > _MAX_FIELD:
        # Truncation may leave part of a secret. Only text that is the same for two cuts is shown.
        shorter = redact(text[: _MAX_FIELD - _OVERLAP])
        redacted = commonprefix([redacted, shorter])  # noqa: RUF071  # texts, not paths
    return redacted[:_DETAIL_LIMIT]


def _safe(body: bytes, redact: Callable[[str], str]) -> bytes | None:
    """Return the envelope without secrets; None if that would take too long."""
    if len(body) > SEARCH_PIECE_SIZE:
        return None
    text = plain_text(body)
    if redact(text) == text:
        return body
    if len(body) > _MAX_CLEANED:
        return None
    try:
        envelope = msgspec.json.decode(replace_lone_surrogates(body))
        cleaned = _cleaned(envelope, redact)
    except (msgspec.DecodeError, RecursionError):
        return None
    return body if cleaned == envelope else _rendered(cleaned)


def _cleaned(value: Any, redact: Callable[[str], str]) -> Any:
    # String by string: redaction of the raw text would miss a secret that contains JSON escapes, and could
    # remove closing quotes and braces.
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redact(name): _cleaned(item, redact) for name, item in value.items()}
    return [_cleaned(item, redact) for item in value] if isinstance(value, list) else value


def _rendered(envelope: Any) -> bytes:
    return json.dumps(envelope, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace")
