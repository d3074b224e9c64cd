"""Long polls of GET /v1/progress/{taskId}: `?wait=` and `Prefer: wait`."""

import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import pytest

from tests.harness import Gateway, RawUpstream, Request, Simulator, framed, until

QUICK = {"running_seconds": 0.1, "stale_while_revalidate_seconds": 0.2, "error_seconds": 0.1}
Launch = Callable[..., Gateway]


def polled(pool: ThreadPoolExecutor, gate: Gateway, task: str, **more: object) -> Future[httpx.Response]:
    """Begin a long poll; return once the gateway has it."""
    poll = pool.submit(gate.get, task, **more)
    until(lambda: gate.metric("watchers", kind="longpoll") == 1 or poll.done(), "the poll waits")
    return poll


def test_longpoll_waits_for_the_change(simulator: Simulator, launch: Launch) -> None:
    """With If-None-Match the answer waits until the representation differs."""
    gate = launch(simulator.url, cache=QUICK)
    task = simulator.task(data={"status": "running", "progress": 0.25})
    etag = gate.get(task).headers["etag"]
    with ThreadPoolExecutor() as pool:
        poll = polled(pool, gate, task, params={"wait": "20"}, headers={"If-None-Match": etag})
        assert not poll.done()
        simulator.script(task, status="running", progress=0.5)
        answer = poll.result()
    assert (answer.status_code, answer.json()["progress"]) == (200, 0.5)
    assert answer.headers["etag"] != etag


def test_longpoll_without_etag_waits_for_what_differs_from_arrival(
    simulator: Simulator, launch: Launch
) -> None:
    """Without If-None-Match it waits until the task differs from what was known on arrival."""
    gate = launch(simulator.url, cache=QUICK | {"stale_while_revalidate_seconds": 60})
    task = simulator.task(data={"status": "running", "progress": 0.25})
    gate.get(task)
    with ThreadPoolExecutor() as pool:
        poll = polled(pool, gate, task, params={"wait": "20"})
        simulator.script(task, status="running", progress=0.5)
        assert poll.result().json()["progress"] == 0.5


def test_longpoll_of_an_unknown_task_answers_at_once(simulator: Simulator, gate: Gateway) -> None:
    """Of a task that nobody asked for yet, the first snapshot is news."""
    task = simulator.task(data={"status": "running", "progress": 0.25})
    assert gate.get(task, params={"wait": "20"}).json()["progress"] == 0.25


def test_longpoll_ends_with_304_when_nothing_changes(simulator: Simulator, launch: Launch) -> None:
    """When the time has passed without a change, the answer is 304."""
    gate = launch(simulator.url, cache=QUICK)
    task = simulator.task(data={"status": "running", "progress": 0.25})
    etag = gate.get(task).headers["etag"]
    answer = gate.get(task, params={"wait": "0.3"}, headers={"If-None-Match": etag})
    assert (answer.status_code, answer.content) == (304, b"")


def test_longpoll_keeps_the_freshness_promise_when_its_time_has_passed(launch: Launch) -> None:
    """With an answer too old to show and the next one still under way, a long poll waits like any query."""
    asked, released = threading.Event(), threading.Event()
    answers = iter([0.25, 0.5])

    def held(connection: socket.socket, request: Request) -> None:
        progress = next(answers)
        if progress > 0.25:
            asked.set()
            released.wait(30)
        connection.sendall(framed(request.envelope(progress=progress)))

    never_shown_again = {"running_seconds": 0, "stale_while_revalidate_seconds": 0}
    with RawUpstream(held) as upstream, ThreadPoolExecutor() as pool:
        gate = launch(upstream.url, cache=never_shown_again)
        etag = gate.get("a").headers["etag"]
        # Not `polled`: a watcher that stays for so short a time may never be seen.
        poll = pool.submit(gate.get, "a", params={"wait": "0.1"}, headers={"If-None-Match": etag})
        assert asked.wait(30)
        until(lambda: gate.metric("watchers", kind="longpoll") == 0, "its time has passed")
        released.set()
        answer = poll.result()
    assert (answer.status_code, answer.headers["age"]) == (200, "0")
    assert answer.json()["progress"] == 0.5


def test_longpoll_of_an_ended_task_does_not_wait(simulator: Simulator, gate: Gateway) -> None:
    """A terminal task changes no more: the answer comes at once, 304 to those who know it."""
    task = simulator.finished()
    first = gate.get(task, params={"wait": "60"})
    assert first.json()["terminal"] is True
    assert gate.get(task, params={"wait": "60"}).status_code == 200
    known = gate.get(task, params={"wait": "60"}, headers={"If-None-Match": first.headers["etag"]})
    assert known.status_code == 304


