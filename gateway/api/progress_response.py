"""The response for a task's progress: status, caching headers and body (RFC 9111, RFC 9211).

Both the application and the server's fast path use it, so their responses are the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from gateway.api.requests import Headers
from gateway.progress.results import CacheResult, CacheStatus

_HELD = frozenset({CacheStatus.HIT, CacheStatus.STALE})
# Apache's mod_deflate and mod_brotli append "-gzip" and "-br", Jetty "--gzip", others ";gzip".
_CODING = re.compile(r'(?:--?|;)(?:gzip|br|zstd|deflate)"$')
CACHE_NAMES = (b"cache-control", b"age", b"cache-status")

_OK, _NOT_MODIFIED = 200, 304
_NAMES = (*CACHE_NAMES, b"etag")
HEADER_NAMES: Mapping[int, tuple[bytes, ...]] = {
    _OK: (*_NAMES, b"content-type", b"content-length"),
    _NOT_MODIFIED: _NAMES,
}


def cache_headers(result: CacheResult) -> Headers:
    """Return Cache-Control, Age and Cache-Status of an answer made from this reading."""
    return list(zip(CACHE_NAMES, cache_values(result), strict=True))


def cache_values(result: CacheResult) -> tuple[bytes, bytes, bytes]:
    """Return the values of `CACHE_NAMES` for an answer made from this reading.

    `max-age` is the whole lifetime, in whole seconds, and `Age` is what has passed of it: a cache downstream
    subtracts the one from the other (RFC 9111, 4.2). Of a lifetime below a second, `max-age` is 1 while the
    snapshot is fresh. A stale answer that is given while a refresh runs behind it was not forwarded:
    RFC 9211 (2.1, 2.4) calls it a hit with a negative ttl.
    """
    ttl = _ttl(result)
    lifetime = result.snapshot.lifetime
    least = 1 if result.age < lifetime else 0
    return b"max-age=%d" % max(least, lifetime), b"%d" % result.age, _cache_status(result, ttl)


def unchanged_until(result: CacheResult) -> float:
    """Return when `cache_values` of this reading would be others, on the clock of its snapshot."""
    snapshot = result.snapshot
    return snapshot.fetched_at + min(int(result.age) + 1, snapshot.lifetime - _ttl(result))


def matches(known: str, etag: str) -> bool:
    """Tell whether If-None-Match names this representation (RFC 9110, 13.1.2: weak comparison).

    A tag that a compressing proxy has marked with its coding (`"…-gzip"`, `"…;gzip"`) still matches.
    """
    if known == etag:  # the usual case
        return True
    candidates = [_CODING.sub('"', part.strip().removeprefix("W/")) for part in known.split(",")]
    return etag in candidates or candidates == ["*"]


def _ttl(result: CacheResult) -> int:
    left = result.snapshot.lifetime - result.age
    return int(left) if left >= 0 else int(left) - 1  # whole seconds; once stale, never 0


def _cache_status(result: CacheResult, ttl: int) -> bytes:
    if result.failure is not None:
        return b"sd-gateway; fwd=stale; ttl=%d; detail=%s" % (ttl, result.failure.code.encode())
    source = result.source
    if source in _HELD:
        return b"sd-gateway; hit; ttl=%d" % ttl
    forward = b"stale" if result.replaced_stale else b"miss"
    collapsed = b"; collapsed" if source is CacheStatus.COLLAPSED else b""
    return b"sd-gateway; fwd=%s%s; ttl=%d" % (forward, collapsed, ttl)


def answer(result: CacheResult, known: str | None) -> tuple[int, tuple[bytes, ...], bytes]:
    """Answer 200 with the task's progress, or 304 when `known`, which is If-None-Match, has it already.

    Return the status, the values of its `HEADER_NAMES`, and the body.
    """
    snapshot = result.snapshot
    etag, body = snapshot.etag, snapshot.body
    values = (*cache_values(result), etag.encode())
    if known is not None and matches(known, etag):
        return _NOT_MODIFIED, values, b""
    return _OK, (*values, b"application/json", b"%d" % len(body)), body
