"""Endpoints for operators: liveness, readiness, metrics and the OpenAPI document."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as prometheus_text

from gateway.app import create_app
from gateway.settings.model import Settings
from gateway.telemetry.redaction import Redactor
from tests.support.harness import KEY, SECRET, Gateway, Simulator, free_port, plain_client, serving, until
from tests.support.programs import required

Launch = Callable[..., Gateway]

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def samples(gate: Gateway) -> list[tuple[str, dict[str, str]]]:
    """Return the name and labels of every sample."""
    text = gate.client.get("/metrics").text
    return [(sample.name, sample.labels) for family in prometheus_text(text) for sample in family.samples]


def use(simulator: Simulator, gate: Gateway) -> None:
    """Cause at least one sample of every kind."""
    task = simulator.task()
    for _ in range(2):
        gate.get(task)
        gate.native(task)
    simulator.fault("status", status=500)
    gate.get("refused")
    gate.client.get("/nothing")
    simulator.heal()


def test_ops_healthz_answers(gate: Gateway) -> None:
    """/healthz responds 200 to GET and HEAD."""
    assert gate.client.get("/healthz").json() == {"status": "ok"}
    assert gate.client.head("/healthz").status_code == 200
    assert gate.client.post("/healthz").status_code == 405


def test_ops_readyz_answers(gate: Gateway) -> None:
    """A ready gateway responds 200 without reasons, and the response is not cacheable."""
    response = gate.client.get("/readyz")
    assert response.json() == {
        "ready": True,
        "reasons": [],
        "degraded": [],
        "credentials": {"slot": "active", "generation": 1},
    }
    assert response.headers["cache-control"] == "no-store"


def test_ops_readyz_reports_an_outage_as_degraded(simulator: Simulator, launch: Launch) -> None:
    """A failing upstream does not make the gateway unready, and a rejection is not an outage."""
    gate = launch(simulator.url, cache={"error_seconds": 0})
    simulator.fault("status", status=404)
    gate.get("abc")
    response = gate.client.get("/readyz")
    assert (response.status_code, response.json()["degraded"]) == (200, ["upstream: upstream-invalid"])
    simulator.heal()
    gate.get("abc")
    assert gate.client.get("/readyz").json()["degraded"] == []


def test_ops_readyz_without_credentials(simulator: Simulator, launch: Launch) -> None:
    """Without a key pair the gateway is not ready."""
    gate = launch(simulator.url, credentials={"access_key": "", "secret_key": ""})
    response = gate.client.get("/readyz")
    assert response.status_code == 503
    assert response.json() == {
        "ready": False,
        "reasons": ["no credentials"],
        "degraded": [],
        "credentials": None,
    }
    assert gate.get("abc").json()["code"] == "upstream-credentials"
    assert simulator.requests() == []


def test_ops_credential_files_may_appear_later(simulator: Simulator, launch: Launch, tmp_path: Path) -> None:
    """Mounted files that appear later make the gateway ready without a restart."""
    key, secret = tmp_path / "key", tmp_path / "secret"
    files = {"access_key": "", "secret_key": "", "access_key_file": key, "secret_key_file": secret}
    gate = launch(simulator.url, credentials=files)
    assert gate.client.get("/readyz").status_code == 503
    secret.write_text(f"{SECRET}\n")
    key.write_text(f"{KEY}\n")
    until(lambda: gate.client.get("/readyz").status_code == 200, "the files are read")
    assert gate.get(simulator.task()).status_code == 200
    assert gate.metric("credentials_reloads_total", result="ok") == 1


@pytest.mark.parametrize("half", ["key", "secret"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        (b" \n", "is empty"),
        (b"a-\nsecret", "contains a line break"),
        (b"\xff", "UTF-8"),
    ],
    ids=["missing", "empty", "lines", "encoding"],
)
def test_ops_readyz_names_an_unreadable_credential_file(
    simulator: Simulator, launch: Launch, tmp_path: Path, half: str, content: bytes | None, says: str
) -> None:
    """The gateway continues with the pair in memory; /readyz names the file until it can be read again."""
    file = {"key": tmp_path / "key", "secret": tmp_path / "secret"}
    for name, text in (("key", KEY), ("secret", SECRET)):
        file[name].write_text(text)
    files = {"access_key": "", "secret_key": "", "access_key_file": file["key"]}
    gate = launch(simulator.url, credentials=files | {"secret_key_file": file["secret"]})
    if content is None:
        file[half].unlink()
    else:
        file[half].write_bytes(content)
    [line] = until(lambda: gate.client.get("/readyz").json()["degraded"], "the fault is reported")
    assert line.startswith("credentials: active key pair: ")
    assert str(file[half]) in line
    assert says in line
    assert "a-" not in line
    assert gate.client.get("/readyz").status_code == 200
    file[half].write_text({"key": KEY, "secret": SECRET}[half])
    until(lambda: not gate.client.get("/readyz").json()["degraded"], "the file is read")


def test_ops_readyz_does_not_show_a_key_given_as_file_name(simulator: Simulator, launch: Launch) -> None:
    """A file name without a folder may be the key itself, in the wrong setting: /readyz is public."""
    files = {"secret_key": "", "secret_key_file": "a-secret-key"}
    response = launch(simulator.url, credentials=files).client.get("/readyz")
    assert response.status_code == 503
    assert response.json()["reasons"] == ["no credentials"]
    [line] = response.json()["degraded"]
    assert line.startswith("credentials: active key pair: credentials.secret_key_file: no such file in the")
    assert line.endswith("is the value the key itself?")
    assert "a-secret-key" not in line


def test_ops_openapi_answers(gate: Gateway) -> None:
    """The OpenAPI document is served as JSON."""
    response = gate.client.get("/openapi.json")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert isinstance(response.json(), dict)


# --- metrics ----------------------------------------------------------------------------------------------


def test_ops_metrics_please_promtool(simulator: Simulator, gate: Gateway) -> None:
    """Prometheus' own linter accepts names, types and help texts."""
    promtool = required("promtool")
    use(simulator, gate)
    text = gate.client.get("/metrics").text
    done = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_ops_metrics_as_openmetrics(simulator: Simulator, gate: Gateway) -> None:
    """OpenMetrics is served if requested, and complete; the default is Prometheus' text format."""
    use(simulator, gate)
    response = gate.client.get("/metrics", headers={"accept": OPENMETRICS})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    names = {family.name for family in openmetrics(response.text)}
    assert {"sd_gateway_http_requests", "sd_gateway_upstream_in_flight", "sd_gateway_build"} <= names | {
        name.removesuffix("_info") for name in names
    }
    assert gate.client.get("/metrics").headers["content-type"].startswith("text/plain")


