"""The Grafana dashboard: its structure, checked with Grafana's own types, and its queries."""

import json
import re
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from gateway.upstream.circuit_breaker import State
from tests.support import yaml_files
from tests.support.dashboard import ANNOTATIONS, DASHBOARD, FILE, PANELS, QUERIES, VARIABLES
from tests.support.promql import check_names, series

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
SELECTED = {name: f'{name}=~"${name}"' for name in ("namespace", "job", "instance", "route", "operation")}
# Labels of the gateway with the meaning of a variable; the operations of the store are others.
LABELLED = {name: labels for name, labels in series().items() if "_store_" not in name}
ROUTE = "/v1/progress/{taskId}"
BUDGET = "sd_gateway_upstream_budget_per_second"
BY_TITLE = {panel["title"]: panel for panel in PANELS}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path and the value of every leaf of a JSON document."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from leaves(inner, f"{path}.{name}")
    elif isinstance(value, list) and value:
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{number}]")
    else:
        yield path, json.dumps(value)


def test_dashboard_matches_grafanas_types() -> None:
    """A round trip through Grafana's types, which drop unknown fields, keeps every field."""
    register_default_plugins()
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(DASHBOARD)))
    assert set(leaves(DASHBOARD)) - set(leaves(read)) == set()


def test_dashboard_panels_do_not_overlap() -> None:
    """Panels have unique IDs, fit into 24 columns, and do not overlap."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        apart_across = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_down = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_across or apart_down, (one, other)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_dashboard_uses_the_selected_data_source(panel: dict[str, Any]) -> None:
    """Every panel uses the selected data source, and its queries have unique letters."""
    assert panel["datasource"] == SOURCE
    letters = [target["refId"] for target in panel["targets"]]
    assert len(set(letters)) == len(letters)
    assert (panel["type"] == "heatmap") == any(
        target.get("format") == "heatmap" for target in panel["targets"]
    )


@pytest.mark.parametrize("query", QUERIES)
def test_dashboard_queries_existing_metrics(query: str) -> None:
    """Metrics, labels and values exist, and every selector uses the variables of its labels."""
    selectors = re.findall(r"(\w+)\{([^}]*)\}", query)
    assert selectors
    for name, matchers in selectors:
        if name == "ALERTS":  # an alert of no gateway has neither label
            assert {'namespace=~"$namespace|"', 'job=~"$job|"'} <= set(matchers.split(", "))
            continue
        check_names(f"{name}{{{matchers}}}", recorded=())
        labels = {"namespace", "job", "instance"} | LABELLED.get(name, set()) & set(SELECTED)
        assert {SELECTED[label] for label in labels} <= set(matchers.split(", ")), name


def test_dashboard_variables_and_annotations_exist() -> None:
    """Variables use a metric that every gateway has; annotations use the alerts."""
    assert list(VARIABLES) == ["job", "namespace", "instance", "route", "operation"]
    for query in VARIABLES.values():
        check_names(query, recorded=())
    assert all("SdGateway" in query for query in ANNOTATIONS)


def test_dashboard_shows_every_metric() -> None:
    """Every metric of the gateway is in a panel."""
    shown = " ".join(query.values[0] for query in QUERIES)
    ours = {name for name in series() if name.startswith("sd_gateway_")}
    families = {name.removesuffix("_count").removesuffix("_sum").removesuffix("_bucket") for name in ours}
    assert {name for name in families if name not in shown} == set()


def test_dashboard_begins_with_what_is_wrong() -> None:
    """The first row answers the first questions of the person on call."""
    first = sorted(
        (panel for panel in PANELS if panel["gridPos"]["y"] == 0), key=lambda panel: panel["gridPos"]["x"]
    )
    assert [panel["title"] for panel in first] == [
        "Requests",
        "Errors",
        "Response time, p99",
        "Upstream success",
        "Age of responses, p99",
        "Firing alerts",
        "Alerts",
    ]
    assert sum(panel["gridPos"]["w"] for panel in first) == 24


@pytest.mark.parametrize(
    ("title", "excluded"),
    [
        ("Requests", {"/healthz", "/readyz", "/metrics"}),
        ("Errors", {"/healthz", "/readyz", "/metrics"}),
        ("Requests by status", {"/healthz", "/readyz", "/metrics"}),
        *(
            (title, {"/healthz", "/readyz", "/metrics", f"{ROUTE}?wait", f"{ROUTE}/events", "/v1/events"})
            for title in ("Response time", "Response time, p99")
        ),
    ],
)
def test_dashboard_excludes_routes_that_mislead(title: str, excluded: set[str]) -> None:
    """Probes are not requests of clients, and the durations of streams and long polls are waiting times."""
    [target] = BY_TITLE[title]["targets"]
    patterns = set(re.findall(r'route!~"([^"]*)"', target["expr"]))
    routes = {ROUTE, "/v1/progress", "/scc/sd_get_progress", "/", "other", *excluded}
    for pattern in patterns:
        assert {route for route in routes if re.fullmatch(pattern, route)} == excluded
    assert len(patterns) == 1


def test_dashboard_has_fixed_colours_for_status_classes() -> None:
    """Each class of statuses has one colour, whatever other series there are."""
    rules = {
        rule["matcher"]["options"]: rule["properties"][0]["value"]["fixedColor"]
        for rule in BY_TITLE["Requests by status"]["fieldConfig"]["overrides"]
    }
    colours = {
        status: [colour for pattern, colour in rules.items() if re.search(pattern.strip("/"), status)]
        for status in ("200", "304", "404", "499", "503")
    }
    assert colours == {
        "200": ["green"],
        "304": ["blue"],
        "404": ["yellow"],
        "499": ["yellow"],
        "503": ["red"],
    }


def test_dashboard_draws_limits_as_lines() -> None:
    """Every limit is a dashed red line without filling, in the panel of what it limits."""
    drawn = set()
    for panel in PANELS:
        limits = [target for target in panel["targets"] if target.get("legendFormat") == "limit"]
        overrides = {rule["matcher"]["options"]: rule["properties"] for rule in panel_overrides(panel)}
        assert bool(limits) == ("limit" in overrides)
        if limits:
            properties = {each["id"]: each["value"] for each in overrides["limit"]}
            assert properties["custom.lineStyle"]["fill"] == "dash"
            assert (properties["color"]["fixedColor"], properties["custom.fillOpacity"]) == ("red", 0)
            [name] = re.findall(r"sd_gateway_\w+", limits[0]["expr"])
            drawn.add(name)
            others = " ".join(target["expr"] for target in panel["targets"] if target not in limits)
            assert name.removesuffix("_limit") in others or name == BUDGET
    assert drawn == {name for name in series() if name.endswith("_limit")} | {BUDGET}


def panel_overrides(panel: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the overrides of a panel."""
    overrides: list[dict[str, Any]] = panel.get("fieldConfig", {}).get("overrides", [])
    return overrides


