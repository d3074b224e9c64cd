"""Cached responses: built once, reused while valid, at little cost, and with backpressure."""

import asyncio
import json
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import cachetools
import pytest
import starlette
import structlog
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from structlog.testing import capture_logs
from uvicorn.server import ServerState

import gateway
from gateway.api.cached_responses import CachedResponse
from gateway.api.client_limits import ClientTokenBuckets
from gateway.api.progress_response import HEADER_NAMES, build_response
from gateway.api.requests import SECURITY_HEADERS
from gateway.app import create_app
from gateway.domain.errors import UpstreamTimeout
from gateway.progress.outcomes import CacheStatus, LookupSuccess
from gateway.server.connection_limits import make_connection_limits
from gateway.server.protocol_class import make_protocol_class
from gateway.settings.model import Cache, Settings
from gateway.telemetry.redaction import Redactor
from tests.support.harness import PATIENCE_SECONDS, RawUpstream, Simulator, respond_ok, serving
from tests.support.hitting import KEY, Bench
from tests.support.seen import TAGS

OF_A_HIT = tuple(
    str(Path(package.__file__).parent)
    for package in (gateway, uvicorn, starlette, cachetools, structlog, json)
)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """Provide cached responses over a memory store."""
    bench = Bench()
    yield bench
    await bench.service.aclose()


# --- reuse ------------------------------------------------------------------------------------------------


def wire(result: LookupSuccess, known: str | None) -> bytes:
    """Return the response to a result as a newly built one."""
    status, values, body = build_response(result, known)
    lines = [b"HTTP/1.1 " + {200: b"200 OK", 304: b"304 Not Modified"}[status], b"server: 100 %d"]
    pairs = [*zip(HEADER_NAMES[status], values, strict=True), *SECURITY_HEADERS]
    lines += [b"%b: %b" % pair for pair in pairs]
    return b"\r\n".join([*lines, b"x-request-id: mine", b"", body])


@given(
    lifetime=st.one_of(st.floats(0.01, 5), st.sampled_from([1.0, 2.0, 600.0])),
    ticks=st.lists(st.one_of(st.floats(0, 1.5), st.sampled_from([0.0, 0.5, 1.0])), min_size=2, max_size=12),
    known=st.sampled_from([None, '"one"', '"other"']),
)
def test_hits_have_the_age_of_each_request(lifetime: float, ticks: list[float], known: str | None) -> None:
    """A reused response has the same age and freshness as a newly built one, until it is stale."""

    async def play() -> None:
        bench = Bench()
        snapshot = bench.keep(lifetime=lifetime)
        headers = [] if known is None else [(b"if-none-match", known.encode())]
        for tick in ticks:
            bench.now += tick
            age = bench.now - snapshot.fetched_at
            if age >= lifetime:
                break
            assert bench.ask(headers=headers) == wire(LookupSuccess(snapshot, age, CacheStatus.HIT), known)
        await bench.service.aclose()

    asyncio.run(play())


@given(ticks=st.lists(st.one_of(st.floats(0, 0.02), st.floats(0, 1)), min_size=1, max_size=12))
def test_hits_that_are_stale_are_reused_briefly(ticks: list[float]) -> None:
    """A stale response has its age, counts as stale, and ends at its maximum age or with a new snapshot."""

    async def play() -> None:
        bench = Bench()
        snapshot = bench.keep(lifetime=1.0)
        bench.now += 1.0
        for asked, tick in enumerate(ticks, start=1):
            age = bench.now - snapshot.fetched_at
            shown = bench.ask()
            if age >= 1.0 + Cache().stale_while_revalidate_seconds:
                assert shown is None
                break
            assert shown == wire(LookupSuccess(snapshot, age, CacheStatus.STALE), None)
            assert bench.count("cache_lookups_total", operation="sd_get_progress", result="stale") == asked
            bench.now += tick
        bench.keep(body=b"newer")
        assert (bench.ask() or b"").endswith(b"newer")
        await bench.service.aclose()

    asyncio.run(play())


