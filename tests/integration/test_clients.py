"""Clients as they are: an EventSource polyfill, browsers with tracing scripts, several kinds of proxies."""

import json
import socket
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from starlette.types import Receive, Scope, Send

from gateway.api.middleware.client_address import ClientAddress
from gateway.api.middleware.cross_site import AllowedOrigins
from tests.support.harness import PATIENCE_SECONDS, Gateway, RawUpstream, Request, Simulator
from tests.support.programs import installed

SDK = Path(__file__).parents[1] / "sdk"
NODE = installed("node")
with_polyfill = pytest.mark.skipif(
    NODE is None or not (SDK / "node_modules" / "event-source-polyfill").is_dir(),
    reason="node or the polyfill is not installed: .ci/run installs npm, and make sdk the polyfill",
)
QUICK = {"waiting_seconds": 0.1, "running_seconds": 0.1, "stale_while_revalidate_seconds": 0.2}
ORIGIN = "https://studio.example.com"

Launch = Callable[..., Gateway]


# --- EventSource polyfills --------------------------------------------------------------------------------


class CutOnce:
    """A proxy that cuts the first stream after its first event."""

    def __init__(self, target: tuple[str, int], then: Callable[[], None]) -> None:
        self._target = target
        self._then = then
        self.targets: list[str] = []

    def __call__(self, connection: socket.socket, request: Request) -> None:
        """Forward a request and its response."""
        first = not self.targets
        self.targets.append(request.head.split()[1].decode())
        received = b""
        with socket.create_connection(self._target, timeout=PATIENCE_SECONDS) as onward:
            onward.sendall(request.head + b"\r\n\r\n")
            with suppress(OSError):
                while part := onward.recv(65536):
                    connection.sendall(part)
                    received += part
                    if first and b"}\n\n" in received.partition(b"event: progress")[2]:
                        self._then()
                        break
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


@with_polyfill
@pytest.mark.parametrize("path", ["/v1/events?taskId=a&api=sd", "/v1/progress/a/events"])
def test_polyfill_resumes_with_the_id_in_the_query(simulator: Simulator, launch: Launch, path: str) -> None:
    """event-source-polyfill sends the last ID as a query parameter, and follows the task to its end."""
    gate = launch(simulator.url, cache=QUICK)
    simulator.script("a", status="running", progress=0.25)
    proxy = CutOnce(gate.address, then=lambda: simulator.script("a", status="succeeded", progress=1))
    with RawUpstream(proxy) as front:
        command = [str(NODE), "follow.cjs", f"{front.url}{path}"]
        done = subprocess.run(command, cwd=SDK, capture_output=True, text=True, timeout=60, check=True)
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line[1]["progress"] for line in printed if line[0] == "progress"] == [0.25, 1], done
    assert printed[-1] == ["end"]
    [given] = parse_qs(urlsplit(proxy.targets[1]).query)["lastEventId"]
    assert given.count(".") == 2  # the tag of the first event


@pytest.mark.parametrize("name", ["lastEventId", "last-event-id"])
@pytest.mark.parametrize("path", ["/v1/events?taskId={}&", "/v1/progress/{}/events?"])
def test_last_event_id_in_the_query_counts_like_the_header(
    simulator: Simulator, gate: Gateway, path: str, name: str
) -> None:
    """The ID of the end gives 204, an empty one counts as none, and the header takes precedence."""
    url = path.format(simulator.finished()) + name
    [end] = [line[4:] for line in gate.client.get(url + "=").text.splitlines() if line.startswith("id: end-")]
    assert gate.client.get(f"{url}={end}").status_code == 204
    assert gate.client.get(f"{url}=", headers={"last-event-id": end}).status_code == 204
    assert gate.client.get(f"{url}=other", headers={"last-event-id": end}).status_code == 204
    assert gate.client.get(f"{url}={end}", headers={"last-event-id": "other"}).status_code == 200
    twice = gate.client.get(f"{url}=a&{name}=b")
    assert (twice.status_code, twice.json()["code"]) == (400, "invalid-parameter")


# --- CORS ------------------------------------------------------------------------------------------------


