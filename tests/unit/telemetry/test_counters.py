"""Counters and histograms without locks: scrapes equal those of prometheus-client."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from gateway.telemetry.counters import FastCounters, FastHistograms

BUCKETS = (0.001, 0.01, 0.1, 1.0)


def without_times(registry: CollectorRegistry) -> list[str]:
    """Return the lines of a scrape without creation times."""
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


@given(st.lists(st.sampled_from(["a", 'q"uote', "line\nbreak", "ü"])))
def test_counters_equal_those_of_the_library(labels: list[str]) -> None:
    """A counter with any labels is scraped like one of prometheus-client."""
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    counts = FastCounters("things_total", "Things.", ["kind"], registry=ours)
    counter = Counter("things_total", "Things.", ["kind"], registry=theirs)
    for label in labels:
        counts.labels(label).inc()
        counter.labels(label).inc()
    assert without_times(ours) == without_times(theirs)


@given(st.lists(st.sampled_from([*BUCKETS, 0.0, 0.0005, 0.5, 7.25, 1000.0])))
def test_histograms_equal_those_of_the_library(amounts: list[float]) -> None:
    """A histogram is scraped like one of prometheus-client, also with amounts on a bucket's bound."""
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    histograms = FastHistograms("seconds", "Seconds.", ["kind"], buckets=BUCKETS, registry=ours)
    histogram = Histogram("seconds", "Seconds.", ["kind"], buckets=BUCKETS, registry=theirs)
    for amount in amounts:
        histograms.labels("a").observe(amount)
        histogram.labels("a").observe(amount)
    assert without_times(ours) == without_times(theirs)


def test_counters_return_the_same_series_for_the_same_labels() -> None:
    """Label values of different types with the same text give the same series."""
    counts = FastCounters("things_total", "Things.", ["status"], registry=CollectorRegistry())
    assert counts.labels(200) is counts.labels("200")
    with pytest.raises(ValueError, match="status"):
        counts.labels("200", "GET")


def test_counters_are_found_by_name() -> None:
    """A scrape can be restricted to names, and a name can be registered only once."""
    registry = CollectorRegistry()
    counts = FastCounters("things_total", "Things.", ["kind"], registry=registry)
    FastHistograms("seconds", "Seconds.", ["kind"], buckets=BUCKETS, registry=registry)
    counts.labels("a").inc()
    text = generate_latest(registry.restricted_registry(["things_total"])).decode()
    assert 'things_total{kind="a"} 1.0' in text
    assert "seconds" not in text
    with pytest.raises(ValueError, match="Duplicated"):
        FastHistograms("seconds", "Seconds.", ["kind"], buckets=BUCKETS, registry=registry)


def test_counters_are_exact_while_threads_scrape() -> None:
    """Counting during scrapes on another thread loses nothing, and no scrape decreases."""
    registry = CollectorRegistry()
    count = FastCounters("things_total", "Things.", ["kind"], registry=registry).labels("a")
    seen: list[float] = []
    done = threading.Event()

    def scrape() -> None:
        while not done.is_set():
            seen.append(registry.get_sample_value("things_total", {"kind": "a"}) or 0.0)

    thread = threading.Thread(target=scrape)
    thread.start()
    for _ in range(100_000):
        count.inc()
    done.set()
    thread.join()
    assert registry.get_sample_value("things_total", {"kind": "a"}) == 100_000
    assert seen == sorted(seen)
