"""Responses to simple requests: they are built before the application handles the request.

A simple request is a GET with a target of one task without percent-encoding, and without a header that only
the routes handle. All others go to the routes. Only the routes send errors, wait for a change, or read
bodies. The responses are counted, timed and logged as in `middleware.RequestTelemetry`. The server's fast
path writes them to the socket, and also waits for the result of a miss. Under other servers,
`CachedResponsesFirst` sends hits, and the routes handle misses.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.api.client_limits import ClientTokenBuckets, client_key
from gateway.api.progress_response import (
    HEADER_NAMES,
    build_response,
    seen_revision_of,
    unchanged_until,
)
from gateway.api.request_log import (
    OutcomeLabels,
    RequestLog,
    outcome_labels,
    record_outcome,
    sampling_key,
)
from gateway.api.requests import (
    SECURITY_HEADERS,
    WAITED_SECONDS,
    Headers,
    client_request_id,
    header,
    is_cross_site,
    new_request_id,
)
from gateway.api.task_parameters import PROGRESS, SimpleTargetParser
from gateway.api.trusted_hosts import TrustedHosts
from gateway.domain.entity_tag import EntityTags
from gateway.domain.task import Operation, TaskKey
from gateway.progress.outcomes import CacheStatus, LookupSuccess
from gateway.progress.service import ProgressService
from gateway.telemetry.counters import FastCounter
from gateway.telemetry.log_sampling import LogSampler, LogSeries
from gateway.telemetry.metrics import Metrics

_ROUTE = f"{PROGRESS}/{{taskId}}"  # the route template, for metrics and log lines
_HIT = CacheStatus.HIT
_OK = 200
_MAX_ENTRIES = 16_384
_MAX_BYTES = 8_388_608  # of snapshots, possibly evicted from the store already, and rendered responses
_CLEAR_SECONDS = 1.0  # then each task is looked up in the store again, whose eviction order follows use
_MAX_ETAG_CHARS = 64  # longer than our entity tags; clients may send kilobytes
_STALE_REUSE_SECONDS = 0.01  # for a stale response: its background refresh may have failed since
# Requests with these headers have a body, or need more than an immediate response.
_UNSUPPORTED_HEADERS = frozenset({b"content-length", b"transfer-encoding", b"expect", b"upgrade", b"prefer"})


class RequestTraits(NamedTuple):
    """The headers that matter to a cached response; `request_id` is the client's X-Request-Id, if valid."""

    if_none_match: str | None
    request_id: bytes | None
    headers: Headers


@dataclass(slots=True, eq=False)
class CachedResponse:
    """A response that can be reused until `expires_at`, while its snapshot is the latest.

    `values` are the values of the headers in `CachedResponses.names` for the status; the request ID follows
    them. `counter` counts the responses, `log_series` samples their log lines. `rendered` is for the
    renderer: the server's headers, and the rendered head.
    """

    result: LookupSuccess
    status: int
    values: tuple[bytes, ...]
    body: bytes
    counter: FastCounter
    log_series: LogSeries
    expires_at: float = 0.0
    rendered: tuple[object, bytes] = (None, b"")


