"""Counters and histograms without locks, for events that occur with every request.

prometheus-client takes a lock for each increment, so that any thread may count. On a cache hit these locks
would cost as much as the response. Here only the event loop's thread counts. The numbers only grow, and a
scrape on any thread sees every earlier increment.
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
    """One series of a counter. A hot path may increment `value` directly."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def inc(self) -> None:
        """Increment the counter by one."""
        self.value += 1


class FastHistogram:
    """One series of a histogram. `bounds` are the upper bounds of the buckets; the last one is infinite."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * len(bounds)
        self.total = 0.0

    def observe(self, amount: float) -> None:
        """Count an observation in its bucket. Buckets become cumulative when they are scraped."""
        self.counts[bisect_left(self.bounds, amount)] += 1
        self.total += amount


class _Labelled(Collector, Generic[Series]):
    """A metric with labels: one series for each combination of label values."""

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str], make: Callable[[], Series]
    ) -> None:
        self.name = name
        self.label_names = tuple(labels)
        self._documentation = documentation
        self._make = make
        self._series: dict[tuple[str, ...], Series] = {}

    def labels(self, *values: object) -> Series:
        """Return the series of these label values. Equal values return the same object.

        Raises:
            ValueError: The number of values is not that of the labels.
        """
        key = tuple(map(str, values))
        if len(key) != len(self.label_names):
            raise ValueError(f"{self.name} has the labels {self.label_names}")
        if key not in self._series:
            self._series[key] = self._make()
        return self._series[key]

    def _all(self) -> list[tuple[tuple[str, ...], Series]]:
        return list(
            self._series.items()
        )  # a copy in one step: the event loop may add a series during a scrape


class FastCounters(_Labelled[FastCounter]):
    """A counter with labels."""

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str], *, registry: CollectorRegistry
    ) -> None:
        super().__init__(name, documentation, labels, FastCounter)
        registry.register(self)

    def describe(self) -> Iterator[Metric]:
        """Yield the metric without samples, for registration."""
        yield CounterMetricFamily(self.name, self._documentation, labels=self.label_names)

    def collect(self) -> Iterator[Metric]:
        """Yield the metric with the current value of every series."""
        family = CounterMetricFamily(self.name, self._documentation, labels=self.label_names)
        for values, counter in self._all():
            family.add_metric(values, counter.value)
        yield family


class CallbackCounter(Collector):
    """A counter without labels, whose value `read` returns at each scrape, on any thread."""

    def __init__(
        self, name: str, documentation: str, read: Callable[[], int], *, registry: CollectorRegistry
    ) -> None:
        self.name = name
        self.label_names: tuple[str, ...] = ()
        self._documentation = documentation
        self._read = read
        registry.register(self)

    def describe(self) -> Iterator[Metric]:
        """Yield the metric without samples, for registration."""
        yield CounterMetricFamily(self.name, self._documentation)

    def collect(self) -> Iterator[Metric]:
        """Yield the metric with its current value."""
        yield CounterMetricFamily(self.name, self._documentation, value=self._read())


class FastHistograms(_Labelled[FastHistogram]):
    """A histogram with labels."""

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
        """Yield the metric without samples, for registration."""
        yield HistogramMetricFamily(self.name, self._documentation, labels=self.label_names)

    def collect(self) -> Iterator[Metric]:
        """Yield the metric with the current value of every series."""
        family = HistogramMetricFamily(self.name, self._documentation, labels=self.label_names)
        for values, histogram in self._all():
            counts = accumulate(histogram.counts)
            family.add_metric(values, list(zip(self._bounds, counts, strict=True)), histogram.total)
        yield family
