"""Permits that this replica takes from the rate limiter that all replicas share (`Store.take_permits`).

    queries are queued -> request permits from the store -> some are granted -> serve the queue
                                 ^--------------- pause <---------------------------'

The replica requests permits only for queries that are queued, and takes none in advance. So refreshes of one
replica can be served before first queries of another. Only one request is in flight at a time. While the
store is not available, the replica uses only its own rate limiter.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

from gateway.domain.permits_reply import PermitsReply

_PAUSE_SECONDS = (0.002, 0.1)  # shortest and longest time between two requests
_FALLBACK_SECONDS = 0.5  # after a failed request, the replica uses only its own rate limiter for this time
_ELSEWHERE_VALID_SECONDS = 1.0  # how long the numbers of queries that are queued on other replicas are used


class TakePermits(Protocol):
    """Takes permits from the shared rate limiter; see `Store.take_permits`."""

    async def __call__(
        self, per_second: float, *, burst: float, refreshes: int, first_queries: int
    ) -> PermitsReply | None:
        """Return the permits; None if there is no shared rate limiter now."""


class _Queued(NamedTuple):
    refreshes: int = 0
    first_queries: int = 0


class SharedPermits:
    """The unused permits of this replica. `on_reply` is called after each request, granted or not."""

    def __init__(
        self, take: TakePermits, *, per_second: float, burst: float, on_reply: Callable[[], None]
    ) -> None:
        self._take = take
        self._per_second = per_second
        self._burst = burst
        self._on_reply = on_reply
        self._refreshes = 0
        self._first_queries = 0
        self._returned = 0  # permits put back by queries; usable for both kinds of queries
        self._queued = _Queued()
        self._elsewhere = _Queued()
        self._elsewhere_until = 0.0
        self._fallback_until = 0.0
        self._request_task: asyncio.Task[None] | None = None

    def ahead_in_other_replicas(self, *, is_refresh: bool) -> int:
        """Return how many queries of other replicas are served before a query of this replica."""
        if time.monotonic() >= self._elsewhere_until:
            return 0
        return self._elsewhere.refreshes + (0 if is_refresh else self._elsewhere.first_queries)

    def has_permit(self, *, is_refresh: bool) -> bool:
        """Tell whether a query may proceed: there is an unused permit, or no shared rate limiter now."""
        unused = self._refreshes if is_refresh else self._first_queries
        return bool(unused or self._returned) or time.monotonic() < self._fallback_until

    def take(self, *, is_refresh: bool) -> bool:
        """Take a permit for a query, if one is needed; return False if the query must wait for one."""
        if not self.has_permit(is_refresh=is_refresh):
            return False
        if is_refresh and self._refreshes:
            self._refreshes -= 1
        elif not is_refresh and self._first_queries:
            self._first_queries -= 1
        elif self._returned:
            self._returned -= 1
        return True

    def put_back(self) -> None:
        """Return a permit that a query has not used."""
        self._returned = min(self._returned + 1, math.ceil(self._burst))

    def request(self, *, refreshes: int, first_queries: int) -> None:
        """Record how many queries can use a permit now, and request permits in the background for them."""
        self._queued = _Queued(
            max(refreshes - self._refreshes, 0), max(first_queries - self._first_queries, 0)
        )
        if any(self._queued) and self._request_task is None:
            self._request_task = asyncio.get_running_loop().create_task(self._request_until_granted())

    async def _request_until_granted(self) -> None:
        try:
            while any(self._queued):
                refreshes, first_queries = self._queued
                grant = await self._take(
                    self._per_second, burst=self._burst, refreshes=refreshes, first_queries=first_queries
                )
                pause = _FALLBACK_SECONDS
                if grant is None:
                    self._fallback_until = time.monotonic() + _FALLBACK_SECONDS
                else:
                    self._fallback_until = 0.0
                    self._refreshes += grant.refreshes
                    self._first_queries += grant.first_queries
                    self._elsewhere = _Queued(grant.refreshes_elsewhere, grant.first_queries_elsewhere)
                    self._elsewhere_until = time.monotonic() + _ELSEWHERE_VALID_SECONDS
                    pause = min(max(grant.next_seconds, _PAUSE_SECONDS[0]), _PAUSE_SECONDS[1])
                self._on_reply()
                if any(self._queued):
                    await asyncio.sleep(pause)
        finally:
            self._request_task = None
