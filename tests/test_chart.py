"""The Helm chart: what it renders, what it refuses, and that the gateway takes the settings it writes."""

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from gateway import __version__
from gateway.api.operator_endpoints import PROBES
from gateway.settings.loading import load
from gateway.settings.model import Settings
from tests.harness import Gateway, Simulator

ROOT = Path(__file__).parent.parent
CHART = ROOT / "helm" / "sd-progress-gateway"
ASK = CHART / "files" / "ask.py"
VALUES = sorted((CHART / "ci").glob("*.yaml"))
MINIMAL, FULL = CHART / "ci" / "minimal.yaml", CHART / "ci" / "full.yaml"
OLDEST, NEWEST = "1.25", "1.37"
# Of which Kubernetes has no schema.
CUSTOM = {"DestinationRule", "HTTPRoute", "PodMonitor", "PrometheusRule", "ServiceMonitor"}

Manifest = dict[str, Any]

each_helm = pytest.mark.parametrize("program", ["helm", "helm3"])
each_values = pytest.mark.parametrize("values", VALUES, ids=lambda file: file.stem)


def helm(*arguments: str | Path, program: str = "helm") -> subprocess.CompletedProcess[str]:
    """Run helm to its end."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not here: .ci/run fetches helm 4 as helm and 3 as helm3")
    return subprocess.run([found, *arguments], capture_output=True, text=True, check=False)


def rendered(*arguments: str | Path, program: str = "helm", chart: Path = CHART) -> dict[str, Manifest]:
    """Return what the chart makes of these arguments, by kind; the dashboard's ConfigMap as Dashboard."""
    ran = helm("template", "release", chart, *arguments, program=program)
    assert ran.returncode == 0, ran.stderr
    manifests = [manifest for manifest in yaml.safe_load_all(ran.stdout) if manifest]
    by_kind = {
        "Dashboard" if manifest["metadata"]["name"].endswith("-dashboard") else manifest["kind"]: manifest
        for manifest in manifests
    }
    assert len(by_kind) == len(manifests)
    return by_kind


def minimal(*settings: str) -> dict[str, Manifest]:
    """Return what the chart makes of the least values and these."""
    return rendered("-f", MINIMAL, *(part for setting in settings for part in ("--set-json", setting)))


def pod(manifests: dict[str, Manifest]) -> Manifest:
    """Return the Deployment's pod template."""
    template: Manifest = manifests["Deployment"]["spec"]["template"]
    return template


def container(manifests: dict[str, Manifest]) -> Manifest:
    """Return the gateway's container."""
    [only] = pod(manifests)["spec"]["containers"]
    assert isinstance(only, dict)
    return only


def settings_of(manifests: dict[str, Manifest], tmp_path: Path) -> Settings:
    """Return the settings that the gateway reads out of the ConfigMap and the container's environment."""
    file = tmp_path / "gateway.toml"
    file.write_text(manifests["ConfigMap"]["data"]["gateway.toml"], encoding="utf-8")
    environ = {variable["name"]: variable["value"] for variable in container(manifests)["env"]}
    return load(file, environ)


def ports(manifests: dict[str, Manifest]) -> dict[str, int]:
    """Return the container's ports by name."""
    return {port["name"]: port["containerPort"] for port in container(manifests)["ports"]}


def test_chart_is_tried_with_the_values_that_matter() -> None:
    """There is a values file for each of the ways to deploy that differ."""
    expected = {"minimal", "full", "gateway-api", "monitoring-off", "existing-secret"}
    assert expected <= {file.stem for file in VALUES}


# --- every values file, with both helms -------------------------------------------------------------------


@each_helm
@each_values
def test_chart_pleases_helm(program: str, values: Path) -> None:
    """Helm's linter finds nothing, strictly."""
    ran = helm("lint", "--strict", CHART, "-f", values, program=program)
    assert ran.returncode == 0, ran.stdout
    assert "[ERROR]" not in ran.stdout
    assert "[WARNING]" not in ran.stdout


