"""Every metric of the gateway, defined once, on a registry of its own.

Label values come from enums, route templates and exception codes: never from a caller. Names
and labels are a promise to dashboards; their meaning stands in each help text.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, GCCollector, Histogram, ProcessCollector

from gateway.telemetry.counters import FastCounters, FastHistograms

_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

_AGES = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.5, 10.0, 20.0, 30.0, 60.0)

_CALLS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)

_STORE = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


class Metrics:
    """The gateway's metrics, registered on `registry`."""

    def __init__(self, registry: CollectorRegistry, *, gateway_version: str) -> None:
        self.registry = registry
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        self.http_requests = FastCounters(
            "sd_gateway_http_requests_total",
            "Requests answered.",
            ["route", "method", "status"],
            registry=registry,
        )
        self.http_request_duration = FastHistograms(
            "sd_gateway_http_request_duration_seconds",
            "From a request's headers to its answer's end.",
            ["route"],
            buckets=_FAST,
            registry=registry,
        )
        self.http_connections = Gauge(
            "sd_gateway_http_connections", "Number of open client connections.", registry=registry
        )
        self.http_connections_refused = Counter(
            "sd_gateway_http_connections_refused_total",
            "Number of client connections refused at server.max_connections.",
            registry=registry,
        )
        self.cache_lookups = FastCounters(
            "sd_gateway_cache_lookups_total",
            "Lookups by result: hit stale miss collapsed negative.",
            ["operation", "result"],
            registry=registry,
        )
        self.answer_age = FastHistograms(
            "sd_gateway_answer_age_seconds",
            "Age of what queries were answered with; answers about tasks that have ended do not age.",
            ["operation"],
            buckets=_AGES,
            registry=registry,
        )
        self.answers_overdue = Counter(
            "sd_gateway_answers_overdue_total",
            "Of these, older than their lifetime and cache.stale_while_revalidate_seconds.",
            ["operation"],
            registry=registry,
        )
        self.cache_entries = Gauge("sd_gateway_cache_entries", "Snapshots kept.", registry=registry)
        self.cache_bytes = Gauge(
            "sd_gateway_cache_bytes",
            "Memory of all cached bodies and envelopes, in bytes.",
            registry=registry,
        )
        self.upstream_requests = FastCounters(
            "sd_gateway_upstream_requests_total",
            "Upstream calls by outcome: ok or a problem code.",
            ["operation", "outcome"],
            registry=registry,
        )
        self.upstream_request_duration = FastHistograms(
            "sd_gateway_upstream_request_duration_seconds",
            "One upstream call, from sending to the answer's end.",
            ["operation"],
            buckets=_CALLS,
            registry=registry,
        )
        self.upstream_in_flight = Gauge(
            "sd_gateway_upstream_in_flight", "Upstream calls in the air.", registry=registry
        )
        self.upstream_abandoned = Counter(
            "sd_gateway_upstream_abandoned_total",
            "Number of queued queries dropped because every caller had left.",
            ["operation"],
            registry=registry,
        )
        self.upstream_certificate_errors = Counter(
            "sd_gateway_upstream_certificate_errors_total",
            "Upstream calls not made, for nobody known vouches for upstream's certificate.",
            registry=registry,
        )
        self.upstream_retries = Counter(
            "sd_gateway_upstream_retries_total",
            "Upstream calls made again, by the problem code that made it necessary.",
            ["operation", "reason"],
            registry=registry,
        )
        self.upstream_circuit_state = Gauge(
            "sd_gateway_upstream_circuit_state",
            "1 for the state of the operation's circuit breaker: closed open half-open.",
            ["operation", "state"],
            registry=registry,
        )
        self.upstream_budget = Gauge(
            "sd_gateway_upstream_budget_per_second",
            "Upstream calls a second that settings and upstream's refusals allow now; +Inf: any number.",
            registry=registry,
        )
        self.upstream_clock_skew = Gauge(
            "sd_gateway_upstream_clock_skew_seconds",
            "Upstream's clock minus ours, by its last Date header.",
            registry=registry,
        )
        self.tasks_observed = Counter(
            "sd_gateway_tasks_observed_total",
            "Transitions of tasks to a status, as seen.",
            ["operation", "status"],
            registry=registry,
        )
        self.subscribers = Gauge(
            "sd_gateway_watchers", "Open event streams and long polls.", ["kind"], registry=registry
        )
        self.watched_tasks = Gauge(
            "sd_gateway_watched_tasks", "Tasks that somebody watches.", registry=registry
        )
        self.events_sent = FastCounters(
            "sd_gateway_events_sent_total",
            "Events written to streams: progress problem end.",
            ["event"],
            registry=registry,
        )
        self.credentials_reloads = Counter(
            "sd_gateway_credentials_reloads_total",
            "Readings of changed credential files, by result: ok or error.",
            ["result"],
            registry=registry,
        )
        self.credentials_active_slot = Gauge(
            "sd_gateway_credentials_active_slot",
            "1 for the slot whose pair signs, 0 for the other: active next.",
            ["slot"],
            registry=registry,
        )
        self.store_up = Gauge(
            "sd_gateway_store_up",
            "1 while snapshots are shared, or store.url is not set; 0 while each replica is alone.",
            registry=registry,
        )
        self.store_up.set(1)
        self.store_operation_duration = Histogram(
            "sd_gateway_store_operation_duration_seconds",
            "One operation of the shared store: take_off land fail renew token tell discard probe.",
            ["operation"],
            buckets=_STORE,
            registry=registry,
        )
        self.store_errors = Counter(
            "sd_gateway_store_errors_total",
            "Operations of the shared store that failed; read: senseless values, subscribe: lost links.",
            ["operation"],
            registry=registry,
        )
        self._build = Gauge(
            "sd_gateway_build_info",
            "1, labelled with what runs.",
            ["version", "python", "server"],
            registry=registry,
        )
        self._build.labels(gateway_version, platform.python_version(), f"uvicorn {version('uvicorn')}").set(1)

    def measure_cache(self, *, entries: Callable[[], int], size: Callable[[], int]) -> None:
        """Let the gauges of the cache ask for its entries and its bytes at each scrape; both only read."""
        self.cache_entries.set_function(entries)
        self.cache_bytes.set_function(size)
