"""A real Prometheus that scrapes real gateways: the alerts that fire, and the dashboard's queries.

Two replicas share a store, and get a fault upstream once they have been seen well. A third one goes astray
from the start: its pair is refused, and its store is not there.
"""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.dashboard import ANNOTATIONS, QUERIES, VARIABLES, filled_in
from tests.harness import Gateway, Mount, Process, Simulator, Stage, free_port, plain_client, serving, until
from tests.storeserver import StoreServer, binary

pytestmark = pytest.mark.timeout(600)  # it builds, starts or plays more than other tests


ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "config" / "prometheus.yaml"
JOB, ASTRAY = "sd-gateway", "astray"

Json = dict[str, Any]


def program(name: str) -> Path:
    """Return one of Prometheus's programs; skip the test where it is not installed."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} here")
    return Path(found)


@dataclass
class Prometheus:
    """A Prometheus, by its API."""

    client: httpx.Client

    def ask(self, path: str, **parameters: str) -> Any:
        """Ask; return the data of the answer."""
        answer = self.client.get(f"/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[Json]:
        """Return what an expression is now: labels and value of each series, but for those that are NaN."""
        result = self.ask("query", query=expression)["result"]
        return [sample for sample in result if sample["value"][1] != "NaN"]

    def evaluations(self) -> set[str]:
        """Return when each group of rules was evaluated last."""
        return {group["lastEvaluation"] for group in self.ask("rules")["groups"]}

    def firing(self, job: str) -> dict[str, Json]:
        """Return the alerts of a job that fire, by name."""
        alerts = [alert for alert in self.ask("alerts")["alerts"] if alert["labels"].get("job") == job]
        return {alert["labels"]["alertname"]: alert for alert in alerts if alert["state"] == "firing"}


@dataclass
class Callers:
    """Those who ask, each replica alike."""

    gateways: list[Gateway]
    tasks: list[str] = field(default_factory=list)

    def watch(self, stack: ExitStack) -> None:
        """Open a stream and a long poll at each replica, until the end."""
        for gate in self.gateways:
            ids = "&".join(f"taskId={task}" for task in [*self.tasks, "nobody"])
            for path in (f"/v1/events?{ids}", f"/v1/progress/{self.tasks[0]}?wait=60"):
                subscriber = stack.enter_context(gate.connect())
                subscriber.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())

    def ask(self) -> None:
        """Ask once for every task, in every way, and for what is not there."""
        for gate in self.gateways:
            for task in self.tasks:
                gate.get(task)
                gate.native(task)
            gate.client.get("/v1/progress", params={"taskId": self.tasks})
            gate.client.get("/v1/nothing")


@dataclass
class Story:
    """What happened, and the Prometheus that saw it. `calm` are the alerts that fired while all was well."""

    prometheus: Prometheus
    calm: dict[str, Json]
    fired: dict[str, Json]
    astray: dict[str, Json]


def hurried(folder: Path, jobs: dict[str, list[Gateway]]) -> Path:
    """Write the example's configuration and rules for these gateways, in a hurry: without any `for`."""
    config = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    [rules] = config["rule_files"]
    groups = yaml.safe_load((EXAMPLE.parent / rules).read_text(encoding="utf-8"))
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
    """Return the settings of a replica, which lets nothing live long."""
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
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """Let everything run, each part a process of its own; first well, then with faults."""
    server = program("prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    pair, other = Mount(tmp_path_factory.mktemp("pair")), Mount(tmp_path_factory.mktemp("other"))
    pair.publish(access_key="key", secret_key="secret")
    other.publish(access_key="another", secret_key="pair")
    with ExitStack() as stack:
        upstream = ["simulate", "--port=0", "--key=key", "--secret=secret"]
        url = stack.enter_context(Process(*upstream, cwd=folder)).says(r"(http://\S+)")
        simulator = Simulator(Stage(), stack.enter_context(plain_client(url)))
        store = stack.enter_context(StoreServer(binary("valkey"), folder))

        well = variables(url, store.url, pair)
        replicas = [stack.enter_context(serving(folder, well))[1] for _ in range(2)]
        lost = variables(url, f"valkey://127.0.0.1:{free_port()}", other)
        astray = stack.enter_context(serving(folder, lost))[1]

        config = hurried(folder, {JOB: replicas, ASTRAY: [astray]})
        address = f"127.0.0.1:{free_port()}"
        arguments = [f"--config.file={config}", f"--storage.tsdb.path={folder}/data"]
        process = Process(*arguments, f"--web.listen-address={address}", cwd=folder, program=server)
        stack.enter_context(process).says("Server is ready to receive web requests")
        prometheus = Prometheus(stack.enter_context(plain_client(f"http://{address}")))

        states = ("waiting", "running", "failed", "succeeded", "paused")
        callers = Callers(replicas, [simulator.task(data={"status": status}) for status in states])
        callers.tasks.append(simulator.task())  # which moves
        callers.watch(stack)

        def meanwhile(condition: Callable[[], Any], what: str) -> Any:
            """Wait until Prometheus has seen it, while callers ask."""

            def asked() -> Any:
                callers.ask()
                astray.get(callers.tasks[0])
                return condition()

            return until(asked, what)

        calls = f'rate(sd_gateway_upstream_requests_total{{job="{JOB}", outcome="ok"}}[5m]) > 0'
        meanwhile(
            lambda: len(prometheus.query(f"sum by (instance) ({calls})")) == 2, "calls of both replicas"
        )
        before = prometheus.evaluations()  # by which a replica without a call yet was a silent one
        meanwhile(lambda: not before & prometheus.evaluations(), "another evaluation")
        told = {"SdGatewayCredentialsRefused", "SdGatewayStoreDown"}
        meanwhile(lambda: told <= set(prometheus.firing(ASTRAY)), "alerts of the one that goes astray")
        calm = prometheus.firing(JOB)

        simulator.fault("status", status=502)
        told = {"SdGatewayUpstreamFailures", "SdGatewayAnswersOverdue"}
        meanwhile(lambda: told <= set(prometheus.firing(JOB)), "alerts of the fault")
        fired = prometheus.firing(JOB)

        simulator.heal()
        simulator.control("PUT", "/pairs", pairs={"key": "secret", "new-key": "new-secret"})
        pair.publish(access_key="new-key", secret_key="new-secret")
        store.freeze()
        reloads, errors = "sd_gateway_credentials_reloads_total", "sd_gateway_store_errors_total"
        for name in (reloads, errors):
            query = f'rate({name}{{job="{JOB}"}}[5m])'
            meanwhile(lambda query=query: prometheus.query(query), f"{query} has samples")
        yield Story(prometheus, calm, fired, prometheus.firing(ASTRAY))


def test_prometheus_takes_the_example() -> None:
    """Promtool finds no fault with the example, nor with the rules that it names."""
    ran = subprocess.run(
        [program("promtool"), "check", "config", EXAMPLE], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"SUCCESS: [1-9]\d* rules found", ran.stdout)


def test_prometheus_is_calm_while_all_is_well(story: Story) -> None:
    """No alert fires for replicas that are well, though every `for` was taken away."""
    assert story.calm == {}


def test_prometheus_fires_when_upstream_fails(story: Story) -> None:
    """A fault upstream fires the alerts of failures and of old answers, which say what it is about."""
    failures = story.fired["SdGatewayUpstreamFailures"]
    assert failures["labels"] == {
        "alertname": "SdGatewayUpstreamFailures",
        "job": JOB,
        "operation": "sd_get_progress",
        "severity": "warning",
    }
    assert failures["annotations"]["summary"] == "Upstream fails for sd_get_progress."
    assert re.match(r"\d+(\.\d+)?% of the calls of sd_get_progress", failures["annotations"]["description"])
    assert "sd-gateway check" in failures["annotations"]["runbook"]
    assert "SdGatewayAnswersOverdue" in story.fired


def test_prometheus_tells_one_job_from_another(story: Story) -> None:
    """What is wrong with one gateway is told of that one: a refused pair, a store that is not there."""
    assert {"SdGatewayCredentialsRefused", "SdGatewayStoreDown"} <= set(story.astray)
    assert not {"SdGatewayCredentialsRefused", "SdGatewayStoreDown"} & set(story.fired)


@pytest.mark.parametrize("query", QUERIES)
def test_prometheus_answers_the_dashboard(story: Story, query: str) -> None:
    """Every panel's query brings numbers."""
    assert story.prometheus.query(filled_in(query, job=JOB))


def test_prometheus_knows_the_dashboards_variables(story: Story) -> None:
    """The job is among what its variable offers; a namespace is only where Kubernetes gave one."""
    offered = {}
    for name, query in VARIABLES.items():
        [(selector, label)] = re.findall(r"^label_values\((.*), (\w+)\)$", query)
        match = {"match[]": filled_in(selector, job=JOB)}
        offered[name] = story.prometheus.ask(f"label/{label}/values", **match)
    assert set(offered["job"]) == {JOB, ASTRAY}
    assert offered["namespace"] == []


@pytest.mark.parametrize("query", ANNOTATIONS)
def test_prometheus_marks_alerts_on_the_dashboard(story: Story, query: str) -> None:
    """The alerts that fire are drawn into the panels."""
    names = {sample["metric"]["alertname"] for sample in story.prometheus.query(filled_in(query, job=JOB))}
    assert "SdGatewayUpstreamFailures" in names
