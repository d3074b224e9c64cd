"""The Prometheus rules: their names exist, their texts are complete, and they fire when they should."""

import re
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import yaml
from pydantic import BaseModel

from gateway.settings.model import Settings
from tests.docs.markdown import Document
from tests.support import yaml_files
from tests.support.dashboard import DASHBOARD, VARIABLES
from tests.support.programs import required
from tests.support.promql import check_names, series

ROOT = Path(__file__).parents[2]
FILE = ROOT / "helm" / "sd-progress-gateway" / "rules" / "gateway.yaml"
RULES: list[dict[str, Any]] = [
    rule for group in yaml_files.load(FILE.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = [rule["record"] for rule in RULES if "record" in rule]
TEXTS = {"summary", "description", "runbook"}
SELECTED = (
    "namespace",
    "job",
    "operation",
    "instance",
)  # labels of alerts that are variables of the dashboard
CASES: list[dict[str, Any]] = yaml_files.load(
    (Path(__file__).parents[1] / "data" / "alerts.yaml").read_text()
)


def promtool(*arguments: str | Path) -> None:
    """Run promtool, which must succeed."""
    ran = subprocess.run([required("promtool"), *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def run_unit_test(tmp_path: Path, **test: Any) -> None:
    """Run one unit test of the rules with promtool."""
    file = tmp_path / "test.yaml"
    content = {"rule_files": [str(FILE)], "evaluation_interval": "1m", "tests": [{"interval": "1m"} | test]}
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    promtool("test", "rules", file)


# --- names ------------------------------------------------------------------------------------------------


def test_rules_pass_promtool() -> None:
    """The rules pass promtool and its linter."""
    promtool("check", "rules", "--lint=all", "--lint-fatal", FILE)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_rules_use_existing_names(rule: dict[str, Any]) -> None:
    """Every metric, label and label value in an expression belongs to the gateway or a recording rule."""
    check_names(rule["expr"], recorded=RECORDED)


@pytest.mark.parametrize("name", ALERTS)
def test_alerts_have_complete_annotations(name: str) -> None:
    """Every alert has a severity, two URLs, and a summary, a description and a runbook in sentences."""
    alert = ALERTS[name]
    assert alert["labels"]["severity"] in {"warning", "critical"}
    assert set(alert["annotations"]) == TEXTS | {"runbook_url", "dashboard_url"}
    assert all(alert["annotations"][text].endswith((".", "?")) for text in TEXTS)
    assert "{{" not in alert["annotations"]["runbook"]


@pytest.mark.parametrize("name", ALERTS)
def test_alerts_link_to_their_runbook(name: str) -> None:
    """runbook_url names an existing document and its heading, which is the alert's own."""
    path, _, anchor = ALERTS[name]["annotations"]["runbook_url"].partition("#")
    assert anchor == name.lower()
    assert anchor in Document(path).anchors()


@pytest.mark.parametrize("name", ALERTS)
def test_alerts_link_to_the_dashboard(name: str) -> None:
    """dashboard_url names the dashboard by its UID, and variables that it has."""
    path, _, query = ALERTS[name]["annotations"]["dashboard_url"].partition("?")
    assert path == f"/d/{DASHBOARD['uid']}"
    assert {variable.removeprefix("var-") for variable in re.findall(r"[\w-]+(?==)", query)} <= set(VARIABLES)


@pytest.mark.parametrize("name", ALERTS)
def test_alerts_mention_existing_names(name: str) -> None:
    """Metrics, settings and alerts that the annotations mention exist."""
    text = " ".join(ALERTS[name]["annotations"].values())
    known = set(series())
    for metric in re.findall(r"sd_gateway_\w+", text):
        assert {metric, f"{metric}_bucket"} & known
    for section, setting in re.findall(rf"\b({'|'.join(Settings.model_fields)})\.([a-z_]+)", text):
        model = Settings.model_fields[section].annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        assert setting in model.model_fields
    assert set(re.findall(r"SdGateway\w+", text)) <= set(ALERTS)


# --- alerts -----------------------------------------------------------------------------------------------


def test_alerts_have_positive_and_negative_cases() -> None:
    """Every alert has a case in which it fires and a case in which it does not."""
    covered = {(case["alert"], bool(case["exp_alerts"])) for case in CASES}
    assert covered == {(name, fires) for name in ALERTS for fires in (True, False)}


def dashboard_url(labels: dict[str, str]) -> str:
    """Return the dashboard_url of an alert with these labels."""
    variables = {f"var-{name}": labels[name] for name in SELECTED if name in labels}
    return f"/d/{DASHBOARD['uid']}" + (f"?{urlencode(variables)}" if variables else "")


def test_alerts_escape_labels_in_urls(tmp_path: Path) -> None:
    """Labels may have any character, for example the slash in the job of a PodMonitor."""
    labels = {"namespace": "n", "job": "n/g&h", "instance": "[::1]:9090"}
    selector = ", ".join(f'{name}="{value}"' for name, value in labels.items())
    alert, annotations = "SdGatewayStoreDown", ALERTS["SdGatewayStoreDown"]["annotations"]
    expected = {
        "exp_labels": labels | {"severity": "warning"},
        "exp_annotations": annotations
        | {
            "summary": "[::1]:9090 has lost the shared store.",
            "dashboard_url": (
                "/d/sd-progress-gateway?var-namespace=n&var-job=n%2Fg%26h&var-instance=%5B%3A%3A1%5D%3A9090"
            ),
        },
    }
    run_unit_test(
        tmp_path,
        input_series=[{"series": f"sd_gateway_store_up{{{selector}}}", "values": "0+0x10"}],
        alert_rule_test=[{"eval_time": "5m", "alertname": alert, "exp_alerts": [expected]}],
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['alert']}: {case['case']}")
def test_alerts_fire_when_they_should(tmp_path: Path, case: dict[str, Any]) -> None:
    """The firing alerts have the labels and annotations of the case; dashboard_url has all their labels."""
    annotations = ALERTS[case["alert"]]["annotations"]
    unchanged = {name: annotations[name] for name in ("runbook", "runbook_url")}
    expected = [
        {
            "exp_labels": alert["exp_labels"],
            "exp_annotations": alert["exp_annotations"]
            | unchanged
            | {"dashboard_url": dashboard_url(alert["exp_labels"])},
        }
        for alert in case["exp_alerts"]
    ]
    rule_test = {"eval_time": case["eval_time"], "alertname": case["alert"], "exp_alerts": expected}
    run_unit_test(tmp_path, input_series=case["input_series"], alert_rule_test=[rule_test])


# --- recording rules --------------------------------------------------------------------------------------

GATEWAY = 'namespace="n", job="g"'
RESULT = 'operation="sd_get_result"'


def calls(instance: str, outcome: str) -> str:
    """Return the series of a replica's requests to the upstream."""
    labels = f'{GATEWAY}, instance="{instance}", {RESULT}, outcome="{outcome}"'
    return f"sd_gateway_upstream_requests_total{{{labels}}}"


def lookups(instance: str, result: str) -> str:
    """Return the series of a replica's cache lookups."""
    labels = f'{GATEWAY}, instance="{instance}", {RESULT}, result="{result}"'
    return f"sd_gateway_cache_lookups_total{{{labels}}}"


@pytest.mark.parametrize(
    ("series", "record", "labels", "value"),
    [
        ({calls("a", "ok"): 60, calls("b", "ok"): 60}, RECORDED[0], f'{RESULT}, outcome="ok"', 2),
        ({calls("a", "ok"): 60, calls("a", "upstream-timeout"): 60}, RECORDED[1], RESULT, 2),
        ({calls("a", "ok"): 60, calls("b", "upstream-invalid"): 20}, RECORDED[2], RESULT, 0.25),
        ({calls("a", "upstream-rejected"): 60}, RECORDED[2], RESULT, 0),
        ({lookups("a", "hit"): 90, lookups("b", "miss"): 30}, RECORDED[3], "", 0.75),
        ({lookups("a", "hit"): 90}, RECORDED[3], "", 1),
    ],
    ids=["by-outcome", "calls", "failures", "no-failures", "lookups", "hits-alone"],
)
def test_recording_rules(
    tmp_path: Path, series: dict[str, int], record: str, labels: str, value: float
) -> None:
    """Recording rules sum over replicas; a ratio without events is 0 and not missing."""
    run_unit_test(
        tmp_path,
        input_series=[{"series": name, "values": f"0+{each}x20"} for name, each in series.items()],
        promql_expr_test=[
            {
                "expr": record,
                "eval_time": "15m",
                "exp_samples": [
                    {"labels": f"{record}{{{', '.join(filter(None, [GATEWAY, labels]))}}}", "value": value}
                ],
            }
        ],
    )
