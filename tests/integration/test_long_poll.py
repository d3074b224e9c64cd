"""Long polls of GET /v1/progress/{taskId}: `?wait=` and `Prefer: wait`."""

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest

from tests.support.harness import Gateway, RawUpstream, Request, Simulator, framed, until

QUICK = {"running_seconds": 0.1, "stale_while_revalidate_seconds": 0.2, "error_seconds": 0.1}
Launch = Callable[..., Gateway]


def polled(pool: ThreadPoolExecutor, gate: Gateway, task: str, **more: object) -> Future[httpx.Response]:
    """Start a long poll; return when the gateway has received it."""
    poll = pool.submit(gate.get, task, **more)
    until(lambda: gate.metric("watchers", kind="longpoll") == 1 or poll.done(), "the poll waits")
    return poll


def test_longpoll_waits_for_the_change(simulator: Simulator, launch: Launch) -> None:
    """With If-None-Match the response waits until the representation differs."""
    gate = launch(simulator.url, cache=QUICK)
    task = simulator.task(data={"status": "running", "progress": 0.25})
    etag = gate.get(task).headers["etag"]
    with ThreadPoolExecutor() as pool:
        poll = polled(pool, gate, task, params={"wait": "20"}, headers={"If-None-Match": etag})
        assert not poll.done()
        simulator.script(task, status="running", progress=0.5)
        response = poll.result()
    assert (response.status_code, response.json()["progress"]) == (200, 0.5)
    assert response.headers["etag"] != etag


def test_longpoll_without_etag_waits_for_what_differs_from_arrival(
    simulator: Simulator, launch: Launch
) -> None:
    """Without If-None-Match it waits until the task differs from the snapshot cached on arrival."""
    gate = launch(simulator.url, cache=QUICK | {"stale_while_revalidate_seconds": 60})
    task = simulator.task(data={"status": "running", "progress": 0.25})
    gate.get(task)
    with ThreadPoolExecutor() as pool:
        poll = polled(pool, gate, task, params={"wait": "20"})
        simulator.script(task, status="running", progress=0.5)
        assert poll.result().json()["progress"] == 0.5


def test_longpoll_of_an_uncached_task_does_not_wait(simulator: Simulator, gate: Gateway) -> None:
    """For a task that is not cached, the first snapshot is a change."""
    task = simulator.task(data={"status": "running", "progress": 0.25})
    assert gate.get(task, params={"wait": "20"}).json()["progress"] == 0.25


def test_longpoll_ends_with_304_when_nothing_changes(simulator: Simulator, launch: Launch) -> None:
    """When the time is up without a change, the response is 304. A shorter limit of the settings counts."""
    gate = launch(simulator.url, cache=QUICK, watch={"max_wait_seconds": 0.3})
    task = simulator.task(data={"status": "running", "progress": 0.25})
    etag = gate.get(task).headers["etag"]
    response = gate.get(task, params={"wait": "1"}, headers={"If-None-Match": etag})
    assert (response.status_code, response.content) == (304, b"")


def test_longpoll_returns_nothing_too_old_when_its_time_is_up(launch: Launch) -> None:
    """If the snapshot is too old and a refresh is in flight, a long poll waits for it like any query."""
    asked, released = threading.Event(), threading.Event()
    responses = iter([0.25, 0.5])

    def delayed(connection: socket.socket, request: Request) -> None:
        progress = next(responses)
        if progress > 0.25:
            asked.set()
            released.wait(30)
        connection.sendall(framed(request.envelope(progress=progress)))

    never_fresh = {"running_seconds": 0, "stale_while_revalidate_seconds": 0}
    with RawUpstream(delayed) as upstream, ThreadPoolExecutor() as pool:
        gate = launch(upstream.url, cache=never_fresh, watch={"max_wait_seconds": 0.1})
        etag = gate.get("a").headers["etag"]
        # Not `polled`: the gauge may miss such a short subscription.
        poll = pool.submit(gate.get, "a", params={"wait": "1"}, headers={"If-None-Match": etag})
        assert asked.wait(30)
        until(lambda: gate.metric("watchers", kind="longpoll") == 0, "its time is up")
        released.set()
        response = poll.result()
    assert (response.status_code, response.headers["age"]) == (200, "0")
    assert response.json()["progress"] == 0.5


