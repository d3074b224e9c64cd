"""Rate limit per client, and the identification of clients."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.client_limits import ClientTokenBuckets, bucket_key
from gateway.domain.errors import TooManyRequests
from tests.support.harness import Gateway, Simulator, serving, until

Launch = Callable[..., Gateway]

ONE, OTHER = "192.0.2.1", "192.0.2.2"
ONE_REQUEST = {"requests_per_second": 0.001}  # one request for the duration of a test


@dataclass
class Clock:
    """A clock that the test advances."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def admitted(limiter: ClientTokenBuckets, host: str = ONE, *, tries: int = 1) -> int:
    """Return how many of `tries` requests are admitted."""
    count = 0
    for _ in range(tries):
        try:
            limiter.admit(host)
        except TooManyRequests:
            continue
        count += 1
    return count


# Token bucket


def test_ratelimit_admits_a_burst_and_then_the_rate() -> None:
    """A full bucket holds one second's tokens, fills at the rate, and does not overflow."""
    clock = Clock()
    limiter = ClientTokenBuckets(5, clock=clock)
    assert admitted(limiter, tries=20) == 5
    clock.now += 0.2
    assert admitted(limiter, tries=20) == 1
    clock.now += 0.6
    assert admitted(limiter, tries=20) == 3
    clock.now += 3600
    assert admitted(limiter, tries=20) == 5


def test_ratelimit_below_one_per_second_admits_the_first() -> None:
    """A rate of one per ten seconds admits one, then one every ten seconds."""
    clock = Clock()
    limiter = ClientTokenBuckets(0.1, clock=clock)
    assert admitted(limiter, tries=3) == 1
    clock.now += 9.9
    assert admitted(limiter, tries=3) == 0
    clock.now += 0.1
    assert admitted(limiter, tries=3) == 1


def test_ratelimit_retry_after_is_exact() -> None:
    """A client is admitted after Retry-After and not earlier, whatever the number of refused attempts."""
    clock = Clock()
    limiter = ClientTokenBuckets(2, clock=clock)
    assert admitted(limiter, tries=50) == 2
    with pytest.raises(TooManyRequests) as refused:
        limiter.admit(ONE)
    assert refused.value.retry_after == pytest.approx(0.5)
    clock.now += 0.49
    assert admitted(limiter, tries=50) == 0
    clock.now += 0.01
    assert admitted(limiter) == 1


def test_ratelimit_separates_clients() -> None:
    """The requests of one client take no tokens from another."""
    limiter = ClientTokenBuckets(3, clock=Clock())
    assert admitted(limiter, ONE, tries=100) == 3
    assert admitted(limiter, OTHER, tries=100) == 3


def test_ratelimit_bucket_can_go_into_debt() -> None:
    """A request of more tasks than the bucket holds is admitted; its debt delays the next one."""
    clock = Clock()
    limiter = ClientTokenBuckets(20, clock=clock)
    limiter.admit(ONE)
    limiter.charge(ONE, 100)
    with pytest.raises(TooManyRequests) as refused:
        limiter.admit(ONE)
    assert refused.value.retry_after == pytest.approx(81 / 20)
    assert admitted(limiter, OTHER) == 1
    clock.now += 81 / 20 - 0.01
    assert (admitted(limiter, tries=50), limiter.would_admit(ONE)) == (0, False)
    clock.now += 0.01
    assert limiter.would_admit(ONE)
    assert admitted(limiter, tries=50) == 1


@given(
    rate=st.floats(0.1, 1000),
    steps=st.lists(st.tuples(st.floats(0, 10), st.integers(1, 100)), min_size=1, max_size=50),
)
def test_ratelimit_never_admits_more_tasks_than_rate_burst_and_one_request(
    rate: float, steps: list[tuple[float, int]]
) -> None:
    """The tasks in any period are at most rate x time + burst + one request."""
    clock = Clock()
    limiter = ClientTokenBuckets(rate, clock=clock)
    started, total, largest = clock.now, 0, 0
    for pause, tasks in steps:
        clock.now += pause
        if admitted(limiter):
            limiter.charge(ONE, tasks)
            total, largest = total + tasks, max(largest, tasks)
        assert total <= rate * (clock.now - started) + max(rate, 1.0) + largest + 1e-3


