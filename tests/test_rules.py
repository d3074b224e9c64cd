"""The Prometheus rules: what they name exists, what they say is enough, and when each one fires."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from gateway.settings.model import Settings
from tests.promql import check_names, series

ROOT = Path(__file__).parent.parent
FILE = ROOT / "helm" / "sd-progress-gateway" / "rules" / "gateway.yaml"
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(FILE.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = [rule["record"] for rule in RULES if "record" in rule]
CASES: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "data" / "alerts.yaml").read_text())


def promtool(*arguments: str | Path) -> None:
    """Run promtool, which must be content."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not here: it comes with Prometheus")
    ran = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def tested(tmp_path: Path, **test: Any) -> None:
    """Have promtool run one unit test of the rules."""
    file = tmp_path / "test.yaml"
    content = {"rule_files": [str(FILE)], "evaluation_interval": "1m", "tests": [{"interval": "1m"} | test]}
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    promtool("test", "rules", file)


# --- what they name ---------------------------------------------------------------------------------------


def test_rules_please_promtool() -> None:
    """Promtool finds no fault, and its linter none either."""
    promtool("check", "rules", "--lint=all", "--lint-fatal", FILE)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_rules_name_what_exists(rule: dict[str, Any]) -> None:
    """Every metric, label and label's value in an expression is one of the gateway's, or recorded above."""
    check_names(rule["expr"], recorded=RECORDED)


@pytest.mark.parametrize("name", ALERTS)
def test_rules_tell_what_is_wrong_and_what_to_do(name: str) -> None:
    """Every alert has a severity, a summary, a description and a runbook, in sentences."""
    alert = ALERTS[name]
    assert alert["labels"]["severity"] in {"warning", "critical"}
    assert set(alert["annotations"]) == {"summary", "description", "runbook"}
    assert all(text.endswith((".", "?")) for text in alert["annotations"].values())
    assert "{{" not in alert["annotations"]["runbook"]


@pytest.mark.parametrize("name", ALERTS)
def test_rules_explain_with_what_exists(name: str) -> None:
    """Metrics and settings that the words mention are the gateway's, and so are other alerts."""
    words = " ".join(ALERTS[name]["annotations"].values())
    known = set(series())
    for metric in re.findall(r"sd_gateway_\w+", words):
        assert {metric, f"{metric}_bucket"} & known
    for section, setting in re.findall(rf"\b({'|'.join(Settings.model_fields)})\.([a-z_]+)", words):
        model = Settings.model_fields[section].annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        assert setting in model.model_fields
    assert set(re.findall(r"SdGateway\w+", words)) <= set(ALERTS)


# --- when they fire ---------------------------------------------------------------------------------------


def test_rules_are_tried_both_ways() -> None:
    """Every alert has a case in which it fires, and one in which it does not."""
    tried = {(case["alert"], bool(case["exp_alerts"])) for case in CASES}
    assert tried == {(name, fires) for name in ALERTS for fires in (True, False)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['alert']}: {case['case']}")
def test_rules_fire_when_they_should(tmp_path: Path, case: dict[str, Any]) -> None:
    """What fires, with which labels and words, is what the case says."""
    runbook = {"runbook": ALERTS[case["alert"]]["annotations"]["runbook"]}
    expected = [
        {
            "exp_labels": alert["exp_labels"],
            "exp_annotations": alert["exp_annotations"] | runbook,
        }
        for alert in case["exp_alerts"]
    ]
    rule_test = {"eval_time": case["eval_time"], "alertname": case["alert"], "exp_alerts": expected}
    tested(tmp_path, input_series=case["input_series"], alert_rule_test=[rule_test])


# --- what they record -------------------------------------------------------------------------------------

GATEWAY = 'namespace="n", job="g"'
RESULT = 'operation="sd_get_result"'


def calls(instance: str, outcome: str) -> str:
    """Return the series of a replica's calls."""
    labels = f'{GATEWAY}, instance="{instance}", {RESULT}, outcome="{outcome}"'
    return f"sd_gateway_upstream_requests_total{{{labels}}}"


def lookups(instance: str, result: str) -> str:
    """Return the series of a replica's lookups."""
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
def test_rules_record(tmp_path: Path, series: dict[str, int], record: str, labels: str, value: float) -> None:
    """What is recorded adds replicas up; a share of nothing is told as 0, not left out."""
    tested(
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
