"""The compose file: docker-compose accepts it, and its parts fit together, also without containers."""

import json
import re
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from gateway.settings.loading import load
from tests.docs.markdown import ROOT
from tests.support import yaml_files
from tests.support.harness import KEY, SECRET, Gateway, Process, Simulator, free_port, plain_client, until
from tests.support.programs import required
from tests.support.storeserver import binary

FILE = ROOT / "config" / "compose.yaml"
TEXT = FILE.read_text(encoding="utf-8")
CONFIG: dict[str, Any] = yaml_files.load(TEXT)
SERVICES: dict[str, Any] = CONFIG["services"]
GATEWAY = SERVICES["gateway"]

each_service = pytest.mark.parametrize("service", SERVICES)


def mounts(service: str) -> dict[str, Path]:
    """Return the files of the project that are mounted into a service, by their path in the container."""
    volumes = [volume.split(":") for volume in SERVICES[service].get("volumes", [])]
    return {target: (FILE.parent / source).resolve() for source, target, *_ in volumes if "/" in source}


def secrets(service: str) -> set[str]:
    """Return the paths of a service's secrets in its container."""
    return {f"/run/secrets/{name}" for name in SERVICES[service].get("secrets", [])}


def prometheus_folder(folder: Path) -> Path:
    """Copy the files that are mounted into Prometheus; return the path of its settings."""
    for target, source in mounts("prometheus").items():
        copy = folder / target.lstrip("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.read_bytes())
    return folder / "etc" / "prometheus" / "prometheus.yml"


def test_compose_file_is_accepted(tmp_path: Path) -> None:
    """docker-compose reads the file, and resolves it without a warning."""
    resolved = subprocess.run(
        [required("docker-compose"), "--file", FILE, "config", "--format", "json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (resolved.returncode, resolved.stderr) == (0, "")
    assert set(json.loads(resolved.stdout)["services"]) == {"gateway", "valkey", "prometheus", "grafana"}


@each_service
def test_compose_images_have_a_version_and_no_registry(service: str) -> None:
    """An image is named as in the Dockerfile, without the host of a registry, and with a version."""
    image = SERVICES[service]["image"]
    assert "." not in image.partition("/")[0].partition(":")[0]
    assert image == "sd-progress-gateway" or re.fullmatch(r"[a-z]+/[a-z]+:v?\d+(\.\d+)+", image)


@each_service
def test_compose_services_are_confined(service: str) -> None:
    """Each service has no privileges, a read-only file system and a limit of memory, and only local ports."""
    settings = SERVICES[service]
    assert settings["cap_drop"] == ["ALL"]
    assert settings["security_opt"] == ["no-new-privileges:true"]
    assert settings["read_only"] is True
    assert settings["mem_limit"]
    assert all(port.startswith("127.0.0.1:") for port in settings.get("ports", []))
    assert "privileged" not in settings


@each_service
def test_compose_files_exist(service: str) -> None:
    """Every mounted file is part of the project, and is mounted read-only."""
    assert all(source.is_file() for source in mounts(service).values())
    assert all(volume.endswith(":ro") for volume in SERVICES[service].get("volumes", []) if "/" in volume[:3])


def test_compose_secrets_are_files_that_git_ignores() -> None:
    """Each secret is a file in a folder that git ignores; the comment at the top creates it."""
    for name, secret in CONFIG["secrets"].items():
        assert secret == {"file": f"./secrets/{name}"}
        assert f"> config/secrets/{name}\n" in TEXT
    assert "/config/secrets/" in (ROOT / ".gitignore").read_text().splitlines()
    assert set(CONFIG["secrets"]) == {
        name for service in SERVICES.values() for name in service.get("secrets", [])
    }
    for service, settings in SERVICES.items():
        files = {
            value for value in settings.get("environment", {}).values() if value.startswith("/run/secrets/")
        }
        assert files <= secrets(service)


def test_compose_gateway_has_valid_settings() -> None:
    """The variables are settings, the grace period suffices, and so does the limit of open files."""
    settings = load(FILE.parent / "gateway.toml", GATEWAY["environment"])
    assert int(GATEWAY["stop_grace_period"].removesuffix("s")) >= settings.server.drain_seconds + 5
    assert GATEWAY["ulimits"]["nofile"] >= (
        settings.server.max_connections + settings.upstream.max_in_flight + 100
    )
    assert f"127.0.0.1:8080:{settings.server.port}" in GATEWAY["ports"]
    assert settings.store.hosts == [("valkey", 6379)]
    [target] = yaml_files.load((FILE.parent / "compose" / "prometheus.yaml").read_text())["scrape_configs"]
    assert target["static_configs"] == [{"targets": [f"gateway:{settings.server.metrics_port}"]}]


def test_compose_networks_connect_what_belongs_together() -> None:
    """Only the gateway reaches the store, which has no access to the internet."""
    assert [name for name, service in SERVICES.items() if "store" in service.get("networks", [])] == [
        "gateway",
        "valkey",
    ]
    assert CONFIG["networks"]["store"] == {"internal": True}


def test_compose_prometheus_loads_the_rules(tmp_path: Path) -> None:
    """Promtool accepts the settings with the files as they are mounted."""
    ran = subprocess.run(
        [required("promtool"), "check", "config", prometheus_folder(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"SUCCESS: [1-9]\d* rules found", ran.stdout)


def test_compose_grafana_finds_prometheus_and_the_dashboard() -> None:
    """Grafana's data source is the service, and the folder of its dashboards has the chart's dashboard."""
    folder = FILE.parent / "compose"
    [source] = yaml_files.load((folder / "grafana-datasources.yaml").read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    assert "127.0.0.1:9090:9090" in SERVICES["prometheus"]["ports"]
    [provider] = yaml_files.load((folder / "grafana-dashboards.yaml").read_text())["providers"]
    [dashboard] = [
        source
        for target, source in mounts("grafana").items()
        if target.startswith(provider["options"]["path"])
    ]
    assert json.loads(dashboard.read_text())["uid"] == "sd-progress-gateway"


def test_compose_services_work_together(tmp_path: Path, simulator: Simulator) -> None:
    """With the commands, variables and files of the compose file, the gateway uses its store and is scraped.

    Without containers: names of services become addresses, and paths in a container become paths in a folder.
    """
    store, port, metrics, web = (free_port() for _ in range(4))
    files = {"access_key": KEY, "secret_key": SECRET, "valkey_password": "hush-hush\n"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)

    def here(text: str) -> str:
        text = text.replace("/run/secrets/", f"{tmp_path}/").replace("valkey:6379", f"127.0.0.1:{store}")
        return text.replace("gateway:9090", f"127.0.0.1:{metrics}")

    shell, option, script = SERVICES["valkey"]["command"]
    script = here(script).replace("$$", "$").replace("valkey-server", str(binary("valkey")), 1)
    script = script.replace("<<END\n", f"<<END\nport {store}\nbind 127.0.0.1\ndir {tmp_path}\n")

    config = prometheus_folder(tmp_path)
    config.write_text(here(config.read_text()).replace("15s", "1s"))

    env = {name: here(value) for name, value in GATEWAY["environment"].items()}
    env |= {
        "SPEEDPIX_ENDPOINT": simulator.url,
        "SD_GATEWAY_SERVER__PORT": str(port),
        "SD_GATEWAY_SERVER__METRICS_PORT": str(metrics),
    }
    arguments = [f"--config.file={config}", f"--storage.tsdb.path={tmp_path}/data"]
    arguments.append(f"--web.listen-address=127.0.0.1:{web}")
    with ExitStack() as stack:
        valkey = stack.enter_context(
            Process(option, script, cwd=tmp_path, program=Path(shutil.which(shell) or shell))
        )
        valkey.says("Ready to accept connections")
        stack.enter_context(Process("serve", cwd=tmp_path, env=env)).says("store_up")
        server = Process(*arguments, cwd=tmp_path, program=required("prometheus"))
        stack.enter_context(server).says("Server is ready")
        gate = Gateway(stack.enter_context(plain_client(f"http://127.0.0.1:{port}")))
        prometheus = stack.enter_context(plain_client(f"http://127.0.0.1:{web}"))

        def value(query: str) -> str | None:
            result = prometheus.get("/api/v1/query", params={"query": query}).json()["data"]["result"]
            return result[0]["value"][1] if result else None

        assert gate.get(simulator.task()).status_code == 200
        until(
            lambda: value('sd_gateway_store_up{job="sd-gateway"}') == "1", "the store is up, says Prometheus"
        )
        until(lambda: value('sd_gateway_upstream_requests_total{outcome="ok"}') == "1", "the call is counted")
        groups = prometheus.get("/api/v1/rules").json()["data"]["groups"]
        assert sum(len(group["rules"]) for group in groups) > 10
        assert "hush" not in Path(f"/proc/{valkey.pid}/cmdline").read_text()
