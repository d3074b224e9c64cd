"""The result types of a lookup, with its cache status, and of an in-flight request."""

from __future__ import annotations

from copy import copy
from enum import StrEnum
from typing import Any, NamedTuple

from gateway.domain.errors import GatewayError
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import TaskKey
from gateway.stores.base import CacheEntry


class CacheStatus(StrEnum):
    """How a lookup was answered; the label `result` of `cache_lookups_total`."""

    HIT = "hit"
    STALE = "stale"
    MISS = "miss"
    COLLAPSED = "collapsed"
    NEGATIVE = "negative"


class FetchOutcome(NamedTuple):
    """The outcome of an in-flight request, shared by all waiting callers: a snapshot or an error.

    `upstream_seconds`: duration of the query: waiting for a permit and a slot, and all calls with the delays
    between them; None if there was no query. `invoke_id`: the vendor's ID of the last call, which its support
    asks for; it may not be redacted. `span`: the context of its span, for links from other spans; None
    without tracing.
    """

    snapshot_or_error: Snapshot | GatewayError
    upstream_seconds: float | None = None
    invoke_id: str | None = None
    span: Any = None


class LookupSuccess(NamedTuple):
    """A snapshot as found by one caller's lookup.

    `age` is in seconds. `had_older_snapshot`: before the fetch, the cache had a snapshot of the task. It was
    too old to serve, or older than what the client had received. `failure`: the stale snapshot is served
    instead of this error (stale-if-error). `fetch_outcome`: the outcome of the in-flight request, if the
    caller waited for one. `entry`: the cache entry of the snapshot; only `lookup` sets it.
    """

    snapshot: Snapshot
    age: float
    cache_status: CacheStatus
    had_older_snapshot: bool = False
    failure: GatewayError | None = None
    fetch_outcome: FetchOutcome | None = None
    entry: CacheEntry | None = None

    @property
    def key(self) -> TaskKey:
        """The task of the snapshot."""
        return self.snapshot.key


class LookupFailure(NamedTuple):
    """A failure as the result of one caller's lookup, even without an in-flight request.

    The fields are those of `LookupSuccess`.
    """

    key: TaskKey
    failure: GatewayError
    cache_status: CacheStatus
    fetch_outcome: FetchOutcome | None = None

    def copy_to_raise(self) -> GatewayError:
        """Return a copy of the failure to raise, because other callers may share the original."""
        return copy(self.failure)
