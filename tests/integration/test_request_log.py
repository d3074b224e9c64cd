"""The request log: fields, levels and sampling."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from gateway.api.request_log import RequestLog, record_outcome
from gateway.domain.errors import UpstreamDetail, UpstreamRejected, UpstreamTimeout
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import Operation, TaskKey
from gateway.progress.outcomes import CacheStatus, FetchOutcome, LookupFailure, LookupSuccess
from gateway.telemetry.log_sampling import LogSampler
from tests.support.harness import Gateway, Json, Process, Simulator, fresh_id, serving, until

KEY = TaskKey(Operation.SD_GET_PROGRESS, "01j5t2qx82323pswaqykz9eq4")
SNAPSHOT = Snapshot(KEY, 0.0, 1.0, b"{}")
ROUTE = "/v1/progress/{taskId}"
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TIMEOUT = UpstreamTimeout("too late")
HIT = LookupSuccess(SNAPSHOT, 0.1, CacheStatus.HIT)
MISS = LookupSuccess(SNAPSHOT, 0.0, CacheStatus.MISS, fetch_outcome=FetchOutcome(SNAPSHOT, 0.25, "i_1"))


@pytest.fixture
def set_level(caplog: pytest.LogCaptureFixture) -> Callable[[int], None]:
    """Return a function that sets the log level, which is info initially."""
    caplog.set_level(logging.INFO, "gateway.api.request_log")
    return lambda level: caplog.set_level(level, "gateway.api.request_log")


pytestmark = pytest.mark.usefixtures("set_level")


def scope(*outcomes: LookupSuccess | LookupFailure, **state: Any) -> dict[str, Any]:
    scope: dict[str, Any] = {"headers": [], "state": {"request_id": "r-1"} | state}
    if outcomes:
        scope["state"]["outcomes"] = outcomes
    return scope


def written(
    request: dict[str, Any], *, status: int = 200, route: str = ROUTE, log: RequestLog | None = None
) -> list[dict[str, Any]]:
    """Return the lines that are written for this request: one or none."""
    log = log or RequestLog(LogSampler())
    with capture_logs() as lines:
        log.log(request, method="GET", route=route, status=status, seconds=0.0123456789)
    return [dict(line) for line in lines]


# Fields


def test_requestlog_line_of_a_hit() -> None:
    """A hit has its task and cache status, and no upstream fields."""
    assert written(scope(HIT)) == [
        {
            "event": "request",
            "log_level": "info",
            "request_id": "r-1",
            "method": "GET",
            "route": ROUTE,
            "task_id": KEY.task_id,
            "status": 200,
            "seconds": 0.012346,
            "cache": "hit",
        }
    ]


@pytest.mark.parametrize("source", [CacheStatus.MISS, CacheStatus.COLLAPSED])
def test_requestlog_line_of_a_request_that_waited_for_the_upstream(source: CacheStatus) -> None:
    """A request that started or joined a fetch has the upstream's duration and the vendor's call ID."""
    [line] = written(scope(MISS._replace(cache_status=source)))
    assert (line["cache"], line["upstream_seconds"], line["upstream_invoke_id"]) == (source, 0.25, "i_1")


def test_requestlog_line_of_a_fetch_without_an_upstream_call() -> None:
    """A fetch that found a snapshot in the store has no upstream fields."""
    [line] = written(scope(MISS._replace(fetch_outcome=FetchOutcome(SNAPSHOT))))
    assert not [name for name in line if name.startswith("upstream")]


def test_requestlog_line_of_a_stale_response_after_a_failure() -> None:
    """A stale response after a failure has the failure's code and the failed call."""
    stale = LookupSuccess(
        SNAPSHOT, 9.0, CacheStatus.STALE, failure=TIMEOUT, fetch_outcome=FetchOutcome(TIMEOUT, 10.0)
    )
    [line] = written(scope(stale))
    assert (line["cache"], line["detail"], line["status"]) == ("stale", "upstream-timeout", 200)
    assert line["upstream_seconds"] == 10.0
    assert "upstream_invoke_id" not in line
    assert line["log_level"] == "info"


