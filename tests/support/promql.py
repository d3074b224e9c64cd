"""Checks Prometheus queries against the gateway's metrics, their labels and the values of labels."""

import re
from collections.abc import Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from gateway.domain import errors
from gateway.domain.errors import GatewayError
from gateway.domain.task import Status
from gateway.progress.outcomes import CacheStatus
from gateway.telemetry.counters import CallbackCounter, FastCounters, FastHistograms
from gateway.telemetry.metrics import Metrics
from gateway.upstream.circuit_breaker import State
from gateway.upstream.credentials import CredentialSlot
from gateway.watch.subscriber import SubscriptionKind

_ERRORS = [error for error in vars(errors).values() if isinstance(error, type)]
_CODES = {error.code for error in _ERRORS if issubclass(error, GatewayError)}
_VALUES = {
    "event": {"progress", "problem", "end"},
    "kind": set(SubscriptionKind),
    "outcome": {"ok"} | _CODES,
    "reason": _CODES,
    "result": {"ok", "error"} | set(CacheStatus),
    "slot": set(CredentialSlot),
    "state": set(State),
    "status": set(Status) | {"200", "500", "503", "5.."},
}
_SUFFIXES = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"], "gauge": [""]}
_EVERYWHERE = {"namespace", "job", "instance"}  # added by Prometheus
_METRIC = re.compile(r"((?:sd_gateway|process|python|namespace_job)_[\w:]+)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)[=!~]+"([^"]*)"')


def label_names(
    metric: MetricWrapperBase | CallbackCounter | FastCounters | FastHistograms,
) -> tuple[str, ...]:
    """Return the label names of a metric."""
    if isinstance(metric, CallbackCounter | FastCounters | FastHistograms):
        return metric.label_names
    return tuple(metric._labelnames)  # prometheus-client has no public attribute for them


def series() -> dict[str, set[str]]:
    """Return the label names of every series of the gateway, by name of the series."""
    metrics = Metrics(CollectorRegistry(), gateway_version="1.2.3")
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]
    known = {s.name: set(s.labels) for s in samples if not s.name.endswith("_created")}
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase | CallbackCounter | FastCounters | FastHistograms):
            family = next(iter(metric.describe()))
            for suffix in _SUFFIXES[family.type]:
                known[family.name + suffix] = set(label_names(metric)) | {"le"}
    return known


def check_names(expression: str, *, recorded: Iterable[str]) -> None:
    """Check that the metrics, labels and label values in an expression exist, or are in `recorded`."""
    known = series()
    found = _METRIC.findall(expression)
    assert found, "an expression without a metric"
    for name, matchers in found:
        assert name in known or name in recorded, name
        allowed = set(_EVERYWHERE)
        if family := re.search(r"sd_gateway_[a-z_]+", name):  # recorded series keep labels of their origin
            allowed.update(*(labels for each, labels in known.items() if each.startswith(family[0])))
        for label, quoted in _MATCHER.findall(matchers):
            if not quoted.startswith("$"):  # not a variable of a dashboard
                assert label in allowed, (name, label)
                assert label not in _VALUES or set(quoted.split("|")) <= _VALUES[label], (name, quoted)
