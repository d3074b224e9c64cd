"""GET /v1/results/{taskId}, over real sockets."""

import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.support.harness import Gateway, RawUpstream, Request, Simulator, framed, fresh_id, until

Launch = Callable[..., Gateway]


def results(gate: Gateway, task: str, **more: object) -> httpx.Response:
    """Query the result of a task."""
    return gate.client.get(f"/v1/results/{task}", **more)  # type: ignore[arg-type]


def test_results_of_a_finished_task(simulator: Simulator, gate: Gateway) -> None:
    """A finished task has its images and the vendor's data; repeated requests make no further calls."""
    task = simulator.finished()
    response = results(gate, task)
    body = response.json()
    data = gate.native(task, "sd_get_result").json()["data"]
    assert body == {
        "taskId": task,
        "api": "sd",
        "status": "succeeded",
        "images": [{"url": data["images"][0]}],
        "result": data,
    }
    assert response.headers["cache-control"] == "private, max-age=30"
    assert response.headers["age"] == "0"
    assert response.headers["content-type"] == "application/json"
    image = httpx.get(body["images"][0]["url"], trust_env=False)
    assert image.content.startswith(b"\x89PNG")
    for _ in range(3):
        again = results(gate, task)
        assert (again.content, again.headers["etag"]) == (response.content, response.headers["etag"])
    assert simulator.stats()["calls"] == {"sd_get_progress": 1, "sd_get_result": 1}


def test_results_have_an_etag_and_head(simulator: Simulator, gate: Gateway) -> None:
    """If-None-Match gets 304, also with a proxy's suffix; HEAD has the headers of GET."""
    task = simulator.finished()
    first = results(gate, task)
    tag = first.headers["etag"]
    for value in (tag, f"W/{tag}", tag[:-1] + '-gzip"', "*", f'"other", {tag}'):
        response = results(gate, task, headers={"If-None-Match": value})
        assert (response.status_code, response.content) == (304, b""), value
        assert response.headers["etag"] == tag
        assert response.headers["cache-control"].startswith("private")
    assert results(gate, task, headers={"If-None-Match": '"other"'}).status_code == 200
    head = gate.client.head(f"/v1/results/{task}")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(first.content))
    assert gate.client.post(f"/v1/results/{task}").status_code == 405


def test_results_of_a_comfy_task(simulator: Simulator, gate: Gateway) -> None:
    """For comfy, each `url` inside of the vendor's result is an image."""
    task = simulator.finished()
    body = results(gate, task, params={"api": "comfy"}).json()
    assert (body["api"], [image["url"] for image in body["images"]]) == (
        "comfy",
        [body["result"]["result"]["images"]["url"]],
    )
    assert simulator.stats()["calls"] == {"comfy_get_progress": 1, "comfy_get_result": 1}


@pytest.mark.parametrize(
    ("status", "retry_after"), [("waiting", "2"), ("running", "1"), ("failed", None), ("canceled", None)]
)
def test_results_of_a_task_that_has_not_succeeded(
    simulator: Simulator, gate: Gateway, status: str, retry_after: str | None
) -> None:
    """Without success, it is 409 with the status of the task, from one call for its progress at most."""
    task = simulator.task(data={"status": status, "progress": 0.5})
    for _ in range(2):
        response = results(gate, task)
        problem = response.json()
        assert response.headers["content-type"] == "application/problem+json"
        assert (response.status_code, problem["status"], problem["code"]) == (409, 409, "not-finished")
        assert (problem["taskStatus"], response.headers.get("retry-after")) == (status, retry_after)
        assert status in problem["detail"]
    assert simulator.stats()["calls"] == {"sd_get_progress": 1}


def test_results_are_read_again_after_the_end(simulator: Simulator, launch: Launch) -> None:
    """A result that was cached before the end of the task is not served after it."""
    gate = launch(simulator.url, cache={"running_seconds": 0.1, "stale_while_revalidate_seconds": 0})
    task = simulator.task(data={"status": "running", "progress": 0.5})
    assert gate.native(task, "sd_get_result").json()["data"]["status"] == "running"
    assert results(gate, task).status_code == 409
    simulator.script(task, status="successed", progress=1, images=["https://x.test/a.png"])
    response = until(lambda: (r := results(gate, task)).status_code == 200 and r, "the result is read")
    assert response.json()["images"] == [{"url": "https://x.test/a.png"}]
    assert simulator.stats()["calls"]["sd_get_result"] == 2