@pytest.mark.parametrize(
    ("title", "alert"),
    [
        ("CPU", "SdGatewayCpuSaturated"),
        ("File descriptors in use", "SdGatewayFileDescriptorsScarce"),
        ("Clock skew and certificate errors", "SdGatewayClockSkew"),
        ("Overdue responses", "SdGatewayAnswersOverdue"),
    ],
)
def test_dashboard_thresholds_are_those_of_the_alerts(title: str, alert: str) -> None:
    """A threshold at which an alert fires is the same in the panel."""
    rules = yaml_files.load((FILE.parents[1] / "rules" / "gateway.yaml").read_text(encoding="utf-8"))
    [expression] = [
        rule["expr"] for group in rules["groups"] for rule in group["rules"] if rule.get("alert") == alert
    ]
    [limit] = re.findall(r"> ([\d.]+)", expression)
    defaults = BY_TITLE[title]["fieldConfig"]["defaults"]
    assert defaults["thresholds"]["steps"][-1] == {"value": float(limit), "color": "red"}
    assert BY_TITLE[title]["type"] == "stat" or defaults["custom"]["thresholdsStyle"] == {"mode": "line"}


def test_dashboard_shows_circuit_breakers_as_a_timeline() -> None:
    """Each state of a circuit breaker has a name and a colour."""
    panel = BY_TITLE["Circuit breakers"]
    assert panel["type"] == "state-timeline"
    [mapping] = panel["fieldConfig"]["defaults"]["mappings"]
    assert {value: (each["text"], each["color"]) for value, each in mapping["options"].items()} == {
        "0": ("closed", "green"),
        "1": ("half-open", "yellow"),
        "2": ("open", "red"),
    }
    assert {each["text"] for each in mapping["options"].values()} == set(State)
