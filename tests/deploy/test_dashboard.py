"""The Grafana dashboard: its structure, checked with Grafana's own types, and its queries."""

import json
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests.support.dashboard import ANNOTATIONS, DASHBOARD, PANELS, QUERIES, VARIABLES
from tests.support.promql import check_names, series

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
SELECTOR = 'namespace=~"$namespace", job=~"$job"'


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
    """Metrics, labels and values exist, and every selector uses the variables."""
    check_names(query, recorded=())
    assert query.count(SELECTOR) == sum(query.count(f"{name}{{") for name in series())


def test_dashboard_variables_and_annotations_exist() -> None:
    """Variables use a metric that every gateway has; annotations use the alerts."""
    assert list(VARIABLES) == ["job", "namespace"]
    for query in VARIABLES.values():
        check_names(query, recorded=())
    assert all("SdGateway" in query for query in ANNOTATIONS)


def test_dashboard_shows_every_metric() -> None:
    """Every metric of the gateway is in a panel."""
    shown = " ".join(query.values[0] for query in QUERIES)
    ours = {name for name in series() if name.startswith("sd_gateway_")}
    families = {name.removesuffix("_count").removesuffix("_sum").removesuffix("_bucket") for name in ours}
    assert {name for name in families if name not in shown} == set()
