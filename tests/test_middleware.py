"""What surrounds every request: prefixes, hosts, browsers of other origins, the net under bugs."""

from collections.abc import Callable

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.types import Message, Receive, Scope, Send
from structlog.testing import capture_logs

from gateway.api.middleware import Telemetry
from gateway.api.problems import Problems
from gateway.exceptions import Overloaded
from gateway.metrics import Metrics
from gateway.sampling import Sampler
from tests.harness import Gateway, Simulator, fresh_id

Launch = Callable[..., Gateway]

ORIGIN = "https://studio.example.com"


@pytest.mark.parametrize("prefix", ["", "/progress-gateway"])
def test_middleware_root_path_stripped_or_not(simulator: Simulator, launch: Launch, prefix: str) -> None:
    """Behind an ingress every path works with the prefix and without it."""
    gate = launch(simulator.url, server={"root_path": "/progress-gateway"})
    task = simulator.task()
    for path in (f"/v1/progress/{task}", "/healthz", "/readyz", "/metrics", "/openapi.json"):
        assert gate.client.get(prefix + path).status_code == 200, path
    assert gate.client.post(f"{prefix}/scc/sd_get_progress", json={"taskId": task}).json()["status"] == 10
    bad = gate.client.post(f"{prefix}/scc/sd_get_progress", content=b"junk")
    assert bad.json()["errCode"] == "invalid-parameter"
    assert gate.client.get(f"{prefix}/nothing").json()["code"] == "not-found"
    assert gate.client.get(f"{prefix}/v1/progress/a%2Fb").json()["code"] == "invalid-task-id"


def test_middleware_trusted_hosts(simulator: Simulator, launch: Launch) -> None:
    """Only the allowed Host values are served; probes may use the address."""
    gate = launch(simulator.url, server={"trusted_hosts": ["gate.example.com", "*.internal"]})
    task = simulator.task()
    path = f"/v1/progress/{task}"
    for host in ("gate.example.com", "GATE.example.com:8080", "a.internal", "a.b.internal"):
        assert gate.client.get(path, headers={"host": host}).status_code == 200, host
    for host in (
        "example.com",
        "gate.example.com.evil.invalid",
        "internal",
        "xinternal",
        "127.0.0.1",
        "",
        "[::1]:80",
    ):
        response = gate.client.get(path, headers={"host": host})
        assert (response.status_code, response.json()["code"]) == (400, "invalid-parameter"), host
        assert "'Host'" in response.json()["detail"]
        native = gate.native(task, headers={"host": host})
        assert (native.status_code, native.json()["errCode"]) == (400, "invalid-parameter"), host
    for probe in ("/healthz", "/readyz", "/metrics"):
        assert gate.client.get(probe).status_code == 200


def test_middleware_cors_on_the_simplified_paths_only(simulator: Simulator, launch: Launch) -> None:
    """Browsers of the named origins may read /v1, and what they need of its headers; nothing else."""
    gate = launch(simulator.url, server={"cors_origins": [ORIGIN]})
    task = simulator.task()
    allowed = gate.get(task, headers={"origin": ORIGIN})
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    exposed = {name.strip() for name in allowed.headers["access-control-expose-headers"].split(",")}
    assert {"ETag", "Age", "Cache-Status", "Retry-After", "X-Request-Id"} <= exposed
    assert "access-control-allow-credentials" not in allowed.headers
    problem = gate.get("no!", headers={"origin": ORIGIN})
    assert problem.headers["access-control-allow-origin"] == ORIGIN
    stranger = gate.get(task, headers={"origin": "https://evil.invalid"})
    assert "access-control-allow-origin" not in stranger.headers
    for other in (
        gate.native(task, headers={"origin": ORIGIN}),
        gate.client.get("/readyz", headers={"origin": ORIGIN}),
    ):
        assert other.status_code == 200
        assert "access-control-allow-origin" not in other.headers


def test_middleware_cors_preflight(simulator: Simulator, launch: Launch) -> None:
    """A browser that asks first is told what it may send."""
    gate = launch(simulator.url, server={"cors_origins": [ORIGIN]})
    asks = {
        "origin": ORIGIN,
        "access-control-request-method": "GET",
        "access-control-request-headers": "if-none-match, x-request-id",
    }
    response = gate.client.options("/v1/progress/abc", headers=asks)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert "GET" in response.headers["access-control-allow-methods"]
    assert gate.client.options("/scc/sd_get_progress", headers=asks).status_code == 405
    stranger = gate.client.options("/v1/progress/abc", headers=asks | {"origin": "https://evil.invalid"})
    assert "access-control-allow-origin" not in stranger.headers
    assert simulator.requests() == []