def test_longpoll_has_a_route_of_its_own_in_metrics(simulator: Simulator, launch: Launch) -> None:
    """Durations of long polls are recorded separately from those of other requests."""
    gate = launch(simulator.url, cache=QUICK, watch={"max_wait_seconds": 0.5})
    task = simulator.task(data={"status": "running", "progress": 0.25})
    etag = gate.get(task).headers["etag"]
    gate.get(task, params={"wait": "0"})
    gate.get(task, params={"wait": "1"}, headers={"If-None-Match": etag})
    gate.get(task, headers={"If-None-Match": etag, "Prefer": "wait=1"})
    assert gate.get(task, params={"wait": "soon"}).status_code == 400
    route = "/v1/progress/{taskId}"
    assert gate.metric("http_requests_total", route=route) == 3
    assert gate.metric("http_requests_total", route=f"{route}?wait", status="304") == 2
    assert gate.metric("http_request_duration_seconds_sum", route=f"{route}?wait") >= 1
    assert gate.metric("http_request_duration_seconds_bucket", route=f"{route}?wait", le="0.25") == 0


def test_longpoll_of_an_ended_task_does_not_wait(simulator: Simulator, gate: Gateway) -> None:
    """A terminal task does not change: the response is immediate, and 304 if the client has it."""
    task = simulator.finished()
    first = gate.get(task, params={"wait": "60"})
    assert first.json()["terminal"] is True
    assert gate.get(task, params={"wait": "60"}).status_code == 200
    known = gate.get(task, params={"wait": "60"}, headers={"If-None-Match": first.headers["etag"]})
    assert known.status_code == 304


def test_longpoll_preference_is_applied_and_confirmed(simulator: Simulator, launch: Launch) -> None:
    """`Prefer: wait` is a long poll, bounded by the settings; the response confirms the applied wait."""
    gate = launch(simulator.url, cache=QUICK, watch={"max_wait_seconds": 1})
    task = simulator.task(data={"status": "running", "progress": 0.25})
    etag = gate.get(task).headers["etag"]
    headers = {"If-None-Match": etag, "Prefer": "respond-async, wait=300"}
    response = gate.get(task, headers=headers)
    assert response.status_code == 304
    assert response.headers["preference-applied"] == "wait=1"
    assert response.headers["vary"] == "Prefer"
    odd = gate.get(task, headers={"Prefer": "wait=soon"})
    assert odd.status_code == 200
    assert "preference-applied" not in odd.headers


def test_longpoll_failure_is_a_problem(simulator: Simulator, launch: Launch) -> None:
    """A failure that is no rejection ends the long poll at once, and the task is not fetched again."""
    gate = launch(simulator.url, cache=QUICK | {"error_seconds": 0}, upstream={"retries": 0})
    simulator.fault("body", body="nonsense")
    response = gate.get("missing", params={"wait": "20"})
    assert (response.status_code, response.json()["code"]) == (502, "upstream-invalid")
    assert simulator.calls("missing") == 1


@pytest.mark.parametrize("known", [True, False], ids=["watched", "unwatched"])
def test_longpoll_waits_for_a_new_task(simulator: Simulator, launch: Launch, *, known: bool) -> None:
    """A task that the upstream does not know yet is awaited, also if another client watches it already."""
    gate = launch(simulator.url, cache=QUICK)
    with ThreadPoolExecutor() as pool, ExitStack() as stack:
        if known:
            stream = stack.enter_context(gate.client.stream("GET", "/v1/progress/new/events"))
            assert any("event: problem" in line for line in stream.iter_lines())
        poll = polled(pool, gate, "new", params={"wait": "20"})
        until(lambda: simulator.calls("new") >= 1, "the upstream is asked")
        assert not poll.done()
        simulator.script("new", status="running", progress=0.5)
        response = poll.result()
    assert (response.status_code, response.json()["progress"]) == (200, 0.5)
    assert simulator.calls("new") <= 4