@pytest.mark.parametrize("invalid", ["text/plain;version=x", "application/openmetrics-text;version=1.x"])
def test_ops_metrics_ignore_an_invalid_version(gate: Gateway, invalid: str) -> None:
    """A version that is no number is not accepted, and is no error."""
    response = gate.client.get("/metrics", headers={"accept": invalid})
    assert (response.status_code, response.headers["content-type"].split(";")[0]) == (200, "text/plain")


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
@pytest.mark.parametrize(
    ("accepts", "coded"),
    [
        ("gzip", True),
        ("br, GZIP;q=0.5", True),
        ("*", True),
        ("gzip;q=1.0, identity;q=0.5", True),
        ("x-gzip", True),
        ("", False),
        ("gzip;q=0", False),
        ("gzip; q=0.000", False),
        ("*;q=0, gzip;q=0", False),
        ("gzip;q=0.2, identity", False),
        ("br, identity", False),
        ("gzip;q=x", False),
    ],
)
def test_ops_metrics_are_compressed_when_accepted(
    gate: Gateway, accept: str, accepts: str, *, coded: bool
) -> None:
    """Both formats are compressed with gzip if Accept-Encoding prefers it, and have Vary."""
    headers = {"accept": accept, "accept-encoding": accepts}
    response = gate.client.get("/metrics", headers=headers)
    assert response.headers.get("content-encoding") == ("gzip" if coded else None)
    assert "Accept-Encoding" in response.headers["vary"]
    assert "sd_gateway_build_info" in response.text
    head = gate.client.head("/metrics", headers=headers)
    assert (head.status_code, head.content) == (200, b"")


async def test_ops_metrics_are_the_same_on_both_ports() -> None:
    """The metrics port serves the same metrics as the main port, and no other path."""
    app = create_app(Settings(), redactor=Redactor())

    def client(asgi: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(asgi), base_url="http://metrics.invalid")

    async with client(app.asgi) as main, client(app.metrics_asgi) as metrics_port:
        for accept in ("", OPENMETRICS):
            for coding in ("gzip", "identity"):
                headers = {"accept": accept, "accept-encoding": coding, "x-request-id": "mine"}
                one, other = [await each.get("/metrics", headers=headers) for each in (metrics_port, main)]
                for response in (one, other):
                    del response.headers["content-length"]  # differs: one of the requests is counted
                assert one.headers == other.headers
                assert one.text.splitlines()[0] == other.text.splitlines()[0]
        head = await metrics_port.head("/metrics")
        assert head.status_code == 200
        for method, path, status in (
            ("GET", "/v1/progress/a", 404),
            ("GET", "/", 404),
            ("POST", "/metrics", 405),
        ):
            refused = await metrics_port.request(method, path)
            assert refused.status_code == refused.json()["status"] == status
            assert refused.headers["content-type"] == "application/problem+json"
            assert refused.json()["requestId"] == refused.headers["x-request-id"]
            assert refused.headers["x-content-type-options"] == "nosniff"
        assert set(refused.headers["allow"].split(", ")) == {"GET", "HEAD"}


