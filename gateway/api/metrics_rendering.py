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

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

_MAX_SHARE = 0.1  # of one processor, on average
_BURST_SECONDS = 0.5  # of processor time that renderings may take without a pause
_MAX_ACCEPT_LENGTH = 1000  # characters; Prometheus sends about 250, and a longer value takes long to parse
_GZIP_LEVEL = 1  # compresses to a fifth; level 9 to a sixth, in five times the time


class _Format(NamedTuple):
    """The format of a response, and whether it is compressed."""

    content_type: str
    compress: bool


class _Rendering(NamedTuple):
    """A rendering that requests wait for."""

    encode: Callable[[CollectorRegistry], bytes]
    body: asyncio.Future[bytes]


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
        self._waiting: dict[_Format, _Rendering] = {}

    async def render(self, accept: str, *, compress: bool) -> tuple[bytes, str]:
        """Return the metrics and their content type, as the header `Accept` asks for them."""
        encode, content_type = choose_encoder(accept if len(accept) <= _MAX_ACCEPT_LENGTH else "")
        wanted = _Format(content_type, compress)
        waiting = self._waiting.get(wanted)
        if waiting is None:
            if not self._waiting and self._seconds_until_next() <= 0:
                return self._render(encode, compress=compress), content_type
            loop = asyncio.get_running_loop()
            if not self._waiting:
                loop.call_later(self._seconds_until_next(), self._render_next)
            waiting = self._waiting[wanted] = _Rendering(encode, loop.create_future())
        return await asyncio.shield(waiting.body), content_type

    def _seconds_until_next(self) -> float:
        return self._paid_at - self._clock() - _BURST_SECONDS / _MAX_SHARE

    def _render_next(self) -> None:
        """Render the format that was requested first, for all who wait for it."""
        wanted = next(iter(self._waiting))
        encode, body = self._waiting.pop(wanted)
        try:
            body.set_result(self._render(encode, compress=wanted.compress))
        except Exception as exc:  # noqa: BLE001  # the requests report it
            body.set_exception(exc)
        if self._waiting:
            asyncio.get_running_loop().call_later(max(self._seconds_until_next(), 0.0), self._render_next)

    def _render(self, encode: Callable[[CollectorRegistry], bytes], *, compress: bool) -> bytes:
        began = self._cpu_clock()
        body = encode(self._registry)
        if compress:
            body = gzip.compress(body, _GZIP_LEVEL, mtime=0)
        self._paid_at = max(self._paid_at, self._clock()) + (self._cpu_clock() - began) / _MAX_SHARE
        return body