@given(
    rate=st.floats(0.01, 1000),
    steps=st.lists(st.tuples(st.floats(0, 10), st.integers(1, 30)), min_size=1, max_size=30),
)
def test_ratelimit_never_admits_more_than_rate_and_burst(rate: float, steps: list[tuple[float, int]]) -> None:
    """The requests in any period from the start are at most rate x time + burst."""
    clock = Clock()
    limiter = ClientTokenBuckets(rate, clock=clock)
    started, total = clock.now, 0
    for pause, tries in steps:
        clock.now += pause
        total += admitted(limiter, tries=tries)
        assert total <= rate * (clock.now - started) + max(rate, 1.0) + 1e-3


def test_ratelimit_memory_is_bounded() -> None:
    """With many clients the least recently used buckets are evicted; each has a few bytes."""
    limiter = ClientTokenBuckets(1, clock=Clock())
    limiter.admit("10.0.0.0")
    for number in range(20_000):
        limiter.admit(f"10.1.{number >> 8}.{number & 255}")
    assert len(limiter) == 16_384
    assert admitted(limiter, "10.0.0.0") == 1  # evicted, hence a new client
    assert admitted(limiter, "10.1.78.31") == 0  # still known
    key = bucket_key("x" * 30_000)
    assert sys.getsizeof(key) < 64


# Identification of clients


def test_ratelimit_identifies_clients_by_address() -> None:
    """IPv6 by /64, IPv4-mapped IPv6 as IPv4, and all values that are no address as one client."""
    same = [
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff:ffff:ffff:ffff"),
        ("192.0.2.1", "::ffff:192.0.2.1"),
        ("192.0.2.1", "::FFFF:C000:201"),
        ("fe80::1", "fe80::2%eth0"),
        ("", "unknown"),
        ("_hidden", "192.0.2.1, 192.0.2.2"),
    ]
    for one, other in same:
        assert bucket_key(one) == bucket_key(other), (one, other)
    different = ["2001:db8:1:2::1", "2001:db8:1:3::1", "192.0.2.1", "192.0.2.2", "::1", "", "::ffff:0:1"]
    assert len({bucket_key(host) for host in different}) == len(different)


# Over real sockets


def statuses(gate: Gateway, *forwarded: str | None) -> list[int]:
    """Send one request for each value of X-Forwarded-For, without the header for None."""
    return [
        gate.client.get(
            "/openapi.json", headers={} if value is None else {"x-forwarded-for": value}
        ).status_code
        for value in forwarded
    ]


def test_ratelimit_refuses_with_a_problem(simulator: Simulator, launch: Launch) -> None:
    """429 `too-many-requests` with Retry-After, as a problem; probes and scrapes are exempt."""
    gate = launch(simulator.url, limits=ONE_REQUEST, server={"root_path": "/prefix"})
    task = simulator.task()
    assert gate.get(task).status_code == 200
    refused = gate.get(task)
    assert (refused.status_code, refused.json()["code"]) == (429, "too-many-requests")
    assert refused.headers["content-type"] == "application/problem+json"
    assert 990 <= int(refused.headers["retry-after"]) <= 1000
    assert refused.headers["cache-control"] == "no-store"
    assert refused.json()["requestId"] == refused.headers["x-request-id"]
    for path in ("/healthz", "/readyz", "/metrics", "/prefix/healthz", "/prefix/metrics"):
        for _ in range(3):
            assert gate.client.get(path).status_code == 200, path
    assert gate.client.get("/v1/events", params={"taskId": task}).status_code == 429
    assert gate.metric("http_requests_total", status="429") == 2
    assert simulator.calls() == 1


def test_ratelimit_refuses_with_an_envelope(simulator: Simulator, launch: Launch) -> None:
    """On the drop-in paths the refusal is an envelope, which the vendor's SDKs parse."""
    gate = launch(simulator.url, limits=ONE_REQUEST)
    task = simulator.task()
    assert gate.native(task).json()["status"] == 10
    refused = gate.native(task)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) > 0
    assert (refused.json()["status"], refused.json()["errCode"]) == (20, "too-many-requests")
    assert refused.json()["data"] is None


def many(prefix: str, count: int = 100) -> str:
    """Return a query of `count` new tasks."""
    return "&".join(f"taskId={prefix}{number}" for number in range(count))


