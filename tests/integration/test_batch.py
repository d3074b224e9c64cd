"""GET /v1/progress?taskId=A&taskId=B: many tasks in one response."""

import gc
import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from gateway.domain.entity_tag import EntityTags, digest_of
from gateway.domain.snapshot import Snapshot, version_now
from gateway.domain.task import Operation, TaskKey
from tests.support.harness import PATIENCE_SECONDS, SECRET, Gateway, Simulator, until

QUICK = {"running_seconds": 0.1, "stale_while_revalidate_seconds": 0.2, "error_seconds": 0.1}
Launch = Callable[..., Gateway]


def test_batch_keeps_order_and_removes_duplicates(simulator: Simulator, gate: Gateway) -> None:
    """Items are in the order of the query, each task once, with the body of a single query."""
    tasks = [simulator.task(data={"status": "running", "progress": n / 4, "etaRelative": n}) for n in (2, 1)]
    response = gate.client.get("/v1/progress", params={"taskId": [*tasks, tasks[0]]})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert [item["taskId"] for item in body["items"]] == tasks
    for item in body["items"]:
        assert 0 <= item.pop("ageSeconds") < PATIENCE_SECONDS
        assert item.pop("stale") is None
    assert body["items"] == [gate.get(task).json() for task in tasks]
    assert body["summary"] == {
        "total": 2,
        "waiting": 0,
        "running": 2,
        "succeeded": 0,
        "failed": 0,
        "canceled": 0,
        "unknown": 0,
        "errors": 0,
        "stale": 0,
        "progress": 0.375,
        "etaSeconds": 2.0,
        "terminal": False,
    }


def test_batch_failure_of_one_task_is_an_item(simulator: Simulator, gate: Gateway) -> None:
    """A failing task is an item with a problem; the response is 200 and counts it."""
    done = simulator.finished()
    body = gate.client.get("/v1/progress", params={"taskId": ["missing", done]}).json()
    problem = body["items"][0]["error"]
    assert body["items"][0]["taskId"] == "missing"
    assert (problem["status"], problem["code"]) == (502, "upstream-rejected")
    assert body["items"][1]["status"] == "succeeded"
    summary = body["summary"]
    assert (summary["total"], summary["errors"], summary["succeeded"]) == (2, 1, 1)
    assert (summary["progress"], summary["etaSeconds"], summary["terminal"]) == (1.0, None, False)


@pytest.mark.parametrize(
    ("etas", "expected"),
    [([], 0.0), ([0], None), ([0, 12.5], 12.5), ([30.5, 12.5], 30.5)],
    ids=["all-ended", "unknown", "one-unknown", "known"],
)
def test_batch_eta_is_that_of_the_tasks_that_have_not_ended(
    simulator: Simulator, gate: Gateway, etas: list[float], expected: float | None
) -> None:
    """An ended task does not hide that the time left of the others is unknown."""
    tasks = [simulator.finished()]
    for eta in etas:  # the vendor sends 0 for an unknown time
        tasks.append(simulator.task())
        simulator.script(tasks[-1], status="running", progress=0.5, etaRelative=eta)
    summary = gate.client.get("/v1/progress", params={"taskId": tasks}).json()["summary"]
    assert (summary["etaSeconds"], summary["terminal"]) == (expected, not etas)


def test_batch_of_failures_has_no_mean(gate: Gateway) -> None:
    """If all items failed, mean and maximum are null."""
    summary = gate.client.get("/v1/progress", params={"taskId": "missing"}).json()["summary"]
    assert (summary["progress"], summary["etaSeconds"], summary["errors"]) == (None, None, 1)


def test_batch_shares_cache_and_in_flight_requests(simulator: Simulator, gate: Gateway) -> None:
    """A batch makes one upstream call for each task that is not fresh, and none for fresh ones."""
    tasks = [simulator.finished() for _ in range(20)]
    gate.get(tasks[0])
    for _ in range(2):
        assert gate.client.get("/v1/progress", params={"taskId": tasks}).json()["summary"]["terminal"] is True
    assert simulator.calls() == 20