async def test_hits_that_are_stale_report_a_failure_soon(bench: Bench) -> None:
    """After a failed refresh a stale response reports the failure within a hundredth of a second."""
    snapshot = bench.keep(lifetime=1.0)
    bench.now += 1.5
    for _ in range(3):
        assert b"detail" not in (bench.ask() or b"detail")
    bench.store.put_failure(KEY, UpstreamTimeout("no answer"), seconds=1)
    bench.now += 0.011
    failed = LookupSuccess(snapshot, 1.511, CacheStatus.STALE, failure=UpstreamTimeout("no answer"))
    for _ in range(3):
        assert bench.ask() == wire(failed, None)


async def test_hits_are_of_the_latest_snapshot(bench: Bench) -> None:
    """As soon as a new snapshot is stored, the response of the old one is not used any more."""
    bench.keep(body=b"old")
    assert (bench.ask() or b"").endswith(b"old")
    bench.keep(body=b"new", etag='"two"')
    assert (bench.ask() or b"").endswith(b"new")
    assert b" 200 " in (bench.ask(headers=[(b"if-none-match", b'"one"')]) or b"")
    assert b" 304 " in (bench.ask(headers=[(b"if-none-match", b'"two"')]) or b"")


async def test_hits_are_not_older_than_the_client_has_received(bench: Bench) -> None:
    """A client whose tag names a newer version is left to the application, which queries the task."""
    bench.keep(etag=TAGS.issue(KEY, b"{}", 5), version=6)

    def ask(body: bytes, revision: int) -> bytes | None:
        tag = TAGS.issue(KEY, body, revision).encode()
        return bench.ask(headers=[(b"if-none-match", tag)])

    for _ in range(3):
        assert b" 200 " in (ask(b"other", 4) or b"")
        assert b" 200 " in (ask(b"other", 6) or b"")
        assert ask(b"other", 7) is None
        assert b" 304 " in (ask(b"{}", 4) or b"")
        assert b" 304 " in (ask(b"{}", 7) or b""), "it is the same body"
    forged = TAGS.issue(KEY, b"other", 4).replace(".4.", ".7.").encode()
    assert b" 200 " in (bench.ask(headers=[(b"if-none-match", forged)]) or b"")


async def test_hits_follow_the_headers_of_the_server(bench: Bench) -> None:
    """When the server's headers change, reused responses have the new ones."""
    bench.keep()
    bench.ask()
    for moment in (b"now", b"then"):
        assert b"\r\ndate: %b\r\n" % moment in (bench.ask(server_headers=[(b"date", moment)]) or b"")


async def test_hits_stored_are_bounded(bench: Bench) -> None:
    """The number of stored responses is bounded, whatever entity tags clients invent."""
    bench.keep()
    for number in range(20_000):
        assert bench.ask(headers=[(b"if-none-match", b'"%d"' % number)])
    assert len(bench.hits._entries) <= 16_384  # private: only the memory shows how many are stored


async def test_hits_of_a_long_entity_tag_are_not_stored(bench: Bench) -> None:
    """The response to a tag that cannot be ours is not stored: the tag may have kilobytes."""
    bench.keep()
    for _ in range(3):
        assert b" 200 " in (bench.ask(headers=[(b"if-none-match", b'"%b"' % (b"x" * 5000))]) or b"")
    assert not bench.hits._entries  # private, as above


async def test_hits_look_up_the_latest_again(bench: Bench) -> None:
    """A known target gets the latest snapshot, and no response after its eviction."""
    bench.keep(lifetime=10, body=b'"older"')
    assert b"older" in (bench.ask() or b"")
    bench.now += 2  # after the second in which responses are reused
    assert b"older" in (bench.ask() or b"")
    latest = bench.keep(lifetime=10, etag='"two"', body=b'"newer"')
    assert b"newer" in (bench.ask() or b"")
    bench.now += 9.5
    assert b"newer" in (bench.ask() or b"")
    for number in range(10):  # the store has room for ten
        bench.store.put(replace(latest, key=KEY._replace(task_id=f"other{number}")))
    assert bench.ask() is None


