"""Counters and histograms for what happens at every request: plain numbers, read when they are scraped.

prometheus-client takes a lock at each count, so that threads may count; on a hit these locks would
cost as much as the answer. Here only the event loop's thread counts. Numbers only grow, so whichever
thread scrapes them finds every count that was made before.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import INF, floatToGoString

Series = TypeVar("Series")


class FastCounter:
    """One series of a counter. Who counts at every request may add to `value` himself."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def inc(self) -> None:
        """Count one more."""
        self.value += 1


class FastHistogram:
    """One series of a histogram. `bounds` are the buckets' upper ones, the last of them infinite."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * len(bounds)
        self.total = 0.0

    def observe(self, amount: float) -> None:
        """Count it in the one bucket where it belongs."""
        self.counts[bisect_left(self.bounds, amount)] += 1
        self.total += amount


class _Labelled(Collector, Generic[Series]):
    """Hands out a series for each set of label values, and knows them all."""

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str], make: Callable[[], Series]
    ) -> None:
        self.name = name
        self.label_names = tuple(labels)
        self._documentation = documentation
        self._make = make
        self._series: dict[tuple[str, ...], Series] = {}

    def labels(self, *values: object) -> Series:
        """Return the series of these label values, always the same."""
        key = tuple(map(str, values))
        if len(key) != len(self.label_names):
            raise ValueError(f"{self.name} has the labels {self.label_names}")
        if key not in self._series:
            self._series[key] = self._make()
        return self._series[key]

    def _all(self) -> list[tuple[tuple[str, ...], Series]]:
        return list(self._series.items())  # in one step: another may be made while a thread scrapes


class FastCounters(_Labelled[FastCounter]):
    """A counter by labels."""

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str], *, registry: CollectorRegistry
    ) -> None:
        super().__init__(name, documentation, labels, FastCounter)
        registry.register(self)

    def describe(self) -> Iterator[Metric]:
        """Name what is collected."""
        yield CounterMetricFamily(self.name, self._documentation, labels=self.label_names)

    def collect(self) -> Iterator[Metric]:
        """Return every series as it is now."""
        family = CounterMetricFamily(self.name, self._documentation, labels=self.label_names)
        for values, count in self._all():
            family.add_metric(values, count.value)
        yield family


class FastHistograms(_Labelled[FastHistogram]):
    """A histogram by labels."""

    def __init__(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str],
        *,
        buckets: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        bounds = (*buckets, INF)
        super().__init__(name, documentation, labels, lambda: FastHistogram(bounds))
        self._bounds = tuple(map(floatToGoString, bounds))
        registry.register(self)

    def describe(self) -> Iterator[Metric]:
        """Name what is collected."""
        yield HistogramMetricFamily(self.name, self._documentation, labels=self.label_names)

    def collect(self) -> Iterator[Metric]:
        """Return every series as it is now."""
        family = HistogramMetricFamily(self.name, self._documentation, labels=self.label_names)
        for values, spread in self._all():
            counts = accumulate(spread.counts)
            family.add_metric(values, list(zip(self._bounds, counts, strict=True)), spread.total)
        yield family