def test_middleware_without_origins_has_no_cors(gate: Gateway) -> None:
    """By default no other origin may read anything."""
    response = gate.get(fresh_id(), headers={"origin": ORIGIN})
    assert not [name for name in response.headers if name.startswith("access-control")]


# --- the net under bugs -----------------------------------------------------------------------------------


def telemetry(
    app: Callable[[Scope, Receive, Send], object], sampler: Sampler | None = None
) -> tuple[httpx.AsyncClient, Metrics]:
    """Return a client of `app` under Telemetry alone, and the metrics that it counts in."""
    metrics = Metrics(CollectorRegistry(), gateway_version="test")
    around = Telemetry(app, metrics=metrics, problems=Problems(["/scc/sd_get_progress"]), sampler=sampler)  # type: ignore[arg-type]
    transport = httpx.ASGITransport(around, raise_app_exceptions=True)  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=transport, base_url="http://test"), metrics


async def test_middleware_bug_is_a_problem_without_a_trace() -> None:
    """An exception that nobody meant is 500 `internal`, with an id to look for in the log and no more."""

    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise KeyError("very-private")

    client, metrics = telemetry(app)
    async with client:
        response = await client.get("/anything", headers={"x-request-id": "find-me"})
        native = await client.post("/scc/sd_get_progress")
    assert (response.status_code, response.json()["code"]) == (500, "internal")
    assert response.json()["requestId"] == response.headers["x-request-id"] == "find-me"
    assert (native.status_code, native.json()["status"], native.json()["errCode"]) == (500, 20, "internal")
    for text in (response.text, native.text):
        assert "very-private" not in text
        assert "KeyError" not in text
    counted = metrics.registry.get_sample_value(
        "sd_gateway_http_requests_total", {"route": "other", "method": "GET", "status": "500"}
    )
    assert counted == 1


async def test_middleware_bugs_by_the_thousand_are_sampled() -> None:
    """Each bug is answered; of a crowd of one kind only some leave a trace in the log, with the count."""

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        raise ValueError if scope["path"] == "/other" else KeyError

    client, _ = telemetry(app, Sampler(first=1, every=3, clock=lambda: 0.0))
    headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    with capture_logs() as lines:
        async with client:
            for path in ["/bug"] * 5 + ["/other"]:
                assert (await client.get(path, headers=headers)).status_code == 500
    bugs = [line for line in lines if line["event"] == "bug"]
    assert [(line["path"], line["suppressed"]) for line in bugs] == [("/bug", 0), ("/bug", 2), ("/other", 0)]
    assert isinstance(bugs[0]["exc_info"], KeyError)
    assert bugs[0]["trace_id"] == "0af7651916cd43dd8448eb211c80319c"


async def test_middleware_error_meant_is_told_from_anywhere() -> None:
    """An error of ours that is raised above the router is answered like any other."""

    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise Overloaded("too much", retry_after=2.5)

    client, _ = telemetry(app)
    async with client:
        response = await client.get("/anything")
    assert (response.status_code, response.json()["code"]) == (503, "overloaded")
    assert response.headers["retry-after"] == "3"


async def test_middleware_half_an_answer_is_broken_off() -> None:
    """A bug in the middle of an answer closes the connection: nothing is added to what is out."""

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise KeyError("very-private")

    client, _ = telemetry(app)
    with pytest.raises(KeyError):
        async with client:
            await client.get("/anything")


async def test_middleware_leaves_other_protocols_alone() -> None:
    """What is not HTTP passes through untouched."""
    seen: list[str] = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        seen.append(scope["type"])

    async def nothing(_: Message | None = None) -> Message:
        return {}

    metrics = Metrics(CollectorRegistry(), gateway_version="test")
    await Telemetry(app, metrics=metrics, problems=Problems([]))({"type": "lifespan"}, nothing, nothing)  # type: ignore[arg-type]
    assert seen == ["lifespan"]
