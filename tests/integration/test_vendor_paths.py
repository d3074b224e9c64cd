"""POST /scc/…: the vendor's own paths on the gateway."""

import gzip
import json
import socket
from collections.abc import Callable

import pytest

from tests.support.harness import Gateway, RawUpstream, Request, Simulator, framed, fresh_id

Launch = Callable[..., Gateway]

OPERATIONS = ("sd_get_progress", "comfy_get_progress", "sd_get_result", "comfy_get_result")
SENT = {
    "host",
    "accept",
    "accept-encoding",
    "user-agent",
    "content-type",
    "content-length",
    "content-md5",
    "x-ca-key",
    "x-ca-nonce",
    "x-ca-timestamp",
    "x-ca-signature",
    "x-ca-signature-headers",
    "x-ca-signature-method",
}


def failure(response: object) -> tuple[int, str]:
    """Return HTTP status and code of a failure of the gateway in the form of the vendor's envelope."""
    assert response.headers["content-type"] == "application/json"  # type: ignore[attr-defined]
    envelope = response.json()  # type: ignore[attr-defined]
    assert envelope["status"] == 20
    assert envelope["data"] is None
    assert envelope["errMessage"]
    assert set(envelope) == {
        "status",
        "apiInvokeId",
        "data",
        "errCode",
        "errMessage",
        "subErrCode",
        "subErrMessage",
        "startTime",
        "endTime",
    }
    return response.status_code, envelope["errCode"]  # type: ignore[attr-defined]


def test_native_envelope_is_passed_on_byte_for_byte(launch: Launch) -> None:
    """The envelope is passed on unchanged: order, spaces, numbers, escapes and unknown members."""

    def body(request: Request) -> bytes:
        return (
            b'{ "data":{"extra": [1.50, 1e3],"progress":0.650,\t"status":"successed",'
            b'"taskId":"%s","message":"\\u4f60 \xe4\xbd\xa0"}, "status":10 ,"new":null}\n'
        ) % request.task_id.encode()

    def behaviour(connection: socket.socket, request: Request) -> None:
        connection.sendall(framed(body(request)))

    with RawUpstream(behaviour) as upstream:
        gate = launch(upstream.url)
        for operation in OPERATIONS:
            for _ in range(2):  # a miss, then a hit
                response = gate.native(fresh := "0abc", operation)
                assert response.status_code == 200
                assert response.content == body(upstream.requests[-1])
                assert response.headers["content-type"].startswith("application/json")
        assert len(upstream.requests) == 4
        assert fresh in upstream.requests[0].body.decode()


def test_native_passes_on_the_raw_progress(simulator: Simulator, launch: Launch) -> None:
    """Progress can jump back on this path; only the simplified path prevents it."""
    gate = launch(simulator.url, cache={"running_seconds": 0, "stale_while_revalidate_seconds": 0})
    task = fresh_id()
    for number in (0.65, 0.35):
        simulator.script(task, status="running", progress=number)
        assert gate.native(task).json()["data"]["progress"] == number


def test_native_client_headers_are_not_forwarded(simulator: Simulator, gate: Gateway) -> None:
    """The upstream gets only the gateway's own headers, and none of the client's."""
    task = simulator.task()
    headers = {
        "x-ca-key": "clients",
        "x-ca-signature": "clients",
        "x-ca-nonce": "clients",
        "x-ca-stage": "TEST",
        "authorization": "Bearer clients",
        "cookie": "session=clients",
        "x-forwarded-for": "192.0.2.7",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "user-agent": "clients",
        "x-sp-resource-config-id": "clients",
    }
    assert gate.native(task, headers=headers).status_code == 200
    assert gate.get(simulator.task(), headers=headers).status_code == 200
    for request in simulator.requests():
        assert set(request["headers"]) == SENT
        assert "clients" not in str(request)
        assert request["headers"]["user-agent"].startswith("sd-progress-gateway/")
    assert simulator.requests()[0]["target"] == "/scc/sd_get_progress"
    assert simulator.requests()[0]["body"] == json.dumps({"taskId": task}, separators=(",", ":"))


def test_native_rejection_is_passed_on(simulator: Simulator, gate: Gateway) -> None:
    """A rejection is passed on unchanged with HTTP 200, and enters the negative cache."""
    simulator.fault("reject", errCode="E1", errMessage="no", subErrCode="E2", subErrMessage="still no")
    first, again = gate.native("abc"), gate.native("abc")
    assert first.status_code == again.status_code == 200
    assert first.content == again.content
    envelope = first.json()
    assert (envelope["status"], envelope["errCode"], envelope["subErrCode"]) == (20, "E1", "E2")
    assert envelope["apiInvokeId"].startswith("i_")
    assert simulator.calls() == 1
    assert gate.get("abc").json()["code"] == "upstream-rejected"