def test_ratelimit_counts_the_tasks_of_batches(simulator: Simulator, launch: Launch) -> None:
    """Of twenty batches of a hundred tasks in a burst one is admitted; duplicates are free."""
    gate = launch(simulator.url, limits={"requests_per_second": 0.02})  # a burst of one
    assert gate.client.get(f"/v1/progress?{'taskId=a&' * 40}").json()["summary"]["total"] == 1
    assert gate.client.get("/v1/progress?taskId=a").status_code == 429
    gate = launch(simulator.url, limits={"requests_per_second": 20})
    before = simulator.calls()
    responses = [gate.client.get(f"/v1/progress?{many(f'n{number}-')}") for number in range(20)]
    assert [response.status_code for response in responses].count(200) <= 2  # a second one if this takes 4 s
    assert simulator.calls() - before <= 200
    refused = next(response for response in responses if response.status_code == 429)
    assert refused.json()["code"] == "too-many-requests"
    assert 1 <= int(refused.headers["retry-after"]) <= 5
    assert gate.get("n0-0").status_code == 429  # a hit is refused, too, until the debt is paid


def test_ratelimit_counts_the_tasks_of_streams(simulator: Simulator, launch: Launch) -> None:
    """A stream costs its number of tasks when it opens; HEAD opens none and costs one request."""
    gate = launch(simulator.url, limits={"requests_per_second": 1})
    with gate.client.stream("GET", f"/v1/events?{many('s')}") as response:
        assert response.status_code == 200
        refused = gate.client.get(f"/v1/events?{many('t')}")
        assert (refused.status_code, refused.json()["code"]) == (429, "too-many-requests")
        assert 90 <= int(refused.headers["retry-after"]) <= 100
    gate = launch(simulator.url, limits={"requests_per_second": 0.01})
    assert gate.client.head(f"/v1/events?{many('s')}").status_code == 200
    refused = gate.client.head("/v1/events?taskId=s")
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) <= 100


# Subscriptions


def test_subscriptions_of_one_client_are_bounded(simulator: Simulator, launch: Launch) -> None:
    """Streams and long polls of a client count together; one too many is 429; others are admitted."""
    gate = launch(simulator.url, limits={"subscriptions_per_client": 2}, cache={"running_seconds": 600})
    task = simulator.task(data={"status": "running", "progress": 0.5})
    done = simulator.finished()
    etag = gate.get(task).headers["etag"]
    poll = f"GET /v1/progress/{task}?wait=60 HTTP/1.1\r\nhost: x\r\nif-none-match: {etag}\r\n\r\n".encode()
    events = f"/v1/progress/{task}/events"
    with gate.connect() as connection, gate.client.stream("GET", events) as stream:
        assert stream.status_code == 200
        connection.sendall(poll)
        until(lambda: gate.metric("watchers") == 2, "both are open")
        for refused in (gate.client.get(events), gate.get(task, params={"wait": "1"})):
            assert (refused.status_code, refused.json()["code"]) == (429, "too-many-requests")
            assert int(refused.headers["retry-after"]) >= 1
        other = {"x-forwarded-for": OTHER}
        with gate.client.stream("GET", events, headers=other) as response:
            assert response.status_code == 200
        assert gate.get(task).status_code == 200
    until(lambda: gate.metric("watchers") == 0, "both are closed")
    for _ in range(4):  # the count decreases in whatever way they end
        assert gate.get(done, params={"wait": "1"}).status_code == 200
        with gate.connect() as connection:
            connection.sendall(poll)
            until(lambda: gate.metric("watchers") == 1, "it waits")
        until(lambda: gate.metric("watchers") == 0, "it is closed")


def test_ratelimit_is_off_by_default(gate: Gateway) -> None:
    """Without the setting there is no limit."""
    assert statuses(gate, *[None] * 50) == [200] * 50


def test_ratelimit_refusal_is_readable_through_cors(simulator: Simulator, launch: Launch) -> None:
    """A page of an allowed origin can read the 429 and Retry-After; preflights are free."""
    origin = "https://studio.example.com"
    gate = launch(simulator.url, limits=ONE_REQUEST, server={"cors_origins": [origin]})
    asks = {"origin": origin, "access-control-request-method": "GET"}
    path = f"/v1/progress/{simulator.task()}"
    for _ in range(3):
        assert gate.client.options(path, headers=asks).status_code == 200
    assert gate.client.get(path, headers={"origin": origin}).status_code == 200
    refused = gate.client.get(path, headers={"origin": origin})
    assert refused.status_code == 429
    assert refused.headers["access-control-allow-origin"] == origin
    assert "Retry-After" in refused.headers["access-control-expose-headers"]


