"""GET /v1/progress?taskId=A&taskId=B: many tasks in one answer."""

import pytest

from tests.harness import Gateway, Simulator


def test_batch_keeps_order_and_folds_duplicates(simulator: Simulator, gate: Gateway) -> None:
    """Items come in the order asked for, each task once, each as the single query has it."""
    tasks = [simulator.task(data={"status": "running", "progress": n / 4, "etaRelative": n}) for n in (2, 1)]
    answer = gate.client.get("/v1/progress", params={"taskId": [*tasks, tasks[0]]})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
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


def test_batch_failure_of_one_spares_the_others(simulator: Simulator, gate: Gateway) -> None:
    """A task that cannot be read is an item with a problem; the answer is 200 and counts it."""
    done = simulator.finished()
    body = gate.client.get("/v1/progress", params={"taskId": ["nobody", done]}).json()
    problem = body["items"][0]["error"]
    assert body["items"][0]["taskId"] == "nobody"
    assert (problem["status"], problem["code"]) == (502, "upstream-rejected")
    assert body["items"][1]["status"] == "succeeded"
    summary = body["summary"]
    assert (summary["total"], summary["errors"], summary["succeeded"]) == (2, 1, 1)
    assert (summary["progress"], summary["etaSeconds"], summary["terminal"]) == (1.0, 0.0, False)


def test_batch_of_failures_has_no_mean(gate: Gateway) -> None:
    """Where no item is without error, the mean and the largest are not known."""
    summary = gate.client.get("/v1/progress", params={"taskId": "nobody"}).json()["summary"]
    assert (summary["progress"], summary["etaSeconds"], summary["errors"]) == (None, None, 1)


def test_batch_shares_cache_and_flights(simulator: Simulator, gate: Gateway) -> None:
    """A batch costs one call for each task that is not fresh, and none for one that is."""
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
def test_batch_refuses_what_is_wrong(
    simulator: Simulator, gate: Gateway, query: str, code: str, named: str
) -> None:
    """A wrong request is a problem that names what is wrong, and nothing goes upstream."""
    answer = gate.client.get(f"/v1/progress{query}")
    assert (answer.status_code, answer.json()["code"]) == (400, code)
    assert named in answer.json()["detail"]
    assert simulator.calls() == 0


def test_batch_head_has_no_body(simulator: Simulator, gate: Gateway) -> None:
    """HEAD answers as GET does, without the body."""
    answer = gate.client.head("/v1/progress", params={"taskId": simulator.finished()})
    assert (answer.status_code, answer.content) == (200, b"")
    assert int(answer.headers["content-length"]) > 0
