"""One line a request: what it says, how loud, and how many of a crowd's are written."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from gateway.api.request_log import RequestLog, record_outcome
from gateway.domain.errors import UpstreamDetail, UpstreamRejected, UpstreamTimeout
from gateway.domain.snapshot import Operation, Snapshot, TaskKey
from gateway.progress.results import CacheResult, CacheStatus, FetchFailure, FetchResult
from gateway.telemetry.log_sampling import LogSampler
from tests.harness import Gateway, Json, Process, Simulator, fresh_id, serving, until

KEY = TaskKey(Operation.SD_GET_PROGRESS, "01j5t2qx82323pswaqykz9eq4")
SNAPSHOT = Snapshot(KEY, 0.0, 1.0, b"{}")
ROUTE = "/v1/progress/{taskId}"
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TIMEOUT = UpstreamTimeout("too late")
HIT = CacheResult(SNAPSHOT, 0.1, CacheStatus.HIT)
MISS = CacheResult(SNAPSHOT, 0.0, CacheStatus.MISS, fetch=FetchResult(SNAPSHOT, 0.25, "i_1"))


@pytest.fixture
def loud(caplog: pytest.LogCaptureFixture) -> Callable[[int], None]:
    """Return what sets the level from which lines are written; it is info."""
    caplog.set_level(logging.INFO, "gateway.api.request_log")
    return lambda level: caplog.set_level(level, "gateway.api.request_log")


pytestmark = pytest.mark.usefixtures("loud")


def scope(*outcomes: CacheResult | FetchFailure, **state: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"headers": [], "state": {"request_id": "r-1"} | state}
    if outcomes:
        made["state"]["outcomes"] = outcomes
    return made


def told(
    request: dict[str, Any], *, status: int = 200, route: str = ROUTE, log: RequestLog | None = None
) -> list[dict[str, Any]]:
    """Return the lines written for this request: one or none."""
    log = log or RequestLog(LogSampler())
    with capture_logs() as lines:
        log.log(request, method="GET", route=route, status=status, seconds=0.0123456789)
    return [dict(line) for line in lines]


# What it says


def test_requestlog_line_of_a_hit() -> None:
    """A hit has its task and verdict, and nothing of upstream."""
    assert told(scope(HIT)) == [
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
def test_requestlog_line_of_one_that_waited_for_upstream(source: CacheStatus) -> None:
    """Who began a flight or joined it is told how long upstream took, and the vendor's id of the call."""
    [line] = told(scope(MISS._replace(source=source)))
    assert (line["cache"], line["upstream_seconds"], line["upstream_invoke_id"]) == (source, 0.25, "i_1")


def test_requestlog_line_of_a_flight_that_asked_nobody() -> None:
    """A flight that found what another had stored has no call to tell of."""
    [line] = told(scope(MISS._replace(fetch=FetchResult(SNAPSHOT))))
    assert not [name for name in line if name.startswith("upstream")]


def test_requestlog_line_of_a_covered_failure() -> None:
    """A stale answer that covers a failure names it, and the call that failed."""
    covered = CacheResult(SNAPSHOT, 9.0, CacheStatus.STALE, failure=TIMEOUT, fetch=FetchResult(TIMEOUT, 10.0))
    [line] = told(scope(covered))
    assert (line["cache"], line["detail"], line["status"]) == ("stale", "upstream-timeout", 200)
    assert line["upstream_seconds"] == 10.0
    assert "upstream_invoke_id" not in line
    assert line["log_level"] == "info"


def test_requestlog_line_of_a_failure() -> None:
    """A failure is a warning with its code, and says whether it was remembered."""
    failed = FetchFailure(KEY, TIMEOUT, CacheStatus.NEGATIVE)
    [line] = told(scope(failed, code="upstream-timeout"), status=504)
    assert (line["log_level"], line["status"], line["code"]) == ("warning", 504, "upstream-timeout")
    assert (line["cache"], line["detail"], line["task_id"]) == ("negative", "upstream-timeout", KEY.task_id)


def test_requestlog_line_of_a_batch() -> None:
    """Many tasks are a number, their verdicts are counted, and upstream's time is the longest."""
    slow = MISS._replace(fetch=FetchResult(SNAPSHOT, 0.75, "i_2"))
    [line] = told(
        scope(HIT, MISS, slow, FetchFailure(KEY, TIMEOUT, CacheStatus.MISS, FetchResult(TIMEOUT, 0.5)))
    )
    assert (line["tasks"], line["cache"]) == (4, {"hit": 1, "miss": 3})
    assert (line["upstream_seconds"], line["upstream_invoke_id"]) == (0.75, "i_1, i_2")
    assert "task_id" not in line