def test_results_list_only_web_addresses(simulator: Simulator, gate: Gateway) -> None:
    """Each value that is no usable URL is left out; the others are unchanged, without duplicates."""
    images = [
        "https://x.test/1.png?a=1&b=2",
        "javascript:alert(1)",
        "data:image/png;base64,AAAA",
        "//x.test/2.png",
        "https://",
        "https://x.test/a b",
        "http://[::1",
        "http://\\evil.test",
        "https://[v1.x]/",
        "https://user:password@x.test/5.png",
        "https://x.test:99999/6.png",
        "https://x.test/\0.png",
        "https://x.test/\u202egnp.exe",
        "https://x.test/a\\b",
        "https://xn--a/",
        None,
        7,
        {"url": "https://x.test/3.png"},
        "HTTP://x.test/4.png",
        "https://[::1]:8443/\u56fe.png?e=@1#x",
        "https://x.test/1.png?a=1&b=2",
    ]
    sd = simulator.task(data={"status": "succeeded", "progress": 1, "images": images})
    body = results(gate, sd).json()
    assert [image["url"] for image in body["images"]] == [images[0], *images[-3:-1]]
    assert body["result"]["images"] == images
    nested = {"9": {"images": [{"url": "https://x.test/b"}, {"url": {"url": "https://x.test/c"}}]}, "url": 1}
    data = {"status": "succeeded", "progress": 1, "images": "https://x.test/no", "url": "https://x.test/no"}
    comfy = simulator.task(data=data | {"result": nested | {"z": {"url": "https://x.test/a"}}})
    body = results(gate, comfy, params={"api": "comfy"}).json()
    assert [image["url"][-1] for image in body["images"]] == ["b", "c", "a"]


def test_results_survive_unusual_data(simulator: Simulator, gate: Gateway) -> None:
    """Deep nesting, huge numbers and constants that are not JSON neither crash nor hide the result."""
    envelope = (
        '{"status":10,"data":{"taskId":"%s","status":"succeeded","progress":1,"result":%s,"images":%s}}'
    )
    number = "9" * 5000
    for result, images, urls in (
        ("[" * 500 + "]" * 500, '["https://x.test/a"]', ["https://x.test/a"]),
        (f'{{"url":"https://x.test/b","seed":{number}}}', "[]", []),
        ('{"url":"https://x.test/c","value":NaN}', "null", ["https://x.test/c"]),
        ('{"url":"https://x.test/\\ud800"}', "{}", ["https://x.test/\ufffd"]),
    ):
        task = simulator.finished()
        simulator.fault("body", body=envelope % (task, result, images))
        response = results(gate, task, params={"api": "comfy"})
        simulator.heal()
        assert response.status_code == 200, response.text
        body = json.loads(response.content, parse_int=str)
        assert [image["url"] for image in body["images"]] == urls


def test_results_share_one_query(simulator: Simulator, gate: Gateway) -> None:
    """Callers at the same time share one query of the progress and one of the result."""
    task = simulator.finished()
    simulator.fault("slow", seconds=0.2)
    with ThreadPoolExecutor(10) as pool:
        responses = list(pool.map(lambda _: results(gate, task), range(10)))
    assert [response.status_code for response in responses] == [200] * 10
    assert simulator.stats()["calls"] == {"sd_get_progress": 1, "sd_get_result": 1}


def test_results_need_the_operation(simulator: Simulator, launch: Launch) -> None:
    """A switched-off operation is 404, which names it; without progress, the result's own status decides."""
    gate = launch(simulator.url, upstream={"operations": ["sd_get_progress", "comfy_get_result"]})
    task = simulator.finished()
    refused = results(gate, task)
    assert (refused.status_code, refused.json()["code"]) == (404, "not-found")
    assert "sd_get_result" in refused.json()["detail"]
    assert results(gate, task, params={"api": "comfy"}).status_code == 200
    unfinished = results(gate, simulator.task(), params={"api": "comfy"})
    assert (unfinished.status_code, unfinished.json()["taskStatus"]) == (409, "running")
    assert simulator.stats()["calls"] == {"comfy_get_result": 2}


def test_results_refuse_invalid_requests(simulator: Simulator, gate: Gateway) -> None:
    """Invalid task IDs and parameters are refused without a call."""
    for path, status, code in (
        ("/v1/results/a%2Fb", 400, "invalid-task-id"),
        ("/v1/results/a/b", 404, "not-found"),
        ("/v1/results/", 400, "invalid-task-id"),
        ("/v1/results/a?api=dall-e", 400, "invalid-parameter"),
        ("/v1/results/a?wait=3", 400, "invalid-parameter"),
    ):
        response = gate.client.get(path)
        assert (response.status_code, response.json()["code"]) == (status, code), path
    assert simulator.calls() == 0


def test_results_pass_on_failures(simulator: Simulator, gate: Gateway) -> None:
    """A task that the vendor rejects, and an upstream that fails, are problems as for progress."""
    unknown = results(gate, fresh_id())
    assert (unknown.status_code, unknown.json()["code"]) == (502, "upstream-rejected")
    task = simulator.finished()
    gate.get(task)
    simulator.fault("refuse", code="A403IS", message="Invalid Signature", operation="sd_get_result")
    refused = results(gate, task)
    assert (refused.status_code, refused.json()["code"]) == (502, "upstream-credentials")


def test_results_never_reuse_a_connection(launch: Launch) -> None:
    """A result is read on a connection of its own, which is then closed: it may not name its task."""
    connections: dict[str, set[int]] = {}

    def behave(connection: socket.socket, request: Request) -> None:
        operation = request.head.split(b" ")[1].decode().rpartition("/")[2]
        connections.setdefault(operation, set()).add(id(connection))
        connection.sendall(framed(request.envelope(status="succeeded", progress=1, images=[])))

    with RawUpstream(behave) as upstream:
        gate = launch(upstream.url)
        for _ in range(3):
            assert results(gate, fresh_id()).status_code == 200
        assert len(connections["sd_get_result"]) == 3
        assert len(connections["sd_get_progress"]) == 1
