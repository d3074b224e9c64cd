"""GET /v1/progress/{taskId}: response body, headers and refused requests."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from gateway.api.progress_response import cache_values
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import Status
from gateway.progress.outcomes import CacheStatus, LookupSuccess
from tests.support.harness import Gateway, Simulator, fresh_id, until
from tests.support.hitting import KEY

Launch = Callable[..., Gateway]

FOR_EVER = {"running_seconds": 600, "waiting_seconds": 600}


def problem(response: Any) -> tuple[int, str, str]:
    """Check a problem document; return its status, code and detail."""
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["cache-control"] == "no-store"
    body = response.json()
    assert body["type"] == f"urn:sd-gateway:problem:{body['code']}"
    assert body["status"] == response.status_code
    assert body["requestId"] == response.headers["x-request-id"]
    assert body["title"]
    return response.status_code, body["code"], body["detail"]


# --- the body ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            {"status": "waiting", "progress": 0, "lastQueueRemaining": 3, "etaRelative": 0},
            {"status": "waiting", "progress": 0.0, "queueRemaining": 3},
        ),
        (
            {
                "status": "running",
                "progress": 0.35,
                "lastQueueRemaining": 3,
                "etaRelative": 12.3,
                "message": "hm",
            },
            {"status": "running", "progress": 0.35, "etaSeconds": 12.3, "message": "hm"},
        ),
        (
            {"status": "running", "progress": 7, "state": {"job": "a", "sampling_step": 7}},
            {"status": "running", "progress": 0.999, "state": {"job": "a", "sampling_step": 7}},
        ),
        (
            {"status": "successed", "progress": 0.65, "etaRelative": 3},
            {"status": "succeeded", "progress": 1.0, "etaSeconds": 0.0, "terminal": True},
        ),
        (
            {"status": "failed", "progress": 0.4},
            {"status": "failed", "progress": 0.4, "etaSeconds": 0.0, "terminal": True},
        ),
        (
            {"status": "cancelled"},
            {"status": "canceled", "progress": 0.0, "etaSeconds": 0.0, "terminal": True},
        ),
        ({"status": "paused", "progress": 0.2}, {"status": "unknown", "progress": 0.2}),
    ],
    ids=lambda value: value["status"],
)
def test_progress_body_is_the_simplified_one(
    simulator: Simulator, gate: Gateway, data: dict[str, Any], expected: dict[str, Any]
) -> None:
    """The response always has all members of the simplified format."""
    task = fresh_id()
    simulator.script(task, **data)
    rest = {
        "taskId": task,
        "api": "sd",
        "queueRemaining": None,
        "etaSeconds": None,
        "message": None,
        "terminal": False,
        "state": None,
    }
    response = gate.get(task)
    assert response.headers["content-type"] == "application/json"
    assert response.json() == rest | expected


def test_progress_of_comfy_is_another_task(simulator: Simulator, gate: Gateway) -> None:
    """`api` selects the upstream operation, and is in the response."""
    task = simulator.task()
    assert gate.get(f"{task}?api=comfy").json()["api"] == "comfy"
    assert gate.get(f"{task}?api=sd").json()["api"] == "sd"
    assert gate.get(task).json()["api"] == "sd"
    assert simulator.stats()["calls"] == {"comfy_get_progress": 1, "sd_get_progress": 1}


def test_progress_never_falls_while_running(simulator: Simulator, launch: Launch) -> None:
    """Progress does not decrease while the task is running, although the vendor's number does."""
    gate = launch(simulator.url, cache={"running_seconds": 0, "stale_while_revalidate_seconds": 0})
    task = fresh_id()
    seen = []
    for number in (0.3, 0.65, 0.35, 0.7):
        simulator.script(task, status="running", progress=number)
        seen.append(gate.get(task).json()["progress"])
    assert seen == [0.3, 0.65, 0.65, 0.7]
    simulator.script(task, status="failed", progress=0.1)
    assert gate.get(task).json()["progress"] == 0.1