def preflight(gate: Gateway, *headers: str, origin: str = ORIGIN, **more: str) -> tuple[int, dict[str, str]]:
    """Send a preflight request for these headers; return the status and the CORS headers."""
    given = {"origin": origin, "access-control-request-method": "GET"}
    if headers:
        given["access-control-request-headers"] = ",".join(headers)
    more = {name.replace("_", "-"): value for name, value in more.items()}
    response = gate.client.options("/v1/progress/a", headers=given | more)
    prefix = "access-control-"
    cors = {name.removeprefix(prefix): value for name, value in response.headers.items() if prefix in name}
    return response.status_code, cors


@pytest.mark.parametrize(
    "headers",
    [
        ("traceparent",),
        ("tracestate", "traceparent"),
        ("baggage", "sentry-trace"),
        ("b3",),
        ("x-b3-traceid", "x-b3-spanid", "x-b3-parentspanid", "x-b3-sampled", "x-b3-flags"),
        ("uber-trace-id",),
        ("x-amzn-trace-id",),
        ("x-datadog-trace-id", "x-datadog-parent-id", "x-datadog-sampling-priority", "x-datadog-origin"),
        ("elastic-apm-traceparent", "newrelic", "request-id", "request-context"),
        ("cache-control", "pragma", "x-requested-with", "accept"),
        ("if-none-match", "last-event-id", "prefer", "x-request-id"),
    ],
)
def test_cors_allows_the_headers_of_browser_scripts(
    gate_with_origin: Gateway, headers: tuple[str, ...]
) -> None:
    """Tracing scripts and polyfills add headers to every request; a preflight with them succeeds."""
    status, cors = preflight(gate_with_origin, *headers)
    assert (status, cors["allow-origin"]) == (200, ORIGIN)
    allowed = {name.strip().lower() for name in cors["allow-headers"].split(",")}
    assert set(headers) <= allowed


@pytest.fixture
def gate_with_origin(simulator: Simulator, launch: Launch) -> Gateway:
    """Return a gateway that allows one origin."""
    return launch(simulator.url, server={"cors_origins": [ORIGIN]})


def test_cors_refuses_other_headers_unless_a_setting_allows_them(
    gate_with_origin: Gateway, simulator: Simulator, launch: Launch
) -> None:
    """`cors_headers` and `cors_expose_headers` add names; `*` allows any request header."""
    assert preflight(gate_with_origin, "x-tenant")[0] == 400
    assert preflight(gate_with_origin, "x-forwarded-for")[0] == 400
    more = {"cors_headers": ["X-Tenant"], "cors_expose_headers": ["Date", "Server-Timing"]}
    gate = launch(simulator.url, server={"cors_origins": [ORIGIN], "cors_max_age_seconds": 60, **more})
    status, cors = preflight(gate, "x-tenant", "traceparent")
    assert (status, cors["max-age"]) == (200, "60")
    exposed = gate.get("a", headers={"origin": ORIGIN}).headers["access-control-expose-headers"]
    assert {"Date", "Server-Timing", "ETag", "Retry-After"} <= {name.strip() for name in exposed.split(",")}
    any_header = launch(simulator.url, server={"cors_origins": [ORIGIN], "cors_headers": ["*"]})
    assert preflight(any_header, "x-anything")[0] == 200


def test_cors_allows_credentials_when_a_setting_asks_for_it(
    gate_with_origin: Gateway, simulator: Simulator, launch: Launch
) -> None:
    """By default neither cookies nor Authorization are allowed; `cors_credentials` allows both."""
    status, cors = preflight(gate_with_origin, "authorization")
    assert status == 400
    assert "allow-credentials" not in cors
    gate = launch(simulator.url, server={"cors_origins": [ORIGIN], "cors_credentials": True})
    status, cors = preflight(gate, "authorization")
    assert (status, cors["allow-credentials"], cors["allow-origin"]) == (200, "true", ORIGIN)
    response = gate.get("a", headers={"origin": ORIGIN})
    assert response.headers["access-control-allow-credentials"] == "true"
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert preflight(gate, "authorization", origin="https://evil.invalid")[0] == 400