async def test_hits_memory_is_bounded(bench: Bench) -> None:
    """Stored responses use at most 8 MiB, including snapshots that the store has evicted."""
    one = bench.keep(body=b"x" * 878_000)
    for number in range(40):
        bench.store.put(replace(one, key=KEY._replace(task_id=f"other{number}"), version=number))
        for _ in range(3):
            assert bench.ask(b"/v1/progress/other%d" % number)

    def stored() -> list[CachedResponse]:
        # Private: only the memory shows what is stored.
        return [hit for hit in bench.hits._entries.values() if hit is not None]

    assert 0 < sum(len(hit.result.snapshot.body) + len(hit.rendered[1]) for hit in stored()) <= 8_388_608
    assert len(bench.store) == 10
    larger = bench.keep(body=b"x" * 5_000_000)
    assert [bench.ask() for _ in range(3)] == [bench.ask()] * 3
    assert larger not in [hit.result.snapshot for hit in stored()]


async def test_hits_are_counted(bench: Bench) -> None:
    """Each response counts as a request, with its duration, and as a lookup; others do not count here."""
    bench.keep()
    for _ in range(5):
        bench.ask()
    bench.ask(headers=[(b"if-none-match", b'"one"')])
    assert bench.ask(b"/v1/progress/unknown") is None
    assert bench.ask(b"/v1/progress/abc?wait=1") is None
    assert bench.ask(headers=[(b"prefer", b"wait=1")]) is None
    route = {"route": "/v1/progress/{taskId}"}
    assert bench.count("http_requests_total", **route, method="GET", status="200") == 5
    assert bench.count("http_requests_total", **route, method="GET", status="304") == 1
    assert bench.count("http_request_duration_seconds_count", **route) == 6
    assert bench.count("cache_lookups_total", operation="sd_get_progress", result="hit") == 6


