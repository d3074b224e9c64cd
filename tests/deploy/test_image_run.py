"""The image that .ci/image builds: its permissions, that it serves, and its shutdown."""

import json
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway import __version__
from tests.support import yaml_files
from tests.support.harness import (
    KEY,
    SECRET,
    Gateway,
    Process,
    RawUpstream,
    Simulator,
    drained,
    framed,
    free_port,
    plain_client,
    until,
)
from tests.support.programs import required
from tests.support.storeserver import StoreServer, binary

pytestmark = pytest.mark.timeout(600)  # builds and starts more than other tests


ROOT = Path(__file__).parents[2]
STORAGE = ROOT / ".cache" / "containers"
IMAGE = "localhost/sd-progress-gateway"
[BASE] = re.findall("^ARG BASE=([^@]*)@.*$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
CHART = ROOT / "helm" / "sd-progress-gateway"
MEGABYTE = 1_000_000
ANY_USER = 1_000_650_000  # in the range that OpenShift gives to a namespace

# The options of Kubernetes' restricted standard. Without the limits Podman would raise them to its own.
RESTRICTED = [
    "--read-only",
    "--read-only-tmpfs=false",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--ulimit=nofile=1024:1024",
    "--ulimit=nproc=1000:1000",
]


def podman() -> list[str]:
    """Return the podman command with the image's storage; skip the test without an image."""
    found = required("podman")
    if not STORAGE.exists():
        pytest.skip("the image does not exist: .ci/run builds it, with buildah")
    storage = ["--root", str(STORAGE / "root"), "--runroot", str(STORAGE / "run")]
    return [found, *storage, "--runtime=runc", "--cgroup-manager=cgroupfs"]


def inspected(name: str) -> dict[str, Any]:
    """Return the metadata of an image."""
    ran = subprocess.run([*podman(), "image", "inspect", name], capture_output=True, check=True)
    [image] = json.loads(ran.stdout)
    assert isinstance(image, dict)
    return image


class Container:
    """A running container; `execute` runs a program in it."""

    def __init__(self, process: Process, name: str, gate: Gateway) -> None:
        self.process = process
        self.gate = gate
        self._name = name

    def execute(self, *command: str) -> tuple[int, str]:
        """Run a program next to the gateway; return its exit status and output."""
        ran = subprocess.run(
            [*podman(), "exec", self._name, *command], capture_output=True, text=True, check=False
        )
        return ran.returncode, ran.stdout + ran.stderr

    def python(self, program: str) -> tuple[int, str]:
        """Run a line of Python in the container."""
        return self.execute("/opt/gateway/bin/python", "-c", program)


@contextmanager
def contained(
    folder: Path,
    endpoint: str,
    *,
    options: Iterable[str] = (),
    arguments: Iterable[str] = (),
    **env: str | None,
) -> Iterator[Container]:
    """Run the image in front of `endpoint`, on the host's network, while the context is open.

    `options` are further ones of `podman run`, and `arguments` replace those of the image. A variable of None
    removes a default.
    """
    port = free_port()
    name = f"sd-progress-gateway-{port}"
    variables: dict[str, str | None] = {
        "SD_GATEWAY_SERVER__PORT": str(port),
        "SD_GATEWAY_UPSTREAM__ENDPOINT": endpoint,
        "SD_GATEWAY_CREDENTIALS__ACCESS_KEY": KEY,
        "SD_GATEWAY_CREDENTIALS__SECRET_KEY": SECRET,
    } | env
    settings = [f"--env={key}={value}" for key, value in variables.items() if value is not None]
    program, *storage = podman()
    # Podman needs systemd for the health check, which may be absent: a test runs the check.
    run = ["run", "--rm", "--name", name, "--pull=never", "--network=host", "--no-healthcheck"]
    with (
        Process(
            *(*storage, *run, *RESTRICTED, *options, *settings, IMAGE, *arguments),
            cwd=folder,
            program=Path(program),
        ) as process,
        plain_client(f"http://127.0.0.1:{port}") as client,
    ):
        process.says(r'"event": "listening"')
        yield Container(process, name, Gateway(client))


@pytest.fixture(scope="module")
def container(simulator_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """Run the image for all tests of the module."""
    with contained(tmp_path_factory.mktemp("image"), simulator_url) as container:
        yield container


def test_image_is_small() -> None:
    """The image adds less than 150 MB to its base."""
    above = inspected(IMAGE)["Size"] - inspected(f"docker.io/library/{BASE}")["Size"]
    assert 0 < above < 150 * MEGABYTE


def test_image_has_labels() -> None:
    """The labels name the version and the commit."""
    labels = inspected(IMAGE)["Labels"]
    assert labels["org.opencontainers.image.version"] == __version__
    assert re.fullmatch("[0-9a-f]{40}", labels["org.opencontainers.image.revision"])


def test_image_serves(container: Container, simulator: Simulator) -> None:
    """The container is ready, and queries the upstream."""
    assert container.gate.client.get("/readyz").status_code == 200
    assert container.gate.get(simulator.task()).json()["status"] == "running"


def test_image_has_no_privileges(container: Container) -> None:
    """The process has an unprivileged user, no capabilities, and a read-only file system."""
    _, status = container.python("print(open('/proc/1/status').read())")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split() == fields["Gid"].split() == ["10001"] * 4
    assert fields["CapEff"] == fields["CapPrm"] == fields["CapBnd"] == "0" * 16
    assert fields["NoNewPrivs"] == "1"
    for folder in ("/etc/sd-gateway", "/opt/gateway", "/tmp"):  # noqa: S108 - only checks that it is not writable
        exit_status, output = container.python(f"open('{folder}/new', 'w')")
        assert exit_status == 1
        assert "Read-only file system" in output


def test_image_runs_on_openshift(tmp_path: Path, simulator: Simulator) -> None:
    """It runs as OpenShift runs the chart: any user, group 0, and secrets that only fsGroup may read."""
    manifests = rendered(CHART / "ci" / "openshift.yaml")
    [gateway] = manifests["Deployment"]["spec"]["template"]["spec"]["containers"]
    folders = {}
    for mount in gateway["volumeMounts"]:
        folders[mount["name"]] = tmp_path / mount["name"]
        folders[mount["name"]].mkdir(mode=0o755)
    for name, content in manifests["ConfigMap"]["data"].items():
        (folders["config"] / name).write_text(content, encoding="utf-8")
    for name, content in {"access_key": KEY, "secret_key": SECRET}.items():
        file = folders["credentials"] / name
        file.write_text(content, encoding="utf-8")
        os.chown(file, 0, ANY_USER)
        file.chmod(0o440)
    volumes = [
        f"--volume={folders[mount['name']]}:{mount['mountPath']}:ro" for mount in gateway["volumeMounts"]
    ]
    env = {variable["name"]: variable["value"] for variable in gateway["env"]} | {
        "SD_GATEWAY_SERVER__METRICS_PORT": "0",
        "SD_GATEWAY_CREDENTIALS__ACCESS_KEY": None,  # the files have the pair
        "SD_GATEWAY_CREDENTIALS__SECRET_KEY": None,
    }
    options = [f"--user={ANY_USER}:0", f"--group-add={ANY_USER}", *volumes]
    with contained(tmp_path, simulator.url, options=options, arguments=gateway["args"], **env) as container:
        status, output = container.python("import os; print(os.getuid(), os.getgid())")
        assert (status, output) == (0, f"{ANY_USER} 0\n")
        assert container.gate.client.get("/readyz").json()["ready"] is True
        assert container.gate.get(simulator.task()).json()["status"] == "running"
        container.process.signal()
        assert container.process.exit_status() == 0


def rendered(values: Path) -> dict[str, Any]:
    """Return the chart's manifests by kind."""
    command = [required("helm"), "template", "release", CHART, "-f", values]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return {manifest["kind"]: manifest for manifest in yaml_files.load_all(ran.stdout) if manifest}


def test_image_passes_its_health_check(container: Container) -> None:
    """The image's own health check passes."""
    check = inspected(IMAGE)["Healthcheck"]["Test"]
    assert check[0] == "CMD"
    assert container.execute(*check[1:]) == (0, "")


def test_image_has_no_build_tools(container: Container) -> None:
    """The gateway's environment does not contain pip."""
    exit_status, output = container.python("import importlib.util as u; print(u.find_spec('pip'))")
    assert (exit_status, output) == (0, "None\n")


def test_image_shuts_down_gracefully(tmp_path: Path, simulator: Simulator) -> None:
    """SIGTERM reaches the gateway: a stream gets a reconnect delay, and the process exits with 0 in time."""
    with contained(tmp_path, simulator.url) as container:
        task = simulator.task()
        with container.gate.connect() as stream:
            stream.sendall(f"GET /v1/progress/{task}/events HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            until(lambda: container.gate.metric("watchers") == 1, "the stream is open")
            container.process.signal()  # podman passes it on
            received = drained(stream)
        assert container.process.exit_status() == 0
    assert received.count(b"retry:") == 2  # at the start, and on shutdown
    assert '"event": "stopped"' in container.process.output
    assert "Traceback" not in container.process.output


def test_image_has_the_extras(tmp_path: Path, simulator: Simulator) -> None:
    """A shared store and traces only need settings."""
    traces = RawUpstream(lambda connection, _: connection.sendall(framed(b"")))
    with StoreServer(binary("valkey"), tmp_path) as store, traces:
        env = {"SD_GATEWAY_STORE__URL": store.url, "OTEL_EXPORTER_OTLP_ENDPOINT": traces.url}
        with contained(tmp_path, simulator.url, **env) as container:
            until(lambda: container.gate.metric("store_up") == 1, "the store is up")
            assert container.gate.get(simulator.task()).status_code == 200
            assert store.client.dbsize()
            container.process.signal()
            assert container.process.exit_status() == 0
        assert {request.head.split(b" ")[1] for request in traces.requests} == {b"/v1/traces"}