def test_native_rejection_takes_precedence_over_a_snapshot(simulator: Simulator, launch: Launch) -> None:
    """The simplified path serves a stale snapshot after a rejection; this path passes on the rejection."""
    never_fresh = {"running_seconds": 0, "stale_while_revalidate_seconds": 0}
    gate = launch(simulator.url, cache=never_fresh)
    task = simulator.task()
    assert gate.native(task).json()["status"] == 10
    simulator.fault("reject", errCode="GONE")
    assert gate.native(task).json()["errCode"] == "GONE"
    assert gate.get(task).headers["cache-status"].endswith("; detail=upstream-rejected")


def test_native_and_simplified_paths_share_a_cache(simulator: Simulator, launch: Launch) -> None:
    """One upstream call serves both, in either order."""
    gate = launch(simulator.url, cache={"running_seconds": 600})
    one, two = simulator.task(), simulator.task()
    assert gate.native(one).headers["cache-status"].startswith("sd-gateway; fwd=miss")
    assert gate.get(one).headers["cache-status"].startswith("sd-gateway; hit")
    assert gate.get(two).status_code == gate.native(two).status_code == 200
    assert (simulator.calls(one), simulator.calls(two)) == (1, 1)


def test_native_results_are_cached(simulator: Simulator, launch: Launch) -> None:
    """Results are cached for cache.result_seconds."""
    gate = launch(simulator.url, cache={"result_seconds": 600})
    task = simulator.finished()
    first, again = gate.native(task, "sd_get_result"), gate.native(task, "sd_get_result")
    assert first.content == again.content
    assert first.json()["data"]["images"]
    assert again.headers["cache-status"].startswith("sd-gateway; hit")
    assert simulator.calls(task) == 1


@pytest.mark.parametrize("fault", ["status", "cut", "body"])
def test_native_failure_is_an_envelope(simulator: Simulator, launch: Launch, fault: str) -> None:
    """The gateway's own failures have the form that the SDKs parse, and the problem's status."""
    gate = launch(simulator.url, upstream={"retries": 0})
    simulator.fault(fault)
    code = "upstream-unreachable" if fault == "cut" else "upstream-invalid"
    assert failure(gate.native(fresh_id())) == (502, code)


def test_native_throttling_has_retry_after(simulator: Simulator, gate: Gateway) -> None:
    """A 503 on these paths has Retry-After, too."""
    simulator.fault("refuse", code="T429PA", message="Throttled by APP Flow Control", retryAfter=5)
    response = gate.native(fresh_id())
    assert failure(response) == (503, "upstream-throttled")
    assert response.headers["retry-after"] == "5"


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS"])
def test_native_accepts_only_post(simulator: Simulator, gate: Gateway, operation: str, method: str) -> None:
    """Any other method is 405 with Allow."""
    response = gate.client.request(method, f"/scc/{operation}")
    assert response.headers["allow"] == "POST"
    assert response.status_code == 405
    if method != "HEAD":
        assert failure(response) == (405, "method-not-allowed")
    assert simulator.calls() == 0


