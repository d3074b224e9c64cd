"""Limits per client, fairness between clients, and requests by foreign web pages."""

import gzip
import json
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from gateway.progress import unanswered_tasks
from tests.attacks.wire import Line, Target, query, request, settle
from tests.support.harness import (
    PATIENCE_SECONDS,
    Gateway,
    HeldUpstream,
    RawUpstream,
    Request,
    Simulator,
    fresh_id,
    respond_ok,
    until,
)

ONE, OTHER = "127.0.0.2", "127.0.0.3"
SECURITY_HEADERS = {"x-content-type-options": "nosniff", "cross-origin-resource-policy": "same-site"}


def batch(
    count: int, *fields: str, path: str = "/v1/progress", new_id: Callable[[], str] = fresh_id
) -> bytes:
    """Return a request for a number of new tasks."""
    return request(f"{path}?" + "&".join(f"taskId={new_id()}" for _ in range(count)), *fields)


# Tasks are what costs


@pytest.mark.parametrize("known", [True, False])
def test_costs_of_batches_count_by_task(target: Target, simulator: Simulator, *, known: bool) -> None:
    """Twenty batches of a hundred tasks count as 2,000 requests for limits.requests_per_second."""
    gate = target(limits={"requests_per_second": 20})
    batches = [
        batch(100, new_id=simulator.task if known and number < 2 else fresh_id) for number in range(20)
    ]
    started, answered = time.monotonic(), 0
    with Line(gate) as line:
        for each in batches:
            line.send(each)
            answer = line.answer()
            answered += answer.status == 200
            assert answer.status == 200 or (answer.status, answer.code) == (429, "too-many-requests")
    allowed = 100 + 20 + 20 * (time.monotonic() - started)  # one batch on credit, a full bucket, and the rate
    assert answered * 100 <= allowed
    assert simulator.calls() <= allowed


def test_costs_of_streams_count_by_task(target: Target) -> None:
    """A stream of a hundred tasks counts them when it opens: the next request is refused."""
    gate = target(limits={"requests_per_second": 10})
    started = time.monotonic()
    with ExitStack() as stack:
        opened = 0
        for _ in range(5):
            line = stack.enter_context(Line(gate))
            line.send(batch(100, path="/v1/events"))
            opened += b" 200 OK" in line.until(b"\r\n")
        assert opened * 100 <= 100 + 10 + 10 * (time.monotonic() - started)


def test_costs_of_a_single_task_stay_one(target: Target, simulator: Simulator) -> None:
    """One task counts once, on every path; a client below its rate is not refused."""
    tasks = [simulator.task() for _ in range(12)]
    gate = target(limits={"requests_per_second": 12})
    with Line(gate) as line:
        for number, task in enumerate(tasks):
            line.send(query(task) if number % 2 else request(f"/v1/progress/{task}"))
            assert line.answer().status == 200


def test_costs_of_subscriptions_are_bounded_for_each_client(target: Target, simulator: Simulator) -> None:
    """The number of concurrent streams and long polls is limited for each client separately."""
    task = simulator.task()
    gate = target(limits={"subscriptions_per_client": 2})
    stream, poll = request(f"/v1/events?taskId={task}"), request(f"/v1/progress/{task}?wait=30")
    with ExitStack() as stack:
        first = stack.enter_context(Line(gate, source=ONE))
        first.send(stream)
        first.until(b"event: progress")
        second = stack.enter_context(Line(gate, source=ONE))
        second.send(poll)
        until(lambda: gate.metric("watchers") == 2, "both watch")
        for asked in (stream, poll):
            third = stack.enter_context(Line(gate, source=ONE))
            third.send(asked)
            refused = third.answer()
            assert (refused.status, refused.code) == (429, "too-many-requests")
            assert refused.header("retry-after") is not None
        stranger = stack.enter_context(Line(gate, source=OTHER))
        stranger.send(stream)
        assert b" 200 OK" in stranger.until(b"event: progress")
        first.socket.close()
        until(lambda: gate.metric("watchers") == 2, "the first one has left")
        again = stack.enter_context(Line(gate, source=ONE))
        again.send(stream)
        again.until(b"event: progress")