def test_progress_terminal_is_final(simulator: Simulator, launch: Launch) -> None:
    """A later upstream response does not change an ended task."""
    gate = launch(simulator.url, cache={"terminal_seconds": 0, "stale_while_revalidate_seconds": 0})
    task = fresh_id()
    simulator.script(task, status="successed")
    ended = gate.get(task).content
    simulator.script(task, status="running", progress=0.1)
    assert gate.get(task).content == ended
    assert simulator.calls(task) == 2


# --- validators and caches --------------------------------------------------------------------------------


def test_progress_etag_follows_the_body(simulator: Simulator, launch: Launch) -> None:
    """The ETag is strong, and differs exactly when the body differs."""
    gate = launch(simulator.url, cache={"running_seconds": 0, "stale_while_revalidate_seconds": 0})
    task = fresh_id()
    simulator.script(task, status="running", progress=0.1)
    first, same = gate.get(task), gate.get(task)
    assert re.fullmatch(r'"[^"]+"', first.headers["etag"])
    assert first.headers["etag"] == same.headers["etag"]
    simulator.script(task, status="running", progress=0.2)
    assert gate.get(task).headers["etag"] != first.headers["etag"]


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("{}", 304),
        ("W/{}", 304),
        ('"other", {}', 304),
        ('"a" , W/{},"b"', 304),
        ("*", 304),
        ('"other"', 200),
        ("", 200),
        ("nonsense", 200),
    ],
)
def test_progress_if_none_match(simulator: Simulator, launch: Launch, header: str, status: int) -> None:
    """If-None-Match with the current entity tag is 304 without a body, in all its forms."""
    gate = launch(simulator.url, cache=FOR_EVER)
    task = simulator.task()
    etag = gate.get(task).headers["etag"]
    response = gate.get(task, headers={"if-none-match": header.format(etag)})
    assert response.status_code == status
    assert response.headers["etag"] == etag
    assert {"cache-control", "age", "cache-status", "x-request-id"} <= set(response.headers)
    assert (response.content == b"") == (status == 304)
    assert ("content-type" in response.headers) == (status == 200)


@pytest.mark.parametrize("mark", ["-gzip", ";gzip", "--gzip", "-br", "-zstd", ";br"])
@pytest.mark.parametrize("form", ['"{}"', 'W/"{}"', '"other", "{}"'])
def test_progress_if_none_match_through_a_compressing_proxy(
    simulator: Simulator, launch: Launch, mark: str, form: str
) -> None:
    """An entity tag with the content-coding suffix of a proxy matches; other changed tags do not."""
    gate = launch(simulator.url, cache=FOR_EVER)
    task = simulator.task()
    tag = gate.get(task).headers["etag"].strip('"')
    assert gate.get(task, headers={"if-none-match": form.format(tag + mark)}).status_code == 304
    assert gate.get(task, headers={"if-none-match": form.format(tag + mark + "x")}).status_code == 200
    assert gate.get(task, headers={"if-none-match": form.format("x" + tag + mark)}).status_code == 200


@pytest.mark.parametrize(
    ("lifetime", "age", "expected"),
    [
        (10.0, 0.0, (10, 0)),
        (10.0, 3.7, (10, 3)),
        (10.0, 9.9, (10, 9)),
        (10.0, 12.5, (10, 12)),
        (2.5, 2.4, (2, 2)),
        (0.5, 0.4, (1, 0)),
        (0.5, 0.6, (0, 0)),
        (0.0, 0.0, (0, 0)),
    ],
)
def test_progress_max_age_is_the_whole_lifetime(
    lifetime: float, age: float, expected: tuple[int, int]
) -> None:
    """`max-age` is the whole lifetime and `Age` the elapsed part; it is at least 1 while fresh."""
    snapshot = Snapshot(KEY, 0.0, lifetime, b"", Status.RUNNING, 0.5, None, b"{}", '"one"')
    control, seconds, _ = cache_values(LookupSuccess(snapshot, age, CacheStatus.HIT))
    assert (control, seconds) == (b"max-age=%d" % expected[0], b"%d" % expected[1])


