"""The Helm chart: rendered manifests, rejected values, and settings that the gateway accepts."""

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

import pytest

from gateway import __version__
from gateway.api.operator_endpoints import PROBES
from gateway.settings.loading import load
from gateway.settings.model import Settings
from tests.support import yaml_files
from tests.support.harness import Gateway, Simulator
from tests.support.programs import required

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "sd-progress-gateway"
ASK = CHART / "files" / "ask.py"
VALUES = sorted((CHART / "ci").glob("*.yaml"))
MINIMAL, FULL = CHART / "ci" / "minimal.yaml", CHART / "ci" / "full.yaml"
OLDEST, NEWEST = "1.25", "1.37"
# Kinds without a schema in Kubernetes.
CUSTOM = {"DestinationRule", "HTTPRoute", "PodMonitor", "PrometheusRule", "ServiceMonitor"}

# The second manifests of a kind, by the last part of their names.
_NAMED = {"dashboard": "Dashboard", "metrics": "MetricsService"}

Manifest = dict[str, Any]

each_helm = pytest.mark.parametrize("program", ["helm", "helm3"])
each_values = pytest.mark.parametrize("values", VALUES, ids=lambda file: file.stem)


def validate(manifest: Manifest, version: str) -> None:
    """Check a manifest against the schema of a Kubernetes version."""
    import kubernetes_validate  # noqa: PLC0415  # takes a second, in each test process

    kubernetes_validate.validate(manifest, version, strict=True)