def test_longpoll_preference_is_applied_and_told(simulator: Simulator, launch: Launch) -> None:
    """`Prefer: wait` is a long poll, bounded by the settings; the answer says what was granted."""
    gate = launch(simulator.url, cache=QUICK, watch={"max_wait_seconds": 1})
    task = simulator.task(data={"status": "running", "progress": 0.25})
    etag = gate.get(task).headers["etag"]
    headers = {"If-None-Match": etag, "Prefer": "respond-async, wait=300"}
    answer = gate.get(task, headers=headers)
    assert answer.status_code == 304
    assert answer.headers["preference-applied"] == "wait=1"
    assert answer.headers["vary"] == "Prefer"
    odd = gate.get(task, headers={"Prefer": "wait=soon"})
    assert odd.status_code == 200
    assert "preference-applied" not in odd.headers


def test_longpoll_failure_is_a_problem(gate: Gateway) -> None:
    """When the task cannot be read, a long poll does not wait for that to pass."""
    answer = gate.get("nobody", params={"wait": "20"})
    assert (answer.status_code, answer.json()["code"]) == (502, "upstream-rejected")


@pytest.mark.parametrize(
    "wait", ["-1", "+1", "soon", "", "1e3", "NaN", "inf", "1 ", "1_0", "\u0663", "1.\u0665", "\uff11"]
)
def test_longpoll_refuses_a_wait_that_is_no_number(gate: Gateway, wait: str) -> None:
    """A `wait` that is not a number of seconds is named as wrong."""
    answer = gate.get("a", params={"wait": wait})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid-parameter")
    assert "wait" in answer.json()["detail"]


def test_longpoll_hung_up_stops_watching(simulator: Simulator, launch: Launch) -> None:
    """A caller that hangs up while it waits leaves no watcher behind."""
    gate = launch(simulator.url, cache={"running_seconds": 600})  # what it knows stays known
    task = simulator.task(data={"status": "running", "progress": 0.25})
    gate.get(task)
    with gate.connect() as connection:
        connection.sendall(b"GET /v1/progress/%s?wait=60 HTTP/1.1\r\nhost: x\r\n\r\n" % task.encode())
        until(lambda: gate.metric("watchers", kind="longpoll") == 1, "it waits")
    until(lambda: gate.metric("watchers", kind="longpoll") == 0, "it is forgotten")
    until(lambda: gate.metric("http_requests_total", status="499") == 1, "it is counted")


def lookups(gate: Gateway) -> float:
    """Return how many lookups were counted."""
    return gate.metric("cache_lookups_total")


def test_longpoll_is_one_lookup(simulator: Simulator, launch: Launch) -> None:
    """However a long poll ends, and however long it waits, it counts as one lookup."""
    gate = launch(simulator.url, cache=QUICK)
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
        until(lambda: simulator.calls(task) >= 5, "the schedule ticks")
        simulator.script(task, status="running", progress=0.5)
        assert poll.result().status_code == 200
    assert lookups(gate) == 6


def test_longpoll_causes_no_call_beyond_its_schedule(simulator: Simulator, launch: Launch) -> None:
    """Long polls of a fresh snapshot make it no hot one: when they have left nothing is asked any more."""
    gate = launch(simulator.url, cache={"running_seconds": 0.5, "stale_while_revalidate_seconds": 60})
    task = simulator.task(data={"status": "running", "progress": 0.25})
    gate.get(task)
    for _ in range(5):
        assert gate.get(task, params={"wait": "0.01"}).status_code == 200
    # Two lifetimes pass by the upstream's own account of another task's watch.
    other = simulator.task(data={"status": "running", "progress": 0.1})
    with gate.client.stream("GET", f"/v1/progress/{other}/events"):
        until(lambda: simulator.calls(other) >= 3, "other watches go on")
    assert simulator.calls(task) == 1


def test_longpoll_of_a_failing_task_asks_once(simulator: Simulator, launch: Launch) -> None:
    """The failure that the schedule met with is the answer: it is not asked for again."""
    gate = launch(simulator.url, cache=QUICK | {"error_seconds": 0}, upstream={"retries": 0})
    answer = gate.get("nobody", params={"wait": "20"})
    assert (answer.status_code, answer.json()["code"]) == (502, "upstream-rejected")
    assert simulator.calls("nobody") == 1