@each_values
def test_chart_is_the_same_with_both_helms(values: Path) -> None:
    """Helm 3 and 4 make the same of it."""
    assert rendered("-f", values, program="helm") == rendered("-f", values, program="helm3")


@each_values
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_chart_is_valid_kubernetes(values: Path, version: str) -> None:
    """Every manifest fits the schema of the oldest and the newest Kubernetes that the chart supports."""
    manifests = rendered("-f", values, "--kube-version", version)
    assert {"ConfigMap", "Deployment", "Pod", "Service"} <= set(manifests)
    for kind, manifest in manifests.items():
        if kind not in CUSTOM:
            kubernetes_validate.validate(manifest, version, strict=True)


@each_values
def test_chart_writes_settings_that_the_gateway_takes(values: Path, tmp_path: Path) -> None:
    """The ConfigMap's TOML is settings as the gateway checks them, those of the values among them."""
    manifests = rendered("-f", values)
    settings = settings_of(manifests, tmp_path)
    written = tomllib.loads(manifests["ConfigMap"]["data"]["gateway.toml"])
    asked = yaml.safe_load((CHART / "values.yaml").read_text())["settings"]
    for section, keys in (yaml.safe_load(values.read_text()).get("settings") or {}).items():
        asked[section] = asked.get(section, {}) | keys
    for section, keys in asked.items():
        assert keys.items() <= written[section].items()
    assert str(settings.credentials.access_key_file) == "/run/secrets/sd-gateway/access_key"


@each_values
def test_chart_gives_the_drain_its_time(values: Path, tmp_path: Path) -> None:
    """The grace period is longer than preStop and the drain together."""
    manifests = rendered("-f", values)
    grace = pod(manifests)["spec"]["terminationGracePeriodSeconds"]
    hook = container(manifests).get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["0"])
    [before] = re.findall(r"\d+", hook[-1])
    assert grace > int(before) + math.ceil(settings_of(manifests, tmp_path).server.drain_seconds)


@each_values
def test_chart_asks_where_the_gateway_answers(values: Path, tmp_path: Path) -> None:
    """Probes are the gateway's own; ports are those of its settings, and those asked for exist."""
    manifests = rendered("-f", values)
    settings = settings_of(manifests, tmp_path).server
    known = {"http": settings.port} | ({"metrics": settings.metrics_port} if settings.metrics_port else {})
    assert ports(manifests) == known
    paths = {}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = container(manifests)[probe]["httpGet"]
        assert asked["port"] == "http"
        paths[probe] = asked["path"]
    assert set(paths.values()) <= PROBES
    assert paths["readinessProbe"] == "/readyz"
    assert (
        paths["livenessProbe"] == "/healthz"
    )  # a pod is not killed for draining, or for want of credentials
    targets = {port["targetPort"] for port in manifests["Service"]["spec"]["ports"]}
    assert targets == set(known)