def helm(*arguments: str | Path, program: str = "helm") -> subprocess.CompletedProcess[str]:
    """Run helm and return its result."""
    command = [required(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def rendered(*arguments: str | Path, program: str = "helm", chart: Path = CHART) -> dict[str, Manifest]:
    """Return the rendered manifests by kind, with those of _NAMED under these names."""
    ran = helm("template", "release", chart, *arguments, program=program)
    assert ran.returncode == 0, ran.stderr
    manifests = [manifest for manifest in yaml_files.load_all(ran.stdout) if manifest]
    by_kind = {
        _NAMED.get(manifest["metadata"]["name"].rpartition("-")[2], manifest["kind"]): manifest
        for manifest in manifests
    }
    assert len(by_kind) == len(manifests)
    return by_kind


def minimal(*settings: str) -> dict[str, Manifest]:
    """Return the rendered manifests of the minimal values plus these settings."""
    return rendered("-f", MINIMAL, *(part for setting in settings for part in ("--set-json", setting)))


def pod(manifests: dict[str, Manifest]) -> Manifest:
    """Return the pod template of the Deployment."""
    template: Manifest = manifests["Deployment"]["spec"]["template"]
    return template


def container(manifests: dict[str, Manifest]) -> Manifest:
    """Return the gateway's container."""
    first, *_ = pod(manifests)["spec"]["containers"]
    assert isinstance(first, dict)
    assert first["name"] == "gateway"
    return first


def settings_of(manifests: dict[str, Manifest], tmp_path: Path) -> Settings:
    """Return the settings that the gateway loads from the ConfigMap and the environment of the container."""
    file = tmp_path / "gateway.toml"
    file.write_text(manifests["ConfigMap"]["data"]["gateway.toml"], encoding="utf-8")
    environ = {variable["name"]: variable["value"] for variable in container(manifests)["env"]}
    return load(file, environ)


def ports(manifests: dict[str, Manifest]) -> dict[str, int]:
    """Return the ports of the container by name."""
    return {port["name"]: port["containerPort"] for port in container(manifests)["ports"]}


def test_chart_has_example_values() -> None:
    """There is a values file for each kind of deployment."""
    expected = {"minimal", "full", "extras", "gateway-api", "monitoring-off", "existing-secret", "openshift"}
    assert expected <= {file.stem for file in VALUES}


# --- every values file, with both helms -------------------------------------------------------------------


@each_helm
@each_values
def test_chart_passes_helm_lint(program: str, values: Path) -> None:
    """Helm's linter reports nothing in strict mode."""
    ran = helm("lint", "--strict", CHART, "-f", values, program=program)
    assert ran.returncode == 0, ran.stdout
    assert "[ERROR]" not in ran.stdout
    assert "[WARNING]" not in ran.stdout


@each_values
def test_chart_is_the_same_with_both_helms(values: Path) -> None:
    """Helm 3 and Helm 4 render the same manifests."""
    assert rendered("-f", values, program="helm") == rendered("-f", values, program="helm3")


@each_values
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_chart_is_valid_kubernetes(values: Path, version: str) -> None:
    """Every manifest matches the schema of the oldest and the newest supported Kubernetes."""
    manifests = rendered("-f", values, "--kube-version", version)
    assert {"ConfigMap", "Deployment", "Pod", "Service"} <= set(manifests)
    for kind, manifest in manifests.items():
        if kind not in CUSTOM:
            validate(manifest, version)


@each_values
def test_chart_writes_valid_settings(values: Path, tmp_path: Path) -> None:
    """The gateway accepts the TOML of the ConfigMap, which contains the settings of the values."""
    manifests = rendered("-f", values)
    settings = settings_of(manifests, tmp_path)
    written = tomllib.loads(manifests["ConfigMap"]["data"]["gateway.toml"])
    asked = yaml_files.load((CHART / "values.yaml").read_text())["settings"]
    for section, keys in (yaml_files.load(values.read_text()).get("settings") or {}).items():
        asked[section] = asked.get(section, {}) | keys
    for section, keys in asked.items():
        assert keys.items() <= written[section].items()
    assert str(settings.credentials.access_key_file) == "/run/secrets/sd-gateway/access_key"


@each_values
def test_chart_grace_period_covers_the_drain(values: Path, tmp_path: Path) -> None:
    """The termination grace period is longer than preStop plus the drain."""
    manifests = rendered("-f", values)
    grace = pod(manifests)["spec"]["terminationGracePeriodSeconds"]
    hook = container(manifests).get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["0"])
    [before] = re.findall(r"\d+", hook[-1])
    assert grace > int(before) + math.ceil(settings_of(manifests, tmp_path).server.drain_seconds)


@each_values
def test_chart_probes_and_ports_are_the_gateways(values: Path, tmp_path: Path) -> None:
    """Probes use paths of the gateway; ports are those of its settings, and every referenced port exists."""
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
    assert paths["livenessProbe"] == "/healthz"  # a pod is not killed while it drains or lacks credentials
    services = [manifests[kind] for kind in ("Service", "MetricsService") if kind in manifests]
    targets = [port["targetPort"] for service in services for port in service["spec"]["ports"]]
    assert sorted(targets) == sorted(known)


def containers(spec: Manifest) -> list[Manifest]:
    """Return all containers of a pod, including its init containers."""
    return [*spec.get("initContainers", ()), *spec["containers"]]


@each_values
def test_chart_is_restricted(values: Path) -> None:
    """Every pod meets the "restricted" standard, has a read-only file system, a memory limit and no token."""
    manifests = rendered("-f", values)
    for spec in (pod(manifests)["spec"], manifests["Pod"]["spec"]):
        assert restricted_violations(spec) == []
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        for each in containers(spec):
            assert each["securityContext"]["readOnlyRootFilesystem"] is True
            assert each["resources"]["limits"]["memory"]


def restricted_violations(spec: Manifest) -> list[str]:
    """Return what the restricted pod security standard forbids in a pod.

    The standard permits some sysctls and SELinux options; this check permits none.

    Source: https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted
    """
    context = spec.get("securityContext", {})
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
    }
    forbidden = {
        f"volume {volume['name']}": set(volume) <= allowed | {"name", "secret"}
        for volume in spec.get("volumes", ())
    }
    forbidden |= {name: not spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")}
    forbidden |= {name: not context.get(name) for name in ("sysctls", "seLinuxOptions", "windowsOptions")}
    forbidden["runAsUser of the pod"] = context.get("runAsUser") != 0
    for each in containers(spec):
        own = each.get("securityContext", {})
        capabilities = own.get("capabilities", {})
        seccomp = own.get("seccompProfile", context.get("seccompProfile", {}))
        rules = {
            "runAsNonRoot": own.get("runAsNonRoot", context.get("runAsNonRoot")) is True,
            "runAsUser": own.get("runAsUser") != 0,
            "privileged": not own.get("privileged"),
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
            "drop": capabilities.get("drop") == ["ALL"],
            "add": set(capabilities.get("add", ())) <= {"NET_BIND_SERVICE"},
            "seccompProfile": seccomp.get("type") in {"RuntimeDefault", "Localhost"},
            "seLinuxOptions": not own.get("seLinuxOptions"),
            "procMount": own.get("procMount", "Default") == "Default",
            "hostPort": not any(port.get("hostPort") for port in each.get("ports", ())),
        }
        forbidden |= {f"{name} of {each['name']}": met for name, met in rules.items()}
    return [name for name, met in forbidden.items() if not met]


@pytest.mark.parametrize(
    ("values", "violation"),
    [
        ("podSecurityContext.runAsNonRoot=null", "runAsNonRoot of gateway"),
        ("podSecurityContext.seccompProfile=null", "seccompProfile of gateway"),
        ("securityContext.runAsUser=0", "runAsUser of gateway"),
        ("securityContext.capabilities.drop=null", "drop of gateway"),
        ('extraVolumes=[{"name": "host", "hostPath": {"path": "/"}}]', "volume host"),
        ('initContainers=[{"name": "init", "securityContext": {"privileged": true}}]', "privileged of init"),
        ('extraContainers=[{"name": "more", "ports": [{"hostPort": 1}]}]', "hostPort of more"),
    ],
)
def test_restricted_violations_are_found(values: str, violation: str) -> None:
    """Values that break the restricted standard are rendered, and the check of these tests finds them."""
    assert violation in restricted_violations(pod(minimal(values))["spec"])


@each_values
def test_chart_selectors_use_immutable_labels(values: Path) -> None:
    """Selectors match the pods of the gateway and not the test pod, by labels without a version."""
    manifests = rendered("-f", values)
    selector = manifests["Deployment"]["spec"]["selector"]["matchLabels"]
    assert set(selector) == {f"app.kubernetes.io/{label}" for label in ("name", "instance", "component")}
    assert selector.items() <= pod(manifests)["metadata"]["labels"].items()
    assert not selector.items() <= manifests["Pod"]["metadata"]["labels"].items()
    for kind in ("Service", "MetricsService"):
        if kind in manifests:
            assert manifests[kind]["spec"]["selector"] == selector
    for kind in ("PodDisruptionBudget", "ServiceMonitor", "PodMonitor"):
        if kind in manifests:
            assert manifests[kind]["spec"]["selector"]["matchLabels"] == selector
    if "NetworkPolicy" in manifests:
        assert manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == selector


# --- manifests --------------------------------------------------------------------------------------------


def test_chart_has_the_version_of_the_gateway() -> None:
    """The default image tag is this version, and kubeVersion is the oldest tested Kubernetes."""
    chart = yaml_files.load((CHART / "Chart.yaml").read_text())
    assert chart["kubeVersion"] == f">={OLDEST}.0-0"
    assert f"Kubernetes {OLDEST} or newer" in (CHART / "README.md").read_text()
    assert chart["version"] == chart["appVersion"] == __version__
    assert container(minimal())["image"] == f"sd-progress-gateway:{__version__}"


def test_chart_updates_without_downtime() -> None:
    """By default no pod is removed before its replacement is ready; Recreate has no options."""
    rolling = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    assert minimal()["Deployment"]["spec"]["strategy"] == rolling
    recreated = minimal('strategy={"type": "Recreate"}')["Deployment"]
    assert recreated["spec"]["strategy"] == {"type": "Recreate"}
    validate(recreated, NEWEST)


def test_chart_restarts_pods_when_settings_change() -> None:
    """The checksum annotation depends on the settings only."""

    def checksum(*settings: str) -> str:
        annotations: dict[str, str] = pod(minimal(*settings))["metadata"]["annotations"]
        return annotations["checksum/config"]

    assert checksum() == checksum("replicas=4")
    assert checksum() != checksum("settings.cache.running_seconds=3")


def test_chart_mounts_secrets_as_directories(tmp_path: Path) -> None:
    """Secrets are mounted as directories, so that rotations arrive, and contain the files of the settings."""
    manifests = rendered("-f", FULL)
    mounts = {mount["mountPath"]: mount for mount in container(manifests)["volumeMounts"]}
    assert all("subPath" not in mount and mount["readOnly"] for mount in mounts.values())
    volumes = {volume["name"]: volume for volume in pod(manifests)["spec"]["volumes"]}
    secrets = {
        path: volumes[mount["name"]]["secret"]["secretName"]
        for path, mount in mounts.items()
        if "secret" in volumes[mount["name"]]
    }
    assert secrets == {
        "/run/secrets/sd-gateway": "progress-pair",
        "/run/secrets/sd-gateway-store": "valkey",
        "/run/secrets/sd-gateway-upstream": "upstream-tls",
    }
    settings = settings_of(manifests, tmp_path)
    folders = {"sd-gateway": settings.credentials, "sd-gateway-store": settings.store}
    for folder, section in (folders | {"sd-gateway-upstream": settings.upstream}).items():
        files = {file for name, file in section.model_dump().items() if name.endswith("_file")}
        assert {str(file.parent) for file in files} == {f"/run/secrets/{folder}"}
    config = container(manifests)["args"][-1]
    assert str(Path(config).parent) in mounts


def test_chart_mounts_the_certificates_of_the_upstream() -> None:
    """The CA and the client certificate for the upstream come from a secret."""
    keys = {"caKey": "ca.crt", "clientCertKey": "tls.crt", "clientKeyKey": "tls.key"}
    manifests = minimal(f"upstream={json.dumps({'existingSecret': 'upstream-tls', **keys})}")
    text = manifests["ConfigMap"]["data"]["gateway.toml"]
    folder = "/run/secrets/sd-gateway-upstream"
    assert [line for line in text.splitlines() if folder in line] == [
        f'ca_file = "{folder}/ca.crt"',
        f'client_cert_file = "{folder}/tls.crt"',
        f'client_key_file = "{folder}/tls.key"',
    ]
    volumes = {volume["name"]: volume for volume in pod(manifests)["spec"]["volumes"]}
    [mount] = [each for each in container(manifests)["volumeMounts"] if each["mountPath"] == folder]
    assert volumes[mount["name"]]["secret"]["secretName"] == "upstream-tls"


def test_chart_names_only_files_of_the_secret(tmp_path: Path) -> None:
    """Without a next key pair or a store secret, the settings name no file for it."""
    settings = settings_of(minimal(), tmp_path)
    assert settings.credentials.next_access_key_file is None
    assert (settings.store.username_file, settings.store.password_file, settings.store.ca_file) == (None,) * 3


def test_chart_keeps_the_key_pair_in_its_secret() -> None:
    """A key pair in the values is in the Secret only; with an existing secret, none is created."""
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
    """With an autoscaler the Deployment has no replicas; the configured measures are used."""
    manifests = rendered("-f", FULL)
    assert "replicas" not in manifests["Deployment"]["spec"]
    spec = manifests["HorizontalPodAutoscaler"]["spec"]
    assert spec["scaleTargetRef"]["name"] == manifests["Deployment"]["metadata"]["name"]
    cpu, subscribers = spec["metrics"]
    assert cpu["resource"]["target"] == {"type": "Utilization", "averageUtilization": 70}
    assert subscribers["pods"]["metric"]["name"] == "sd_gateway_watchers"
    assert subscribers["pods"]["target"] == {"type": "AverageValue", "averageValue": "4000"}
    assert minimal()["Deployment"]["spec"]["replicas"] == 1


def test_chart_routes_the_root_path_without_timeouts() -> None:
    """Ingress and HTTPRoute route server.root_path to the service; no timeout ends a stream."""
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


def test_chart_hashes_the_path_of_the_task() -> None:
    """HAProxy counts path segments, including server.root_path; annotations of the user take precedence."""
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


def test_chart_trusts_the_names_of_its_routes(tmp_path: Path) -> None:
    """With an ingress, trusted_hosts are its hosts, the service names and localhost, unless set."""
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
    )  # Host header of `helm test`
    assert hosts(*ingress, 'settings.server.trusted_hosts=["c.example.com"]') == ["c.example.com"]
    route = ["httpRoute.enabled=true", 'httpRoute.parentRefs=[{"name": "public"}]']
    assert "d.example.com" in hosts(*ingress, *route, 'httpRoute.hostnames=["d.example.com"]')
    assert hosts(*ingress, *route) == ["*"]
    assert hosts() == ["*"]