def test_requestlog_line_of_a_stream() -> None:
    """A stream has the number of its tasks and no verdict."""
    [line] = told(scope(tasks=7), route="/v1/events")
    assert line["tasks"] == 7
    assert "cache" not in line


def test_requestlog_line_of_a_wrong_request_is_bounded() -> None:
    """What a caller sent as a task ID is cut short, by the log, after it has been redacted."""
    request = scope(code="invalid-task-id") | {"path_params": {"taskId": "x" * 30_000}}
    [line] = told(request, status=400)
    assert line["task_id"].limit == 64
    assert (line["code"], line["log_level"]) == ("invalid-task-id", "info")


def test_requestlog_line_has_the_callers_trace() -> None:
    """A valid traceparent is taken over; an invalid one leaves no mark."""
    request = scope(HIT) | {"headers": [(b"traceparent", f"00-{TRACE}-{SPAN}-01".encode())]}
    [line] = told(request)
    assert (line["trace_id"], line["parent_id"]) == (TRACE, SPAN)
    request = scope(HIT) | {"headers": [(b"traceparent", b"00-junk")]}
    assert not {"trace_id", "parent_id"} & set(told(request)[0])


# How loud


def test_requestlog_probes_are_quiet(loud: Callable[[int], None]) -> None:
    """Probes and scrapes that go well are told at debug only; one that fails is a warning."""
    assert told(scope(), route="/healthz") == []
    assert told(scope(), route="/metrics") == []
    assert [line["log_level"] for line in told(scope(), route="/readyz", status=503)] == ["warning"]
    loud(logging.DEBUG)
    assert [line["log_level"] for line in told(scope(), route="/healthz")] == ["debug"]


def test_requestlog_below_the_level_says_nothing(loud: Callable[[int], None]) -> None:
    """With log.level = warning only failures are told."""
    loud(logging.WARNING)
    assert told(scope(HIT)) == []
    assert len(told(scope(), status=500)) == 1


# Crowds


def test_requestlog_samples_a_crowd_of_a_kind() -> None:
    """Lines of one route, class of status and verdict are sampled together; others are not held up."""
    log = RequestLog(LogSampler(first=2, every=100, clock=lambda: 0.0))
    crowd = [line for _ in range(102) for line in told(scope(HIT), log=log)]
    assert [line.get("suppressed") for line in crowd] == [None, None, 99]
    for request, status in [
        (scope(MISS), 200),
        (scope(HIT._replace(failure=TIMEOUT)), 200),
        (scope(FetchFailure(KEY, TIMEOUT, CacheStatus.MISS)), 504),
        (scope(code="not-found"), 404),
        (scope(code="too-many-requests"), 429),
    ]:
        assert len(told(request, status=status, log=log)) == 1
    assert len(told(scope(HIT), route="/v1/progress", log=log)) == 1


def test_settled_leaves_the_outcome_and_raises_the_failure() -> None:
    """A reading is returned, a failure raised, and either is left in the scope."""
    request = scope()
    assert record_outcome(request, HIT) is HIT
    assert request["state"]["outcomes"] == (HIT,)
    failed = FetchFailure(
        KEY, UpstreamRejected("no", envelope=b"{}", detail=UpstreamDetail()), CacheStatus.MISS
    )
    with pytest.raises(UpstreamRejected) as raised:
        record_outcome(request, failed)
    assert raised.value is not failed.failure  # which others may share
    assert vars(raised.value) == vars(failed.failure)
    assert request["state"]["outcomes"] == (failed,)


# The whole, as a process


def line_of(process: Process, request_id: str) -> Json:
    """Wait for the line of this request."""

    def found() -> list[Json]:
        return [line for line in map(json.loads, list(process.lines)) if line.get("request_id") == request_id]

    [line] = until(found, f"a line for {request_id} in {process.output}")
    return dict(line)


def test_requestlog_of_a_gateway_at_work(tmp_path: Path, simulator: Simulator) -> None:
    """By default each request is a line, with what became of it at upstream, and no secret."""
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