async def test_hits_are_logged_like_any_request(bench: Bench) -> None:
    """A hit's log line has the same fields as the application's, and is sampled at high rates."""
    bench.keep()
    traced = [(b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")]
    with capture_logs() as lines:
        for _ in range(1020):
            bench.ask(headers=traced)
    written = [line for line in lines if line["event"] == "request"]
    assert [line.get("suppressed") for line in written] == [None] * 10 + [999]
    assert {name: written[0][name] for name in written[0] if name != "seconds"} == {
        "event": "request",
        "log_level": "info",
        "request_id": "mine",
        "method": "GET",
        "route": "/v1/progress/{taskId}",
        "task_id": "abc",
        "status": 200,
        "cache": "hit",
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
        "parent_id": "b7ad6b7169203331",
    }


async def test_hits_over_the_rate_are_left_to_the_application() -> None:
    """A client without a token gets no response here, and each hit takes one token."""
    limiter = ClientTokenBuckets(2, clock=lambda: 0.0)
    bench = Bench(limiter=limiter)
    bench.keep()
    assert bench.ask(b"/v1/progress/unknown") is None  # takes no token
    assert [bench.ask() is not None for _ in range(4)] == [True, True, False, False]
    assert bench.ask(headers=[(b"x-forwarded-for", b"10.0.0.1")]) is None
    assert bench.count("cache_lookups_total", operation="sd_get_progress", result="hit") == 2
    await bench.service.aclose()


# --- cost of a hit ---------------------------------------------------------------------------------------


@pytest.fixture
def upstream() -> Iterator[RawUpstream]:
    """Provide an upstream with a snapshot of every task."""
    with RawUpstream(respond_ok) as upstream:
        yield upstream


@pytest.mark.parametrize(
    ("edge", "headers", "most"),
    [(True, b"", 12), (True, b"X-Request-Id: %d\r\n", 41), (False, b"", 75)],
    ids=["alike", "parsed", "application"],
)
async def test_hits_cost_no_task_no_json_and_few_calls(
    upstream: RawUpstream,
    edge: bool,  # noqa: FBT001 - pytest passes by name
    headers: bytes,
    most: int,
) -> None:
    """A hit encodes no JSON, calls few functions, and creates no task except the application's."""
    settings = Settings.model_validate(
        {
            "server": {"edge": edge, "trusted_hosts": ["*"]},
            "cache": {"running_seconds": 3000},
            "upstream": {"endpoint": upstream.url},
            "credentials": {"access_key": "k", "secret_key": "s"},
        }
    )
    app = create_app(settings, redactor=Redactor())
    hits, asgi = (None, app.asgi) if app.fast_path is None else app.fast_path
    protocol = make_protocol_class(make_connection_limits(settings.server, app.metrics), hits=hits)
    config = uvicorn.Config(asgi, http=protocol, log_config=None, access_log=False)
    config.load()
    loop = asyncio.get_running_loop()
    tasks: list[object] = []
    calls: Counter[str] = Counter()

    def make_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        tasks.append(coroutine)
        return asyncio.Task(coroutine, loop=loop, **options)

    def note(frame: FrameType, event: str, _: object) -> None:
        # Neither asyncio's loop nor the test's threads are part of a hit.
        if event == "call" and frame.f_code.co_filename.startswith(OF_A_HIT):
            calls[f"{frame.f_code.co_filename}:{frame.f_code.co_name}"] += 1

    async with app.asgi.router.lifespan_context(app.asgi):
        server = await loop.create_server(lambda: protocol(config, ServerState(), {}), "127.0.0.1", 0)
        with socket.create_connection(server.sockets[0].getsockname()) as connection:

            def ask(number: int) -> bytes:
                more = headers % number if headers else b""
                connection.sendall(b"GET /v1/progress/a HTTP/1.1\r\nHost: x\r\n%b\r\n" % more)
                return connection.recv(65536)

            await asyncio.to_thread(ask, 0)
            loop.set_task_factory(make_task)
            hits: list[Counter[str]] = []
            try:
                for number in range(1, 51):
                    calls.clear()
                    sys.setprofile(note)
                    response = await asyncio.to_thread(ask, number)
                    sys.setprofile(None)
                    hits.append(calls.copy())
                    assert b"sd-gateway; hit" in response
            finally:
                sys.setprofile(None)
                loop.set_task_factory(None)
        server.close()
        await server.wait_closed()
    assert len(tasks) == (0 if edge else len(hits))
    fewest = min(hits, key=Counter.total)  # the first hits of each second write a log line
    assert not any("json" in Path(name).parts for name in fewest)
    assert 5 < fewest.total() <= most, fewest


async def test_hits_apply_backpressure(simulator: Simulator, tmp_path: Path) -> None:
    """A client that sends without reading is not read from any more; all accepted requests get a response."""
    task = simulator.task()
    request = b"GET /v1/progress/%b HTTP/1.1\r\nHost: x\r\n\r\n" % task.encode()
    environment = {
        "SD_GATEWAY_UPSTREAM__ENDPOINT": simulator.url,
        "SD_GATEWAY_CACHE__RUNNING_SECONDS": "3000",
    }
    with serving(tmp_path, environment, real=True) as (process, gate), gate.connect() as connection:
        gate.get(task)
        before = process.resident_bytes()
        connection.settimeout(1)
        sent = 0
        many = request * 1000
        with suppress(TimeoutError):
            while sent < 1_000_000 * len(request):
                sent += connection.send(many[sent % len(request) :])
        grown = process.resident_bytes() - before
        connection.settimeout(PATIENCE_SECONDS)
        answers = 0
        tail = b""
        while answers < sent // len(request):
            received = connection.recv(1 << 20)
            assert received
            answers += (tail[-8:] + received).count(b"HTTP/1.1 ")
            tail = received
    assert sent < 1_000_000 * len(request)
    assert grown < 32 << 20