def test_chart_adds_extra_objects() -> None:
    """Extra objects are created unchanged, including braces."""
    extra = {
        "apiVersion": "v1",
        "kind": "Extra",
        "metadata": {"name": "e"},
        "spec": {"text": "{{ .Values }}"},
    }
    assert minimal(f"extraObjects={json.dumps([extra])}")["Extra"] == extra


def test_chart_network_policy_is_minimal() -> None:
    """Ingress: clients and Prometheus, each on its port. Egress: DNS, upstream and the store."""
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
def test_chart_egress_follows_the_settings(settings: list[str], out: list[list[int]]) -> None:
    """The ports of upstream and of the store are those of their URLs, or the default ports."""
    egress = minimal(*settings)["NetworkPolicy"]["spec"]["egress"]
    assert [[port["port"] for port in rule["ports"]] for rule in egress] == out


def test_chart_monitors_the_metrics_port() -> None:
    """A monitor scrapes the metrics port; without one, the port of the clients."""
    manifests = rendered("-f", FULL)
    [endpoint] = manifests["ServiceMonitor"]["spec"]["endpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("metrics", "/metrics")
    assert manifests["ServiceMonitor"]["metadata"]["labels"]["release"] == "prometheus"
    manifests = minimal('monitoring.monitor="PodMonitor"', "settings.server.metrics_port=0")
    [endpoint] = manifests["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == "http"


def test_chart_contains_the_rules() -> None:
    """The PrometheusRule equals the file that promtool tests, with its templates unchanged."""
    manifests = rendered("-f", FULL)
    assert manifests["PrometheusRule"]["spec"] == yaml_files.load(
        (CHART / "rules" / "gateway.yaml").read_text()
    )
    assert "PrometheusRule" not in minimal()


def test_chart_puts_urls_into_alerts() -> None:
    """runbook_url and dashboard_url begin with the URLs of the values; nothing else differs from the file."""
    manifests = rendered("-f", CHART / "ci" / "extras.yaml")
    expected = yaml_files.load((CHART / "rules" / "gateway.yaml").read_text())
    alerts = [rule for group in expected["groups"] for rule in group["rules"] if "alert" in rule]
    for alert in alerts:
        annotations = alert["annotations"]
        path, _, heading = annotations["runbook_url"].partition("#")
        assert path == "helm/OPERATING.md"
        annotations["runbook_url"] = f"{own('monitoring.runbookUrl')}#{heading}"
        annotations["dashboard_url"] = f"https://example.com/grafana{annotations['dashboard_url']}"
    assert manifests["PrometheusRule"]["spec"] == expected


def test_chart_contains_the_dashboard() -> None:
    """The ConfigMap for the Grafana sidecar contains the tested dashboard unchanged, including braces."""
    manifest = rendered("-f", FULL)["Dashboard"]
    assert manifest["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert manifest["metadata"]["annotations"] == {"grafana_folder": "Images"}
    [content] = manifest["data"].values()
    assert json.loads(content) == json.loads((CHART / "dashboards" / "gateway.json").read_text())
    assert "Dashboard" not in minimal()


def notes_of(tmp_path: Path, *arguments: str | Path) -> str:
    """Return the notes that Helm prints after an installation."""
    # Helm prints no notes without a cluster, so a manifest quotes them.
    chart = shutil.copytree(CHART, tmp_path / CHART.name)
    notes = '{{ include (print .Template.BasePath "/NOTES.txt") . | toJson }}'
    quoting = f"kind: Notes\nmetadata: {{name: notes}}\ntext: {notes}\n"
    (chart / "templates" / "quoting.yaml").write_text(quoting, encoding="utf-8")
    text = rendered(*arguments, chart=chart)["Notes"]["text"]
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize(
    ("values", "more", "warnings"),
    [
        ("minimal", "replicas=1", []),
        ("minimal", "replicas=2", ["without settings.store.url each replica makes its own upstream calls"]),
        (
            "minimal",
            "autoscaling.enabled=true",
            ["without settings.store.url each replica makes its own upstream calls"],
        ),
        ("full", "replicas=2", []),
        (
            "values-pair",
            "replicas=1",
            ["the key pair is part of the values", "without a NetworkPolicy"],
        ),
        ("minimal", "service.type=NodePort", ["the NetworkPolicy admits no client from outside"]),
        (
            "hash-by-task",
            "replicas=1",
            ["the NetworkPolicy admits no client from outside"],
        ),
        ("openshift", "replicas=1", []),
        ("extras", "autoscaling.enabled=false", []),
    ],
)
def test_chart_notes_have_warnings(tmp_path: Path, values: str, more: str, warnings: list[str]) -> None:
    """The notes contain the next command, and warnings about risky values."""
    notes = notes_of(tmp_path, "-f", CHART / "ci" / f"{values}.yaml", "--set", more)
    assert "helm test release --namespace default --logs" in notes
    assert re.findall(r"WARNING: (.*?)(?:,| and a client| every pod)", notes) == warnings


@pytest.mark.parametrize(
    ("values", "admitted"),
    [("minimal", "default"), ("full", "default, ingress"), ("gateway-api", "default, gateways")],
)
def test_chart_notes_name_the_admitted_namespaces(tmp_path: Path, values: str, admitted: str) -> None:
    """The notes list the namespaces of clients."""
    assert f"from these namespaces only: {admitted}\n" in notes_of(
        tmp_path, "-f", CHART / "ci" / f"{values}.yaml"
    )


@pytest.mark.parametrize("values", ["minimal", "full", "gateway-api", "hash-by-task"])
def test_chart_notes_forward_a_port(
    tmp_path: Path, simulator: Simulator, launch: Callable[..., Gateway], values: str
) -> None:
    """The notes forward a port of the service; the gateway then answers at the addresses of the notes."""
    file = CHART / "ci" / f"{values}.yaml"
    manifests = rendered("-f", file)
    notes = notes_of(tmp_path, "-f", file)
    [(service, local, remote)] = re.findall(
        r"^  kubectl --namespace default port-forward service/(\S+) (\d+):(\d+)$", notes, re.MULTILINE
    )
    assert service == manifests["Service"]["metadata"]["name"]
    assert int(remote) == manifests["Service"]["spec"]["ports"][0]["port"]
    settings = settings_of(manifests, tmp_path).server
    gate = launch(
        simulator.url, server={"root_path": settings.root_path, "trusted_hosts": settings.trusted_hosts}
    )
    addresses = re.findall(rf"http://127\.0\.0\.1:{local}(\S*?),?\s", notes.replace(".\n", "\n"))
    assert len(addresses) == (1 if values == "full" else 2)  # its trusted hosts do not include 127.0.0.1
    for path in addresses:
        assert gate.client.get(path, headers={"Host": f"127.0.0.1:{local}"}).status_code == 200, path


def own(name: str) -> Any:
    """Return a value of ci/extras.yaml."""
    value = yaml_files.load((CHART / "ci" / "extras.yaml").read_text())
    for part in name.split("."):
        value = value[part]
    return value


def test_chart_default_security_context_has_fixed_ids() -> None:
    """By default all IDs are 10001, and fsGroup lets the gateway read the mounted secrets."""
    for spec in (pod(minimal())["spec"], minimal()["Pod"]["spec"]):
        context = spec["securityContext"]
        assert {context[name] for name in ("runAsUser", "runAsGroup", "fsGroup")} == {10001}
        [only] = spec["containers"]
        assert set(only["securityContext"]) == {
            "allowPrivilegeEscalation",
            "capabilities",
            "readOnlyRootFilesystem",
        }


@each_helm
def test_chart_runs_on_openshift(program: str) -> None:
    """OpenShift's constraint restricted-v2 admits the pods: no ID is fixed, and no volume needs the host.

    The constraint requires what the restricted standard requires, and assigns user, group and SELinux label.
    """
    manifests = rendered("-f", CHART / "ci" / "openshift.yaml", program=program)
    for spec in (pod(manifests)["spec"], manifests["Pod"]["spec"]):
        assert spec["securityContext"] == {
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        for each in containers(spec):
            assert each["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
    policy = manifests["NetworkPolicy"]["spec"]
    assert {port["port"] for port in policy["egress"][0]["ports"]} == {53, 5353}
    admitted = [peer["namespaceSelector"] for rule in policy["ingress"] for peer in rule["from"][-1:]]
    assert [list(each["matchLabels"].values()) for each in admitted] == [
        ["openshift-ingress"],
        ["openshift-user-workload-monitoring"],
    ]


def test_chart_uses_every_extra_value() -> None:
    """Each value of ci/extras.yaml is in the field of Kubernetes that it names, unchanged."""
    manifests = rendered("-f", CHART / "ci" / "extras.yaml")
    deployment = manifests["Deployment"]["spec"]
    spec = pod(manifests)["spec"]
    only = container(manifests)
    assert only["envFrom"] == own("extraEnvFrom")
    assert spec["volumes"][-2:] == own("extraVolumes")
    assert only["volumeMounts"][-1:] == own("extraVolumeMounts")
    assert spec["initContainers"] == own("initContainers")
    assert spec["containers"][1:] == own("extraContainers")
    for name in ("hostAliases", "dnsPolicy", "dnsConfig", "runtimeClassName"):
        assert spec[name] == own(name)
    assert deployment["revisionHistoryLimit"] == own("revisionHistoryLimit")
    assert deployment["strategy"] == {"type": "RollingUpdate"} | own("strategy")
    assert own("podSecurityContext").items() <= spec["securityContext"].items()
    assert spec["securityContext"]["runAsNonRoot"] is True  # defaults without a value of the user stay
    assert own("securityContext").items() <= only["securityContext"].items()
    assert manifests["Pod"]["spec"]["containers"][0]["securityContext"] == only["securityContext"]
    behavior = manifests["HorizontalPodAutoscaler"]["spec"]["behavior"]
    assert behavior["scaleUp"] == own("autoscaling.behavior.scaleUp")
    assert behavior["scaleDown"] == {"stabilizationWindowSeconds": 600}
    [rule] = manifests["Ingress"]["spec"]["rules"]
    [path] = rule["http"]["paths"]
    assert (path["path"], path["pathType"]) == (own("ingress.path"), own("ingress.pathType"))
    [endpoint] = manifests["ServiceMonitor"]["spec"]["endpoints"]
    for name in ("interval", "scrapeTimeout", "relabelings", "metricRelabelings"):
        assert endpoint[name] == own(f"monitoring.{name}")


def test_chart_spreads_its_own_pods() -> None:
    """A constraint without a labelSelector counts the pods of the gateway; an empty list removes them all."""
    selector = minimal()["Deployment"]["spec"]["selector"]
    default = pod(minimal())["spec"]["topologySpreadConstraints"]
    assert [each["topologyKey"] for each in default] == [
        "kubernetes.io/hostname",
        "topology.kubernetes.io/zone",
    ]
    assert [each["labelSelector"] for each in default] == [selector, selector]
    without, with_selector = pod(rendered("-f", CHART / "ci" / "extras.yaml"))["spec"][
        "topologySpreadConstraints"
    ]
    assert without == own("topologySpreadConstraints")[0] | {"labelSelector": selector}
    assert with_selector == own("topologySpreadConstraints")[1]
    assert "topologySpreadConstraints" not in pod(minimal("topologySpreadConstraints=[]"))["spec"]


def test_chart_labels_every_object() -> None:
    """Common labels are on every object and pod, and in no selector; they replace no label of the chart."""
    labels = {"example.com/team": "images", "app.kubernetes.io/name": "other", "release": "other"}
    manifests = rendered(
        *("-f", FULL, "--set-json", f"commonLabels={json.dumps(labels)}"),
        *("--set-json", 'podLabels={"example.com/team": "edge"}'),
    )
    assert len(manifests) > 10
    plain = rendered("-f", FULL)
    for kind, manifest in manifests.items():
        assert manifest["metadata"]["labels"]["example.com/team"] == "images"
        assert manifest["metadata"]["labels"]["app.kubernetes.io/name"] == "sd-progress-gateway"
        assert plain[kind]["metadata"]["labels"].items() <= manifest["metadata"]["labels"].items()
        assert manifest.get("spec", {}).get("selector") == plain[kind].get("spec", {}).get("selector")
    assert pod(manifests)["metadata"]["labels"]["example.com/team"] == "edge"
    assert manifests["ServiceMonitor"]["metadata"]["labels"]["release"] == "prometheus"


def test_chart_exposes_only_the_port_of_clients() -> None:
    """A service that is reachable from outside has no metrics port: another service has it."""
    assert [port["name"] for port in minimal()["Service"]["spec"]["ports"]] == ["http", "metrics"]
    assert "MetricsService" not in minimal()
    manifests = rendered("-f", CHART / "ci" / "extras.yaml")
    spec = manifests["Service"]["spec"]
    assert [(port["name"], port["nodePort"]) for port in spec["ports"]] == [("http", 30080)]
    names = ("type", "ipFamilyPolicy", "ipFamilies", "loadBalancerClass", "loadBalancerSourceRanges")
    for name in (*names, "externalTrafficPolicy"):
        assert spec[name] == own(f"service.{name}")
    assert own("service.annotations") == manifests["Service"]["metadata"]["annotations"]
    inside = manifests["MetricsService"]["spec"]
    assert (inside["type"], [port["name"] for port in inside["ports"]]) == ("ClusterIP", ["metrics"])
    monitored = manifests["ServiceMonitor"]["spec"]["selector"]["matchLabels"]
    assert monitored.items() <= manifests["MetricsService"]["metadata"]["labels"].items()
    without = minimal('service.type="NodePort"', "settings.server.metrics_port=0")
    assert "MetricsService" not in without


def test_chart_network_policy_has_extra_rules() -> None:
    """DNS may have other ports, or no rule; extra rules admit clients from outside the cluster."""
    spec = rendered("-f", CHART / "ci" / "extras.yaml")["NetworkPolicy"]["spec"]
    assert spec["ingress"][-1:] == own("networkPolicy.extraIngress")
    assert [(port["port"], port["protocol"]) for port in spec["egress"][0]["ports"]] == [
        (53, "UDP"),
        (53, "TCP"),
        (1053, "UDP"),
        (1053, "TCP"),
    ]
    egress = minimal("networkPolicy.dnsPorts=[]")["NetworkPolicy"]["spec"]["egress"]
    assert [rule["ports"] for rule in egress] == [[{"port": 443}]]  # a rule without ports would allow all


def test_chart_documents_who_may_connect() -> None:
    """The README says that the default policy admits the namespace of the release only, as it does."""
    clients, _ = minimal()["NetworkPolicy"]["spec"]["ingress"]
    assert clients["from"] == [{"podSelector": {}}]
    readme = " ".join((CHART / "README.md").read_text(encoding="utf-8").split())
    assert "The default NetworkPolicy admits clients from the namespace of the release only." in readme


# --- rejected values --------------------------------------------------------------------------------------


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
        ("autoscaling.behaviour.scaleDown=1", "behaviour"),
        ("podSecurityContext=none", "podSecurityContext"),
        ("extraVolumes[0].emptyDir=x", "name"),
        ("extraVolumeMounts[0].name=x", "mountPath"),
        ("extraContainers[0].image=x", "name"),
        ("commonLabels.a.b=c", "commonLabels"),
        ("topologySpreadConstraints[0].maxSkew=1", "topologyKey"),
        ("strategy.type=Rolling", "type"),
        ("strategy.maxSurge=1", "maxSurge"),
        ("revisionHistoryLimit=-1", "revisionHistoryLimit"),
        ("dnsPolicy=Cluster", "dnsPolicy"),
        ("hostAliases[0].ip=10.0.0.1", "hostnames"),
        ("service.type=ExternalName", "type"),
        ("service.ipFamilyPolicy=DualStack", "ipFamilyPolicy"),
        ("service.ipFamilies[0]=ipv6", "ipFamilies"),
        ("service.nodeport=30080", "nodeport"),
        ("ingress.path=x", "path"),
        ("ingress.pathType=Regex", "pathType"),
        ("networkPolicy.dnsPorts[0]=0", "dnsPorts"),
        ("monitoring.scrapeTimeout=soon", "scrapeTimeout"),
        ("monitoring.runbookUrl=wiki", "runbookUrl"),
        ("monitoring.grafanaUrl=https://g/?a", "grafanaUrl"),
        ("monitoring.dashboard.folder=Images", "folder"),
        ("extraObjects[0].kind=Secret", "apiVersion"),
    ],
)
def test_chart_rejects_invalid_values(program: str, wrong: str, named: str) -> None:
    """The schema rejects unknown keys and invalid settings; the error names the key."""
    ran = helm("template", "release", CHART, "-f", MINIMAL, "--set", wrong, program=program)
    assert ran.returncode != 0
    assert "schema" in ran.stderr
    assert named in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "set existingSecret"),
        (["credentials.accessKey=a"], "set existingSecret"),
        (["credentials.existingSecret=s", "credentials.accessKey=a", "credentials.secretKey=s"], "not both"),
        (
            ["credentials.existingSecret=s", "autoscaling.enabled=true", "autoscaling.cpuPercent=0"],
            "autoscaling: set cpuPercent, watchers, or both",
        ),
    ],
    ids=["no-pair", "half-a-pair", "two-pairs", "no-measure"],
)
def test_chart_rejects_contradictory_values(arguments: list[str], says: str) -> None:
    """Templates reject combinations that the schema cannot check."""
    ran = helm("template", "release", CHART, *(part for each in arguments for part in ("--set", each)))
    assert ran.returncode != 0
    assert says in ran.stderr


