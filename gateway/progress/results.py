"""What one caller gets of a query: a snapshot, or why there is none, and how that came about."""

from __future__ import annotations

from copy import copy
from enum import StrEnum
from typing import Any, NamedTuple

from gateway.domain.errors import GatewayError
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import TaskKey


class CacheStatus(StrEnum):
    """How an answer came about; the `result` of `cache_lookups_total`."""

    HIT = "hit"
    STALE = "stale"
    MISS = "miss"
    COLLAPSED = "collapsed"
    NEGATIVE = "negative"


class FetchResult(NamedTuple):
    """What a flight brings to all who wait for it.

    `upstream_seconds`: how long the upstream took, every attempt included; None when it was not asked.
    `invoke_id`: the vendor's id of the last call, which its support asks for. `span`: the flight's, to
    link to, where spans are made.
    """

    outcome: Snapshot | GatewayError
    upstream_seconds: float | None = None
    invoke_id: str | None = None
    span: Any = None


class CacheResult(NamedTuple):
    """A snapshot as one caller gets it.

    `age` is in seconds. `replaced_stale`: a snapshot was there, too old to show. `failure` is set
    when this stale snapshot covers one. `fetch` is that of the flight which this caller waited for.
    """

    snapshot: Snapshot
    age: float
    source: CacheStatus
    replaced_stale: bool = False
    failure: GatewayError | None = None
    fetch: FetchResult | None = None

    @property
    def key(self) -> TaskKey:
        """Which task it is about."""
        return self.snapshot.key


class FetchFailure(NamedTuple):
    """What one caller gets when there is no snapshot to show; as `CacheResult` otherwise."""

    key: TaskKey
    failure: GatewayError
    source: CacheStatus
    fetch: FetchResult | None = None

    def raised(self) -> GatewayError:
        """Return the failure to raise, for this caller alone: many may share it."""
        return copy(self.failure)