def test_longpoll_says_when_a_task_stays_unknown(simulator: Simulator, launch: Launch) -> None:
    """After `watch.unknown_task_seconds` the rejection is the response; the upstream is asked a few times."""
    gate = launch(simulator.url, cache=QUICK, watch={"unknown_task_seconds": 1.5})
    began = time.monotonic()
    response = gate.get("missing", params={"wait": "60"})
    assert 1.5 <= time.monotonic() - began < 30
    assert (response.status_code, response.json()["code"]) == (502, "upstream-rejected")
    assert simulator.calls("missing") == 3  # at once, after a second, and at the end
    assert gate.metric("cache_lookups_total", result="negative") == 1


def test_longpoll_says_at_its_end_that_a_task_is_unknown(simulator: Simulator, launch: Launch) -> None:
    """A poll that is shorter than `watch.unknown_task_seconds` ends with the rejection, without a call."""
    gate = launch(simulator.url, cache=QUICK, watch={"max_wait_seconds": 0.5})
    response = gate.get("missing", params={"wait": "1"})
    assert (response.status_code, response.json()["code"]) == (502, "upstream-rejected")
    assert simulator.calls("missing") == 1


@pytest.mark.parametrize(
    "wait",
    ["-1", "+1", "soon", "", "0.5", "1.", "1e3", "NaN", "inf", "1 ", "1_0", "\u0663", "1.\u0665", "\uff11"],
)
def test_longpoll_refuses_an_invalid_wait(gate: Gateway, wait: str) -> None:
    """A `wait` that is not a whole number of seconds is an error that names the parameter."""
    response = gate.get("a", params={"wait": wait})
    assert (response.status_code, response.json()["code"]) == (400, "invalid-parameter")
    assert "wait" in response.json()["detail"]


@pytest.mark.parametrize("wait", ["1", "999999999", "1234567890", "0" * 30 + "1", "9" * 5000])
def test_longpoll_waits_no_longer_than_the_settings_allow(
    simulator: Simulator, launch: Launch, wait: str
) -> None:
    """A number of any length is limited to `watch.max_wait_seconds`, in the query and in `Prefer`."""
    gate = launch(simulator.url, cache=QUICK, watch={"max_wait_seconds": 0.1})
    task = simulator.task(data={"status": "running", "progress": 0.25})
    etag = {"If-None-Match": gate.get(task).headers["etag"]}
    assert gate.get(task, params={"wait": wait}, headers=etag).status_code == 304
    preferred = gate.get(task, headers=etag | {"Prefer": f"wait={wait}"})
    assert (preferred.status_code, preferred.headers["preference-applied"]) == (304, "wait=0")


@pytest.mark.parametrize(
    ("prefer", "applied"),
    [
        ("wait=1", True),
        ('WAIT = "1"', True),
        ("wait=1; foo, respond-async", True),
        ("return=minimal; x=y,, wait=1", True),
        ('foo="a,b\\",c", wait=1', True),
        ('foo=bar; p="x,wait=1"; q, wait=1', True),
        ("wait=1, wait=soon", True),
        ('foo="a,wait=3"', False),
        ('foo="a\\",wait=3"', False),
        ('foo; p="a,wait=3"', False),
        ('foo="a, wait=3', False),
        ("wait=soon, wait=3", False),
        ("wait", False),
        ("wait=-1", False),
        ("wait=1.5", False),
        ("await=3", False),
        (", " * 10_000 + "a, " * 40 + "wait=3", False),
    ],
)
def test_longpoll_preference_is_read_by_the_grammar(
    simulator: Simulator, launch: Launch, prefer: str, *, applied: bool
) -> None:
    """RFC 7240: a comma in a quoted string separates nothing, the first `wait` counts, others are ignored."""
    gate = launch(simulator.url, cache=QUICK, watch={"max_wait_seconds": 0.1})
    task = simulator.finished()
    response = gate.get(task, headers={"Prefer": prefer})
    assert ("preference-applied" in response.headers) is applied


