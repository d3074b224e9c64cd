"""ASGI middleware: prefixes, hosts, cross-site requests, common headers and unexpected exceptions."""

from collections.abc import Callable

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.types import Message, Receive, Scope, Send
from structlog.testing import capture_logs

from gateway.api.middleware.telemetry import RequestTelemetry
from gateway.api.problems import Problems
from gateway.api.trusted_hosts import TrustedHosts
from gateway.domain.errors import Overloaded
from gateway.telemetry.log_sampling import LogSampler
from gateway.telemetry.metrics import Metrics
from tests.support.harness import Gateway, Simulator, fresh_id

Launch = Callable[..., Gateway]

ORIGIN = "https://studio.example.com"


@pytest.mark.parametrize("prefix", ["", "/progress-gateway"])
def test_middleware_root_path_stripped_or_not(simulator: Simulator, launch: Launch, prefix: str) -> None:
    """Behind an ingress every path works with and without the prefix."""
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
    """Only the allowed Host values are served; probes may use an IP address."""
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
    """Pages of the allowed origins can read /v1 and its relevant headers, and no other path."""
    gate = launch(simulator.url, server={"cors_origins": [ORIGIN]})
    task = simulator.task()
    allowed = gate.get(task, headers={"origin": ORIGIN})
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    exposed = {name.strip() for name in allowed.headers["access-control-expose-headers"].split(",")}
    assert {"ETag", "Age", "Cache-Status", "Retry-After", "X-Request-Id"} <= exposed
    assert "access-control-allow-credentials" not in allowed.headers
    problem = gate.get("no!", headers={"origin": ORIGIN})
    assert problem.headers["access-control-allow-origin"] == ORIGIN
    other_origin = gate.get(task, headers={"origin": "https://evil.invalid"})
    assert "access-control-allow-origin" not in other_origin.headers
    for other in (
        gate.native(task, headers={"origin": ORIGIN}),
        gate.client.get("/readyz", headers={"origin": ORIGIN}),
    ):
        assert other.status_code == 200
        assert "access-control-allow-origin" not in other.headers


def test_middleware_cors_preflight(simulator: Simulator, launch: Launch) -> None:
    """A CORS preflight responds with the allowed methods and headers."""
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
    other_origin = gate.client.options("/v1/progress/abc", headers=asks | {"origin": "https://evil.invalid"})
    assert "access-control-allow-origin" not in other_origin.headers
    assert simulator.requests() == []


def test_middleware_without_origins_has_no_cors(gate: Gateway) -> None:
    """By default no other origin can read responses."""
    response = gate.get(fresh_id(), headers={"origin": ORIGIN})
    assert not [name for name in response.headers if name.startswith("access-control")]


# --- Host -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edge", [True, False])
@pytest.mark.parametrize(
    "trusted", [[], ["LOCALHOST.", "*.localhost", "127.0.0.1", "[::1]"]], ids=["default", "list"]
)
def test_middleware_host_is_compared_as_a_name(
    simulator: Simulator, launch: Launch, trusted: list[str], *, edge: bool
) -> None:
    """On loopback only loopback names are served; case, port and final dot are ignored; malformed is 400."""
    gate = launch(simulator.url, server={"trusted_hosts": trusted, "edge": edge})
    path = f"/v1/progress/{simulator.task()}"
    for host in (
        "localhost",
        "LocalHost:8080",
        "localhost.",
        "localhost.:1",
        "localhost:",
        "a.LOCALHOST",
        "127.0.0.1:1",
        "[::1]",
        "[::1]:8080",
        "[0:0:0:0:0:0:0:1]",
    ):
        for _ in range(2):  # first by the routes, then as a cached response
            assert gate.client.get(path, headers={"host": host}).status_code == 200, host
    for host in (
        "attacker.example",
        "attacker.example:8080",
        "localhost.attacker.example",
        "xlocalhost",
        "localhost..",
        "127.0.0.1.attacker.example",
        "[::2]",
        *MALFORMED,
    ):
        refused = gate.client.get(path, headers={"host": host})
        assert (refused.status_code, refused.json()["code"]) == (400, "invalid-parameter"), host
    probe = gate.client.get("/healthz", headers={"host": "attacker.example"})
    assert probe.status_code == 200  # a kubelet uses the pod's address


MALFORMED = (
    "localhost:80:80",
    "localhost:x",
    "localhost:99999",
    "user@localhost",
    "localhost/",
    "local host",
    "::1",
    "[::1",
    "[127.0.0.1]",
    "[]",
    "localhost, localhost",
)


