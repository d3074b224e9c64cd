"""Hits: answers that are there already, and are given before anything is made of a request.

Only the plainest requests are answered: GET, a target without anything odd in it, and no header that asks
for more than a hit can give. There is no answer for any other, and the routes give it: whatever is refused,
waited for or read from a body is their affair alone. What is answered is counted, timed and logged as
`middleware.Telemetry` does. Whoever has a request asks: the edge, which renders a hit for the wire, or else
`CachedResponsesFirst`, which sends it as ASGI has it.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.api.client_limits import ClientRateLimiter
from gateway.api.progress_response import HEADER_NAMES, answer, unchanged_until
from gateway.api.request_log import RequestLog, Verdict, kind, verdict
from gateway.api.requests import (
    SECURITY_HEADERS,
    Headers,
    given_request_id,
    header,
    is_cross_site,
    new_request_id,
)
from gateway.api.task_parameters import PROGRESS, PlainTargets
from gateway.api.trusted_hosts import TrustedHosts
from gateway.domain.snapshot import Operation
from gateway.progress.results import CacheResult, CacheStatus
from gateway.progress.service import ProgressService
from gateway.telemetry.counters import FastCounter
from gateway.telemetry.log_sampling import LogSampler, LogSeries
from gateway.telemetry.metrics import Metrics

_ROUTE = f"{PROGRESS}/{{taskId}}"  # in metrics and log lines, the application's template of the path
_HIT = CacheStatus.HIT
_MOST_MADE = 16_384
_MOST_BYTES = 8_388_608  # of snapshots and rendered answers: they may have had to make room in the store
_MADE_SECONDS = 1.0  # then each task is looked up again, which the store takes for a sign of use
_LONGEST_KNOWN = 64  # characters: more than our entity tags have, and a caller may send kilobytes of others
_STALE_SECONDS = 0.01  # for which a stale answer is given again: then its refresh may have failed
# A body, or a wish for more than an answer at once.
_MORE = frozenset({b"content-length", b"transfer-encoding", b"expect", b"upgrade", b"prefer"})


class RequestTraits(NamedTuple):
    """What a request's headers ask of a hit: `known` is If-None-Match, `request_id` the caller's own."""

    known: str | None
    request_id: bytes | None
    headers: Headers


@dataclass(slots=True, eq=False)
class CachedResponse:
    """An answer, which can be given again `until` then, while its snapshot is the newest.

    `values` are those of the headers that `CachedResponses.names` has for the status; the request's id comes
    behind them. `count` counts it, `line` is the series of its log line. The renderer keeps `rendered`.
    """

    result: CacheResult
    status: int
    values: tuple[bytes, ...]
    body: bytes
    count: FastCounter
    line: LogSeries
    until: float = 0.0
    rendered: tuple[object, bytes] = (None, b"")


class CachedResponses:
    """Answers hits, or leaves them to the routes.

    With `cross_origin` an answer may differ by the caller's origin, with a `limiter` by the address that
    proxies vouch for: requests that tell these are left to the routes. `clock` is that of the sampler and of
    the service.
    """

    def __init__(
        self,
        service: ProgressService,
        *,
        operations: Collection[Operation],
        root_path: str,
        hosts: TrustedHosts,
        cross_origin: bool,
        limiter: ClientRateLimiter | None,
        metrics: Metrics,
        log_sampler: LogSampler,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lookup = service.lookup
        self._still_current = service.still_current
        self._task = PlainTargets(operations, root_path=root_path).task
        self._hosts = hosts
        self._limiter = limiter
        added = [*([(b"vary", b"Origin")] if cross_origin else []), *SECURITY_HEADERS]
        self._added = tuple(value for _, value in added)
        self.names = {
            status: (*names, *(name for name, _ in added)) for status, names in HEADER_NAMES.items()
        }
        self._more = _MORE.union(
            [b"origin"] if cross_origin else (), [b"x-forwarded-for"] if limiter is not None else ()
        )
        self._counts = {
            status: metrics.http_requests.labels(_ROUTE, "GET", status) for status in HEADER_NAMES
        }
        self._durations = metrics.http_request_duration.labels(_ROUTE)
        self._request_log = RequestLog(log_sampler)
        self._log_sampler = log_sampler
        self._lines = {status: self._line(status, (_HIT, None)) for status in HEADER_NAMES}
        self._clock = clock
        # Of this second, for a crowd that asks for the same; None: asked for once.
        self._made: dict[tuple[bytes, str | None], CachedResponse | None] = {}
        self._empty_at = 0.0
        self._made_bytes = 0

    def traits(self, headers: Headers) -> RequestTraits | None:
        """Return what these headers ask of a hit, or None when it is more than that."""
        names = {name for name, _ in headers}
        if not names.isdisjoint(self._more) or not self._hosts.trust(headers):
            return None
        if b"sec-fetch-site" in names and is_cross_site(headers):
            return None
        known = header(headers, b"if-none-match") if b"if-none-match" in names else None
        request_id = given_request_id(headers) if b"x-request-id" in names else None
        return RequestTraits(known, request_id, headers)

    def answer(
        self, target: bytes, traits: RequestTraits, client: tuple[str, int] | None
    ) -> tuple[CachedResponse, bytes] | None:
        """Return the answer to a GET for `target`, which is as it came, and the request's id; or None."""
        began = self._clock()
        limiter = self._limiter
        if limiter is not None and not limiter.would_admit(_host(client)):
            return None
        hit = self._made.get((target, traits.known))
        if hit is None or began >= hit.until or not self._still_current(hit.result.snapshot, began):
            hit = self._make(target, traits.known, began)
            if hit is None:
                return None
        if limiter is not None:
            limiter.admit(_host(client))
        request_id = traits.request_id or new_request_id()
        now = self._clock()
        hit.count.value += 1
        self._durations.observe(now - began)
        unnotified = hit.line.take(now)
        if unnotified is not None:
            self._tell(hit, traits, request_id, seconds=now - began, unnotified=unnotified)
        return hit, request_id

    def _make(self, target: bytes, known: str | None, now: float) -> CachedResponse | None:
        key = self._task(target)
        result = None if key is None else self._lookup(key)
        if result is None:
            return None
        status, values, body = answer(result, known)
        fresh = result.source is _HIT
        line = self._lines[status] if fresh else self._line(status, verdict(result))
        hit = CachedResponse(result, status, values + self._added, body, self._counts[status], line)
        if result.failure is None:
            until = unchanged_until(result)
            self._keep(target, known, hit, now, until if fresh else min(until, now + _STALE_SECONDS))
        return hit

    def _line(self, status: int, how: Verdict) -> LogSeries:
        return self._log_sampler.kind(kind(_ROUTE, status, None, how))

    def _keep(self, target: bytes, known: str | None, hit: CachedResponse, now: float, until: float) -> None:
        """Keep an answer that is made for a second time within a second."""
        if known is not None and len(known) > _LONGEST_KNOWN:
            return
        if now >= self._empty_at or len(self._made) >= _MOST_MADE:
            self._forget(now)
        if (target, known) not in self._made:
            self._made[target, known] = None
            return
        snapshot = hit.result.snapshot
        size = 2 * len(snapshot.body) + len(snapshot.envelope)  # its body stands in the rendered one, too
        if self._made_bytes + size > _MOST_BYTES:
            self._forget(now)
        if size <= _MOST_BYTES:
            hit.until = until
            self._made[target, known] = hit
            self._made_bytes += size

    def _forget(self, now: float) -> None:
        self._made.clear()
        self._made_bytes = 0
        self._empty_at = now + _MADE_SECONDS

    def _tell(
        self,
        hit: CachedResponse,
        traits: RequestTraits,
        request_id: bytes,
        *,
        seconds: float,
        unnotified: int,
    ) -> None:
        state = {"request_id": request_id.decode(), "outcomes": (hit.result,)}
        self._request_log.write(
            {"headers": traits.headers, "state": state},
            method="GET",
            route=_ROUTE,
            status=hit.status,
            seconds=seconds,
            unnotified=unnotified,
        )


class CachedResponsesFirst:
    """Answers hits under any ASGI server, before the application does anything."""

    def __init__(self, app: ASGIApp, *, hits: CachedResponses) -> None:
        self._app = app
        self._hits = hits

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Answer a hit, or pass the request on, without a frame that would live as long as a stream."""
        found = self._find(scope)
        return self._app(scope, receive, send) if found is None else self._answer(*found, send)

    async def _answer(self, hit: CachedResponse, request_id: bytes, send: Send) -> None:
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