def test_requestlog_line_of_a_failure() -> None:
    """A failure is a warning with its code, and shows whether it was in the negative cache."""
    failed = LookupFailure(KEY, TIMEOUT, CacheStatus.NEGATIVE)
    [line] = written(scope(failed, code="upstream-timeout"), status=504)
    assert (line["log_level"], line["status"], line["code"]) == ("warning", 504, "upstream-timeout")
    assert (line["cache"], line["detail"], line["task_id"]) == ("negative", "upstream-timeout", KEY.task_id)


def test_requestlog_line_of_a_batch() -> None:
    """A batch has the number of tasks, counts of cache statuses, and the longest upstream duration."""
    slow = MISS._replace(fetch_outcome=FetchOutcome(SNAPSHOT, 0.75, "i_2"))
    [line] = written(
        scope(HIT, MISS, slow, LookupFailure(KEY, TIMEOUT, CacheStatus.MISS, FetchOutcome(TIMEOUT, 0.5)))
    )
    assert (line["tasks"], line["cache"]) == (4, {"hit": 1, "miss": 3})
    assert (line["upstream_seconds"], line["upstream_invoke_id"]) == (0.75, "i_1, i_2")
    assert "task_id" not in line


def test_requestlog_line_of_a_stream() -> None:
    """A stream has the number of its tasks and no cache status."""
    [line] = written(scope(tasks=7), route="/v1/events")
    assert line["tasks"] == 7
    assert "cache" not in line


def test_requestlog_line_of_an_invalid_request_is_bounded() -> None:
    """An invalid task ID is truncated by the log, after redaction."""
    request = scope(code="invalid-task-id") | {"path_params": {"taskId": "x" * 30_000}}
    [line] = written(request, status=400)
    assert line["task_id"].limit == 64
    assert (line["code"], line["log_level"]) == ("invalid-task-id", "info")


def test_requestlog_line_has_the_trace_context() -> None:
    """A valid traceparent is logged; an invalid one is ignored."""
    request = scope(HIT) | {"headers": [(b"traceparent", f"00-{TRACE}-{SPAN}-01".encode())]}
    [line] = written(request)
    assert (line["trace_id"], line["parent_id"]) == (TRACE, SPAN)
    request = scope(HIT) | {"headers": [(b"traceparent", b"00-junk")]}
    assert not {"trace_id", "parent_id"} & set(written(request)[0])


# Levels


def test_requestlog_probes_are_quiet(set_level: Callable[[int], None]) -> None:
    """Successful probes and scrapes are logged at debug level; a failing one is a warning."""
    assert written(scope(), route="/healthz") == []
    assert written(scope(), route="/metrics") == []
    assert [line["log_level"] for line in written(scope(), route="/readyz", status=503)] == ["warning"]
    set_level(logging.DEBUG)
    assert [line["log_level"] for line in written(scope(), route="/healthz")] == ["debug"]


def test_requestlog_respects_the_level(set_level: Callable[[int], None]) -> None:
    """With log.level = warning only failures are logged."""
    set_level(logging.WARNING)
    assert written(scope(HIT)) == []
    assert len(written(scope(), status=500)) == 1


# Sampling


def test_requestlog_samples_similar_lines() -> None:
    """Lines of one route, status class and cache status are sampled together; others are separate."""
    log = RequestLog(LogSampler(first=2, every=100, clock=lambda: 0.0))
    similar = [line for _ in range(102) for line in written(scope(HIT), log=log)]
    assert [line.get("suppressed") for line in similar] == [None, None, 99]
    for request, status in [
        (scope(MISS), 200),
        (scope(HIT._replace(failure=TIMEOUT)), 200),
        (scope(LookupFailure(KEY, TIMEOUT, CacheStatus.MISS)), 504),
        (scope(code="not-found"), 404),
        (scope(code="too-many-requests"), 429),
    ]:
        assert len(written(request, status=status, log=log)) == 1
    assert len(written(scope(HIT), route="/v1/progress", log=log)) == 1


