"""Permits for upstream calls, from the rate limiter that replicas share."""

from __future__ import annotations

from typing import NamedTuple


class PermitsReply(NamedTuple):
    """The reply to a request for permits.

    Attributes:
        refreshes: Permits granted for refreshes: queries of tasks of which an older snapshot is known.
        first_queries: Permits granted for first queries: all other queries.
        next_seconds: Seconds until the next permit may be available.
        refreshes_elsewhere: Refreshes that are queued on other replicas.
        first_queries_elsewhere: First queries that are queued on other replicas.
    """

    refreshes: int
    first_queries: int
    next_seconds: float
    refreshes_elsewhere: int
    first_queries_elsewhere: int