def test_middleware_any_host_must_be_well_formed(gate: Gateway) -> None:
    """A gateway that serves any host still refuses malformed values."""
    for host in ("x", "my_service:8080", "a.example.com", "", "xn--bcher-kva.example", "a" * 300):
        assert gate.client.get("/openapi.json", headers={"host": host}).status_code == 200, host
    for host in MALFORMED:
        assert gate.client.get("/openapi.json", headers={"host": host}).status_code == 400, host


async def test_middleware_host_cache_is_bounded() -> None:
    """Invented hosts do not fill the memory, and are checked nevertheless."""
    hosts = TrustedHosts(["gate.example.com"])
    for number in range(2000):
        assert not hosts.trust([(b"host", b"%d.invalid" % number)])
    assert not hosts.trust([(b"host", b"x" * 10_000)])
    assert hosts.trust([(b"host", b"gate.example.com")])
    assert len(hosts._cache) <= 256  # private: only the memory shows the size of the cache
    assert not hosts.trust([])
    assert TrustedHosts(["*"]).trust([])


# --- cross-site requests --------------------------------------------------------------------------------


@pytest.mark.parametrize("edge", [True, False])
@pytest.mark.parametrize("root_path", ["", "/v"])
def test_middleware_refuses_pages_of_other_sites(
    simulator: Simulator, launch: Launch, root_path: str, *, edge: bool
) -> None:
    """Cross-site requests are refused before they cost an upstream call or a token, even on a hit."""
    gate = launch(
        simulator.url,
        server={"edge": edge, "root_path": root_path},
        limits={"requests_per_second": 1000},
        cache={"running_seconds": 600},
    )
    task = simulator.task()
    gate.get(task)
    calls = simulator.calls()
    for site in ("cross-site", "Cross-Site", "unheard-of", "same-origin, cross-site", ""):
        headers = {"sec-fetch-site": site}
        for refused in (
            gate.get(task, headers=headers),
            gate.client.get(f"{root_path}/v1/progress?taskId=new", headers=headers),
            gate.client.get("/v1/events?taskId=new", headers=headers | {"origin": ORIGIN}),
        ):
            assert (refused.status_code, refused.json()["code"]) == (403, "cross-site-request"), site
        native = gate.native("new", headers=headers)
        assert (native.status_code, native.json()["errCode"]) == (403, "cross-site-request")
        for path in ("/", "/docs", "/openapi.json", "/healthz", "/readyz", "/metrics"):
            assert gate.client.get(path, headers=headers).status_code == 200, path
    assert simulator.calls() == calls
    for site in ("same-origin", "same-site", "none"):
        assert (
            gate.get(task, headers={"sec-fetch-site": site})
            .headers["cache-status"]
            .startswith("sd-gateway; hit")
        )
    new = simulator.task()
    assert gate.native(new, headers={"sec-fetch-site": "same-origin"}).json()["status"] == 10
    assert simulator.calls() == calls + 1


@pytest.mark.parametrize("origins", [[ORIGIN], ["*"]])
def test_middleware_allows_pages_of_allowed_origins(
    simulator: Simulator, launch: Launch, origins: list[str]
) -> None:
    """Pages of origins that CORS allows can send requests from any site, and get the CORS headers."""
    gate = launch(simulator.url, server={"cors_origins": origins})
    task = simulator.task()
    asks = {"sec-fetch-site": "cross-site", "origin": ORIGIN}
    assert gate.get(task, headers=asks).headers["access-control-allow-origin"] in {ORIGIN, "*"}
    preflight = gate.client.options(
        f"/v1/progress/{task}", headers=asks | {"access-control-request-method": "GET"}
    )
    assert preflight.status_code == 200
    other_origin = gate.get(task, headers=asks | {"origin": "https://evil.invalid"})
    assert other_origin.status_code == (403 if origins == [ORIGIN] else 200)


# --- common headers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("edge", [True, False])
def test_middleware_security_headers_are_on_every_response(
    simulator: Simulator, launch: Launch, *, edge: bool
) -> None:
    """Every response has each security header exactly once."""
    gate = launch(simulator.url, server={"edge": edge, "cors_origins": [ORIGIN]})
    task = simulator.task()
    etag = gate.get(task).headers["etag"]
    requests: list[tuple[str, str, dict[str, str]]] = [
        *[("GET", f"/v1/progress/{task}", {})] * 3,
        ("GET", f"/v1/progress/{task}", {"if-none-match": etag}),
        ("GET", f"/v1/progress/{task}", {"origin": ORIGIN}),
        ("OPTIONS", f"/v1/progress/{task}", {"origin": ORIGIN, "access-control-request-method": "GET"}),
        ("HEAD", f"/v1/progress?taskId={task}", {}),
        ("HEAD", f"/v1/events?taskId={task}", {}),
        ("POST", "/scc/sd_get_progress", {}),
        *[("GET", path, {}) for path in ("/", "/docs", "/web/page.js", "/openapi.json", "/nothing")],
        *[("GET", path, {}) for path in ("/healthz", "/readyz", "/metrics", "/v1/progress/no!")],
        ("OPTIONS", "/", {}),
    ]
    for method, path, headers in requests:
        response = gate.client.request(method, path, headers=headers)
        assert response.headers.get_list("x-content-type-options") == ["nosniff"], path
        assert response.headers.get_list("cross-origin-resource-policy") == ["same-site"], path
    with gate.client.stream("GET", f"/v1/events?taskId={task}") as stream:
        assert stream.headers["cross-origin-resource-policy"] == "same-site"