@pytest.mark.parametrize(
    ("query", "code", "named"),
    [
        ("", "invalid-parameter", "taskId"),
        ("?taskId=a&taskId=b%2Fc", "invalid-task-id", "'b/c' is not a task ID: a task ID is"),
        ("?taskId=a&taskId=" + "b" * 65, "invalid-task-id", "a text of 65 characters is not a task ID"),
        ("?taskId=a,b", "invalid-task-id", "for several tasks, repeat the parameter: ?taskId=A&taskId=B"),
        ("/a,b", "invalid-task-id", "'a,b' is not a task ID"),
        ("?taskId=a&colour=red", "invalid-parameter", "colour"),
        ("?taskId=a&api=sd&api=sd", "invalid-parameter", "api"),
        ("?taskId=a&wait=soon", "invalid-parameter", "wait"),
        ("?" + "&".join(f"taskId=t{number}" for number in range(101)), "invalid-parameter", "100"),
    ],
)
def test_batch_refuses_invalid_requests(
    simulator: Simulator, gate: Gateway, query: str, code: str, named: str
) -> None:
    """An invalid request is a problem that names the fault, without an upstream call."""
    response = gate.client.get(f"/v1/progress{query}")
    assert (response.status_code, response.json()["code"]) == (400, code)
    assert named in response.json()["detail"]
    assert simulator.calls() == 0


def test_batch_head_has_no_body(simulator: Simulator, gate: Gateway) -> None:
    """HEAD responds like GET, without the body."""
    response = gate.client.head("/v1/progress", params={"taskId": simulator.finished()})
    assert (response.status_code, response.content) == (200, b"")
    assert int(response.headers["content-length"]) > 0


# --- entity tags and long polls -----------------------------------------------------------------------------


def test_batch_answers_304_until_a_task_changes(simulator: Simulator, launch: Launch) -> None:
    """The weak tag changes with the progress or the problem of a task, and with nothing else."""
    gate = launch(simulator.url, cache=QUICK | {"stale_while_revalidate_seconds": 0})
    task = simulator.task(data={"status": "running", "progress": 0.25})
    query = {"taskId": ["missing", task]}
    tags = []
    for change in (
        None,
        lambda: simulator.script(task, status="running", progress=0.5),
        lambda: simulator.script("missing", status="waiting"),
    ):
        if change is not None:
            change()
            until(
                lambda: gate.client.get("/v1/progress", params=query).headers["etag"] != tags[-1], "a new tag"
            )
        first = gate.client.get("/v1/progress", params=query)
        tags.append(first.headers["etag"])
        assert tags[-1].startswith('W/"')
        for known in (
            tags[-1],
            tags[-1].removeprefix("W/"),
            f'"other", {tags[-1]}',
            tags[-1][:-1] + '-gzip"',
        ):
            again = gate.client.get("/v1/progress", params=query, headers={"if-none-match": known})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tags[-1]), known
        other = gate.client.get("/v1/progress", params=query, headers={"if-none-match": 'W/"other"'})
        assert other.status_code == 200
    assert len(set(tags)) == 3


@pytest.mark.parametrize("wait", [0, 60])
def test_batch_is_never_older_than_its_tag(wait: int, simulator: Simulator, gate: Gateway) -> None:
    """A tag from another replica names a newer version of one task: only this task is queried again.

    The replicas have the same secret key, and no store in common.
    """
    tasks = [simulator.task(data={"status": "running", "progress": 0.25}) for _ in range(2)]
    query: dict[str, Any] = {"taskId": tasks} | ({"wait": wait} if wait else {})
    first = gate.client.get("/v1/progress", params={"taskId": tasks})
    keys = [TaskKey(Operation.SD_GET_PROGRESS, task) for task in tasks]
    tags = EntityTags(lambda: SECRET)
    revisions = tags.revisions_of_batch(first.headers["etag"], keys)
    assert list(revisions) == keys
    newer = tags.issue_for_batch(digest_of(b"other"), revisions | {keys[1]: version_now() - 1})
    simulator.script(tasks[1], status="running", progress=0.5)
    calls = [simulator.calls(task) for task in tasks]
    second = gate.client.get("/v1/progress", params=query, headers={"if-none-match": newer})
    assert [item["progress"] for item in second.json()["items"]] == [0.25, 0.5]
    assert [simulator.calls(task) for task in tasks] == [calls[0], calls[1] + 1]