def test_cors_lets_public_pages_reach_a_private_gateway(
    gate_with_origin: Gateway, simulator: Simulator, launch: Launch
) -> None:
    """A private-network preflight succeeds for an allowed origin, unless a setting forbids it."""
    asks = {"access_control_request_private_network": "true"}
    status, cors = preflight(gate_with_origin, **asks)
    assert (status, cors["allow-private-network"]) == (200, "true")
    assert preflight(gate_with_origin, origin="https://evil.invalid", **asks)[0] == 400
    assert "allow-private-network" not in preflight(gate_with_origin)[1]
    private = launch(simulator.url, server={"cors_origins": [ORIGIN], "cors_private_network": False})
    status, cors = preflight(private, **asks)
    assert status == 400
    assert "allow-private-network" not in cors


ORIGINS = [
    "https://*.example.com",
    "http://localhost:*",
    "https://a.example.org:8443",
    "http://[::1]:*",
    "null",
]


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("https://a.example.com", True),
        ("https://a.b.example.com", True),
        ("https://a.example.com.", True),
        ("https://example.com", False),
        ("http://a.example.com", False),
        ("https://a.example.com:8443", False),
        ("https://a-example.com", False),
        ("https://aexample.com", False),
        ("https://a.exampleXcom", False),
        ("https://a.example.com.evil.invalid", False),
        ("https://evil.invalid/.example.com", False),
        ("https://evil.invalid#.example.com", False),
        ("https://user@a.example.com", False),
        ("https://.example.com", False),
        ("http://localhost", True),
        ("http://localhost:5173", True),
        ("http://localhost:", False),
        ("http://localhost:80.evil.invalid", False),
        ("https://localhost:5173", False),
        ("https://a.example.org:8443", True),
        ("https://a.example.org.:8443", True),
        ("https://a.example.org", False),
        ("https://a.example.org:84430", False),
        ("http://[::1]:3000", True),
        ("http://[::1]", True),
        ("null", True),
        ("", False),
        (None, False),
    ],
)
def test_cors_wildcards_stand_for_subdomains_and_ports(origin: str | None, *, allowed: bool) -> None:
    """`*.` stands for one or more labels and `:*` for any port; a final dot of the host name is ignored."""
    assert AllowedOrigins(ORIGINS).allow(origin) is allowed
    assert not AllowedOrigins([]).allow(origin)
    assert AllowedOrigins(["*"]).allow(origin)


def test_cors_origins_with_wildcards_are_allowed_throughout(simulator: Simulator, launch: Launch) -> None:
    """A cross-site request of a matching origin is served and readable; any other one is refused."""
    gate = launch(simulator.url, server={"cors_origins": ["https://*.example.com"]})
    task = simulator.task()
    response = gate.get(task, headers={"origin": ORIGIN, "sec-fetch-site": "cross-site"})
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, ORIGIN)
    assert "Origin" in response.headers["vary"]
    assert preflight(gate, "traceparent")[0] == 200
    refused = gate.get(task, headers={"origin": "https://example.com", "sec-fetch-site": "cross-site"})
    assert refused.status_code == 403
    assert "access-control-allow-origin" not in refused.headers


# --- absolute host names ----------------------------------------------------------------------------------


@pytest.mark.parametrize("edge", [True, False])
@pytest.mark.parametrize("trusted", ["gate.example.com", "gate.example.com.", "*.example.com."])
def test_hosts_may_be_absolute(simulator: Simulator, launch: Launch, trusted: str, *, edge: bool) -> None:
    """A final dot of a host name makes no difference, in the request or in the setting."""
    gate = launch(simulator.url, server={"trusted_hosts": [trusted], "edge": edge})
    task = simulator.task()
    for host in ("gate.example.com", "gate.example.com.", "GATE.example.com.:8080"):
        assert gate.get(task, headers={"host": host}).status_code == 200, host
    absolute = f"GET http://gate.example.com./v1/progress/{task} HTTP/1.1\r\nhost: gate.example.com.\r\n"
    assert gate.raw(f"{absolute}connection: close\r\n\r\n".encode()).startswith(b"HTTP/1.1 200 ")