@each_values
def test_chart_is_restricted(values: Path) -> None:
    """Every pod keeps to Kubernetes' "restricted" standard, writes nowhere, and has no token."""
    manifests = rendered("-f", values)
    for spec in (pod(manifests)["spec"], manifests["Pod"]["spec"]):
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 10001
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        [only] = spec["containers"]
        assert only["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert only["resources"]["limits"]["memory"]


@each_values
def test_chart_selects_its_pods_by_what_never_changes(values: Path) -> None:
    """Everything selects the gateway's pods and not the test's, by labels without a version."""
    manifests = rendered("-f", values)
    selector = manifests["Deployment"]["spec"]["selector"]["matchLabels"]
    assert set(selector) == {f"app.kubernetes.io/{label}" for label in ("name", "instance", "component")}
    assert selector.items() <= pod(manifests)["metadata"]["labels"].items()
    assert not selector.items() <= manifests["Pod"]["metadata"]["labels"].items()
    assert manifests["Service"]["spec"]["selector"] == selector
    for kind in ("PodDisruptionBudget", "ServiceMonitor", "PodMonitor"):
        if kind in manifests:
            assert manifests[kind]["spec"]["selector"]["matchLabels"] == selector
    if "NetworkPolicy" in manifests:
        assert manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == selector


# --- what it makes ----------------------------------------------------------------------------------------


def test_chart_is_of_the_gateways_version() -> None:
    """The image's default tag is this version, and the oldest Kubernetes that it names the oldest tried."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["kubeVersion"] == f">={OLDEST}.0-0"
    assert f"Kubernetes {OLDEST} or newer" in (CHART / "README.md").read_text()
    assert chart["version"] == chart["appVersion"] == __version__
    assert container(minimal())["image"] == f"sd-progress-gateway:{__version__}"


def test_chart_rolls_without_a_gap() -> None:
    """No pod goes before its successor is ready."""
    strategy = minimal()["Deployment"]["spec"]["strategy"]["rollingUpdate"]
    assert strategy == {"maxSurge": 1, "maxUnavailable": 0}


def test_chart_rolls_when_settings_change() -> None:
    """The sum in the pod's annotations follows the settings, and nothing else."""

    def checksum(*settings: str) -> str:
        annotations: dict[str, str] = pod(minimal(*settings))["metadata"]["annotations"]
        return annotations["checksum/config"]

    assert checksum() == checksum("replicas=4")
    assert checksum() != checksum("settings.cache.running_seconds=3")


def test_chart_mounts_secrets_as_directories(tmp_path: Path) -> None:
    """Secrets are whole directories, so that a rotation arrives, and the settings' files lie in them."""
    manifests = rendered("-f", FULL)
    mounts = {mount["mountPath"]: mount for mount in container(manifests)["volumeMounts"]}
    assert all("subPath" not in mount and mount["readOnly"] for mount in mounts.values())
    volumes = {volume["name"]: volume for volume in pod(manifests)["spec"]["volumes"]}
    secrets = {
        path: volumes[mount["name"]]["secret"]["secretName"]
        for path, mount in mounts.items()
        if "secret" in volumes[mount["name"]]
    }
    assert secrets == {"/run/secrets/sd-gateway": "progress-pair", "/run/secrets/sd-gateway-store": "valkey"}
    settings = settings_of(manifests, tmp_path)
    files = [*settings.credentials.model_dump().items(), *settings.store.model_dump().items()]
    named = {name: file for name, file in files if name.endswith("_file")}
    assert {name: str(file.parent) for name, file in named.items()} == {
        name: f"/run/secrets/sd-gateway{'' if name.endswith('_key_file') else '-store'}" for name in named
    }
    config = container(manifests)["args"][-1]
    assert str(Path(config).parent) in mounts


def test_chart_names_no_file_that_the_secret_does_not_have(tmp_path: Path) -> None:
    """Without a next pair, or a store's secret, the settings name no file for it."""
    settings = settings_of(minimal(), tmp_path)
    assert settings.credentials.next_access_key_file is None
    assert (settings.store.username_file, settings.store.password_file, settings.store.ca_file) == (None,) * 3


def test_chart_keeps_the_pair_out_of_everything_but_its_secret() -> None:
    """A pair that comes with the values is in the Secret alone; a secret that exists is not made."""
    manifests = rendered("-f", CHART / "ci" / "values-pair.yaml")
    assert manifests["Secret"]["stringData"] == {"access_key": "an-access-key", "secret_key": "a-secret-key"}
    assert (
        pod(manifests)["spec"]["volumes"][1]["secret"]["secretName"]
        == manifests["Secret"]["metadata"]["name"]
    )
    del manifests["Secret"]
    assert "a-secret-key" not in json.dumps(manifests)
    assert "Secret" not in minimal()


def test_chart_leaves_the_number_of_pods_to_the_autoscaler() -> None:
    """With an autoscaler the Deployment names no number; it counts CPU and watchers, as asked."""
    manifests = rendered("-f", FULL)
    assert "replicas" not in manifests["Deployment"]["spec"]
    spec = manifests["HorizontalPodAutoscaler"]["spec"]
    assert spec["scaleTargetRef"]["name"] == manifests["Deployment"]["metadata"]["name"]
    cpu, subscribers = spec["metrics"]
    assert cpu["resource"]["target"] == {"type": "Utilization", "averageUtilization": 70}
    assert subscribers["pods"]["metric"]["name"] == "sd_gateway_watchers"
    assert subscribers["pods"]["target"] == {"type": "AverageValue", "averageValue": "4000"}
    assert minimal()["Deployment"]["spec"]["replicas"] == 1


def test_chart_routes_by_the_root_path_and_bounds_no_stream() -> None:
    """Ingress and HTTPRoute lead to the service, below server.root_path; no time-out ends a stream."""
    manifests = rendered("-f", CHART / "ci" / "gateway-api.yaml")
    [rule] = manifests["HTTPRoute"]["spec"]["rules"]
    assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": "/progress"}}]
    assert rule["timeouts"] == {"request": "0s", "backendRequest": "0s"}
    service = manifests["Service"]
    assert rule["backendRefs"] == [
        {"name": service["metadata"]["name"], "port": service["spec"]["ports"][0]["port"]}
    ]

    manifests = rendered("-f", FULL)
    [rule] = manifests["Ingress"]["spec"]["rules"]
    [path] = rule["http"]["paths"]
    assert path["path"] == "/"
    assert path["backend"]["service"] == {
        "name": manifests["Service"]["metadata"]["name"],
        "port": {"name": "http"},
    }
    annotations = manifests["Ingress"]["metadata"]["annotations"]
    assert annotations["nginx.ingress.kubernetes.io/proxy-buffering"] == "off"
    assert annotations["haproxy.org/timeout-server"] == "1h"


def test_chart_hashes_by_the_part_of_the_path_that_is_the_task() -> None:
    """HAProxy counts the parts of the path, those of server.root_path too; own annotations go first."""
    hashing = ["ingress.enabled=true", "ingress.hashByTask=true", 'ingress.hosts=["a.example.com"]']

    def annotations(*settings: str) -> dict[str, str]:
        told: dict[str, str] = minimal(*hashing, *settings)["Ingress"]["metadata"]["annotations"]
        return told

    assert annotations()["haproxy.org/load-balance"] == "uri depth 3"
    assert annotations()["haproxy-ingress.github.io/balance-algorithm"] == "uri depth 3"
    assert annotations('settings.server.root_path="/a/b"')["haproxy.org/load-balance"] == "uri depth 5"
    own = 'ingress.annotations={"nginx.org/lb-method": "least_conn"}'
    assert annotations(own)["nginx.org/lb-method"] == "least_conn"
    assert annotations()["nginx.ingress.kubernetes.io/proxy-buffering"] == "off"
    plain = minimal("ingress.enabled=true", 'ingress.hosts=["a.example.com"]')["Ingress"]["metadata"][
        "annotations"
    ]
    assert not {"haproxy.org/load-balance", "nginx.org/lb-method"} & set(plain)


def test_chart_serves_the_names_by_which_it_is_reached(tmp_path: Path) -> None:
    """With an ingress, trusted_hosts are its hosts, the service's and localhost; a given list stands."""
    ingress = ["ingress.enabled=true", 'ingress.hosts=["a.example.com", "*.b.example.com"]']

    def hosts(*settings: str) -> list[str]:
        return settings_of(minimal(*settings), tmp_path).server.allowed_hosts

    manifests = minimal(*ingress)
    name = manifests["Service"]["metadata"]["name"]
    inside = [name, f"{name}.default", f"{name}.default.svc", f"{name}.default.svc.cluster.local"]
    told = ["a.example.com", "*.b.example.com", *inside, "localhost", "127.0.0.1"]
    assert settings_of(manifests, tmp_path).server.trusted_hosts == told
    assert (
        manifests["Pod"]["spec"]["containers"][0]["args"][-1] == "a.example.com"
    )  # what `helm test` asks by
    assert hosts(*ingress, 'settings.server.trusted_hosts=["c.example.com"]') == ["c.example.com"]
    route = ["httpRoute.enabled=true", 'httpRoute.parentRefs=[{"name": "public"}]']
    assert "d.example.com" in hosts(*ingress, *route, 'httpRoute.hostnames=["d.example.com"]')
    assert hosts(*ingress, *route) == ["*"]
    assert hosts() == ["*"]


def test_chart_brings_along_what_it_has_no_value_for() -> None:
    """Objects of the user's are made as they stand, braces and all."""
    extra = {
        "apiVersion": "v1",
        "kind": "Extra",
        "metadata": {"name": "e"},
        "spec": {"text": "{{ .Values }}"},
    }
    assert minimal(f"extraObjects={json.dumps([extra])}")["Extra"] == extra


def test_chart_lets_in_and_out_only_what_is_needed() -> None:
    """In: callers and Prometheus, each on its port. Out: names, upstream, the store."""
    spec = rendered("-f", FULL)["NetworkPolicy"]["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    callers, prometheus = spec["ingress"]
    assert callers["ports"] == [{"port": "http"}]
    assert {"podSelector": {}} in callers["from"]
    assert prometheus["ports"] == [{"port": "metrics"}]
    assert prometheus["from"] == [
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    ]
    names, upstream, store, collector = spec["egress"]
    assert {port["port"] for port in names["ports"]} == {53}
    assert upstream["ports"] == [{"port": 8443}]
    assert [port["port"] for port in store["ports"]] == [6380, 26379, 6379]
    assert store["to"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "valkey"}}}]
    assert collector["ports"] == [{"port": 4318}]