@pytest.mark.parametrize("with_tag", [True, False])
def test_batch_waits_for_the_change_of_a_task(
    simulator: Simulator, launch: Launch, *, with_tag: bool
) -> None:
    """A long poll of many tasks returns when one of them changes; only the schedules call the upstream."""
    gate = launch(simulator.url, cache=QUICK | {"running_seconds": 0.5})
    tasks = [simulator.task(data={"status": "running", "progress": n / 10}) for n in range(5)]
    first = gate.client.get("/v1/progress", params={"taskId": tasks})
    headers = {"if-none-match": first.headers["etag"]} if with_tag else {}
    with ThreadPoolExecutor() as pool:
        poll = pool.submit(
            gate.client.get, "/v1/progress", params={"taskId": tasks, "wait": "20"}, headers=headers
        )
        until(lambda: gate.metric("watchers", kind="longpoll") == 1 or poll.done(), "it waits")
        until(lambda: simulator.calls(tasks[0]) >= 2, "the schedules refresh")
        assert not poll.done()
        simulator.script(tasks[3], status="running", progress=0.9)
        response = poll.result()
    assert response.status_code == 200
    assert [item["progress"] for item in response.json()["items"]] == [0, 0.1, 0.2, 0.9, 0.4]
    assert gate.metric("cache_lookups_total") == 10


