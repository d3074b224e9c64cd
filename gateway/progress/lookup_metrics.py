"""The metrics of lookups: how many had which result, and how old the snapshots were that callers received."""

from __future__ import annotations

from gateway.domain.snapshot import Snapshot
from gateway.domain.task import Operation
from gateway.progress.outcomes import CacheStatus
from gateway.settings.model import Cache as CacheSettings
from gateway.telemetry.metrics import Metrics


class LookupMetrics:
    """Counts lookups and observes ages. A terminal snapshot has no age, because it stays true.

    Attributes:
        hits: The counter of the hits of each operation. Every hit uses it directly, without a method call.
        observe_age: A function of each operation that observes an age in seconds, for the same reason.
    """

    def __init__(self, metrics: Metrics, settings: CacheSettings) -> None:
        self._stale_seconds = settings.stale_while_revalidate_seconds
        self._counters = {
            (operation, cache_status): metrics.cache_lookups.labels(operation, cache_status)
            for operation in Operation
            for cache_status in CacheStatus
        }
        self.hits = {operation: self._counters[operation, CacheStatus.HIT] for operation in Operation}
        self.observe_age = {
            operation: metrics.answer_age.labels(operation).observe for operation in Operation
        }
        self._too_old = {operation: metrics.answers_too_old.labels(operation) for operation in Operation}

    def count(self, operation: Operation, cache_status: CacheStatus) -> None:
        """Count a lookup."""
        self._counters[operation, cache_status].inc()

    def record_age(self, snapshot: Snapshot, age: float) -> None:
        """Observe the age of a snapshot, in seconds, and count it if it is beyond stale-while-revalidate."""
        if snapshot.terminal:
            return
        operation = snapshot.key.operation
        self.observe_age[operation](age)
        if age >= snapshot.lifetime + self._stale_seconds:
            self._too_old[operation].inc()