@pytest.mark.parametrize(
    ("settings", "out"),
    [
        ([], [[53, 53], [443]]),
        (['settings.upstream.endpoint="http://127.0.0.1"'], [[53, 53], [80]]),
        (['settings.upstream.endpoint="https://[::1]:8443/"'], [[53, 53], [8443]]),
        (['settings.store.url="valkey://cache"'], [[53, 53], [443], [6379]]),
        (
            ['settings.store.url="valkeys://a:7000,b:7000"', "settings.store.cluster=true"],
            [[53, 53], [443], [7000]],
        ),
    ],
    ids=["default", "plain", "port", "store", "cluster"],
)
def test_chart_lets_out_where_the_settings_lead(settings: list[str], out: list[list[int]]) -> None:
    """The ports of upstream and of the store are those of their URLs, or the usual ones."""
    egress = minimal(*settings)["NetworkPolicy"]["spec"]["egress"]
    assert [[port["port"] for port in rule["ports"]] for rule in egress] == out


def test_chart_is_scraped_where_the_metrics_are() -> None:
    """A monitor asks on the metrics' own port; where they have none, on the callers'."""
    manifests = rendered("-f", FULL)
    [endpoint] = manifests["ServiceMonitor"]["spec"]["endpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("metrics", "/metrics")
    assert manifests["ServiceMonitor"]["metadata"]["labels"]["release"] == "prometheus"
    manifests = minimal('monitoring.monitor="PodMonitor"', "settings.server.metrics_port=0")
    [endpoint] = manifests["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == "http"


def test_chart_has_the_rules_as_they_are() -> None:
    """The PrometheusRule is the file that promtool tests, its templates untouched."""
    manifests = rendered("-f", FULL)
    assert manifests["PrometheusRule"]["spec"] == yaml.safe_load(
        (CHART / "rules" / "gateway.yaml").read_text()
    )
    assert "PrometheusRule" not in minimal()


def test_chart_has_the_dashboard_as_it_is() -> None:
    """The ConfigMap that Grafana's sidecar finds holds the dashboard that is tested, braces and all."""
    manifest = rendered("-f", FULL)["Dashboard"]
    assert manifest["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert manifest["metadata"]["annotations"] == {"grafana_folder": "Images"}
    [content] = manifest["data"].values()
    assert json.loads(content) == json.loads((CHART / "dashboards" / "gateway.json").read_text())
    assert "Dashboard" not in minimal()


@pytest.mark.parametrize(
    ("values", "more", "warnings"),
    [
        ("minimal", "replicas=1", []),
        ("minimal", "replicas=2", ["without settings.store.url each replica asks upstream for itself"]),
        (
            "minimal",
            "autoscaling.enabled=true",
            ["without settings.store.url each replica asks upstream for itself"],
        ),
        ("full", "replicas=2", []),
        (
            "values-pair",
            "replicas=1",
            ["the access-key pair came with the values", "without a NetworkPolicy"],
        ),
    ],
)
def test_chart_warns_of_what_is_unwise(tmp_path: Path, values: str, more: str, warnings: list[str]) -> None:
    """The notes tell the next command, and warn where there is something to warn of."""
    file = CHART / "ci" / f"{values}.yaml"
    # Without a cluster helm shows no notes: a manifest that quotes them has to.
    chart = shutil.copytree(CHART, tmp_path / CHART.name)
    notes = '{{ include (print .Template.BasePath "/NOTES.txt") . | toJson }}'
    quoting = f"kind: Notes\nmetadata: {{name: notes}}\ntext: {notes}\n"
    (chart / "templates" / "quoting.yaml").write_text(quoting, encoding="utf-8")
    notes = rendered("-f", file, "--set", more, chart=chart)["Notes"]["text"]
    assert "helm test release --namespace default --logs" in notes
    assert re.findall(r"WARNING: (.*?)(?:,| whoever)", notes) == warnings


# --- what it refuses --------------------------------------------------------------------------------------


@each_helm
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("replica=2", "replica"),
        ("replicas=-1", "replicas"),
        ("image.pullPolicy=Often", "pullPolicy"),
        ("image.digest=latest", "digest"),
        ("settings.server.prot=1", "prot"),
        ("settings.server.port=0", "port"),
        ("settings.server.drain_seconds=0", "drain_seconds"),
        ("settings.credentials.secret_key=s", "credentials"),
        ("settings.store.password_file=/f", "password_file"),
        ("settings.store.url=valkey://:password@valkey", "url"),
        ("settings.log.level=loud", "level"),
        ("credentials.secret=s", "secret"),
        ("preStopSeconds=soon", "preStopSeconds"),
        ("ingress.enabled=true", "hosts"),
        ("httpRoute.enabled=true", "parentRefs"),
        ("monitoring.monitor=Monitor", "monitor"),
        ("networkPolicy.fromNamespaces[0]=Not_A_Name", "fromNamespaces"),
        ("autoscaling.cpuPercent=high", "cpuPercent"),
        ("monitoring.dashboard.folder=Images", "folder"),
        ("extraObjects[0].kind=Secret", "apiVersion"),
    ],
)
def test_chart_refuses_wrong_values(program: str, wrong: str, named: str) -> None:
    """The schema refuses what no template reads or the gateway would refuse, and says where it stands."""
    ran = helm("template", "release", CHART, "-f", MINIMAL, "--set", wrong, program=program)
    assert ran.returncode != 0
    assert "schema" in ran.stderr
    assert named in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name an existingSecret"),
        (["credentials.accessKey=a"], "name an existingSecret"),
        (["credentials.existingSecret=s", "credentials.accessKey=a", "credentials.secretKey=s"], "not both"),
        (
            ["credentials.existingSecret=s", "autoscaling.enabled=true", "autoscaling.cpuPercent=0"],
            "autoscaling: by cpuPercent, by watchers, or by both",
        ),
    ],
    ids=["no-pair", "half-a-pair", "two-pairs", "no-measure"],
)
def test_chart_refuses_values_that_do_not_go_together(arguments: list[str], says: str) -> None:
    """What the schema cannot see, the templates refuse in words."""
    ran = helm("template", "release", CHART, *(part for each in arguments for part in ("--set", each)))
    assert ran.returncode != 0
    assert says in ran.stderr