def test_batch_long_poll_does_not_keep_evicted_bodies(simulator: Simulator, launch: Launch) -> None:
    """The cache's limit in bytes bounds all bodies: a long poll keeps none that the cache has evicted."""
    gate = launch(simulator.url, cache={"max_tasks": 2, "running_seconds": 60})
    tasks = [simulator.task(data={"status": "running", "message": "large " * 5_000}) for _ in range(4)]
    gate.client.get("/v1/progress", params={"taskId": tasks[:2]})
    with gate.connect() as poll:
        query = "&".join(f"taskId={task}" for task in tasks[:2])
        poll.sendall(f"GET /v1/progress?{query}&wait=60 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        until(lambda: gate.metric("watchers") == 1, "it waits")
        until(lambda: _kept(tasks[0]), "it is cached")
        gate.client.get("/v1/progress", params={"taskId": tasks[2:]})
        until(lambda: not any(map(_kept, tasks[:2])), "no object has the evicted bodies")


def _kept(task: str) -> list[Snapshot]:
    """Return the snapshots of a task that exist in this process."""
    gc.collect()
    return [o for o in gc.get_objects() if isinstance(o, Snapshot) and o.key.task_id == task and o.body]


def test_batch_long_poll_for_any_tag_costs_little(
    simulator: Simulator, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`*` matches every representation, so it is not computed for each change of a task."""
    computed = 0

    def count(texts: Iterable[str]) -> str:
        nonlocal computed
        computed += 1
        return digest_of("".join(texts).encode())

    gate = launch(simulator.url, cache=QUICK)
    tasks = [simulator.task(life={"waitingSeconds": 0, "runningSeconds": 60}) for _ in range(3)]
    gate.client.get("/v1/progress", params={"taskId": tasks}).raise_for_status()
    monkeypatch.setattr("gateway.api.batch._digest", count)
    calls = simulator.calls()
    response = gate.client.get(
        "/v1/progress", params={"taskId": tasks, "wait": 2}, headers={"If-None-Match": "*"}
    )
    assert response.status_code == 304
    assert simulator.calls() > calls + 10, "the tasks have changed meanwhile"
    assert computed == 1


def test_batch_long_poll_ends_with_304(simulator: Simulator, launch: Launch) -> None:
    """Without a change the response is 304 at the end of the wait; `Prefer: wait` is confirmed."""
    gate = launch(simulator.url, cache=QUICK, watch={"max_wait_seconds": 1})
    query = {"taskId": [simulator.task(data={"status": "running", "progress": 0.5}), "missing"]}
    tag = gate.client.get("/v1/progress", params=query).headers["etag"]
    began = time.monotonic()
    headers = {"if-none-match": tag, "prefer": "wait=30"}
    response = gate.client.get("/v1/progress", params=query, headers=headers)
    assert time.monotonic() - began >= 1
    assert (response.status_code, response.headers["preference-applied"]) == (304, "wait=1")
    assert response.headers["cache-control"] == "no-store"
    until(lambda: gate.metric("http_requests_total", route="/v1/progress?wait") == 1, "it has its own route")


@pytest.mark.parametrize("seconds", [0, 1.5])
def test_batch_long_poll_of_ended_tasks_does_not_wait(
    simulator: Simulator, launch: Launch, seconds: float
) -> None:
    """If every task has ended or is unknown the response is immediate, even for a client that has it."""
    gate = launch(simulator.url, cache=QUICK, watch={"unknown_task_seconds": seconds})
    query = {"taskId": [simulator.finished(), "missing"], "wait": "60"}
    first = gate.client.get("/v1/progress", params=query)  # the rejection is new
    assert first.json()["items"][1]["error"]["code"] == "upstream-rejected"
    began = time.monotonic()
    again = gate.client.get("/v1/progress", params=query, headers={"if-none-match": first.headers["etag"]})
    assert again.status_code == 304
    assert seconds <= time.monotonic() - began < 30


def test_batch_long_poll_is_bounded_and_ends_with_its_client(simulator: Simulator, launch: Launch) -> None:
    """A long poll counts as a subscription, and leaves none behind when its client disconnects."""
    gate = launch(simulator.url, cache={"running_seconds": 600}, limits={"subscriptions_per_client": 1})
    task = simulator.task(data={"status": "running", "progress": 0.5})
    gate.get(task)
    with ExitStack() as stack:
        connection = stack.enter_context(gate.connect())
        connection.sendall(b"GET /v1/progress?taskId=%s&wait=60 HTTP/1.1\r\nhost: x\r\n\r\n" % task.encode())
        until(lambda: gate.metric("watchers", kind="longpoll") == 1, "it waits")
        assert gate.client.get("/v1/progress", params={"taskId": task, "wait": "1"}).status_code == 429
    until(lambda: gate.metric("watchers", kind="longpoll") == 0, "the subscription is closed")
    until(lambda: gate.metric("http_requests_total", status="499") == 1, "it is counted")


def test_batch_of_cached_tasks_reaches_a_half_closed_client(simulator: Simulator, launch: Launch) -> None:
    """As a single cached task does: the client may send, close its side, and read."""
    gate = launch(simulator.url, cache={"running_seconds": 600})
    task = simulator.task(data={"status": "running", "progress": 0.5})
    gate.get(task)
    with gate.connect() as connection:
        connection.sendall(b"GET /v1/progress?taskId=%s HTTP/1.1\r\nhost: x\r\n\r\n" % task.encode())
        connection.shutdown(socket.SHUT_WR)
        response = b"".join(iter(lambda: connection.recv(65536), b""))
    assert response.startswith(b"HTTP/1.1 200 ")
    assert b'"progress":0.5' in response


def test_batch_ages_are_those_of_the_response(simulator: Simulator, launch: Launch) -> None:
    """The age of a cached task includes the time that the query of another task takes."""
    gate = launch(simulator.url, cache={"running_seconds": 600})
    cached, slow = (simulator.task(data={"status": "running", "progress": 0.5}) for _ in range(2))
    gate.get(cached)
    simulator.fault("slow", seconds=0.7)
    response = gate.client.get("/v1/progress", params={"taskId": [cached, slow]})
    assert response.json()["items"][0]["ageSeconds"] >= 0.7


def test_batch_shows_the_snapshot_that_was_stored_during_its_query(
    simulator: Simulator, launch: Launch
) -> None:
    """A cached task whose refresh ends before the query of another task is shown with the newer snapshot."""
    gate = launch(simulator.url, cache={"running_seconds": 0.1, "stale_while_revalidate_seconds": 60})
    cached, slow = (simulator.task(data={"status": "running", "progress": 0.5}) for _ in range(2))
    gate.get(cached)
    time.sleep(0.1)
    simulator.script(cached, status="running", progress=0.75)
    simulator.fault("slow", seconds=1, taskId=slow)
    response = gate.client.get("/v1/progress", params={"taskId": [cached, slow]})
    assert response.json()["items"][0]["progress"] == 0.75