# --- OPTIONS ----------------------------------------------------------------------------------------------


def test_middleware_options_for_load_balancers(simulator: Simulator, launch: Launch) -> None:
    """`OPTIONS *` and `OPTIONS /` are 204 with Allow, for any Host and without a rate limit."""
    limits = {"requests_per_second": 0.001}
    gate = launch(simulator.url, limits=limits, server={"trusted_hosts": ["a.example"], "root_path": "/p"})
    for target, version in (("*", "1.1"), ("/", "1.1"), ("/p/", "1.1"), ("*", "1.0")):
        request = f"OPTIONS {target} HTTP/{version}\r\nHost: 10.0.0.1\r\nConnection: close\r\n\r\n"
        head = gate.raw(request.encode()).lower()
        assert head.startswith(b"http/1.1 204 "), target
        assert b"\r\nallow: get, head, options" in head
        assert head.endswith(b"\r\n\r\n")
    assert gate.client.post("/", headers={"host": "a.example"}).status_code == 405


# --- unexpected exceptions --------------------------------------------------------------------------------


def telemetry(
    app: Callable[[Scope, Receive, Send], object], log_sampler: LogSampler | None = None
) -> tuple[httpx.AsyncClient, Metrics]:
    """Return a client of `app` within RequestTelemetry, and its metrics."""
    metrics = Metrics(CollectorRegistry(), gateway_version="test")
    wrapped = RequestTelemetry(
        app, metrics=metrics, problems=Problems(["/scc/sd_get_progress"]), log_sampler=log_sampler
    )  # type: ignore[arg-type]
    transport = httpx.ASGITransport(wrapped, raise_app_exceptions=True)  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=transport, base_url="http://test"), metrics


async def test_middleware_bug_is_a_problem_without_details() -> None:
    """An unexpected exception is 500 `internal` with a request ID, and without further details."""

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


async def test_middleware_bugs_are_sampled() -> None:
    """Every bug gets a response; the log lines of one exception type are sampled, with a count."""

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        raise ValueError if scope["path"] == "/other" else KeyError

    client, _ = telemetry(app, LogSampler(first=1, every=3, clock=lambda: 0.0))
    headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    with capture_logs() as lines:
        async with client:
            for path in ["/bug"] * 5 + ["/other"]:
                assert (await client.get(path, headers=headers)).status_code == 500
    bugs = [line for line in lines if line["event"] == "bug_in_request"]
    assert [(line["path"], line["suppressed"]) for line in bugs] == [("/bug", 0), ("/bug", 2), ("/other", 0)]
    assert isinstance(bugs[0]["exc_info"], KeyError)
    assert bugs[0]["trace_id"] == "0af7651916cd43dd8448eb211c80319c"


async def test_middleware_handles_errors_above_the_router() -> None:
    """A GatewayError that is raised above the router is a problem like any other."""

    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise Overloaded("too much", retry_after=2.5)

    client, _ = telemetry(app)
    async with client:
        response = await client.get("/anything")
    assert (response.status_code, response.json()["code"]) == (503, "overloaded")
    assert response.headers["retry-after"] == "3"


async def test_middleware_bug_after_the_head_closes_the_connection() -> None:
    """A bug in the middle of a response closes the connection; nothing more is sent."""

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise KeyError("very-private")

    client, _ = telemetry(app)
    with pytest.raises(KeyError):
        async with client:
            await client.get("/anything")


async def test_middleware_leaves_other_protocols_alone() -> None:
    """Scopes other than HTTP are passed on unchanged."""
    seen: list[str] = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        seen.append(scope["type"])

    async def nothing(_: Message | None = None) -> Message:
        return {}

    metrics = Metrics(CollectorRegistry(), gateway_version="test")
    await RequestTelemetry(app, metrics=metrics, problems=Problems([]))(
        {"type": "lifespan"}, nothing, nothing
    )  # type: ignore[arg-type]
    assert seen == ["lifespan"]