def test_ratelimit_behind_a_trusted_proxy_counts_its_clients(simulator: Simulator, launch: Launch) -> None:
    """X-Forwarded-For of the proxy identifies clients: one header or several, ports, IPv6 by /64."""
    gate = launch(simulator.url, limits=ONE_REQUEST)
    assert statuses(gate, ONE, OTHER, ONE, f"{OTHER}:4711", f"::ffff:{ONE}") == [200, 200, 429, 429, 429]
    assert statuses(gate, "2001:db8::1", "[2001:db8::2]:80", "2001:db8:0:1::1") == [200, 429, 200]
    # The proxy itself, also with an empty header, is a separate client.
    assert statuses(gate, None, "") == [200, 429]
    twice = [("x-forwarded-for", "192.0.2.77"), ("x-forwarded-for", ONE)]
    assert gate.client.get("/openapi.json", headers=twice).status_code == 429
    assert statuses(gate, "192.0.2.77") == [200]


def test_ratelimit_behind_several_proxies_uses_the_last_untrusted_hop(
    simulator: Simulator, launch: Launch
) -> None:
    """Values left of the last untrusted hop, which a client can invent, are ignored."""
    proxies = ["127.0.0.1", "10.0.0.0/8", "2001:db8:ffff::/48"]
    gate = launch(simulator.url, limits=ONE_REQUEST, server={"trusted_proxies": proxies})
    assert statuses(gate, f"{ONE}, 10.1.2.3") == [200]
    spoofs = [f"198.51.100.{number}, {ONE}, 2001:db8:ffff::9, 10.1.2.3" for number in range(5)]
    assert statuses(gate, *spoofs) == [429] * 5
    # An IPv4-mapped address is the same hop.
    assert statuses(gate, f"203.0.113.1, {ONE}, ::ffff:10.9.9.9") == [429]
    assert statuses(gate, f"{OTHER}, 10.1.2.3, 10.4.5.6") == [200]


def test_ratelimit_ignores_headers_of_untrusted_peers(simulator: Simulator, launch: Launch) -> None:
    """An untrusted peer counts by its own address, whatever headers it sends."""
    gate = launch(simulator.url, limits=ONE_REQUEST, server={"trusted_proxies": ["10.0.0.1"]})
    claims = [f"198.51.100.{number}" for number in range(5)]
    assert statuses(gate, *claims, None, "10.0.0.1", "127.0.0.1") == [200] + [429] * 7
    for name, value in (("forwarded", "for=198.51.100.99"), ("x-real-ip", "198.51.100.99")):
        assert gate.client.get("/openapi.json", headers={name: value}).status_code == 429
    # Another address of the loopback network stands for another machine, with its own bucket.
    transport = httpx.HTTPTransport(local_address="127.0.0.2", verify=False)  # plain http
    with httpx.Client(transport=transport, base_url=gate.url, trust_env=False) as other:
        assert other.get("/openapi.json").status_code == 200
        assert other.get("/openapi.json", headers={"x-forwarded-for": OTHER}).status_code == 429


@pytest.mark.parametrize(
    ("proxies", "rate", "lines"),
    [("*", "5", 1), ("0.0.0.0/0", "5", 1), ("*", "0", 0), ("10.0.0.0/8", "5", 0)],
)
def test_ratelimit_that_can_be_evaded_is_logged_at_startup(
    tmp_path: Path, proxies: str, rate: str, lines: int
) -> None:
    """If all addresses are trusted proxies a client can choose its address: the log has a warning."""
    env = {"SD_GATEWAY_SERVER__TRUSTED_PROXIES": proxies, "SD_GATEWAY_LIMITS__REQUESTS_PER_SECOND": rate}
    with serving(tmp_path, env) as (process, gate):
        assert gate.client.get("/healthz").status_code == 200
        process.signal()
        assert process.exit_status() == 0
    assert process.output.count("X-Forwarded-For") == lines