def test_costs_of_batches_that_wait_are_bounded(target: Target) -> None:
    """At most 4,000 tasks of one client, in batches, wait for the upstream; more are refused."""
    with HeldUpstream() as upstream, ExitStack() as stack:
        gate = target(upstream.url, upstream={"attempt_timeout_seconds": 60, "timeout_seconds": 60})

        def wait_for_batch(source: str) -> Line:
            line = stack.enter_context(Line(gate, source=source))
            line.send(batch(100))
            return line

        waiting = [wait_for_batch(ONE) for _ in range(40)]
        settle(gate)
        refused = wait_for_batch(ONE).answer()
        assert (refused.status, refused.code, refused.header("retry-after")) == (503, "overloaded", "1")
        waiting.append(wait_for_batch(OTHER))
        settle(gate)
        upstream.released.set()
        assert [line.answer().status for line in waiting] == [200] * 41
        assert wait_for_batch(ONE).answer().status == 200


def knows_only_known(hold: threading.Event) -> Callable[[Any, Request], None]:
    """Return an upstream that holds the queries for tasks that are not named "known…"."""

    def behaviour(connection: Any, asked: Request) -> None:
        if not asked.task_id.startswith("known"):
            hold.wait(PATIENCE_SECONDS)
        respond_ok(connection, asked)

    return behaviour


def test_costs_of_batches_that_wait_do_not_fail_other_tasks(target: Target) -> None:
    """Of a batch or a long poll whose new tasks may not wait, the known ones are served."""
    hold = threading.Event()
    with RawUpstream(knows_only_known(hold)) as upstream, ExitStack() as stack:
        stack.callback(hold.set)
        gate = target(
            upstream.url,
            upstream={"attempt_timeout_seconds": 60, "timeout_seconds": 60},
            cache={"running_seconds": 0, "stale_while_revalidate_seconds": 0},
        )
        for known in ("known-1", "known-2"):
            assert gate.get(known).status_code == 200
        for _ in range(40):
            line = stack.enter_context(Line(gate, source=ONE))
            line.send(batch(100))
        settle(gate)
        line = stack.enter_context(Line(gate, source=ONE))
        for wait in ("", "&wait=1"):
            line.send(request(f"/v1/progress?taskId=new-1&taskId=known-1&taskId=new-2&taskId=known-2{wait}"))
            answer = line.answer()
            assert answer.status == 200
            results = [each.get("error", {}).get("code") for each in answer.json["items"]]
            assert results == ["overloaded", None, "overloaded", None]
            assert answer.json["summary"]["errors"] == 2


@pytest.mark.parametrize("path", ["/v1/events", "/v1/progress?wait=60"])
def test_costs_of_watched_tasks_without_a_response_are_bounded(target: Target, path: str) -> None:
    """At most 4,000 such tasks of one client are watched. More are refused until some have left."""
    with HeldUpstream() as upstream, ExitStack() as stack:
        gate = target(upstream.url, upstream={"attempt_timeout_seconds": 60, "timeout_seconds": 60})

        def watch(source: str, *, tasks: int = 100) -> Line:
            line = stack.enter_context(Line(gate, source=source))
            names = "&".join(f"taskId={fresh_id()}" for _ in range(tasks))
            line.send(request(f"{path}{'&' if '?' in path else '?'}{names}"))
            return line

        lines = [watch(ONE) for _ in range(40)]
        until(lambda: gate.metric("watched_tasks") == 4_000, "all are watched")
        for tasks in (100, 1):
            refused = watch(ONE, tasks=tasks).answer()
            assert (refused.status, refused.code, refused.header("retry-after")) == (503, "overloaded", "1")
        single = stack.enter_context(Line(gate, source=ONE))
        single.send(request(f"/v1/progress/{fresh_id()}?wait=60"))
        assert single.answer().code == "overloaded"
        lines.append(watch(OTHER))
        until(lambda: gate.metric("watched_tasks") == 4_100, "another client's tasks are watched")
        for line in lines[:2]:
            line.socket.close()
        until(lambda: gate.metric("watched_tasks") == 3_900, "two have left")
        watch(ONE)
        until(lambda: gate.metric("watched_tasks") == 4_000, "one may watch again")
        upstream.released.set()


