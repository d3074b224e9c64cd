"""Hash-by-task routing: the annotations of the chart, applied to real proxies."""

import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import yaml_files
from tests.support.harness import Gateway, Process, Simulator, free_port, plain_client, until
from tests.support.programs import required

CHART = Path(__file__).parents[2] / "helm" / "sd-progress-gateway"
TASKS, REPLICAS = 30, 3

Proxy = Callable[[Path, list[Gateway], int, dict[str, str]], Process]


@pytest.fixture(scope="module")
def annotations() -> dict[str, str]:
    """Return the annotations of the chart's ingress, with hashing by task."""
    values = CHART / "ci" / "hash-by-task.yaml"
    command = [required("helm"), "template", "release", CHART, "-f", values, "-s", "templates/ingress.yaml"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    annotations: dict[str, str] = yaml_files.load(ran.stdout)["metadata"]["annotations"]
    return annotations


def haproxy(folder: Path, replicas: list[Gateway], port: int, annotations: dict[str, str]) -> Process:
    """Start HAProxy as its ingress controllers would configure it."""
    servers = [
        f"server r{number} {gate.address[0]}:{gate.address[1]}" for number, gate in enumerate(replicas)
    ]
    lines = [
        "defaults",
        "mode http",
        "timeout connect 5s",
        "timeout client 60s",
        f"timeout server {annotations['haproxy.org/timeout-server']}",
        "frontend all",
        f"bind 127.0.0.1:{port}",
        "default_backend replicas",
        "backend replicas",
        f"balance {annotations['haproxy.org/load-balance']}",
        *annotations["haproxy.org/backend-config-snippet"].splitlines(),
        *servers,
    ]
    file = folder / "haproxy.cfg"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Process("-db", "-f", str(file), cwd=folder, program=required("haproxy"))


def nginx(folder: Path, replicas: list[Gateway], port: int, annotations: dict[str, str]) -> Process:
    """Start NGINX as its ingress controller would configure it."""
    servers = " ".join(f"server {gate.address[0]}:{gate.address[1]};" for gate in replicas)
    file = folder / "nginx.conf"
    file.write_text(
        f"""
        daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr notice;
        events {{}}
        http {{
          access_log off; client_body_temp_path {folder}; proxy_temp_path {folder};
          fastcgi_temp_path {folder}; scgi_temp_path {folder}; uwsgi_temp_path {folder};
          upstream replicas {{ {annotations["nginx.org/lb-method"]}; {servers} }}
          server {{
            listen 127.0.0.1:{port};
            location / {{
              proxy_pass http://replicas;
              proxy_buffering off;
              proxy_read_timeout {annotations["nginx.org/proxy-read-timeout"]};
            }}
          }}
        }}
        """,
        encoding="utf-8",
    )
    return Process("-c", str(file), cwd=folder, program=required("nginx"))


@contextmanager
def routed(
    proxy: Proxy, folder: Path, replicas: list[Gateway], annotations: dict[str, str]
) -> Iterator[Gateway]:
    """Run a proxy in front of the replicas; yield a client of it."""
    port = free_port()
    with (
        proxy(folder, replicas, port, annotations) as process,
        plain_client(f"http://127.0.0.1:{port}") as client,
    ):

        def listens() -> bool:
            assert process.alive, process.output
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        until(listens, f"{proxy.__name__} listens")
        yield Gateway(client)


@pytest.fixture
def replicas(simulator: Simulator, launch: Callable[..., Gateway]) -> list[Gateway]:
    """Return replicas without a shared store, whose snapshots stay fresh."""
    return [launch(simulator.url, cache={"running_seconds": 600}) for _ in range(REPLICAS)]


def ask(gate: Gateway, task: str) -> None:
    """Query a task in each way that has the task in the path."""
    for query in ("", "?api=sd", "?wait=0"):
        assert gate.client.get(f"/v1/progress/{task}{query}").status_code == 200


def read_event(gate: Gateway, task: str) -> None:
    """Read the first event of a task's stream."""
    with gate.client.stream("GET", f"/v1/progress/{task}/events") as stream:
        assert any("event: progress" in line for line in stream.iter_lines())


@pytest.mark.parametrize("proxy", [haproxy, nginx])
def test_routing_makes_one_call_per_task(
    tmp_path: Path, simulator: Simulator, replicas: list[Gateway], annotations: dict[str, str], proxy: Proxy
) -> None:
    """All queries of a task by path reach one replica, and every replica gets a share of the tasks."""
    tasks = [simulator.task() for _ in range(TASKS)]
    with routed(proxy, tmp_path, replicas, annotations) as gate:
        for task in tasks:
            ask(gate, task)
    assert [simulator.calls(task) for task in tasks] == [1] * TASKS
    assert all(gate.metric("upstream_requests_total") for gate in replicas)


def test_routing_sends_streams_and_polls_to_the_same_replica(
    tmp_path: Path, simulator: Simulator, replicas: list[Gateway], annotations: dict[str, str]
) -> None:
    """HAProxy hashes the path up to the task, so that streams and polls reach the same replica."""
    tasks = [simulator.task() for _ in range(TASKS)]
    with routed(haproxy, tmp_path, replicas, annotations) as gate:
        for task in tasks:
            ask(gate, task)
            read_event(gate, task)
    assert [simulator.calls(task) for task in tasks] == [1] * TASKS


@pytest.mark.parametrize("proxy", [haproxy, nginx])
def test_routing_moves_only_the_tasks_of_a_removed_replica(
    tmp_path: Path, simulator: Simulator, replicas: list[Gateway], annotations: dict[str, str], proxy: Proxy
) -> None:
    """After the removal of a replica only its tasks are fetched again."""
    tasks = [simulator.task() for _ in range(TASKS)]
    with routed(proxy, tmp_path, replicas, annotations) as gate:
        for task in tasks:
            ask(gate, task)
    removed = replicas[-1].metric("upstream_requests_total")
    with routed(proxy, tmp_path, replicas[:-1], annotations) as gate:
        for task in tasks:
            ask(gate, task)
    assert 0 < removed < TASKS
    assert simulator.calls() == TASKS + removed


def test_routing_without_hashing_reaches_all_replicas(
    tmp_path: Path, simulator: Simulator, replicas: list[Gateway], annotations: dict[str, str]
) -> None:
    """With round robin, the default of proxies, every replica makes an upstream call."""
    annotations = annotations | {"haproxy.org/load-balance": "roundrobin"}
    task = simulator.task()
    with routed(haproxy, tmp_path, replicas, annotations) as gate:
        ask(gate, task)
    assert simulator.calls(task) == REPLICAS
