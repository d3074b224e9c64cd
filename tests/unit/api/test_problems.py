"""The mapping of exceptions to HTTP error responses."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from gateway.api.problems import PROBLEMS, Problems, status_and_title
from gateway.domain import errors
from gateway.domain.errors import (
    GatewayError,
    InvalidTaskId,
    KeyPairMissing,
    KeyPairRefused,
    NotFinished,
    Overloaded,
    RequestError,
    UpstreamBusy,
    UpstreamDetail,
    UpstreamError,
    UpstreamRejected,
    UpstreamThrottled,
)

# Public contract: each problem code and its HTTP status.
PROMISED = {
    "invalid-task-id": 400,
    "invalid-parameter": 400,
    "cross-site-request": 403,
    "not-found": 404,
    "method-not-allowed": 405,
    "not-finished": 409,
    "body-too-large": 413,
    "unsupported-media-type": 415,
    "too-many-requests": 429,
    "headers-too-large": 431,
    "upstream-rejected": 502,
    "upstream-credentials": 502,
    "upstream-invalid": 502,
    "upstream-unreachable": 502,
    "upstream-throttled": 503,
    "upstream-open": 503,
    "overloaded": 503,
    "upstream-timeout": 504,
    "internal": 500,
}
NOT_YET: set[str] = set()
BRANCHES = {GatewayError, RequestError, UpstreamError}  # never raised themselves
VENDOR_PATH = "/scc/sd_get_progress"


def kinds(kind: type[GatewayError] = GatewayError) -> Iterator[type[GatewayError]]:
    yield kind
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from kinds(child)


KINDS = list(kinds())


def make(kind: type[GatewayError], **options: Any) -> GatewayError:
    if kind is UpstreamRejected:
        return UpstreamRejected("a fixed text", envelope=b"{}", detail=UpstreamDetail())
    return kind("a fixed text", **options)


def respond(error: Exception, path: str = "/v1/progress/x") -> tuple[int, dict[str, str], dict[str, Any]]:
    scope = {"type": "http", "path": path, "state": {"request_id": "the-request"}}
    response = Problems([VENDOR_PATH]).response(scope, error)
    return response.status_code, dict(response.headers), json.loads(bytes(response.body))


@pytest.mark.parametrize("kind", KINDS)
def test_problems_map_every_exception(kind: type[GatewayError]) -> None:
    """Each class has its own or an ancestor's row with its status; only abstract classes are 500."""
    status, title = status_and_title(make(kind))
    assert status == PROMISED[kind.code]
    assert title
    assert (status == 500) == (kind in BRANCHES)


def test_problems_have_a_row_for_every_promised_code() -> None:
    """Each promised code has an exception, except those of future features."""
    assert {kind.code for kind in KINDS} == set(PROMISED) - NOT_YET
    assert {kind.code: status for kind, (status, _) in PROBLEMS.items()} == {
        code: status for code, status in PROMISED.items() if code not in NOT_YET
    }


def test_problems_map_a_subclass_like_its_parent() -> None:
    """A class without its own row uses that of its nearest ancestor."""
    assert status_and_title(UpstreamBusy("x")) == PROBLEMS[UpstreamBusy.__bases__[0]]


def test_problems_answer_with_a_problem_document() -> None:
    """Outside the drop-in paths an error is an uncacheable problem (RFC 9457) with the request ID."""
    status, headers, problem = respond(InvalidTaskId("a fixed text"))
    assert status == 400
    assert headers["content-type"] == "application/problem+json"
    assert headers["cache-control"] == "no-store"
    assert problem == {
        "type": "urn:sd-gateway:problem:invalid-task-id",
        "title": "Invalid task ID",
        "status": 400,
        "detail": "a fixed text",
        "code": "invalid-task-id",
        "requestId": "the-request",
    }


@pytest.mark.parametrize(("seconds", "header"), [(1.2, "2"), (None, None)])
def test_problems_of_an_unfinished_task_have_its_status(seconds: float | None, header: str | None) -> None:
    """The problem has the status of the task, and Retry-After unless the task has failed."""
    error = NotFinished("a fixed text", task_status="running", retry_after=seconds)
    status, headers, problem = respond(error)
    assert (status, problem["status"], problem["taskStatus"]) == (409, 409, "running")
    assert headers.get("retry-after") == header


def test_problems_say_that_there_are_no_credentials() -> None:
    """Without a key pair the upstream was not asked, so the title does not say that it refused."""
    assert status_and_title(KeyPairMissing("x"))[1] == "The gateway has no credentials"
    assert status_and_title(KeyPairRefused("x"))[1] == "The upstream did not authorize the query"


def test_problems_include_the_upstream_details() -> None:
    """The problem of an upstream response has its six details, null where they are missing."""
    error = UpstreamRejected(
        "a fixed text",
        envelope=b"{}",
        detail=UpstreamDetail(invoke_id="i_1", err_code="E", sub_err_message="why"),
    )
    assert respond(error)[2]["upstream"] == {
        "invokeId": "i_1",
        "requestId": None,
        "errCode": "E",
        "errMessage": None,
        "subErrCode": None,
        "subErrMessage": "why",
    }


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in BRANCHES])
def test_problems_come_as_envelopes_on_the_drop_in_paths(kind: type[GatewayError]) -> None:
    """On the drop-in paths the HTTP status is the same and the body is the vendor's envelope."""
    status, headers, envelope = respond(make(kind), VENDOR_PATH)
    assert status == PROMISED[kind.code]
    assert headers["content-type"] == "application/json"
    assert set(envelope) == {
        "status",
        "apiInvokeId",
        "data",
        "subErrCode",
        "subErrMessage",
        "errCode",
        "errMessage",
        "startTime",
        "endTime",
    }
    values = (envelope["status"], envelope["data"], envelope["errCode"], envelope["errMessage"])
    assert values == (20, None, kind.code, "a fixed text")


@pytest.mark.parametrize("path", ["/v1/progress/x", VENDOR_PATH])
@pytest.mark.parametrize(("seconds", "expected"), [(None, "1"), (0.2, "1"), (7.0, "7"), (7.1, "8")])
def test_problems_have_retry_after(path: str, seconds: float | None, expected: str) -> None:
    """Each 503 has Retry-After in whole seconds, rounded up, at least 1; other errors have none."""
    for kind in (Overloaded, UpstreamThrottled):
        assert respond(make(kind, retry_after=seconds), path)[1]["retry-after"] == expected
    assert "retry-after" not in respond(make(UpstreamBusy, retry_after=seconds), path)[1]


def test_problems_reveal_nothing_about_a_bug() -> None:
    """An unexpected exception is a 500 with a fixed text that refers to the log."""
    status, _, problem = respond(ZeroDivisionError("division by zero in gateway/x.py"))
    assert (status, problem["code"], problem["title"]) == (500, "internal", "Internal error")
    assert "see the log" in problem["detail"]
    assert "division" not in str(problem)


@pytest.mark.parametrize(
    ("refused", "code"),
    [
        (HTTPException(404), "not-found"),
        (HTTPException(405, headers={"Allow": "GET, HEAD"}), "method-not-allowed"),
    ],
)
def test_problems_map_refusals_of_the_router(refused: HTTPException, code: str) -> None:
    """Refusals by the router are problems, too, and keep their headers."""
    status, headers, problem = respond(refused)
    assert (status, problem["status"], problem["code"]) == (refused.status_code, refused.status_code, code)
    assert headers.get("allow") == (refused.headers or {}).get("Allow")
