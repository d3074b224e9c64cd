"""Renders the metrics within a bounded share of the processor: anyone may request them, at any rate.

    within the budget -> render at once
    else              -> wait until the budget allows it, then render once for all requests that wait

So a response always has the values of a moment after its request. One rendering takes about as much time as
twenty ordinary requests that are not hits.
"""

from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import Callable
from typing import NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics import exposition as openmetrics

from gateway.api.requests import Headers, accepted_ranges

_MAX_SHARE = 0.1  # of one processor, on average
_BURST_SECONDS = 0.5  # of processor time that renderings may take without a pause
_GZIP_LEVEL = 1  # compresses to a fifth; level 9 to a sixth, in five times the time


class Format(NamedTuple):
    """A format of the metrics."""

    content_type: str
    encode: Callable[[CollectorRegistry], bytes]


# All names are ASCII. So the ways of escaping that Prometheus may ask for make no difference.
TEXT = Format(CONTENT_TYPE_PLAIN_0_0_4, generate_latest)
OPENMETRICS = Format(openmetrics.CONTENT_TYPE_LATEST, openmetrics.generate_latest)
_OPENMETRICS_VERSIONS = {"", "1.0.0"}
_RANGES_OF_TEXT = {"text/plain", "text/*", "*/*"}


def choose_format(headers: Headers) -> Format:
    """Return the format that the header `Accept` prefers; text if it names neither."""
    best, highest = TEXT, 0.0
    for media_type, parameters, weight in accepted_ranges(headers, b"accept"):
        if media_type in _RANGES_OF_TEXT:
            offered = TEXT
        elif (
            media_type == "application/openmetrics-text"
            and parameters.get("version", "").strip('"') in _OPENMETRICS_VERSIONS
        ):
            offered = OPENMETRICS
        else:
            continue
        if weight > highest:
            best, highest = offered, weight
    return best


class MetricsRenderer:
    """Renders the metrics of a registry.

    `clock` is monotonic, and `cpu_clock` counts processor time; both in seconds.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._registry = registry
        self._clock = clock
        self._cpu_clock = cpu_clock
        # When all renderings so far will have taken no more than `_MAX_SHARE` of the time.
        self._paid_at = clock()
        self._waiting: dict[tuple[Format, bool], asyncio.Future[bytes]] = {}

    async def render(self, wanted: Format, *, compress: bool) -> bytes:
        """Return the metrics in this format."""
        body = self._waiting.get((wanted, compress))
        if body is None:
            if not self._waiting and self._seconds_until_next() <= 0:
                return self._render(wanted, compress=compress)
            loop = asyncio.get_running_loop()
            if not self._waiting:
                loop.call_later(self._seconds_until_next(), self._render_next)
            body = self._waiting[wanted, compress] = loop.create_future()
        return await asyncio.shield(body)

    def _seconds_until_next(self) -> float:
        return self._paid_at - self._clock() - _BURST_SECONDS / _MAX_SHARE

    def _render_next(self) -> None:
        """Render the format that was requested first, for all who wait for it."""
        wanted, compress = next(iter(self._waiting))
        body = self._waiting.pop((wanted, compress))
        try:
            body.set_result(self._render(wanted, compress=compress))
        except Exception as exc:  # noqa: BLE001  # the requests report it
            body.set_exception(exc)
        if self._waiting:
            asyncio.get_running_loop().call_later(max(self._seconds_until_next(), 0.0), self._render_next)

    def _render(self, wanted: Format, *, compress: bool) -> bytes:
        began = self._cpu_clock()
        body = wanted.encode(self._registry)
        if compress:
            body = gzip.compress(body, _GZIP_LEVEL, mtime=0)
        self._paid_at = max(self._paid_at, self._clock()) + (self._cpu_clock() - began) / _MAX_SHARE
        return body
