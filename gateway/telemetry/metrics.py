"""The Prometheus metrics of the gateway, on a registry of their own.

Label values come from enums, route templates and exception codes, never from a caller. Names and labels are
part of the API, because dashboards and alerts depend on them.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, GCCollector, Histogram, ProcessCollector

from gateway.telemetry.counters import CallbackCounter, FastCounters, FastHistograms
from gateway.telemetry.logs import lost_lines

_REQUEST_BUCKETS = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)

_AGE_BUCKETS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.5, 10.0, 20.0, 30.0, 60.0)

_UPSTREAM_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)

_STORE_BUCKETS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


class Metrics:
    """The gateway's metrics, registered on `registry`."""

    def __init__(self, registry: CollectorRegistry, *, gateway_version: str) -> None:
        self.registry = registry
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        self.http_requests = FastCounters(
            "sd_gateway_http_requests_total",
            "Number of HTTP requests that have ended. With status 499, the client left before the response.",
            ["route", "method", "status"],
            registry=registry,
        )
        self.http_request_duration = FastHistograms(
            "sd_gateway_http_request_duration_seconds",
            "Duration of requests, from their headers to the end of the response, in seconds.",
            ["route"],
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )
        self.http_connections = Gauge(
            "sd_gateway_http_connections", "Number of open client connections.", registry=registry
        )
        self.http_connections_limit = Gauge(
            "sd_gateway_http_connections_limit",
            "Maximum number of open client connections: server.max_connections, or less if the limit of open "
            "files is too low.",
            registry=registry,
        )
        self.http_connections_refused = Counter(
            "sd_gateway_http_connections_refused_total",
            "Number of client connections refused at server.max_connections.",
            registry=registry,
        )
        self.cache_lookups = FastCounters(
            "sd_gateway_cache_lookups_total",
            "Number of cache lookups, by result: hit (fresh), stale, miss (started a query), "
            "collapsed (joined a query in flight), negative (a cached failure, or refused because too many "
            "tasks wait for a first response).",
            ["operation", "result"],
            registry=registry,
        )
        self.answer_age = FastHistograms(
            "sd_gateway_answer_age_seconds",
            "Age of snapshots when they are served, in seconds. When a query for subscribers ends, the age "
            "is observed once, however many subscribers there are. Ended tasks are not counted.",
            ["operation"],
            buckets=_AGE_BUCKETS,
            registry=registry,
        )
        self.answers_too_old = Counter(
            "sd_gateway_answers_overdue_total",
            "Number of snapshots that were older than their lifetime plus "
            "cache.stale_while_revalidate_seconds when they were served. Ended tasks are not counted.",
            ["operation"],
            registry=registry,
        )
        self.cache_entries = Gauge(
            "sd_gateway_cache_entries", "Number of cached snapshots.", registry=registry
        )
        self.cache_bytes = Gauge(
            "sd_gateway_cache_bytes",
            "Size of the cached snapshots and failures, as limited by cache.max_bytes, in bytes.",
            registry=registry,
        )
        self.cache_entries_limit = Gauge(
            "sd_gateway_cache_entries_limit",
            "Maximum number of cached snapshots: cache.max_tasks.",
            registry=registry,
        )
        self.cache_bytes_limit = Gauge(
            "sd_gateway_cache_bytes_limit",
            "Maximum size of the cached snapshots and failures, in bytes: cache.max_bytes.",
            registry=registry,
        )
        self.upstream_requests = FastCounters(
            "sd_gateway_upstream_requests_total",
            "Number of upstream calls, by outcome: ok or a problem code.",
            ["operation", "outcome"],
            registry=registry,
        )
        self.upstream_request_duration = FastHistograms(
            "sd_gateway_upstream_request_duration_seconds",
            "Duration of upstream calls, including the time to connect, in seconds.",
            ["operation"],
            buckets=_UPSTREAM_BUCKETS,
            registry=registry,
        )
        self.upstream_in_flight = Gauge(
            "sd_gateway_upstream_in_flight",
            "Number of upstream calls in flight.",
            registry=registry,
        )
        self.upstream_in_flight_limit = Gauge(
            "sd_gateway_upstream_in_flight_limit",
            "Maximum number of upstream calls in flight: upstream.max_in_flight.",
            registry=registry,
        )
        self.upstream_abandoned = Counter(
            "sd_gateway_upstream_abandoned_total",
            "Number of queries that were dropped without a call in flight, because no client waited for "
            "them any more.",
            ["operation"],
            registry=registry,
        )
        self.upstream_certificate_errors = Counter(
            "sd_gateway_upstream_certificate_errors_total",
            "Number of upstream calls that were not sent, because the certificate of the upstream or of an "
            "https:// egress proxy is not trusted.",
            registry=registry,
        )
        self.upstream_retries = Counter(
            "sd_gateway_upstream_retries_total",
            "Number of repeats of upstream calls, by the problem code of the earlier call. It counts "
            "retries, and repeats with a corrected clock. With reason upstream-invalid, it also counts "
            "repeats of calls whose response may be for another task. With reason upstream-timeout, it also "
            "counts hedged calls. A repeat is counted before it is sent.",
            ["operation", "reason"],
            registry=registry,
        )
        self.upstream_repairs = Counter(
            "sd_gateway_upstream_repairs_total",
            "Number of upstream responses that deviate from the vendor's reference and were accepted, by "
            "deviation: byte_order_mark (skipped), constant (NaN or Infinity, read as null), "
            "implausible_number (time left or queue, read as null), number_in_text, status_spelling (case or "
            "white space).",
            ["operation", "repair"],
            registry=registry,
        )
        self.upstream_circuit_state = Gauge(
            "sd_gateway_upstream_circuit_state",
            "1 for the current state (closed, open or half-open) of the operation's circuit breaker, else 0.",
            ["operation", "state"],
            registry=registry,
        )
        self.upstream_rate_limit = Gauge(
            "sd_gateway_upstream_budget_per_second",
            "Current rate limit of upstream calls, per second; +Inf means no limit.",
            registry=registry,
        )
        self.upstream_clock_skew = Gauge(
            "sd_gateway_upstream_clock_skew_seconds",
            "Upstream clock minus local clock, from the last Date header, in seconds.",
            registry=registry,
        )
        self.tasks_observed = Counter(
            "sd_gateway_tasks_observed_total",
            "Number of changes of the status of a task, by the new status.",
            ["operation", "status"],
            registry=registry,
        )
        self.subscribers = Gauge(
            "sd_gateway_watchers", "Number of open event streams and long polls.", ["kind"], registry=registry
        )
        self.subscribers_limit = Gauge(
            "sd_gateway_watchers_limit",
            "Maximum number of open event streams and long polls: watch.max_watchers.",
            registry=registry,
        )
        self.watched_tasks = Gauge(
            "sd_gateway_watched_tasks",
            "Number of tasks with an open event stream or long poll.",
            registry=registry,
        )
        self.overdue_tasks = Gauge(
            "sd_gateway_snapshots_stale",
            "Number of watched tasks whose update is overdue: the upstream fails, throttles or is slow.",
            registry=registry,
        )
        self.events_sent = FastCounters(
            "sd_gateway_events_sent_total",
            "Number of events written to event streams, by event: progress, stale, problem or end.",
            ["event"],
            registry=registry,
        )
        self.credentials_reloads = Counter(
            "sd_gateway_credentials_reloads_total",
            "Number of reloads of changed credential files, by result: ok or error.",
            ["result"],
            registry=registry,
        )
        self.credentials_active_slot = Gauge(
            "sd_gateway_credentials_active_slot",
            "1 for the slot whose key pair signs calls, 0 for the other, by slot: active or next.",
            ["slot"],
            registry=registry,
        )
        self.store_up = Gauge(
            "sd_gateway_store_up",
            "1 if the store is available or store.url is not set; 0 if this replica works alone.",
            registry=registry,
        )
        self.store_up.set(1)
        self.store_operation_duration = Histogram(
            "sd_gateway_store_operation_duration_seconds",
            "Duration of store operations, in seconds: take_off (acquire a lease), land (commit a snapshot), "
            "fail (end a lease without a snapshot), renew (extend a lease), token (take permits), "
            "tell (publish a message), discard (delete an invalid value), probe.",
            ["operation"],
            buckets=_STORE_BUCKETS,
            registry=registry,
        )
        self.store_errors = Counter(
            "sd_gateway_store_errors_total",
            'Number of failed store operations. operation="read" counts invalid values, '
            'operation="subscribe" lost connections.',
            ["operation"],
            registry=registry,
        )
        self.log_lines_dropped = CallbackCounter(
            "sd_gateway_log_lines_dropped_total",
            "Number of log lines that were not written because their reader was too slow or had stopped.",
            lost_lines,
            registry=registry,
        )
        self._build = Gauge(
            "sd_gateway_build_info",
            "1, with the versions of the gateway, Python and the server as labels.",
            ["version", "python", "server"],
            registry=registry,
        )
        self._build.labels(gateway_version, platform.python_version(), f"uvicorn {version('uvicorn')}").set(1)

    def measure_cache(
        self, *, entries: Callable[[], int], size: Callable[[], int], max_entries: int, max_bytes: int
    ) -> None:
        """Set the callables that return the number of cache entries and their size in bytes, and the limits.

        Both are called at each scrape, on any thread, so they may only read.
        """
        self.cache_entries.set_function(entries)
        self.cache_bytes.set_function(size)
        self.cache_entries_limit.set(max_entries)
        self.cache_bytes_limit.set(max_bytes)
