"""The image itself, as .ci/image builds it: what it may do, that it serves, and how it leaves."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway import __version__
from tests.harness import (
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
from tests.storeserver import StoreServer, binary

pytestmark = pytest.mark.timeout(600)  # it builds, starts or plays more than other tests


ROOT = Path(__file__).parent.parent
STORAGE = ROOT / ".cache" / "containers"
IMAGE = "localhost/sd-progress-gateway"
[BASE] = re.findall("^ARG BASE=([^@]*)@.*$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
MEGABYTE = 1_000_000

# As Kubernetes' restricted standard has it run. Podman would raise the limits to its own, if it may.
RESTRICTED = [
    "--read-only",
    "--read-only-tmpfs=false",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--ulimit=nofile=1024:1024",
    "--ulimit=nproc=1000:1000",
]


def podman() -> list[str]:
    """Return the command that knows the image; skip the test where there is none."""
    found = shutil.which("podman")
    if found is None or not STORAGE.exists():
        pytest.skip("no image here: .ci/image builds it")
    storage = ["--root", str(STORAGE / "root"), "--runroot", str(STORAGE / "run")]
    return [found, *storage, "--runtime=runc", "--cgroup-manager=cgroupfs"]


def inspected(name: str) -> dict[str, Any]:
    """Return what is known of an image."""
    told = subprocess.run([*podman(), "image", "inspect", name], capture_output=True, check=True)
    [image] = json.loads(told.stdout)
    assert isinstance(image, dict)
    return image


class Container:
    """The image as it runs; `ask` runs a program in it."""

    def __init__(self, process: Process, name: str, gate: Gateway) -> None:
        self.process = process
        self.gate = gate
        self._name = name

    def ask(self, *command: str) -> tuple[int, str]:
        """Run a program beside the gateway; return its exit status and what it says."""
        ran = subprocess.run(
            [*podman(), "exec", self._name, *command], capture_output=True, text=True, check=False
        )
        return ran.returncode, ran.stdout + ran.stderr

    def python(self, program: str) -> tuple[int, str]:
        """Run a line of Python there."""
        return self.ask("/opt/gateway/bin/python", "-c", program)


@contextmanager
def contained(folder: Path, endpoint: str, **env: str) -> Iterator[Container]:
    """Run the image in front of `endpoint`, on the host's network, until the end."""
    port = free_port()
    name = f"sd-progress-gateway-{port}"
    variables = {
        "SD_GATEWAY_SERVER__PORT": str(port),
        "SD_GATEWAY_UPSTREAM__ENDPOINT": endpoint,
        "SD_GATEWAY_CREDENTIALS__ACCESS_KEY": KEY,
        "SD_GATEWAY_CREDENTIALS__SECRET_KEY": SECRET,
    } | env
    settings = [part for key, value in variables.items() for part in ("--env", f"{key}={value}")]
    program, *options = podman()
    # Its health check is systemd's to run, which need not be here: the tests run it.
    run = ["run", "--rm", "--name", name, "--pull=never", "--network=host", "--no-healthcheck"]
    with (
        Process(*options, *run, *RESTRICTED, *settings, IMAGE, cwd=folder, program=Path(program)) as process,
        plain_client(f"http://127.0.0.1:{port}") as client,
    ):
        process.says(r'"event": "listening"')
        yield Container(process, name, Gateway(client))


@pytest.fixture(scope="module")
def container(simulator_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """Run the image until the last test that asks for it has ended."""
    with contained(tmp_path_factory.mktemp("image"), simulator_url) as container:
        yield container


def test_image_is_small() -> None:
    """It adds less than 150 MB to its base."""
    above = inspected(IMAGE)["Size"] - inspected(f"docker.io/library/{BASE}")["Size"]
    assert 0 < above < 150 * MEGABYTE


def test_image_says_what_it_is() -> None:
    """Its labels name the version and the commit."""
    labels = inspected(IMAGE)["Labels"]
    assert labels["org.opencontainers.image.version"] == __version__
    assert re.fullmatch("[0-9a-f]{40}", labels["org.opencontainers.image.revision"])


def test_image_serves(container: Container, simulator: Simulator) -> None:
    """It is ready, and asks upstream as anywhere."""
    assert container.gate.client.get("/readyz").status_code == 200
    assert container.gate.get(simulator.task()).json()["status"] == "running"


def test_image_may_do_nothing_but_serve(container: Container) -> None:
    """It is nobody, may become nobody else, and has nothing to write on."""
    _, status = container.python("print(open('/proc/1/status').read())")
    told = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert told["Uid"].split() == told["Gid"].split() == ["10001"] * 4
    assert told["CapEff"] == told["CapPrm"] == told["CapBnd"] == "0" * 16
    assert told["NoNewPrivs"] == "1"
    for folder in ("/etc/sd-gateway", "/opt/gateway", "/tmp"):  # noqa: S108 - asked whether it is writable
        exit_status, says = container.python(f"open('{folder}/new', 'w')")
        assert exit_status == 1
        assert "Read-only file system" in says


def test_image_knows_whether_it_is_healthy(container: Container) -> None:
    """The health check that it was built with passes."""
    check = inspected(IMAGE)["Healthcheck"]["Test"]
    assert check[0] == "CMD"
    assert container.ask(*check[1:]) == (0, "")


def test_image_left_its_tools_behind(container: Container) -> None:
    """What installed the gateway did not come along into its environment."""
    exit_status, says = container.python("import importlib.util as u; print(u.find_spec('pip'))")
    assert (exit_status, says) == (0, "None\n")


def test_image_drains_when_it_is_told_to_stop(tmp_path: Path, simulator: Simulator) -> None:
    """SIGTERM reaches the gateway: a stream is told to come back, and it leaves with 0, in time."""
    with contained(tmp_path, simulator.url) as container:
        task = simulator.task()
        with container.gate.connect() as stream:
            stream.sendall(f"GET /v1/progress/{task}/events HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            until(lambda: container.gate.metric("watchers") == 1, "the stream is open")
            container.process.signal()  # which podman passes on
            said = drained(stream)
        assert container.process.exit_status() == 0
    assert said.count(b"retry:") == 2  # as it opened, and as it was sent away
    assert '"event": "stopped"' in container.process.output
    assert "Traceback" not in container.process.output


def test_image_has_the_extras(tmp_path: Path, simulator: Simulator) -> None:
    """A shared store and traces are a matter of settings."""
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