class CachedResponses:
    """Serves cached responses, or leaves requests to the routes.

    With `cross_origin`, requests with `Origin` go to the routes; with a `limiter`, those with one of the
    `address_headers`. `set_client` sets the client in a scope, as `ClientAddress` does. `clock` is the clock
    of the log sampler and the service.
    """

    def __init__(
        self,
        service: ProgressService,
        *,
        tags: EntityTags,
        operations: Collection[Operation],
        root_path: str,
        hosts: TrustedHosts,
        cross_origin: bool,
        limiter: ClientTokenBuckets | None,
        address_headers: Sequence[str] = (),
        metrics: Metrics,
        log_sampler: LogSampler,
        set_client: Callable[[Scope], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._service = service
        self._lookup = service.lookup
        self._may_serve_again = service.may_serve_again
        self._tags = tags
        self._parse_target = SimpleTargetParser(operations, root_path=root_path).parse
        self._hosts = hosts
        self._limiter = limiter
        common = [*([(b"vary", b"Origin")] if cross_origin else []), *SECURITY_HEADERS]
        self._common_values = tuple(value for _, value in common)
        self.names = {
            status: (*names, *(name for name, _ in common)) for status, names in HEADER_NAMES.items()
        }
        self._unsupported_headers = _UNSUPPORTED_HEADERS.union(
            [b"origin"] if cross_origin else (),
            [name.lower().encode() for name in address_headers] if limiter is not None else (),
        )
        self._counters = {
            status: metrics.http_requests.labels(_ROUTE, "GET", status) for status in HEADER_NAMES
        }
        self._durations = metrics.http_request_duration.labels(_ROUTE)
        self._request_log = RequestLog(log_sampler)
        self._log_sampler = log_sampler
        self._set_client = set_client
        self._log_series = {
            (status, cache_status): self._sample(status, (cache_status, None))
            for status in HEADER_NAMES
            for cache_status in CacheStatus
        }
        self._clock = clock
        # By target and If-None-Match, for the current second. None: requested once so far.
        self._entries: dict[tuple[bytes, str | None], CachedResponse | None] = {}
        self._clear_at = 0.0
        self._entry_bytes = 0

    def traits(self, headers: Headers) -> RequestTraits | None:
        """Return the traits of a request with these headers, or None if it must be handled by the routes."""
        names = {name for name, _ in headers}
        if not names.isdisjoint(self._unsupported_headers) or not self._hosts.trust(headers):
            return None
        if b"sec-fetch-site" in names and is_cross_site(headers):
            return None
        if_none_match = header(headers, b"if-none-match") if b"if-none-match" in names else None
        request_id = client_request_id(headers) if b"x-request-id" in names else None
        return RequestTraits(if_none_match, request_id, headers)

    def answer(
        self, target: bytes, traits: RequestTraits, client: tuple[str, int] | None
    ) -> tuple[CachedResponse, bytes] | None:
        """Return the response to GET `target`, a raw request target, and the request ID; or None."""
        began = self._clock()
        limiter = self._limiter
        if limiter is not None and not limiter.would_admit(_host(client)):
            return None
        hit = self._entries.get((target, traits.if_none_match))
        if hit is None or began >= hit.expires_at or not self._is_current(hit, began):
            hit = self._build(target, traits.if_none_match, began)
            if hit is None:
                return None
        if limiter is not None:
            limiter.admit(_host(client))
        return hit, self._record(hit, traits, began)

    def task_of_miss(self, target: bytes) -> TaskKey | None:
        """Return the task if `wait` may handle a request that `answer` has not answered; else None.

        With a limiter, the routes handle misses.
        """
        return None if self._limiter is not None else self._parse_target(target)

    async def wait(self, key: TaskKey, traits: RequestTraits, scope: Scope) -> tuple[CachedResponse, bytes]:
        """Wait for the result of a miss; return the response, and the request ID.

        If this coroutine is cancelled, the client leaves the in-flight request. If it raises an exception,
        the state in `scope` has what the request log needs. Raises: GatewayError.
        """
        began = self._clock()
        self._set_client(scope)
        client, if_none_match = client_key(scope), traits.if_none_match
        seen_revision = seen_revision_of(self._service, self._tags, key, if_none_match)
        try:
            # `get` looks up again: the snapshot may have arrived since `answer` was called.
            outcome = await self._service.get(key, client=client, seen_revision=seen_revision)
            result = record_outcome(scope, outcome)
        except BaseException:
            scope["state"][WAITED_SECONDS] = self._clock() - began
            raise
        response = self._make(result, *build_response(result, if_none_match))
        return response, self._record(response, traits, began)

    def _build(self, target: bytes, if_none_match: str | None, now: float) -> CachedResponse | None:
        key = self._parse_target(target)
        result = None if key is None else self._lookup(key)
        if result is None:
            return None
        status, values, body = build_response(result, if_none_match)
        if if_none_match is not None and status == _OK:
            snapshot = result.snapshot
            if self._tags.revision(if_none_match, snapshot.key) > snapshot.version and not snapshot.terminal:
                return None  # the client has received a newer one
        hit = self._make(result, status, values, body)
        if result.failure is None:
            expires_at = unchanged_until(result)
            if result.cache_status is not _HIT:
                expires_at = min(expires_at, now + _STALE_REUSE_SECONDS)
            self._store(target, if_none_match, hit, now, expires_at)
        return hit

    def _make(
        self, result: LookupSuccess, status: int, values: tuple[bytes, ...], body: bytes
    ) -> CachedResponse:
        cache_status, failure = result.cache_status, result.failure
        if failure is None:
            log_series = self._log_series[status, cache_status]
        else:
            log_series = self._sample(status, outcome_labels(result))
        return CachedResponse(
            result, status, values + self._common_values, body, self._counters[status], log_series
        )

    def _record(self, response: CachedResponse, traits: RequestTraits, began: float) -> bytes:
        """Count, time and log a response; return the request ID."""
        request_id = traits.request_id or new_request_id()
        now = self._clock()
        response.counter.value += 1
        self._durations.observe(now - began)
        suppressed = response.log_series.take(now)
        if suppressed is not None:
            self._log(response, traits, request_id, seconds=now - began, suppressed=suppressed)
        return request_id

    def _is_current(self, hit: CachedResponse, now: float) -> bool:
        entry = hit.result.entry
        return entry is not None and self._may_serve_again(entry, now)

    def _sample(self, status: int, labels: OutcomeLabels) -> LogSeries:
        return self._log_sampler.kind(sampling_key(_ROUTE, status, None, labels))

    def _store(
        self, target: bytes, if_none_match: str | None, hit: CachedResponse, now: float, expires_at: float
    ) -> None:
        """Store a response only when it is built twice within one second."""
        if if_none_match is not None and len(if_none_match) > _MAX_ETAG_CHARS:
            return
        if now >= self._clear_at or len(self._entries) >= _MAX_ENTRIES:
            self._clear(now)
        if (target, if_none_match) not in self._entries:
            self._entries[target, if_none_match] = None
            return
        snapshot = hit.result.snapshot
        size = 2 * len(snapshot.body) + len(snapshot.envelope)  # the rendered response has a copy of the body
        if self._entry_bytes + size > _MAX_BYTES:
            self._clear(now)
        if size <= _MAX_BYTES:
            hit.expires_at = expires_at
            self._entries[target, if_none_match] = hit
            self._entry_bytes += size

    def _clear(self, now: float) -> None:
        self._entries.clear()
        self._entry_bytes = 0
        self._clear_at = now + _CLEAR_SECONDS

    def _log(
        self,
        hit: CachedResponse,
        traits: RequestTraits,
        request_id: bytes,
        *,
        seconds: float,
        suppressed: int,
    ) -> None:
        state = {"request_id": request_id.decode(), "outcomes": (hit.result,)}
        self._request_log.write(
            {"headers": traits.headers, "state": state},
            method="GET",
            route=_ROUTE,
            status=hit.status,
            seconds=seconds,
            suppressed=suppressed,
        )


class CachedResponsesFirst:
    """Middleware that serves cached responses under any ASGI server."""

    def __init__(self, app: ASGIApp, *, hits: CachedResponses) -> None:
        self._app = app
        self._hits = hits

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve a cached response, or pass the request on without a frame that lives as long as a stream."""
        cached = self._find(scope)
        return self._app(scope, receive, send) if cached is None else self._send(*cached, send)

    async def _send(self, hit: CachedResponse, request_id: bytes, send: Send) -> None:
        names = self._hits.names[hit.status]
        headers = [*zip(names, hit.values, strict=True), (b"x-request-id", request_id)]
        await send({"type": "http.response.start", "status": hit.status, "headers": headers})
        await send({"type": "http.response.body", "body": hit.body})

    def _find(self, scope: Scope) -> tuple[CachedResponse, bytes] | None:
        if scope["type"] != "http" or scope["method"] != "GET" or not scope.get("raw_path"):
            return None
        traits = self._hits.traits(scope["headers"])
        if traits is None:
            return None
        target, query = scope["raw_path"], scope["query_string"]
        return self._hits.answer(b"%b?%b" % (target, query) if query else target, traits, scope.get("client"))


def _host(client: tuple[str, int] | None) -> str:
    return client[0] if client else ""