def test_costs_of_watched_tasks_do_not_stop_subscriptions_to_known_ones(target: Target) -> None:
    """While too many tasks wait, known ones are watched; those of a long poll that are not fail."""
    hold = threading.Event()
    with RawUpstream(knows_only_known(hold)) as upstream, ExitStack() as stack:
        stack.callback(hold.set)
        gate = target(upstream.url, upstream={"attempt_timeout_seconds": 60, "timeout_seconds": 60})
        for known in ("known-1", "known-2"):
            assert gate.get(known).status_code == 200
        for _ in range(40):
            line = stack.enter_context(Line(gate, source=ONE))
            line.send(batch(100, path="/v1/events"))
        until(lambda: gate.metric("watched_tasks") == 4_000, "all are watched")
        stream = stack.enter_context(Line(gate, source=ONE))
        stream.send(request("/v1/events?taskId=known-1&taskId=known-2"))
        assert b"known-2" in stream.until(b'"taskId":"known-2"')
        poll = stack.enter_context(Line(gate, source=ONE))
        poll.send(request("/v1/progress?taskId=new-1&taskId=known-1&wait=60"))  # answered after a second
        answer = poll.answer()
        assert [each.get("error", {}).get("code") for each in answer.json["items"]] == ["overloaded", None]


def test_costs_of_unanswered_tasks_do_not_stop_queries_for_known_ones(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the tasks of a client may not wait, a batch still queries the known ones."""
    monkeypatch.setattr(unanswered_tasks, "MAX_UNANSWERED_TASKS_PER_CLIENT", 3)
    hold = threading.Event()
    with (
        RawUpstream(knows_only_known(hold)) as upstream,
        Line(
            gate := target(upstream.url, cache={"running_seconds": 0, "stale_while_revalidate_seconds": 0}),
            source=ONE,
        ) as line,
        Line(gate, source=ONE) as waiting,
    ):
        line.send(request("/v1/progress?taskId=known-1"))
        assert line.answer().status == 200
        waiting.send(batch(3))
        settle(gate)
        for _ in range(2):
            before = sum(each.task_id == "known-1" for each in upstream.requests)
            line.send(request("/v1/progress?taskId=known-1&taskId=new-1"))
            known, new = line.answer().json["items"]
            assert (known["stale"], new["error"]["code"]) == (None, "overloaded")
            # A slow call is hedged, so there may be more than one.
            assert sum(each.task_id == "known-1" for each in upstream.requests) > before
        line.send(request("/v1/progress?taskId=new-1&taskId=new-2"))
        assert line.answer().code == "overloaded"
        hold.set()


# The upstream's calls


class Counting:
    """An upstream that works on each call until it is released, even if its client has disconnected."""

    def __init__(self, *, seconds: float | None = None) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._seconds = seconds
        self.go = threading.Event()
        self.most = 0

    def __call__(self, connection: Any, asked: Request) -> None:
        with self._lock:
            self._running += 1
            self.most = max(self.most, self._running)
        self.go.wait(self._seconds)
        with self._lock:
            self._running -= 1
        respond_ok(connection, asked)


def test_costs_of_a_queue_do_not_delay_other_clients(target: Target) -> None:
    """With a long queue of one client, another client's first query is sent in the next round."""
    with RawUpstream(respond_ok) as upstream:
        # A low rate, so that few calls are made while the newcomer connects on a busy machine.
        gate = target(upstream.url, upstream={"requests_per_second": 5, "timeout_seconds": 120})
        with ExitStack() as stack:
            for _ in range(4):
                greedy = stack.enter_context(Line(gate, source=ONE))
                greedy.send(batch(100))
            until(lambda: len(upstream.requests) >= 8, "the queue moves")
            before = len(upstream.requests)
            newcomer = stack.enter_context(Line(gate, source=OTHER))
            newcomer.send(query("newcomer"))
            assert newcomer.answer().status == 200
            place = [asked.task_id for asked in upstream.requests].index("newcomer")
    # Calls that were already in flight, and one round.
    assert place - before <= 5


def test_costs_of_abandoned_queries_are_saved(target: Target) -> None:
    """Queued queries whose clients have disconnected are dropped and counted, without an upstream call."""
    upstream_work = Counting()
    with RawUpstream(upstream_work) as upstream:
        gate = target(upstream.url, upstream={"max_in_flight": 2})
        try:
            with ExitStack() as stack:
                for _ in range(100):
                    stack.enter_context(Line(gate)).send(query(fresh_id()))
                until(lambda: len(upstream.requests) == 2, "two are on their way")
                settle(gate)
            until(lambda: gate.metric("upstream_abandoned_total") == 98, "the others are dropped")
            assert len(upstream.requests) == 2
        finally:
            upstream_work.go.set()
        with Line(gate) as line:
            line.send(query("asked-after"))
            assert line.answer().status == 200
        assert len(upstream.requests) == 3
    assert upstream_work.most <= 2


def test_costs_of_queries_are_saved_although_their_clients_sent_more(target: Target) -> None:
    """A disconnect is noticed although the client has sent more than is read while it waits."""
    upstream_work = Counting()
    with RawUpstream(upstream_work) as upstream:
        gate = target(upstream.url, upstream={"max_in_flight": 1}, server={"header_seconds": 3})
        try:
            with ExitStack() as stack:
                for size in (40_000, 40_000, 50_000, 100_000, 500_000):
                    line = stack.enter_context(Line(gate))
                    line.send(query(fresh_id()))
                    line.offer((request("/openapi.json") * 20_000)[:size])
                until(lambda: len(upstream.requests) == 1, "one is on its way")
                settle(gate)
            until(lambda: gate.metric("upstream_abandoned_total") == 4, "the others are dropped")
            assert len(upstream.requests) == 1
        finally:
            upstream_work.go.set()


def test_costs_of_a_query_with_one_client_left_are_paid(target: Target) -> None:
    """A queued query is sent as long as one of its clients waits."""
    upstream_work = Counting()
    with RawUpstream(upstream_work) as upstream:
        gate = target(upstream.url, upstream={"max_in_flight": 1})
        try:
            with Line(gate) as first, Line(gate) as patient:
                first.send(query("first"))
                until(lambda: len(upstream.requests) == 1, "the first is on its way")
                with Line(gate) as leaving:
                    leaving.send(query("shared"))
                    settle(gate)
                    patient.send(query("shared"))
                    settle(gate)
                settle(gate)
                upstream_work.go.set()
                assert patient.answer().json["data"]["taskId"] == "shared"
        finally:
            upstream_work.go.set()


def test_costs_of_disconnecting_clients_stay_within_max_in_flight(target: Target) -> None:
    """From the upstream's view, never more than upstream.max_in_flight calls are in flight."""
    upstream_work = Counting(seconds=0.2)
    with RawUpstream(upstream_work) as upstream:
        gate = target(
            upstream.url,
            upstream={
                "max_in_flight": 4,
                "timeout_seconds": 0.6,
                "attempt_timeout_seconds": 30,  # longer than any call takes, even on a busy machine
                "retries": 0,
            },
        )
        with ExitStack() as stack:
            # Four times as many queries as the upstream can answer, and some clients disconnect.
            rounds = 0
            while rounds < 60:
                seen = len(upstream.requests)
                asking = [stack.enter_context(Line(gate)) for _ in range(4)]
                for line in asking:
                    line.send(query(fresh_id()))
                settle(gate)
                asking[rounds % 4].socket.close()
                # On a busy machine, all queries of a round can reach their deadline before their call.
                until(
                    lambda seen=seen: len(upstream.requests) > seen or gate.metric("upstream_in_flight") == 0,
                    "upstream is asked, or nothing waits for a slot",
                )
                rounds += len(upstream.requests) > seen
            until(lambda: gate.metric("upstream_in_flight") == 0, "all is answered or given up")
    assert upstream_work.most <= 4


def test_costs_of_a_bare_403_are_one_tasks(target: Target, simulator: Simulator) -> None:
    """A refusal that does not name the credentials affects its own task only."""
    refused, fine = simulator.task(), simulator.task()
    simulator.fault("status", status=403, taskId=refused)
    gate = target()
    assert gate.get(refused).status_code == 502
    for _ in range(3):
        assert gate.get(fine).status_code == 200
    assert gate.get(simulator.task()).status_code == 200


def test_costs_of_a_refusal_that_names_the_key_are_everyones(target: Target, simulator: Simulator) -> None:
    """A refusal of the access key pauses the key pair: no other task is queried with it."""
    refused, other = simulator.task(), simulator.task()
    simulator.fault("refuse", code="A403IK", message="Invalid AppKey")
    gate = target()
    assert gate.get(refused).json()["code"] == "upstream-credentials"
    calls = simulator.calls()
    assert gate.get(other).json()["code"] == "upstream-credentials"
    assert simulator.calls() == calls


# Browsers


@pytest.mark.parametrize("path", ["/v1/progress/own", "/v1/progress?taskId=own", "/v1/events?taskId=own"])
def test_costs_of_another_sites_page_are_nothing(target: Target, simulator: Simulator, path: str) -> None:
    """A page of another site cannot make its reader's browser query the gateway."""
    simulator.task("own")
    gate = target(server={"cors_origins": ["https://studio.example.com"]})
    for fields in (
        ("Sec-Fetch-Site: cross-site",),
        ("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors", "Sec-Fetch-Dest: image"),
        ("Sec-Fetch-Site: cross-site", "Origin: https://evil.example"),
        ("sec-fetch-site:cross-site", "Origin: null"),
    ):
        with Line(gate) as line:
            line.send(request(path, *fields))
            answer = line.answer()
            assert (answer.status, answer.code) == (403, "cross-site-request")
    assert simulator.calls() == 0


def test_costs_of_another_sites_page_are_nothing_when_cached(target: Target, simulator: Simulator) -> None:
    """A hit is refused to the page of another site as well, as is a vendor-compatible query."""
    simulator.task("own")
    gate = target()
    with Line(gate) as line:
        for _ in range(2):
            line.send(request("/v1/progress/own"))
            assert line.answer().status == 200
        for _ in range(2):
            line.send(request("/v1/progress/own", "Sec-Fetch-Site: cross-site"))
            assert line.answer().status == 403
        line.send(request("/v1/progress/own"))
        assert line.answer().status == 200
        line.send(query("own", "Sec-Fetch-Site: cross-site", "Content-Type: text/plain"))
        assert line.answer().status == 403


@pytest.mark.parametrize(
    "fields",
    [
        ("Sec-Fetch-Site: cross-site", "Origin: https://studio.example.com"),
        ("Sec-Fetch-Site: same-origin",),
        ("Sec-Fetch-Site: same-site",),
        ("Sec-Fetch-Site: none",),
        (),
    ],
)
def test_costs_of_pages_that_are_allowed(
    target: Target, simulator: Simulator, fields: tuple[str, ...]
) -> None:
    """Pages of an origin that CORS allows, our own pages, typed addresses and programs are answered."""
    simulator.task("own")
    gate = target(server={"cors_origins": ["https://studio.example.com"]})
    with Line(gate) as line:
        for _ in range(2):
            line.send(request("/v1/progress/own", *fields))
            assert line.answer().status == 200


def test_costs_of_a_link_to_the_page_are_nothing(target: Target) -> None:
    """A link on another site may lead to the web page, which alone causes no query."""
    with Line(target()) as line:
        line.send(
            request("/", "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document")
        )
        assert line.answer().status == 200


@pytest.mark.parametrize(
    ("target_form", "host", "status"),
    [
        ("/v1/progress/own", "attacker.example", 400),
        ("/v1/progress/own", "attacker.example:8080", 400),
        ("http://attacker.example/v1/progress/own", "attacker.example", 400),
        ("http://attacker.example/v1/progress/own", "127.0.0.1", 400),
        ("/v1/progress/own", "127.0.0.1.attacker.example", 400),
        ("/v1/progress/own", "localhost.attacker.example", 400),
        ("/v1/progress/own", "localhost", 200),
        ("/v1/progress/own", "127.0.0.1:8080", 200),
        ("/v1/progress/own", "[::1]:8080", 200),
        ("/v1/progress/own", "LOCALHOST", 200),
    ],
)
def test_costs_of_a_rebound_name_are_nothing(
    target: Target, simulator: Simulator, target_form: str, host: str, status: int
) -> None:
    """A gateway on loopback accepts only the host names of loopback, by default."""
    simulator.task("own")
    gate = target(server={"trusted_hosts": []})
    assert gate.get("own").status_code == 200
    calls = simulator.calls()
    with Line(gate) as line:
        line.send(request(target_form, host=host))
        assert line.answer().status == status
    if status == 400:
        assert simulator.calls() == calls


# Bodies


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "GZIP", "x-gzip", "identity, gzip"])
def test_costs_of_compressed_bodies_are_nothing(target: Target, simulator: Simulator, coding: str) -> None:
    """A compressed body is not decompressed: 415, in the vendor's envelope."""
    body = gzip.compress(json.dumps({"taskId": "own"}).encode())
    with Line(target()) as line:
        line.send(query("own", f"Content-Encoding: {coding}", body=body))
        answer = line.answer()
    assert (answer.status, answer.code) == (415, "unsupported-media-type")
    assert simulator.calls() == 0