def test_progress_head_is_get_without_a_body(simulator: Simulator, launch: Launch) -> None:
    """HEAD responds with GET's headers, for problems, too."""
    gate = launch(simulator.url, cache=FOR_EVER)
    task = simulator.task()
    for path in (f"/v1/progress/{task}", "/v1/progress/no!", f"/v1/progress/{task}?x=1"):
        got, head = gate.client.get(path), gate.client.head(path)
        assert head.status_code == got.status_code
        assert head.content == b""
        assert head.headers["content-length"] == got.headers["content-length"] == str(len(got.content))
        assert head.headers["content-type"] == got.headers["content-type"]
        assert head.headers.get("etag") == got.headers.get("etag")
    assert gate.client.get("/healthz").status_code == 200  # the connection is still in a valid state


def test_progress_cache_headers_of_miss_and_hit(simulator: Simulator, launch: Launch) -> None:
    """The first response is a miss, the second a hit; both have the lifetime and the age."""
    gate = launch(simulator.url, cache=FOR_EVER)
    task = simulator.task()
    miss, hit = gate.get(task), gate.get(task)
    for response, status in (
        (miss, r"sd-gateway; fwd=miss; ttl=(\d+)"),
        (hit, r"sd-gateway; hit; ttl=(\d+)"),
    ):
        match = re.fullmatch(status, response.headers["cache-status"])
        assert match, response.headers["cache-status"]
        assert 500 < int(match[1]) < 600
        assert response.headers["cache-control"] == "max-age=600"
        assert int(response.headers["age"]) < 60
    assert simulator.calls(task) == 1
    assert gate.metric("cache_lookups_total", operation="sd_get_progress", result="hit") == 1
    assert gate.metric("cache_entries") == 1


def test_progress_stale_while_revalidate(simulator: Simulator, launch: Launch) -> None:
    """A stale snapshot is served at once, as a hit with a negative ttl, and refreshed in the background."""
    gate = launch(simulator.url, cache={"running_seconds": 0, "stale_while_revalidate_seconds": 600})
    task = fresh_id()
    simulator.script(task, status="running", progress=0.1)
    gate.get(task)
    simulator.script(task, status="running", progress=0.2)
    stale = gate.get(task)
    assert stale.json()["progress"] == 0.1
    assert re.fullmatch(r"sd-gateway; hit; ttl=-\d+", stale.headers["cache-status"])
    assert stale.headers["cache-control"] == "max-age=0"
    until(lambda: gate.get(task).json()["progress"] == 0.2, "the snapshot is refreshed")
    assert gate.metric("cache_lookups_total", result="stale") >= 1


def test_progress_too_old_snapshot_is_fetched_again(simulator: Simulator, launch: Launch) -> None:
    """Past stale_while_revalidate the request waits for a new snapshot, as the header reports."""
    gate = launch(simulator.url, cache={"running_seconds": 0, "stale_while_revalidate_seconds": 0})
    task = simulator.task()
    gate.get(task)
    assert gate.get(task).headers["cache-status"].startswith("sd-gateway; fwd=stale; ttl=")
    assert simulator.calls(task) == 2


# --- refused requests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("valid", ["abc-123", "a" * 128, "01:2.3/4+5=6_7"])
def test_progress_request_id_is_kept_if_valid(gate: Gateway, valid: str) -> None:
    """A valid X-Request-Id is returned, in the header and in problems."""
    response = gate.get("no!", headers={"x-request-id": valid})
    assert response.headers.get_list("x-request-id") == [valid]
    assert response.json()["requestId"] == valid


