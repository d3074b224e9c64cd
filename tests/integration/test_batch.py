"""GET /v1/progress?taskId=A&taskId=B: many tasks in one response."""

import pytest

from tests.support.harness import Gateway, Simulator


def test_batch_keeps_order_and_removes_duplicates(simulator: Simulator, gate: Gateway) -> None:
    """Items are in the order of the query, each task once, with the body of a single query."""
    tasks = [simulator.task(data={"status": "running", "progress": n / 4, "etaRelative": n}) for n in (2, 1)]
    response = gate.client.get("/v1/progress", params={"taskId": [*tasks, tasks[0]]})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert [item["taskId"] for item in body["items"]] == tasks
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
    assert (summary["progress"], summary["etaSeconds"], summary["terminal"]) == (1.0, 0.0, False)


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
        ("?taskId=a&taskId=b%2Fc", "invalid-task-id", ""),
        ("?taskId=a&colour=red", "invalid-parameter", "colour"),
        ("?taskId=a&api=sd&api=sd", "invalid-parameter", "api"),
        ("?taskId=a&wait=5", "invalid-parameter", "wait"),
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
