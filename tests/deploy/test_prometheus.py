"""A real Prometheus scrapes real gateways: firing alerts and the queries of the dashboard.

Two replicas share a store and first work without faults; then upstream fails. A third gateway has wrong
settings from the start: upstream refuses its key pair, and its store does not exist.
"""

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.support import yaml_files
from tests.support.dashboard import ANNOTATIONS, QUERIES, VARIABLES, substituted
from tests.support.harness import (
    Gateway,
    Mount,
    Process,
    Simulator,
    Stage,
    free_port,
    plain_client,
    serving,
    until,
)
from tests.support.programs import required
from tests.support.storeserver import StoreServer, binary

pytestmark = pytest.mark.timeout(600)  # starts Prometheus, a store and several gateways


ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "config" / "prometheus.yaml"
JOB, MISCONFIGURED = "sd-gateway", "misconfigured"

Json = dict[str, Any]


@dataclass
class Prometheus:
    """Client of the API of a Prometheus."""

    client: httpx.Client

    def get(self, path: str, **parameters: str) -> Any:
        """Send a request; return the data of the response."""
        response = self.client.get(f"/api/v1/{path}", params=parameters).json()
        assert response["status"] == "success", response
        return response["data"]

    def query(self, expression: str, at: float | None = None) -> list[Json]:
        """Return the labels and value of each series of an expression now, or `at` a time, without NaN."""
        moment = {} if at is None else {"time": str(at)}
        result = self.get("query", query=expression, **moment)["result"]
        return [sample for sample in result if sample["value"][1] != "NaN"]

    def evaluations(self) -> set[str]:
        """Return the times of the last evaluation of the rule groups."""
        return {group["lastEvaluation"] for group in self.get("rules")["groups"]}

    def firing(self, job: str) -> dict[str, Json]:
        """Return the firing alerts of a job, by name."""
        alerts = [alert for alert in self.get("alerts")["alerts"] if alert["labels"].get("job") == job]
        return {alert["labels"]["alertname"]: alert for alert in alerts if alert["state"] == "firing"}


@dataclass
class Clients:
    """Clients that send the same requests to each replica."""

    gateways: list[Gateway]
    tasks: list[str] = field(default_factory=list)

    def subscribe(self, stack: ExitStack) -> None:
        """Open a stream and a long poll at each replica until the stack is closed."""
        for gate in self.gateways:
            ids = "&".join(f"taskId={task}" for task in [*self.tasks, "no-such-task"])
            for path in (f"/v1/events?{ids}", f"/v1/progress/{self.tasks[0]}?wait=60"):
                subscriber = stack.enter_context(gate.connect())
                subscriber.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())

    def query(self) -> None:
        """Query every task once on every kind of path, and one path that does not exist."""
        for gate in self.gateways:
            for task in self.tasks:
                gate.get(task)
                gate.native(task)
            gate.client.get("/v1/progress", params={"taskId": self.tasks})
            gate.client.get("/v1/nothing")
            gate.get(self.tasks[0], params={"wait": "1"})


@dataclass
class Scenario:
    """The alerts that fired, and the Prometheus. `healthy` has those that fired before the faults.

    The times are Unix timestamps in seconds: rates fall once the scenario has ended.
    """

    prometheus: Prometheus
    healthy: dict[str, Json]
    fired: dict[str, Json]
    fired_at: float
    misconfigured: dict[str, Json]
    ended_at: float


def fast_configuration(folder: Path, jobs: dict[str, list[Gateway]]) -> Path:
    """Write the example configuration and rules with short intervals and without `for`."""
    config = yaml_files.load(EXAMPLE.read_text(encoding="utf-8"))
    [rules] = config["rule_files"]
    groups = yaml_files.load((EXAMPLE.parent / rules).read_text(encoding="utf-8"))
    for group in groups["groups"]:
        for rule in group["rules"]:
            rule.pop("for", None)
    (folder / "rules.yaml").write_text(yaml.safe_dump(groups), encoding="utf-8")

    [scrape] = config["scrape_configs"]
    config |= {
        "global": dict.fromkeys(config["global"], "1s"),
        "rule_files": ["rules.yaml"],
        "scrape_configs": [
            scrape
            | {
                "job_name": job,
                "static_configs": [{"targets": ["{}:{}".format(*gate.address) for gate in gates]}],
            }
            for job, gates in jobs.items()
        ],
    }
    file = folder / "prometheus.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


