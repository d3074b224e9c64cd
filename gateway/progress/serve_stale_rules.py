"""Which stale snapshots may be served: stale-while-revalidate and stale-if-error (RFC 5861)."""

from __future__ import annotations

from collections.abc import Callable

from gateway.domain.errors import GatewayError
from gateway.domain.snapshot import Snapshot
from gateway.progress.outcomes import CacheStatus, LookupFailure, LookupSuccess
from gateway.settings.model import Cache
from gateway.stores.base import Store


class ServeStaleRules:
    """Applies `cache.stale_while_revalidate_seconds` and `cache.stale_if_error_seconds`.

    `settings` is the section `cache` of the settings. `clock` is the clock of `Snapshot.fetched_at`.
    """

    def __init__(self, settings: Cache, store: Store, *, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._store = store
        self._clock = clock

    def serve_stale(
        self, snapshot: Snapshot, age: float, failure: GatewayError | None = None
    ) -> LookupSuccess | None:
        """Return what a caller receives of a stale snapshot, or None if the snapshot is too old.

        The maximum age is the lifetime + `cache.stale_while_revalidate_seconds`. If a failure of the task is
        cached, it is returned with the snapshot, and the maximum age is `cache.stale_if_error_seconds`
        instead, even if that is shorter. `failure`: used in place of a cached failure.
        """
        failure = failure or self._store.cached_failure(snapshot.key)
        if failure is None:
            too_old = age >= snapshot.lifetime + self._settings.stale_while_revalidate_seconds
        else:
            too_old = age > self._settings.stale_if_error_seconds
        return None if too_old else LookupSuccess(snapshot, age, CacheStatus.STALE, failure=failure)

    def may_replace_failure(self, snapshot: Snapshot | None, seen_revision: int) -> bool:
        """Tell whether this snapshot may be served instead of a failure (stale-if-error)."""
        return (
            snapshot is not None
            and snapshot.may_follow(seen_revision)
            and self._clock() - snapshot.fetched_at <= self._settings.stale_if_error_seconds
        )

    def replace_failure(self, failure: LookupFailure, seen_revision: int) -> LookupSuccess | LookupFailure:
        """Return a stale snapshot instead of the failure, unless it is too old (stale-if-error)."""
        snapshot = self._store.last_known(failure.key)
        if snapshot is None or not self.may_replace_failure(snapshot, seen_revision):
            return failure
        age = self._clock() - snapshot.fetched_at
        return LookupSuccess(
            snapshot,
            age,
            CacheStatus.STALE,
            failure=failure.failure,
            fetch_outcome=failure.fetch_outcome,
        )