@pytest.mark.parametrize("fields", [(), ("Content-Encoding: identity",)])
def test_costs_of_a_byte_order_mark_are_nothing(
    target: Target, simulator: Simulator, fields: tuple[str, ...]
) -> None:
    """A byte order mark before the JSON is skipped."""
    simulator.task("own")
    with Line(target()) as line:
        line.send(query("own", *fields, body=b"\xef\xbb\xbf" + b'{"taskId": "own"}'))
        assert line.answer().json["data"]["taskId"] == "own"


# Headers


def _asked(task: str) -> dict[str, bytes]:
    return {
        "hit": request(f"/v1/progress/{task}"),
        "304": request(f"/v1/progress/{task}", "If-None-Match: *"),
        "head": request(f"/v1/progress/{task}", method="HEAD"),
        "drop-in": query(task),
        "batch": request(f"/v1/progress?taskId={task}"),
        "page": request("/"),
        "docs": request("/docs"),
        "openapi": request("/openapi.json"),
        "healthz": request("/healthz"),
        "readyz": request("/readyz"),
        "metrics": request("/metrics"),
        "404": request("/nothing"),
        "405": request("/v1/progress/x", method="PUT"),
        "400": request("/v1/progress/no!"),
        "413": query("x", body=bytes(70_000)),
        "403": request(f"/v1/progress/{task}", "Sec-Fetch-Site: cross-site"),
        "broken": b"garbage\r\n\r\n",
        "no host": request(host=None),
        "431": request("/", *[b"a:"] * 500),
        "10": request("/healthz", version="1.0"),
    }


@pytest.mark.parametrize("kind", _asked(""))
def test_costs_of_answers_in_other_pages_are_nothing(target: Target, simulator: Simulator, kind: str) -> None:
    """Every response, including the server's own, forbids sniffing and embedding by other sites."""
    task = simulator.task()
    with Line(target()) as line:
        line.send(request(f"/v1/progress/{task}"))
        line.answer()
        asked = _asked(task)[kind]
        line.send(asked)
        answer = line.answer("HEAD" if kind == "head" else "GET")
    for name, value in SECURITY_HEADERS.items():
        assert answer.header(name) == value


def test_costs_of_streams_in_other_pages_are_nothing(target: Target, simulator: Simulator) -> None:
    """So does a stream, and the refusal of a connection."""
    task = simulator.task()
    gate: Gateway = target(server={"max_connections": 8})
    with Line(gate) as line:
        line.send(request(f"/v1/events?taskId={task}"))
        head = line.until(b"\r\n\r\n").partition(b"\r\n\r\n")[0].decode().lower().split("\r\n")
    for name, value in SECURITY_HEADERS.items():
        assert f"{name}: {value}" in head