# --- the client's address ---------------------------------------------------------------------------------


async def address(
    *headers: tuple[str, str],
    peer: str | None = "127.0.0.1",
    proxies: tuple[str, ...] = ("127.0.0.1", "10.0.0.0/8"),
    names: tuple[str, ...] = ("X-Forwarded-For", "Forwarded", "X-Real-IP"),
) -> str | None:
    """Return the client's address that the middleware finds."""
    found: list[Scope] = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        found.append(scope)

    pairs = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    scope = {"type": "http", "client": peer and (peer, 1), "headers": pairs, "scheme": "http"}
    middleware = ClientAddress(app, trusted_proxies=proxies, headers=names)
    await middleware(scope, None, None)  # type: ignore[arg-type]
    client = found[0]["client"]
    return None if client is None else str(client[0])


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], "127.0.0.1"),
        # X-Forwarded-For
        ([("X-Forwarded-For", "192.0.2.1")], "192.0.2.1"),
        ([("X-Forwarded-For", "192.0.2.1:4711")], "192.0.2.1"),
        ([("X-Forwarded-For", "[2001:db8::1]:4711")], "2001:db8::1"),
        ([("X-Forwarded-For", "2001:db8::1")], "2001:db8::1"),
        ([("X-Forwarded-For", "198.51.100.1, 192.0.2.1, 10.1.2.3")], "192.0.2.1"),
        ([("X-Forwarded-For", "198.51.100.1"), ("X-Forwarded-For", "192.0.2.1")], "192.0.2.1"),
        ([("X-Forwarded-For", "10.9.9.9, 10.1.2.3")], "10.9.9.9"),
        ([("X-Forwarded-For", "")], "127.0.0.1"),
        ([("X-Forwarded-For", "x" * 31_000)], "x" * 64),  # invented: it is logged and kept in caches
        ([("X-Forwarded-For", f"{'f' * 900}, [{':'.join(['2001'] * 8)}]:65535")], ":".join(["2001"] * 8)),
        # Forwarded, with the examples of RFC 7239
        ([("Forwarded", 'for="_gazonk"')], "_gazonk"),
        ([("Forwarded", 'For="[2001:db8:cafe::17]:4711"')], "2001:db8:cafe::17"),
        ([("Forwarded", "for=192.0.2.60;proto=http;by=203.0.113.43")], "192.0.2.60"),
        ([("Forwarded", "for=192.0.2.43, for=198.51.100.17")], "198.51.100.17"),
        ([("Forwarded", "for=192.0.2.43,for=10.1.2.3")], "192.0.2.43"),
        ([("Forwarded", "by=10.0.0.1;for=192.0.2.43 , ,for=10.1.2.3")], "192.0.2.43"),
        ([("Forwarded", "for=192.0.2.43"), ("Forwarded", 'proto=https;for="10.1.2.3:80"')], "192.0.2.43"),
        ([("Forwarded", "for=[2001:db8::1]:80, for=10.1.2.3")], "2001:db8::1"),  # not quoted
        ([("Forwarded", "for=192.0.2.43, for=unknown")], "unknown"),
        ([("Forwarded", "for=192.0.2.43, proto=https")], "unknown"),
        ([("Forwarded", 'for=192.0.2.43;host="a, b", for=10.1.2.3')], "192.0.2.43"),
        # a client that sends an open quotation mark before the proxy's element
        ([("Forwarded", 'for=203.0.113.9, x=", for=192.0.2.43')], "192.0.2.43"),
        ([("Forwarded", 'for=203.0.113.9, x=", for=192.0.2.43;by="[::1]"')], "192.0.2.43"),
        ([("Forwarded", 'for=203.0.113.9;x=", for=192.0.2.43;by="[::1]";host="h"')], "192.0.2.43"),
        # malformed: the last address that is known
        ([("Forwarded", "nonsense")], "127.0.0.1"),
        ([("Forwarded", "for=192.0.2.43 for=192.0.2.44")], "127.0.0.1"),
        ([("Forwarded", "nonsense, for=10.1.2.3")], "10.1.2.3"),
        ([("Forwarded", "for=192.0.2.43;x=" + "a" * 600)], "127.0.0.1"),
        ([("Forwarded", "")], "127.0.0.1"),
        # X-Real-IP
        ([("X-Real-IP", "192.0.2.1")], "192.0.2.1"),
        ([("X-Real-IP", "2001:db8::1")], "2001:db8::1"),
        ([("X-Real-IP", "")], "127.0.0.1"),
        ([("X-Real-IP", "x" * 31_000)], "x" * 64),
        # the first header in the setting's order is used
        ([("X-Real-IP", "192.0.2.1"), ("X-Forwarded-For", "192.0.2.2")], "192.0.2.2"),
        ([("X-Real-IP", "192.0.2.1"), ("Forwarded", "for=192.0.2.2")], "192.0.2.2"),
    ],
)
async def test_address_of_the_client_is_the_last_untrusted_hop(
    headers: list[tuple[str, str]], expected: str
) -> None:
    """Trusted proxies report the client in any of three headers; values that it can invent are ignored."""
    assert await address(*headers) == expected
    assert await address(*headers, peer="192.0.2.99") == "192.0.2.99"