@pytest.mark.parametrize(
    "path",
    [
        "sd_txt2img",
        "comfy_prompt",
        "",
        "sd_get_progress/",
        "sd_get_progress/x",
        "SD_GET_PROGRESS",
        "..%2fmetrics",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_native_other_paths_are_not_forwarded(
    simulator: Simulator, gate: Gateway, path: str, method: str
) -> None:
    """Operations that cost money are never forwarded: every other path is a problem that lists the four."""
    response = gate.client.request(method, f"/scc/{path}")
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["code"] == "not-found"
    assert all(f"/scc/{operation}" in response.json()["detail"] for operation in OPERATIONS)
    assert simulator.requests() == []


BAD_BODIES = {
    "empty": (b"", "invalid-parameter"),
    "text": (b"task", "invalid-parameter"),
    "list": (b'["taskId"]', "invalid-parameter"),
    "string": (b'"taskId"', "invalid-parameter"),
    "null": (b"null", "invalid-parameter"),
    "no-task": (b"{}", "invalid-parameter"),
    "task-is-number": (b'{"taskId": 1}', "invalid-parameter"),
    "task-is-null": (b'{"taskId": null}', "invalid-parameter"),
    "deep": (b'{"taskId":' * 50_000, "body-too-large"),
    "deep-list": (b"[" * 50_000, "invalid-parameter"),
    "deep-object": (b'{"":' * 13_000, "invalid-parameter"),
    "not-utf-8": (b'{"taskId": "\xff\xfe"}', "invalid-parameter"),
    "utf-16": ('{"taskId": "a"}'.encode("utf-16"), "invalid-parameter"),
    "nan": (b'{"taskId": "a", "x": NaN}', "invalid-parameter"),
    "half": (b'{"taskId": "a"', "invalid-parameter"),
    "endless-integer": (b'{"taskId": ' + b"1" * 5000 + b"}", "invalid-parameter"),
    "nul": (b'{"taskId": "a\\u0000"}', "invalid-task-id"),
    "slash": (b'{"taskId": "a/b"}', "invalid-task-id"),
    "long": (b'{"taskId": "%s"}' % (b"a" * 65), "invalid-task-id"),
    "no-characters": (b'{"taskId": ""}', "invalid-task-id"),
    "surrogate": (b'{"taskId": "\\ud800"}', "invalid-task-id"),
    "70-kb": (b'{"taskId": "a"}' + b" " * 71_680, "body-too-large"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_native_invalid_body_is_refused(simulator: Simulator, gate: Gateway, name: str) -> None:
    """Each invalid body has a clear error in an envelope, without a traceback or an upstream call."""
    body, code = BAD_BODIES[name]
    response = gate.client.post("/scc/sd_get_progress", content=body)
    assert failure(response) == (413 if code == "body-too-large" else 400, code)
    assert "Traceback" not in response.text
    assert simulator.requests() == []


def test_native_invalid_task_id_is_shown(gate: Gateway) -> None:
    """The error has the invalid task ID in ASCII, if it is not long."""

    def message(task_id: str) -> str:
        return str(gate.client.post("/scc/sd_get_progress", json={"taskId": task_id}).json()["errMessage"])

    reason = "is not a task ID: a task ID is 1 to 64 characters of A-Z a-z 0-9 _ -"
    assert message("a,画") == f"'a,\\u753b' {reason}"
    assert message("a" * 65) == f"a text of 65 characters {reason}"


def test_native_query_parameters_are_refused(simulator: Simulator, gate: Gateway) -> None:
    """These paths have no query parameters; the error names an unknown one."""
    response = gate.client.post("/scc/sd_get_progress?debug=1", json={"taskId": "a"})
    assert failure(response) == (400, "invalid-parameter")
    assert "'debug'" in response.json()["errMessage"]
    assert simulator.requests() == []


def test_native_body_may_have_other_members_and_the_maximum_size(simulator: Simulator, gate: Gateway) -> None:
    """Other members are ignored, and a body of limits.max_body_bytes is accepted."""
    task = simulator.task()
    body = json.dumps({"other": [1], "taskId": task}).encode().ljust(65_536)
    assert gate.client.post("/scc/sd_get_progress", content=body).json()["data"]["taskId"] == task


def test_native_chunked_body_over_the_limit_is_refused(simulator: Simulator, gate: Gateway) -> None:
    """The size limit applies to a body without Content-Length as it arrives."""
    pieces = (b" " * 10_000 for _ in range(10))
    assert failure(gate.client.post("/scc/sd_get_progress", content=pieces)) == (413, "body-too-large")
    assert simulator.requests() == []


@pytest.mark.parametrize("coding", ["gzip", "identity, gzip", "BR", "x-gzip", "aes128gcm"])
def test_native_refuses_a_compressed_body(gate: Gateway, coding: str) -> None:
    """A body with a content coding is 415, and is never read without decoding."""
    body = gzip.compress(b'{"taskId": "abc"}')
    response = gate.client.post("/scc/sd_get_progress", content=body, headers={"content-encoding": coding})
    assert failure(response) == (415, "unsupported-media-type")
    assert response.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("coding", ["identity", "", "Identity, identity"])
def test_native_accepts_identity(simulator: Simulator, gate: Gateway, coding: str) -> None:
    """The coding `identity` is accepted."""
    task = simulator.task()
    assert gate.native(task, headers={"content-encoding": coding}).json()["status"] == 10


def test_native_skips_a_byte_order_mark(simulator: Simulator, gate: Gateway) -> None:
    """One UTF-8 BOM before the JSON is ignored; a second one is an error."""
    task = simulator.task()
    for marks, status in ((1, 200), (2, 400)):
        body = b"\xef\xbb\xbf" * marks + json.dumps({"taskId": task}).encode()
        assert gate.client.post("/scc/sd_get_progress", content=body).status_code == status
