"""The response for a task's progress: status, caching headers and body (RFC 9111, RFC 9211).

Both the application and the server's fast path use it, so their responses are the same.
"""

from __future__ import annotations

from collections.abc import Mapping

from gateway.api.requests import Headers
from gateway.domain.entity_tag import EntityTags, matches
from gateway.domain.task import TaskKey
from gateway.progress.outcomes import CacheStatus, LookupSuccess
from gateway.progress.service import ProgressService

_CACHED = frozenset({CacheStatus.HIT, CacheStatus.STALE})
CACHE_NAMES = (b"cache-control", b"age", b"cache-status")

_OK, _NOT_MODIFIED = 200, 304
_NAMES = (*CACHE_NAMES, b"etag")
HEADER_NAMES: Mapping[int, tuple[bytes, ...]] = {
    _OK: (*_NAMES, b"content-type", b"content-length"),
    _NOT_MODIFIED: _NAMES,
}


def cache_headers(result: LookupSuccess) -> Headers:
    """Return Cache-Control, Age and Cache-Status of a response with this result."""
    return list(zip(CACHE_NAMES, cache_values(result), strict=True))


def cache_values(result: LookupSuccess) -> tuple[bytes, bytes, bytes]:
    """Return the values of `CACHE_NAMES` for a response with this result.

    `max-age` is the whole lifetime in seconds, rounded down, and `Age` is the snapshot's age: a downstream
    cache subtracts one from the other (RFC 9111, 4.2). For a lifetime below one second, `max-age` is 1 while
    the snapshot is fresh. A stale response with a background refresh is not a forwarded request: RFC 9211
    (2.1, 2.4) calls it a hit with a negative ttl.
    """
    ttl = _ttl(result)
    lifetime = result.snapshot.lifetime
    least = 1 if result.age < lifetime else 0
    return b"max-age=%d" % max(least, lifetime), b"%d" % result.age, _cache_status(result, ttl)


def unchanged_until(result: LookupSuccess) -> float:
    """Return when `cache_values` of this result will change, on the clock of its snapshot."""
    snapshot = result.snapshot
    return snapshot.fetched_at + min(int(result.age) + 1, snapshot.lifetime - _ttl(result))


def age_seconds(age: float) -> float:
    """Return the age of a snapshot as the member `ageSeconds` shows it: in steps of 0.1 s, not negative."""
    return round(max(age, 0.0), 1)


def _ttl(result: LookupSuccess) -> int:
    left = result.snapshot.lifetime - result.age
    return int(left) if left >= 0 else int(left) - 1  # whole seconds; once stale, never 0


def _cache_status(result: LookupSuccess, ttl: int) -> bytes:
    if result.failure is not None:
        return b"sd-gateway; fwd=stale; ttl=%d; detail=%s" % (ttl, result.failure.code.encode())
    cache_status = result.cache_status
    if cache_status in _CACHED:
        return b"sd-gateway; hit; ttl=%d" % ttl
    forward = b"stale" if result.had_older_snapshot else b"miss"
    collapsed = b"; collapsed" if cache_status is CacheStatus.COLLAPSED else b""
    return b"sd-gateway; fwd=%s%s; ttl=%d" % (forward, collapsed, ttl)


def build_response(result: LookupSuccess, if_none_match: str | None) -> tuple[int, tuple[bytes, ...], bytes]:
    """Build the response: 200 with the task's progress, or 304 if If-None-Match has its entity tag.

    Returns: the status, the values of its `HEADER_NAMES`, and the body.
    """
    snapshot = result.snapshot
    etag, body = snapshot.etag, snapshot.body
    values = (*cache_values(result), etag.encode())
    if if_none_match is not None and matches(if_none_match, etag):
        return _NOT_MODIFIED, values, b""
    return _OK, (*values, b"application/json", b"%d" % len(body)), body


def seen_revision_of(
    service: ProgressService, tags: EntityTags, key: TaskKey, if_none_match: str | None
) -> int:
    """Return the newest revision that this client has seen; 0 if any snapshot may be the response."""
    if if_none_match is None:
        return 0
    known = service.peek(key)
    if known is not None and matches(if_none_match, known.snapshot.etag):
        return 0
    return tags.revision(if_none_match, key)