async def test_address_depends_on_the_listed_headers_and_proxies() -> None:
    """Headers that are not listed are ignored; any peer may be trusted; a Unix socket's peer is trusted."""
    both = [("X-Forwarded-For", "192.0.2.2"), ("X-Real-IP", "192.0.2.1")]
    assert await address(*both, names=("X-Real-IP",)) == "192.0.2.1"
    assert await address(*both, names=()) == "127.0.0.1"
    chain = ("X-Forwarded-For", "192.0.2.2, 198.51.100.7")
    assert await address(chain, peer="203.0.113.9", proxies=("*",)) == "192.0.2.2"
    assert await address(chain, peer="203.0.113.9", proxies=("0.0.0.0/0",)) == "192.0.2.2"
    assert await address(chain, peer="::ffff:127.0.0.1") == "198.51.100.7"
    assert await address(chain, peer="::ffff:127.0.0.2") == "::ffff:127.0.0.2"
    assert await address(chain, peer=None) == "198.51.100.7"
    assert await address(peer=None) is None


@pytest.mark.parametrize("name", ["forwarded", "x-real-ip"])
def test_address_in_other_headers_separates_the_clients_of_a_proxy(
    simulator: Simulator, launch: Launch, name: str
) -> None:
    """Clients behind a proxy that sends Forwarded or X-Real-IP do not share one rate limit, even for hits."""
    gate = launch(simulator.url, limits={"requests_per_second": 0.001}, cache={"running_seconds": 600})
    task = simulator.task()

    def status(client: str) -> int:
        value = f"for={client};proto=https" if name == "forwarded" else client
        return gate.get(task, headers={name: value}).status_code

    assert [status(f"192.0.2.{number}") for number in (1, 2, 1, 2, 3)] == [200, 200, 429, 429, 200]


# --- a prefix without its final slash ---------------------------------------------------------------------


def test_prefix_without_its_slash_is_redirected(simulator: Simulator, launch: Launch) -> None:
    """GET and HEAD of `server.root_path` itself lead to the page, with the query; other methods give 404."""
    gate = launch(simulator.url, server={"root_path": "/tools/sd:1"})
    for method in ("GET", "HEAD"):
        response = gate.client.request(method, "/tools/sd:1?taskId=a&taskId=b")
        assert (response.status_code, response.headers["location"]) == (307, "./sd:1/?taskId=a&taskId=b")
        assert response.next_request is not None
        assert response.next_request.url.raw_path == b"/tools/sd:1/?taskId=a&taskId=b"
    followed = gate.client.get("/tools/sd:1", follow_redirects=True)
    assert followed.headers["content-type"].startswith("text/html")
    assert gate.client.post("/tools/sd:1").status_code == 404
    assert gate.client.get("/tools/sd:12").status_code == 404
