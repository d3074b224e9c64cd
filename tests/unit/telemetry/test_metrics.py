"""Metrics: the names, types and labels that dashboards depend on."""

import platform

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from gateway.telemetry.counters import CallbackCounter, FastCounters, FastHistograms
from gateway.telemetry.metrics import Metrics
from tests.support.promql import label_names

PREFIX = "sd_gateway_"
PUBLISHED: dict[str, tuple[str, tuple[str, ...]]] = {
    "http_requests": ("counter", ("route", "method", "status")),
    "http_request_duration_seconds": ("histogram", ("route",)),
    "http_connections": ("gauge", ()),
    "http_connections_limit": ("gauge", ()),
    "http_connections_refused": ("counter", ()),
    "log_lines_dropped": ("counter", ()),
    "cache_lookups": ("counter", ("operation", "result")),
    "answer_age_seconds": ("histogram", ("operation",)),
    "answers_overdue": ("counter", ("operation",)),
    "cache_entries": ("gauge", ()),
    "cache_bytes": ("gauge", ()),
    "cache_entries_limit": ("gauge", ()),
    "cache_bytes_limit": ("gauge", ()),
    "upstream_requests": ("counter", ("operation", "outcome")),
    "upstream_request_duration_seconds": ("histogram", ("operation",)),
    "upstream_in_flight": ("gauge", ()),
    "upstream_in_flight_limit": ("gauge", ()),
    "upstream_abandoned": ("counter", ("operation",)),
    "upstream_certificate_errors": ("counter", ()),
    "upstream_retries": ("counter", ("operation", "reason")),
    "upstream_repairs": ("counter", ("operation", "repair")),
    "upstream_circuit_state": ("gauge", ("operation", "state")),
    "upstream_budget_per_second": ("gauge", ()),
    "upstream_clock_skew_seconds": ("gauge", ()),
    "tasks_observed": ("counter", ("operation", "status")),
    "watchers": ("gauge", ("kind",)),
    "watchers_limit": ("gauge", ()),
    "watched_tasks": ("gauge", ()),
    "snapshots_stale": ("gauge", ()),
    "events_sent": ("counter", ("event",)),
    "credentials_reloads": ("counter", ("result",)),
    "credentials_active_slot": ("gauge", ("slot",)),
    "store_up": ("gauge", ()),
    "store_operation_duration_seconds": ("histogram", ("operation",)),
    "store_errors": ("counter", ("operation",)),
    "build_info": ("gauge", ("version", "python", "server")),
}


@pytest.fixture
def metrics() -> Metrics:
    """Return the metrics on a registry of their own."""
    return Metrics(CollectorRegistry(), gateway_version="1.2.3")


def test_metrics_have_the_published_names_types_and_labels(metrics: Metrics) -> None:
    """The metrics are exactly the published ones."""
    ours = [
        m
        for m in vars(metrics).values()
        if isinstance(m, MetricWrapperBase | FastCounters | FastHistograms | CallbackCounter)
    ]
    described = [(next(iter(metric.describe())), metric) for metric in ours]
    assert {
        family.name.removeprefix(PREFIX): (family.type, label_names(metric)) for family, metric in described
    } == PUBLISHED
    exposed = {family.name for family in metrics.registry.collect() if family.name.startswith(PREFIX)}
    assert exposed == {PREFIX + name for name in PUBLISHED}


def test_metrics_have_help_texts(metrics: Metrics) -> None:
    """The help text of every metric is a sentence."""
    for family in metrics.registry.collect():
        if family.name.startswith(PREFIX):
            assert family.documentation.endswith(".")


def test_metrics_include_build_info(metrics: Metrics) -> None:
    """build_info is 1, with the versions of the gateway, Python and the server as labels."""
    [sample] = [s for f in metrics.registry.collect() for s in f.samples if s.name == "sd_gateway_build_info"]
    assert sample.value == 1
    assert sample.labels["version"] == "1.2.3"
    assert sample.labels["python"] == platform.python_version()
    assert sample.labels["server"].startswith("uvicorn ")


def test_metrics_read_the_size_of_the_cache_when_scraped(metrics: Metrics) -> None:
    """The gauges of the cache call their functions at each scrape."""
    entries = ["a"]
    metrics.measure_cache(
        entries=entries.__len__, size=lambda: 10 * len(entries), max_entries=7, max_bytes=70
    )
    assert metrics.registry.get_sample_value("sd_gateway_cache_entries") == 1
    entries.append("b")
    assert metrics.registry.get_sample_value("sd_gateway_cache_entries") == 2
    assert metrics.registry.get_sample_value("sd_gateway_cache_bytes") == 20
    assert metrics.registry.get_sample_value("sd_gateway_cache_entries_limit") == 7
    assert metrics.registry.get_sample_value("sd_gateway_cache_bytes_limit") == 70


def test_metrics_include_the_process(metrics: Metrics) -> None:
    """Memory, CPU and garbage collector metrics are included."""
    text = generate_latest(metrics.registry).decode()
    for name in ("process_resident_memory_bytes", "process_cpu_seconds_total", "python_gc_collections_total"):
        assert f"\n{name}" in text


def test_metrics_are_valid_openmetrics(metrics: Metrics) -> None:
    """A scrape with series parses as OpenMetrics."""
    metrics.http_requests.labels("/healthz", "GET", "200").inc()
    metrics.http_request_duration.labels("/healthz").observe(0.01)
    families = {
        f.name for f in text_string_to_metric_families(generate_openmetrics(metrics.registry).decode())
    }
    assert {PREFIX + name for name in PUBLISHED} <= families


def test_metrics_use_their_own_registry() -> None:
    """Two gateways in one process have separate metrics: nothing is registered globally."""
    one, other = (Metrics(CollectorRegistry(), gateway_version="1") for _ in range(2))
    one.upstream_in_flight.inc()
    assert one.registry.get_sample_value("sd_gateway_upstream_in_flight") == 1
    assert other.registry.get_sample_value("sd_gateway_upstream_in_flight") == 0
