"""The Grafana dashboard: its shape, as Grafana's own types have it, and what its queries name."""

import json
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests.dashboard import ANNOTATIONS, DASHBOARD, PANELS, QUERIES, VARIABLES
from tests.promql import check_names, series

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
NARROWED = 'namespace=~"$namespace", job=~"$job"'


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Tell every leaf of some JSON, and where it is."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from leaves(inner, f"{path}.{name}")
    elif isinstance(value, list) and value:
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{number}]")
    else:
        yield path, json.dumps(value)


def test_dashboard_is_what_grafana_reads() -> None:
    """Nothing of it is lost on the way through Grafana's own types, which drop what they do not know."""
    register_default_plugins()
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(DASHBOARD)))
    assert set(leaves(DASHBOARD)) - set(leaves(read)) == set()


def test_dashboard_has_its_panels_side_by_side() -> None:
    """Panels have numbers of their own, fit the 24 columns, and do not lie upon one another."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        apart_across = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_down = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_across or apart_down, (one, other)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_dashboard_asks_the_chosen_prometheus(panel: dict[str, Any]) -> None:
    """Every panel asks the source that is chosen above, each of its queries under another letter."""
    assert panel["datasource"] == SOURCE
    letters = [target["refId"] for target in panel["targets"]]
    assert len(set(letters)) == len(letters)
    assert (panel["type"] == "heatmap") == any(
        target.get("format") == "heatmap" for target in panel["targets"]
    )


@pytest.mark.parametrize("query", QUERIES)
def test_dashboard_asks_for_what_exists(query: str) -> None:
    """Metrics, labels and values are the gateway's, and every one is narrowed by the variables."""
    check_names(query, recorded=())
    assert query.count(NARROWED) == sum(query.count(f"{name}{{") for name in series())


def test_dashboard_offers_what_exists() -> None:
    """The variables come from the one metric that every gateway always has."""
    assert list(VARIABLES) == ["job", "namespace"]
    for query in VARIABLES.values():
        check_names(query, recorded=())
    assert all("SdGateway" in query for query in ANNOTATIONS)


def test_dashboard_shows_every_metric() -> None:
    """No metric of ours is missing."""
    shown = " ".join(query.values[0] for query in QUERIES)
    ours = {name for name in series() if name.startswith("sd_gateway_")}
    families = {name.removesuffix("_count").removesuffix("_sum").removesuffix("_bucket") for name in ours}
    assert {name for name in families if name not in shown} == set()