def variables(endpoint: str, store: str, pair: Mount) -> dict[str, str]:
    """Return the settings of a replica, with short lifetimes."""
    return {
        "SD_GATEWAY_UPSTREAM__ENDPOINT": endpoint,
        "SD_GATEWAY_UPSTREAM__REQUESTS_PER_SECOND": "1000",
        "SD_GATEWAY_CREDENTIALS__ACCESS_KEY": "",
        "SD_GATEWAY_CREDENTIALS__SECRET_KEY": "",
        "SD_GATEWAY_CREDENTIALS__ACCESS_KEY_FILE": str(pair.file("access_key")),
        "SD_GATEWAY_CREDENTIALS__SECRET_KEY_FILE": str(pair.file("secret_key")),
        "SD_GATEWAY_STORE__URL": store,
        "SD_GATEWAY_CACHE__WAITING_SECONDS": "0.2",
        "SD_GATEWAY_CACHE__RUNNING_SECONDS": "0.2",
        "SD_GATEWAY_CACHE__STALE_WHILE_REVALIDATE_SECONDS": "0.2",
        "SD_GATEWAY_CACHE__ERROR_SECONDS": "0.1",
    }


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenario]:
    """Run every part in a process of its own: first without faults, then with faults."""
    server = required("prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    pair, other = Mount(tmp_path_factory.mktemp("pair")), Mount(tmp_path_factory.mktemp("other"))
    pair.publish(access_key="key", secret_key="secret")
    other.publish(access_key="another", secret_key="pair")
    with ExitStack() as stack:
        upstream = ["simulate", "--port=0", "--key=key", "--secret=secret"]
        url = stack.enter_context(Process(*upstream, cwd=folder)).says(r"(http://\S+)")
        simulator = Simulator(Stage(), stack.enter_context(plain_client(url)))
        store = stack.enter_context(StoreServer(binary("valkey"), folder))

        settings = variables(url, store.url, pair)
        replicas = [stack.enter_context(serving(folder, settings))[1] for _ in range(2)]
        wrong_settings = variables(url, f"valkey://127.0.0.1:{free_port()}", other)
        misconfigured = stack.enter_context(serving(folder, wrong_settings))[1]

        config = fast_configuration(folder, {JOB: replicas, MISCONFIGURED: [misconfigured]})
        address = f"127.0.0.1:{free_port()}"
        arguments = [f"--config.file={config}", f"--storage.tsdb.path={folder}/data"]
        process = Process(*arguments, f"--web.listen-address={address}", cwd=folder, program=server)
        stack.enter_context(process).says("Server is ready to receive web requests")
        prometheus = Prometheus(stack.enter_context(plain_client(f"http://{address}")))

        states = ("waiting", "running", "failed", "succeeded", "paused")
        clients = Clients(replicas, [simulator.task(data={"status": status}) for status in states])
        clients.tasks.append(simulator.task())  # its progress changes
        clients.subscribe(stack)

        def wait_for(condition: Callable[[], Any], what: str) -> Any:
            """Send queries until the condition is true."""

            def poll() -> Any:
                clients.query()
                misconfigured.get(clients.tasks[0])
                return condition()

            return until(poll, what)

        calls = f'rate(sd_gateway_upstream_requests_total{{job="{JOB}", outcome="ok"}}[5m]) > 0'
        wait_for(lambda: len(prometheus.query(f"sum by (instance) ({calls})")) == 2, "calls of both replicas")
        before = prometheus.evaluations()  # an evaluation before the first call may report a silent replica
        wait_for(lambda: not before & prometheus.evaluations(), "another evaluation")
        expected = {"SdGatewayCredentialsRefused", "SdGatewayStoreDown"}
        wait_for(
            lambda: expected <= set(prometheus.firing(MISCONFIGURED)), "alerts of the misconfigured gateway"
        )
        healthy = prometheus.firing(JOB)

        simulator.fault("status", status=502)
        expected = {"SdGatewayUpstreamFailures", "SdGatewayAnswersOverdue"}
        wait_for(lambda: expected <= set(prometheus.firing(JOB)), "alerts of the fault")
        fired, fired_at = prometheus.firing(JOB), time.time()

        simulator.heal()
        simulator.control("PUT", "/pairs", pairs={"key": "secret", "new-key": "new-secret"})
        pair.publish(access_key="new-key", secret_key="new-secret")
        store.freeze()
        reloads, errors = "sd_gateway_credentials_reloads_total", "sd_gateway_store_errors_total"
        for name in (reloads, errors):
            query = f'rate({name}{{job="{JOB}"}}[5m])'
            wait_for(lambda query=query: prometheus.query(query), f"{query} has samples")
        misconfigured_fired = prometheus.firing(MISCONFIGURED)
        yield Scenario(prometheus, healthy, fired, fired_at, misconfigured_fired, time.time())


def test_prometheus_accepts_the_example() -> None:
    """Promtool accepts the example and its rules."""
    ran = subprocess.run(
        [required("promtool"), "check", "config", EXAMPLE], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"SUCCESS: [1-9]\d* rules found", ran.stdout)


def test_prometheus_fires_nothing_without_faults(scenario: Scenario) -> None:
    """No alert fires for healthy replicas, although every `for` was removed."""
    assert scenario.healthy == {}


def test_prometheus_fires_when_upstream_fails(scenario: Scenario) -> None:
    """An upstream fault fires the alerts for failures and for old responses, with the operation."""
    failures = scenario.fired["SdGatewayUpstreamFailures"]
    assert failures["labels"] == {
        "alertname": "SdGatewayUpstreamFailures",
        "job": JOB,
        "operation": "sd_get_progress",
        "severity": "warning",
    }
    assert failures["annotations"]["summary"] == "Upstream calls fail for sd_get_progress."
    assert re.match(r"\d+(\.\d+)?% of the calls of sd_get_progress", failures["annotations"]["description"])
    assert "sd-gateway check" in failures["annotations"]["runbook"]
    url = "/d/sd-progress-gateway?var-namespace=&var-job=sd-gateway&var-operation=sd_get_progress"
    assert failures["annotations"]["dashboard_url"] == url
    assert "SdGatewayAnswersOverdue" in scenario.fired


def test_prometheus_separates_jobs(scenario: Scenario) -> None:
    """Alerts about a refused key pair and a missing store fire for the misconfigured gateway only."""
    assert {"SdGatewayCredentialsRefused", "SdGatewayStoreDown"} <= set(scenario.misconfigured)
    assert not {"SdGatewayCredentialsRefused", "SdGatewayStoreDown"} & set(scenario.fired)


@pytest.mark.parametrize("query", QUERIES)
def test_prometheus_answers_the_dashboard(scenario: Scenario, query: str) -> None:
    """Every query of a panel returns numbers."""
    assert scenario.prometheus.query(substituted(query, job=JOB), at=scenario.ended_at)


def test_prometheus_knows_the_dashboards_variables(scenario: Scenario) -> None:
    """Each variable offers the values of its label; `namespace` is empty outside Kubernetes."""
    values = {}
    for name, query in VARIABLES.items():
        [(selector, label)] = re.findall(r"^label_values\((.*), (\w+)\)$", query)
        match = {"match[]": substituted(selector, job=JOB)}
        values[name] = scenario.prometheus.get(f"label/{label}/values", **match)
    assert set(values["job"]) == {JOB, MISCONFIGURED}
    assert values["namespace"] == []
    assert len(values["instance"]) == 2
    assert {"sd_get_progress", "comfy_get_progress"} <= set(values["operation"])
    assert {"/v1/progress/{taskId}", "/v1/progress/{taskId}?wait", "other"} <= set(values["route"])
    assert not {"/healthz", "/readyz", "/metrics"} & set(values["route"])


def test_prometheus_evaluates_every_rule(scenario: Scenario) -> None:
    """Every rule is evaluated without an error, and every metric that it uses has samples."""
    rules = [rule for group in scenario.prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {(rule["health"], rule.get("lastError", "")) for rule in rules} == {("ok", "")}
    names = {
        name for rule in rules for name in re.findall(r"(?<![\w:])(?:sd_gateway_|process_)\w+", rule["query"])
    }
    assert len(names) > 10
    assert [name for name in names if not scenario.prometheus.query(name)] == []


def test_prometheus_keeps_long_polls_out_of_response_times(scenario: Scenario) -> None:
    """The panels of response times select no route of long polls, which others do."""
    routes = "sum by (route) (sd_gateway_http_request_duration_seconds_count{{{}}})"
    for query in (each.values[0] for each in QUERIES if str(each.id).startswith("Response time")):
        [selector] = re.findall(r"_bucket\{([^}]*)\}", substituted(str(query), job=JOB))
        found = {sample["metric"]["route"] for sample in scenario.prometheus.query(routes.format(selector))}
        assert "/v1/progress/{taskId}" in found
        assert not [route for route in found if route.endswith(("?wait", "/events"))]
    everything = {sample["metric"]["route"] for sample in scenario.prometheus.query(routes.format(""))}
    assert "/v1/progress/{taskId}?wait" in everything


@pytest.mark.parametrize("query", ANNOTATIONS)
def test_prometheus_marks_alerts_on_the_dashboard(scenario: Scenario, query: str) -> None:
    """Firing alerts appear as annotations."""
    alerts = scenario.prometheus.query(substituted(query, job=JOB), at=scenario.fired_at)
    assert "SdGatewayUpstreamFailures" in {alert["metric"]["alertname"] for alert in alerts}
