"""Decodes the body of a response (RFC 9110, 8.4.1). The gateway asks for no coding; a proxy may add one."""

from __future__ import annotations

import zlib

from gateway.domain.errors import UpstreamInvalid

_COMPRESSED = frozenset({"gzip", "x-gzip", "deflate"})
_DETECT_FORMAT = 47  # gzip or zlib


def decode_body(body: bytes, coding: str, *, limit: int) -> bytes:
    """Return the decoded body. Decompression stops beyond `limit` bytes.

    Raises: UpstreamInvalid if the body is larger, incomplete, or not in this coding.
    """
    coding = coding.strip().lower()
    if coding in _COMPRESSED:
        body = _decompress(body, limit)
    elif coding not in {"identity", ""}:
        raise UpstreamInvalid("the upstream's answer has an unknown content encoding")
    if len(body) > limit:
        raise UpstreamInvalid("the upstream's answer is too large")
    return body


def _decompress(body: bytes, limit: int) -> bytes:
    if not body:
        return body  # a response without content, as to an error
    inflate = zlib.decompressobj(wbits=_DETECT_FORMAT)
    try:
        decoded = inflate.decompress(body, limit + 1)
    except zlib.error as exc:
        raise UpstreamInvalid("the upstream's answer does not match its content encoding") from exc
    if len(decoded) <= limit:
        if not inflate.eof:  # the checksum at the end was not reached
            raise UpstreamInvalid("the upstream's compressed answer is incomplete")
        if inflate.unused_data:
            raise UpstreamInvalid("the upstream's compressed answer has bytes after its end")
    return decoded