def test_requestlog_outcome_is_recorded_or_raised() -> None:
    """A result is returned, a failure is raised, and either is stored in the scope."""
    request = scope()
    assert record_outcome(request, HIT) is HIT
    assert request["state"]["outcomes"] == (HIT,)
    failed = LookupFailure(
        KEY, UpstreamRejected("no", envelope=b"{}", detail=UpstreamDetail()), CacheStatus.MISS
    )
    with pytest.raises(UpstreamRejected) as raised:
        record_outcome(request, failed)
    assert raised.value is not failed.failure  # which other requests may share
    assert vars(raised.value) == vars(failed.failure)
    assert request["state"]["outcomes"] == (failed,)


# A running gateway


def line_of(process: Process, request_id: str) -> Json:
    """Wait for the line of this request."""

    def found() -> list[Json]:
        return [line for line in map(json.loads, list(process.lines)) if line.get("request_id") == request_id]

    [line] = until(found, f"a line for {request_id} in {process.output}")
    return dict(line)


def test_requestlog_of_a_running_gateway(tmp_path: Path, simulator: Simulator) -> None:
    """By default each request is one line with its upstream fields, and without secrets."""
    task, lost = simulator.task(), fresh_id()
    trace = {"traceparent": f"00-{TRACE}-{SPAN}-01"}

    def ask(gate: Gateway, name: str, path: str, **more: Any) -> None:
        gate.client.request(more.pop("method", "GET"), path, headers={"x-request-id": name} | trace, **more)

    env = {
        "SD_GATEWAY_UPSTREAM__ENDPOINT": simulator.url,
        "SD_GATEWAY_CACHE__RUNNING_SECONDS": "600",
        "SD_GATEWAY_CACHE__ERROR_SECONDS": "600",
    }
    with serving(tmp_path, env) as (process, gate):
        ask(gate, "miss", f"/v1/progress/{task}")
        ask(gate, "hit", f"/v1/progress/{task}")
        ask(gate, "lost", f"/v1/progress/{lost}")
        ask(gate, "native", "/scc/sd_get_result", method="POST", json={"taskId": task})
        ask(gate, "batch", "/v1/progress", params={"taskId": [task, lost]})
        ask(gate, "wrong", "/v1/progress/a%20b")
        ask(gate, "nowhere", "/nothing")
        lines = {
            name: line_of(process, name)
            for name in ("miss", "hit", "lost", "native", "batch", "wrong", "nowhere")
        }
    miss, hit, gone, native, batch = (lines[name] for name in ("miss", "hit", "lost", "native", "batch"))
    assert (miss["level"], miss["logger"]) == ("info", "gateway.api.request_log")
    assert (miss["cache"], miss["task_id"], miss["status"]) == ("miss", task, 200)
    assert 0 < miss["upstream_seconds"] <= miss["seconds"]
    assert (miss["trace_id"], miss["parent_id"]) == (TRACE, SPAN)
    assert (hit["cache"], "upstream_seconds" in hit) == ("hit", False)
    assert (gone["level"], gone["status"], gone["code"]) == ("warning", 502, "upstream-rejected")
    assert native["route"] == "/scc/sd_get_result"
    invoke_ids = [miss["upstream_invoke_id"], gone["upstream_invoke_id"], native["upstream_invoke_id"]]
    assert len(set(invoke_ids)) == 3
    assert all(isinstance(invoke_id, str) and invoke_id for invoke_id in invoke_ids)
    assert (batch["tasks"], batch["cache"]) == (2, {"hit": 1, "negative": 1})
    assert (lines["wrong"]["status"], lines["wrong"]["code"]) == (400, "invalid-task-id")
    assert (lines["nowhere"]["route"], lines["nowhere"]["code"]) == ("other", "not-found")
