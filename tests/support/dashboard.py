"""The queries of the Grafana dashboard, for the structural tests and those with a real Prometheus."""

import json
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "helm" / "sd-progress-gateway" / "dashboards" / "gateway.json"
DASHBOARD: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [
    pytest.param(target["expr"], id=f"{panel['title']}: {target['refId']}")
    for panel in PANELS
    for target in panel["targets"]
]
ANNOTATIONS: list[str] = [annotation["expr"] for annotation in DASHBOARD["annotations"]["list"]]
VARIABLES: dict[str, str] = {
    variable["name"]: variable["query"]
    for variable in DASHBOARD["templating"]["list"]
    if variable["type"] == "query"
}
_ALL = {
    variable["name"]: variable for variable in DASHBOARD["templating"]["list"] if variable.get("includeAll")
}


def substituted(query: str, *, job: str) -> str:
    """Substitute the variables as Grafana does, with All for each but the job."""
    values = {name: variable["allValue"] for name, variable in _ALL.items()}
    for variable, value in (values | {"job": job, "__rate_interval": "5m", "__range": "5m"}).items():
        query = query.replace(f"${variable}", value)
    return query