def test_chart_schema_has_the_settings_of_the_gateway() -> None:
    """The schema has the bounds of the gateway for every setting, except those that the chart sets."""
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
    for section in (sections["store"], sections["upstream"]):  # the chart sets the files
        for name in [name for name in section["properties"] if name.endswith("_file")]:
            del section["properties"][name]
    sections["upstream"]["properties"]["proxy"] = {"type": "string", "pattern": "^[^@]*$"}
    sections["store"]["properties"]["url"] = {
        "type": "string",
        "pattern": "^[^@]*$",
    }  # a ConfigMap must not contain a password
    sections["server"]["properties"]["port"]["minimum"] = 1  # the Service needs a fixed port
    del sections["server"]["properties"]["uds"]  # a Service and its probes need a port
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert schema["properties"]["settings"] == expected


def test_chart_schema_and_values_have_the_same_keys() -> None:
    """The schema and values.yaml have the same keys, down to values with a free structure."""

    def compare(values: Any, schema: Any, path: str) -> None:
        if path == "settings" or schema.get("additionalProperties") is not False:
            return
        optional = {"global", "claims"}  # Helm's own key, and a rare one of resources
        assert set(schema["properties"]) - optional == set(values), path
        for name, value in values.items():
            compare(value, schema["properties"][name], name)

    values = yaml_files.load((CHART / "values.yaml").read_text())
    compare(values, json.loads((CHART / "values.schema.json").read_text()), "values")


