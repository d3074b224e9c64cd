"""How an answer's age and origin are told in headers, and what a caller has already (RFC 9111, RFC 9211)."""

from __future__ import annotations

from gateway.service import Reading, Source

Headers = list[tuple[bytes, bytes]]


def cache_headers(reading: Reading) -> Headers:
    """Return Cache-Control, Age and Cache-Status of an answer made from this reading.

    `max-age` is what is left of the freshness, in whole seconds. A stale answer that is given while
    a refresh runs behind it was not forwarded: RFC 9211 (2.1, 2.4) calls it a hit with a negative ttl.
    """
    left = reading.snapshot.lifetime - reading.age
    ttl = int(left) if left >= 0 else int(left) - 1  # whole seconds; once stale, never 0
    return [
        (b"cache-control", b"max-age=%d" % max(ttl, 0)),
        (b"age", b"%d" % reading.age),
        (b"cache-status", _cache_status(reading, ttl)),
    ]


def matches(known: str, etag: str) -> bool:
    """Tell whether If-None-Match names this representation (RFC 9110, 13.1.2: weak comparison)."""
    candidates = [part.strip().removeprefix("W/") for part in known.split(",")]
    return etag in candidates or candidates == ["*"]


def _cache_status(reading: Reading, ttl: int) -> bytes:
    if reading.failure is not None:
        return b"sd-gateway; fwd=stale; ttl=%d; detail=%s" % (ttl, reading.failure.code.encode())
    if reading.source in {Source.HIT, Source.STALE}:
        return b"sd-gateway; hit; ttl=%d" % ttl
    forward = b"stale" if reading.replaced_stale else b"miss"
    collapsed = b"; collapsed" if reading.source is Source.COLLAPSED else b""
    return b"sd-gateway; fwd=%s%s; ttl=%d" % (forward, collapsed, ttl)