def test_longpoll_disconnect_ends_the_subscription(simulator: Simulator, launch: Launch) -> None:
    """A client that disconnects while it waits leaves no subscriber behind."""
    gate = launch(simulator.url, cache={"running_seconds": 600})  # the snapshot stays fresh
    task = simulator.task(data={"status": "running", "progress": 0.25})
    gate.get(task)
    with gate.connect() as connection:
        connection.sendall(b"GET /v1/progress/%s?wait=60 HTTP/1.1\r\nhost: x\r\n\r\n" % task.encode())
        until(lambda: gate.metric("watchers", kind="longpoll") == 1, "it waits")
    until(lambda: gate.metric("watchers", kind="longpoll") == 0, "the subscription is closed")
    until(lambda: gate.metric("http_requests_total", status="499") == 1, "it is counted")


def lookups(gate: Gateway) -> float:
    """Return the number of counted lookups."""
    return gate.metric("cache_lookups_total")


def test_longpoll_is_one_lookup(simulator: Simulator, launch: Launch) -> None:
    """A long poll counts as one lookup, whatever its duration and result."""
    gate = launch(simulator.url, cache=QUICK, watch={"unknown_task_seconds": 0})
    new = simulator.task(data={"status": "running", "progress": 0.25})
    assert gate.get(new, params={"wait": "20"}).status_code == 200
    assert (lookups(gate), gate.metric("cache_lookups_total", result="miss")) == (1, 1)
    assert gate.get("unknown", params={"wait": "20"}).status_code == 502
    assert lookups(gate) == 2
    done = simulator.finished()
    for number in (3, 4):
        assert gate.get(done, params={"wait": "20"}).status_code == 200
        assert lookups(gate) == number
    with ThreadPoolExecutor() as pool:
        task = simulator.task(data={"status": "running", "progress": 0.25})
        etag = gate.get(task).headers["etag"]
        assert lookups(gate) == 5
        poll = polled(pool, gate, task, params={"wait": "60"}, headers={"If-None-Match": etag})
        until(lambda: simulator.calls(task) >= 5, "the schedule refreshes")
        simulator.script(task, status="running", progress=0.5)
        assert poll.result().status_code == 200
    assert lookups(gate) == 6


def test_longpoll_causes_no_call_beyond_its_schedule(simulator: Simulator, launch: Launch) -> None:
    """Long polls do not trigger refresh-ahead: no upstream call is made after they have left."""
    cache = {"running_seconds": 0.5, "stale_while_revalidate_seconds": 60}
    gate = launch(simulator.url, cache=cache, watch={"max_wait_seconds": 0.01})
    task = simulator.task(data={"status": "running", "progress": 0.25})
    gate.get(task)
    for _ in range(5):
        assert gate.get(task, params={"wait": "1"}).status_code == 200
    # Wait for two lifetimes, measured by the upstream's calls for another task.
    other = simulator.task(data={"status": "running", "progress": 0.1})
    with gate.client.stream("GET", f"/v1/progress/{other}/events"):
        until(lambda: simulator.calls(other) >= 3, "the other task is refreshed")
    assert simulator.calls(task) == 1


def test_longpoll_of_a_failing_task_makes_one_call(simulator: Simulator, launch: Launch) -> None:
    """The schedule's failure is the response; the task is not fetched again."""
    gate = launch(
        simulator.url,
        cache=QUICK | {"error_seconds": 0},
        upstream={"retries": 0},
        watch={"unknown_task_seconds": 0},
    )
    response = gate.get("missing", params={"wait": "20"})
    assert (response.status_code, response.json()["code"]) == (502, "upstream-rejected")
    assert simulator.calls("missing") == 1