def test_chart_knows_the_settings_that_the_gateway_knows() -> None:
    """The schema has the gateway's own bounds for every setting, but for those that the chart itself sets."""
    model = Settings.model_json_schema()

    def plain(node: Any) -> Any:
        if isinstance(node, list):
            return [plain(part) for part in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return plain(model["$defs"][node["$ref"].rpartition("/")[2]])
        kept = {key: value for key, value in node.items() if key not in {"title", "default", "description"}}
        if "properties" in kept:
            kept["properties"] = {name: plain(part) for name, part in node["properties"].items()}
        return {key: value if key == "properties" else plain(value) for key, value in kept.items()}

    expected = plain({key: value for key, value in model.items() if key != "$defs"})
    sections = expected["properties"]
    del sections["credentials"]
    files = ("username_file", "password_file", "ca_file", "sentinel_username_file", "sentinel_password_file")
    for name in files:
        del sections["store"]["properties"][name]
    sections["store"]["properties"]["url"] = {
        "type": "string",
        "pattern": "^[^@]*$",
    }  # no password in a ConfigMap
    sections["server"]["properties"]["port"]["minimum"] = 1  # the Service has to know it
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert schema["properties"]["settings"] == expected


def test_chart_explains_every_value() -> None:
    """The schema and values.yaml have the same keys, all the way down to what the user fills."""

    def compare(values: Any, schema: Any, path: str) -> None:
        if path == "settings" or schema.get("additionalProperties") is not False:
            return
        optional = {"global", "claims"}  # Helm's own; and what few resources have
        assert set(schema["properties"]) - optional == set(values), path
        for name, value in values.items():
            compare(value, schema["properties"][name], name)

    values = yaml.safe_load((CHART / "values.yaml").read_text())
    compare(values, json.loads((CHART / "values.schema.json").read_text()), "values")


def test_chart_readme_is_made_of_the_values() -> None:
    """The README's table is the current one, and has a word for every value that is to be set."""
    spec = importlib.util.spec_from_file_location("readme", CHART.parent / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    text = (CHART / "README.md").read_text(encoding="utf-8")
    assert readme.renewed(text) == text, "make chart"
    assert re.findall(r"^\| `([\w.]+)` \| `.*` \|  \|$", text, re.MULTILINE) == []


# --- helm test --------------------------------------------------------------------------------------------


def asked(gate: Gateway, host: str = "helm-test") -> tuple[int, str]:
    """Run the test pod's program; return its exit status and what it says."""
    ran = subprocess.run([sys.executable, ASK, gate.url, host], capture_output=True, text=True, check=False)
    return ran.returncode, ran.stdout + ran.stderr


def test_chart_test_is_what_the_pod_runs() -> None:
    """The pod has the program whole, the service's address, and a name that trusted_hosts lets in."""
    manifests = rendered("-f", FULL)
    [only] = manifests["Pod"]["spec"]["containers"]
    assert only["args"] == [
        ASK.read_text(encoding="utf-8"),
        f"http://{manifests['Service']['metadata']['name']}:80",
        "progress.example.com",
    ]
    assert minimal()["Pod"]["spec"]["containers"][0]["args"][-1] == "helm-test"
    assert only["image"] == container(manifests)["image"]


def test_chart_test_passes_where_upstream_accepts_the_signature(
    simulator: Simulator, launch: Callable[..., Gateway]
) -> None:
    """A ready gateway whose pair upstream accepts passes, though there is no such task."""
    gate = launch(simulator.url, server={"trusted_hosts": ["progress.example.com"]})
    status, says = asked(gate, "progress.example.com")
    assert status == 0, says
    assert simulator.calls("helm-test") == 1


@pytest.mark.parametrize("pair", [("", ""), ("wrong", "pair")], ids=["none", "refused"])
def test_chart_test_fails_without_a_pair_that_works(
    simulator: Simulator, launch: Callable[..., Gateway], pair: tuple[str, str]
) -> None:
    """Without a pair, or with one that upstream refuses, it fails and shows why."""
    gate = launch(simulator.url, credentials=dict(zip(("access_key", "secret_key"), pair, strict=True)))
    status, says = asked(gate)
    assert status == 1
    assert "upstream-credentials" in says or "no credentials" in says
    assert "Traceback" not in says