@pytest.mark.parametrize("invalid", ["", "a" * 129, "two words", 'quote"', "{}", "caf\xe9", "<script>"])
def test_progress_request_id_is_generated_if_invalid(gate: Gateway, invalid: str) -> None:
    """An invalid X-Request-Id is replaced, and never returned."""
    made = gate.get("no!", headers={"x-request-id": invalid.encode("latin-1")}).headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", made)
    assert gate.get("no!").headers["x-request-id"] != made


@pytest.mark.parametrize(
    "task_id",
    [
        "%00",
        "a%00b",
        "a%2Fb",
        "%2e%2e%2fmetrics",
        "a" * 65,
        "a" * 4000,
        "a.b",
        "a%20b",
        "%E4%BD%A0",
        "%ff",
        "a;b",
        "a:b",
    ],
)
def test_progress_invalid_task_id_is_refused(simulator: Simulator, gate: Gateway, task_id: str) -> None:
    """An invalid task ID is a clear problem, without an upstream call."""
    assert problem(gate.get(task_id))[:2] == (400, "invalid-task-id")
    assert simulator.calls() == 0


@pytest.mark.parametrize("task_id", ["a", "A_b-9", "a" * 64])
def test_progress_task_id_of_any_valid_length(simulator: Simulator, gate: Gateway, task_id: str) -> None:
    """The shortest and the longest task ID are accepted."""
    assert gate.get(task_id).json()["code"] == "upstream-rejected"
    assert simulator.calls(task_id) == 1


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("x=1", "'x'"),
        ("api=sd&x=1", "'x'"),
        ("taskId=b", "'taskId'"),
        ("api=sd&api=comfy", "'api' is given twice"),
        ("api=midjourney", "'api' must be one of: sd, comfy"),
        ("api=", "'api' must be one of"),
        ("api", "'api' must be one of"),
        ("API=sd", "'API'"),
        ("api=%ff", "cannot be read"),
        ("%00=1", "\\x00"),
        ("&".join(f"a{n}=1" for n in range(1500)), "'a0'"),
    ],
)
def test_progress_invalid_query_is_refused(
    simulator: Simulator, gate: Gateway, query: str, names: str
) -> None:
    """An unknown, repeated or invalid query parameter is a problem that names it."""
    status, code, detail = problem(gate.client.get(f"/v1/progress/abc?{query}"))
    assert (status, code) == (400, "invalid-parameter")
    assert names in detail
    assert simulator.calls() == 0


def test_progress_long_parameter_names_are_not_repeated(gate: Gateway) -> None:
    """An error does not repeat a long parameter name."""
    assert len(gate.client.get(f"/v1/progress/abc?{'x' * 5000}=1").content) < 1000


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_progress_other_methods_are_refused(simulator: Simulator, gate: Gateway, method: str) -> None:
    """Any other method is 405 with Allow."""
    response = gate.client.request(method, "/v1/progress/abc")
    assert problem(response)[:2] == (405, "method-not-allowed")
    assert set(response.headers["allow"].split(", ")) == {"GET", "HEAD"}
    assert simulator.calls() == 0


@pytest.mark.parametrize(
    "path", ["/v1/progress/", "/v1/progress/a/b", "/v2", "/v1/progress/a/b/events", "/healthz/"]
)
def test_progress_unknown_path_is_not_found(simulator: Simulator, gate: Gateway, path: str) -> None:
    """An unknown path is a problem, without a redirect."""
    response = gate.client.get(path)
    assert problem(response)[:2] in {(404, "not-found"), (400, "invalid-task-id")}
    assert simulator.calls() == 0


def test_progress_operation_can_be_disabled(simulator: Simulator, launch: Launch) -> None:
    """A disabled operation is an invalid value of `api`, and its drop-in path does not exist."""
    gate = launch(simulator.url, upstream={"operations": ["sd_get_progress"]})
    assert gate.get(simulator.task()).status_code == 200
    assert problem(gate.get("abc?api=comfy"))[1] == "invalid-parameter"
    assert gate.native("abc", "comfy_get_progress").status_code == 404
    assert simulator.stats()["calls"] == {"sd_get_progress": 1}