def test_chart_readme_is_current() -> None:
    """The table in the README is current and describes every value."""
    spec = importlib.util.spec_from_file_location("readme", CHART.parent / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    text = (CHART / "README.md").read_text(encoding="utf-8")
    assert readme.updated(text) == text, "make chart"
    assert re.findall(r"^\| `([\w.]+)` \| `.*` \|  \|$", text, re.MULTILINE) == []


# --- helm test --------------------------------------------------------------------------------------------


def run_test(gate: Gateway, host: str = "helm-test") -> tuple[int, str]:
    """Run the program of the test pod; return its exit status and its output."""
    ran = subprocess.run([sys.executable, ASK, gate.url, host], capture_output=True, text=True, check=False)
    return ran.returncode, ran.stdout + ran.stderr


def test_chart_test_pod_runs_the_program() -> None:
    """The pod has the program, the address of the service, and a host name that trusted_hosts allows."""
    manifests = rendered("-f", FULL)
    [only] = manifests["Pod"]["spec"]["containers"]
    assert only["args"] == [
        ASK.read_text(encoding="utf-8"),
        f"http://{manifests['Service']['metadata']['name']}:80",
        "progress.example.com",
    ]
    assert minimal()["Pod"]["spec"]["containers"][0]["args"][-1] == "helm-test"
    assert only["image"] == container(manifests)["image"]


def test_chart_test_passes_with_an_accepted_signature(
    simulator: Simulator, launch: Callable[..., Gateway]
) -> None:
    """A ready gateway with an accepted key pair passes, although the test task does not exist."""
    gate = launch(simulator.url, server={"trusted_hosts": ["progress.example.com"]})
    status, output = run_test(gate, "progress.example.com")
    assert status == 0, output
    assert simulator.calls("helm-test") == 1


@pytest.mark.parametrize("pair", [("", ""), ("wrong", "pair")], ids=["none", "refused"])
def test_chart_test_fails_without_a_valid_key_pair(
    simulator: Simulator, launch: Callable[..., Gateway], pair: tuple[str, str]
) -> None:
    """Without a key pair, or with a refused one, the test fails and prints the reason."""
    gate = launch(simulator.url, credentials=dict(zip(("access_key", "secret_key"), pair, strict=True)))
    status, output = run_test(gate)
    assert status == 1
    assert "upstream-credentials" in output or "no credentials" in output
    assert "Traceback" not in output