def test_ops_metrics_count_what_happened(simulator: Simulator, launch: Callable[..., Gateway]) -> None:
    """Requests, lookups, upstream calls and transitions are counted under the documented names and labels."""
    # With a long lifetime, no refresh makes another call.
    gate = launch(simulator.url, cache={"waiting_seconds": 60, "running_seconds": 60})
    task = simulator.task()
    for _ in range(3):
        gate.get(task)
    gate.native(task, "comfy_get_progress")
    route = "/v1/progress/{taskId}"
    routes = {labels["route"] for name, labels in samples(gate) if name == "sd_gateway_http_requests_total"}
    shown = next(name for name in routes if name.startswith("/v1/progress/"))
    assert route in shown.replace(":path", "")
    assert gate.metric("http_requests_total", route=shown, method="GET", status="200") == 3
    assert gate.metric("http_request_duration_seconds_count", route=shown) == 3
    assert gate.metric("cache_lookups_total", operation="sd_get_progress", result="miss") == 1
    assert gate.metric("upstream_requests_total", operation="sd_get_progress", outcome="ok") == 1
    assert gate.metric("upstream_request_duration_seconds_count", operation="comfy_get_progress") == 1
    assert gate.metric("tasks_observed_total", operation="sd_get_progress", status="running") == 1
    assert gate.metric("cache_entries") == 2
    assert gate.metric("build_info") == 1


def test_ops_metrics_have_the_limits_of_the_settings(tmp_path: Path, simulator: Simulator) -> None:
    """Each limit is a gauge; that of connections is the one in force, which open files may lower."""
    limits = {
        "SERVER__MAX_CONNECTIONS": ("http_connections_limit", 21),
        "WATCH__MAX_WATCHERS": ("watchers_limit", 22),
        "UPSTREAM__MAX_IN_FLIGHT": ("upstream_in_flight_limit", 23),
        "CACHE__MAX_TASKS": ("cache_entries_limit", 24),
        "CACHE__MAX_BYTES": ("cache_bytes_limit", 131_072),
    }
    env = {f"SD_GATEWAY_{name}": str(value) for name, (_, value) in limits.items()}
    with serving(tmp_path, env | {"SD_GATEWAY_UPSTREAM__ENDPOINT": simulator.url}) as (_, gate):
        for name, value in limits.values():
            assert gate.metric(name) == value, name
    many = env | {"SD_GATEWAY_SERVER__MAX_CONNECTIONS": "25000"}
    with serving(tmp_path, many, descriptors="300:300") as (process, gate):
        reduced = process.says(r'"max_connections": (\d+)')
        assert gate.metric("http_connections_limit") == int(reduced) < 300


def test_ops_metrics_labels_are_bounded(gate: Gateway) -> None:
    """Two hundred random paths and methods add only a few series."""
    random = Random(7)
    methods = ["GET", "POST", "PUT", "PROPFIND", "MKCOL", "LOCK", "REPORT", "M-SEARCH", "PURGE", "TRACE"]
    letters = "abcdefghij/%.-_~"

    def ask() -> None:
        tail = "".join(random.choice(letters) for _ in range(20)).replace("%", "%25")
        prefix = random.choice(["", "v1/progress/", "scc/", "v1/", "metrics/"])
        gate.client.request(random.choice(methods), f"/{prefix}{tail}")

    for _ in range(200):
        ask()
    before = {(name, *labels.items()) for name, labels in samples(gate)}
    for _ in range(200):
        ask()
    after = {(name, *labels.items()) for name, labels in samples(gate)}
    assert len(after) - len(before) < 40
    values = {value for series in after for _, value in series[1:]}
    assert not [value for value in values if any(part in value for part in ("PROPFIND", "MKCOL", "%25"))]
    assert {
        labels["method"] for name, labels in samples(gate) if name == "sd_gateway_http_requests_total"
    } <= {
        "GET",
        "POST",
        "PUT",
        "other",
    }


def test_ops_metrics_may_have_their_own_port(tmp_path: Path) -> None:
    """With server.metrics_port, metrics are served on that port only."""
    port = free_port()
    env = {"SD_GATEWAY_SERVER__METRICS_PORT": str(port)}
    with serving(tmp_path, env) as (process, gate), plain_client(f"http://127.0.0.1:{port}") as client:
        assert gate.client.get("/metrics").status_code == 404
        assert "sd_gateway_build_info" in client.get("/metrics").text
        process.signal()
        assert process.exit_status() == 0
        with pytest.raises(httpx.ConnectError):
            client.get("/metrics")
