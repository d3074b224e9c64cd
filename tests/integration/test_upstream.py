"""Failures on the way to the upstream, over real sockets."""

import asyncio
import gzip
import json
import logging
import math
import re
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from gateway.domain.task import Operation
from gateway.upstream.header_values import parse_http_date, parse_retry_after
from gateway.upstream.signing import verify
from tests.support.egress import Proxy, socks_proxy
from tests.support.harness import (
    KEY,
    SECRET,
    Behaviour,
    Gateway,
    Json,
    RawUpstream,
    Request,
    Simulator,
    answer,
    framed,
    free_port,
    fresh_id,
    relay,
    reset,
    respond_ok,
    running,
    serving,
    sum_of_samples,
    until,
)

Launch = Callable[..., Gateway]

ATTEMPTS = 3  # the first call, and upstream.retries more
DEADLINE_SECONDS = 30
# A failure is forgotten at once, so that the next query makes a call.
QUICK: dict[str, Json] = {
    "upstream": {"timeout_seconds": DEADLINE_SECONDS},
    "cache": {"error_seconds": 0},
}
# For responses that never come: on a busy machine any attempt may take this long.
IMPATIENT = QUICK | {"upstream": QUICK["upstream"] | {"attempt_timeout_seconds": 0.3}}
# The gateways of earlier tests stop in the background. Each cause of a failed call has a line per minute.
NOT_COUNTED = {"started", "stopped", "upstream_unreachable"}


class Outcome(NamedTuple):
    """The problem that a caller receives, the number of upstream calls, and the side effects.

    `log`: the log events besides the request's own line. `log_after`: the events after the next success.
    """

    status: int
    code: str
    calls: int = 1
    retry_after: str | None = None
    log: tuple[str, ...] = ()
    log_after: tuple[str, ...] = ()


INVALID = Outcome(502, "upstream-invalid")
BUSY = Outcome(502, "upstream-invalid", ATTEMPTS)
UNREACHABLE = Outcome(502, "upstream-unreachable", ATTEMPTS)
TIMEOUT = Outcome(504, "upstream-timeout", ATTEMPTS)
REJECTED = Outcome(502, "upstream-rejected")
CREDENTIALS = Outcome(
    502, "upstream-credentials", log=("credentials_refused",), log_after=("credentials_accepted_again",)
)
FORBIDDEN = Outcome(502, "upstream-credentials")  # the response does not name the key pair
CLOCK = Outcome(502, "upstream-credentials")  # like the nonce, not a failure of the key pair
NONCE = CLOCK._replace(calls=ATTEMPTS)
THROTTLED = Outcome(503, "upstream-throttled", 1, "1", log=("upstream_throttled",))


@pytest.fixture(autouse=True)
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[Json]]:
    """Return the log lines of every gateway here, before redaction; libraries must log nothing."""
    caplog.set_level(logging.INFO, "gateway")
    with capture_logs() as captured:
        yield captured  # type: ignore[misc]  # they are dicts
    assert caplog.records == []


def counts(gate: Gateway, code: str) -> tuple[float, float, float]:
    """Return how many calls there were, with this outcome, and how many retries for it."""
    metrics = gate.client.get("/metrics").text
    return (
        sum_of_samples(metrics, "upstream_requests_total"),
        sum_of_samples(metrics, "upstream_requests_total", outcome=code),
        sum_of_samples(metrics, "upstream_retries_total", reason=code),
    )


def assert_reported(gate: Gateway, task_id: str, outcome: Outcome, *, in_flight: int = 0) -> httpx.Response:
    """Query a task; the response and the metrics must report the same failure."""
    before = counts(gate, outcome.code)
    response = gate.get(task_id)
    problem = response.json()
    assert (response.status_code, problem["code"]) == (outcome.status, outcome.code), problem
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers.get("retry-after") == outcome.retry_after
    after = counts(gate, outcome.code)
    assert [now - then for now, then in zip(after, before, strict=True)] == [
        outcome.calls,
        outcome.calls,
        outcome.calls - 1,
    ]
    assert gate.metric("upstream_in_flight") == in_flight
    return response


def patience(outcome: Outcome | None, **upstream: Json) -> dict[str, Json]:
    """Return the settings for this case, with more of `upstream`."""
    settings = IMPATIENT if outcome == TIMEOUT else QUICK
    return settings | {"upstream": settings["upstream"] | upstream}


def assert_success(gate: Gateway, task_id: str) -> httpx.Response:
    """Query a task; the response must be its progress."""
    response = gate.get(task_id)
    assert response.status_code == 200, response.text
    assert response.json()["taskId"] == task_id
    return response


def assert_logged(lines: list[Json], response: httpx.Response, *events: str) -> None:
    """Check that the log has these events and the answered request since the last check, and no more."""
    request_id = response.headers["x-request-id"]
    until(lambda: any(line.get("request_id") == request_id for line in list(lines)), "the line is written")
    outcome = [lines.pop(0) for _ in list(lines)]
    text = repr(outcome)
    outcome = [line for line in outcome if line["event"] not in NOT_COUNTED]
    assert [line["event"] for line in outcome] == [*events, "request"]
    assert not re.search(rf"exc_info|Traceback|{KEY}|{SECRET}|x-ca-|StringToSign", text), text
    line = outcome[-1]
    # Each limit contains the next: the caller's deadline, the request, the calls made for it.
    assert DEADLINE_SECONDS > line.pop("seconds") >= line.pop("upstream_seconds") > 0
    answer = response.json()
    expected = {
        "event": "request",
        "log_level": "info",
        "request_id": request_id,
        "method": "GET",
        "route": "/v1/progress/{taskId}",
        "task_id": response.url.path.rpartition("/")[2],
        "status": response.status_code,
        "cache": "miss",
    }
    if response.is_error:
        upstream = answer.get("upstream") or {}
        invoke_id = upstream.get("invokeId") or upstream.get("requestId")
        expected |= {"log_level": "warning", "code": answer["code"], "detail": answer["code"]}
    else:
        invoke_id = line.get("upstream_invoke_id")
    assert line == expected | ({"upstream_invoke_id": invoke_id} if invoke_id else {})


# --- error responses of the API gateway ------------------------------------------------------------------

CODES = {
    "A400IK": ("Invalid AppKey", CREDENTIALS),
    "A403IS": ("Invalid Signature, Server StringToSign:`x`", CREDENTIALS),
    "A400MA": ("Unauthorized", CREDENTIALS),
    "A401AC": ("Unauthorized", CREDENTIALS),
    "A403EP": ("Unauthorized", CREDENTIALS),
    "A403PR": ("Unauthorized", CREDENTIALS),
    "I403AA": ("Unauthorized", CREDENTIALS),
    "I400NC": ("Nonce Used", NONCE),
    "T429ID": ("Throttled by DOMAIN Flow Control", THROTTLED),
    "T429IN": ("Throttled by INNER Flow Control", THROTTLED),
    "T429GR": ("Throttled by GROUP Flow Control", THROTTLED),
    "T429PA": ("Throttled by APP Flow Control", THROTTLED),
    "T429PR": ("Throttled by API Flow Control", THROTTLED),
    "T429SR": ("Throttled by USER Flow Control", THROTTLED),
    "T429MR": ("Throttled by API Flow Control", THROTTLED),
    "B403MQ": ("Quota Exhausted", CREDENTIALS),
    "B403ME": ("Quota Expired", CREDENTIALS),
    "B403MI": ("User Arrears", CREDENTIALS),
    "B403OD": ("User Arrears", CREDENTIALS),
    "B403MO": ("Quota Exhausted", CREDENTIALS),
    "I400HD": ("Invalid Url", INVALID),
    "I400MH": ("Invalid Content-MD5", INVALID),
    "I400BD": ("Invalid Url", INVALID),
    "I400PA": ("API Not Found", INVALID),
    "I405UM": ("Unsupported Method", INVALID),
    "I413RL": ("Request Too Large", INVALID),
    "I400I5": ("Invalid Url", INVALID),
    "D503BB": ("Service Unavailable", BUSY),
    "D503CB": ("Service Unavailable", BUSY),
    "X503BZ": ("Service Unavailable", BUSY),
    "X500ER": ("Internal Error", BUSY),
    "D502FC": ("Internal Error", BUSY),
    "N502RE": ("Internal Error", BUSY),
    "D504TO": ("Async Service", TIMEOUT),
    "X504TO": ("Async Service", TIMEOUT),
    "D504RE": ("Async Service", TIMEOUT),
    "D504CO": ("Async Service", TIMEOUT),
    "D504CS": ("Async Service", TIMEOUT),
    "D504IL": ("Async Service", TIMEOUT),
    "X504VE": ("Async Service", TIMEOUT),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["code", "legacy"])
@pytest.mark.parametrize("code", CODES)
def test_upstream_error_response_is_reported(
    simulator: Simulator,
    launch: Launch,
    lines: list[Json],
    code: str,
    legacy: bool,  # noqa: FBT001 - pytest passes by name
) -> None:
    """Each documented error response, with its code or in the older form, becomes its problem."""
    message, outcome = CODES[code]
    gate = launch(simulator.url, **QUICK)
    simulator.fault("refuse", code=code, message=message, legacy=legacy)
    task = simulator.task()
    response = assert_reported(gate, task, outcome)
    upstream = response.json()["upstream"]
    assert upstream["errCode"].startswith("HTTP " if legacy else code)
    assert upstream["errMessage"].startswith(message[:17])
    assert upstream["requestId"]
    assert simulator.calls(task) == outcome.calls
    assert_logged(lines, response, *outcome.log)
    simulator.heal()
    assert_logged(lines, assert_success(gate, simulator.task()), *outcome.log_after)


@pytest.mark.parametrize("code", ["T429ZZ", "X503ZZ", "A403ZZ", "D504ZZ", "Z418ZZ"])
def test_upstream_unknown_code_is_classified_by_its_status(
    simulator: Simulator, launch: Launch, lines: list[Json], code: str
) -> None:
    """A code that is not documented still contains its HTTP status."""
    expected = {"T": THROTTLED, "X": BUSY, "A": CREDENTIALS, "D": TIMEOUT, "Z": INVALID}
    gate = launch(simulator.url, **QUICK)
    simulator.fault("refuse", code=code, message="something new")
    outcome = expected[code[0]]
    assert_logged(lines, assert_reported(gate, simulator.task(), outcome), *outcome.log)
    simulator.heal()
    assert_logged(lines, assert_success(gate, simulator.task()), *outcome.log_after)


# --- faults of the simulator ------------------------------------------------------------------------------

LEAST = '{"status": 10, "data": {"taskId": "TASK"}}'  # a successful body; TASK stands for the task's ID

FAULTS: dict[str, tuple[dict[str, Any], Outcome]] = {
    "500": ({"name": "status", "status": 500}, BUSY),
    "502": ({"name": "status", "status": 502}, BUSY),
    "503": ({"name": "status", "status": 503}, BUSY),
    "503-retry-after": ({"name": "status", "status": 503, "retryAfter": 60}, BUSY._replace(calls=1)),
    "504": ({"name": "status", "status": 504}, TIMEOUT),
    "404": ({"name": "status", "status": 404}, INVALID),
    "401": ({"name": "status", "status": 401}, FORBIDDEN),
    "403": ({"name": "status", "status": 403}, FORBIDDEN),
    "429": ({"name": "status", "status": 429}, THROTTLED),
    "429-retry-after": (
        {"name": "status", "status": 429, "retryAfter": 7},
        THROTTLED._replace(retry_after="7"),
    ),
    "429-retry-after-long": (
        {"name": "status", "status": 429, "retryAfter": 99999},
        THROTTLED._replace(retry_after="3600"),
    ),
    "429-retry-after-odd": ({"name": "status", "status": 429, "retryAfter": "soon"}, THROTTLED),
    "429-retry-after-past": (
        {"name": "status", "status": 429, "retryAfter": "Wed, 21 Oct 2015 07:28:00 GMT"},
        THROTTLED,
    ),
    "403-throttled": (
        {"name": "refuse", "status": 403, "message": "Throttled by USER Flow Control", "legacy": True},
        THROTTLED,
    ),
    "403-throttled-retry-after": (
        {
            "name": "refuse",
            "status": 403,
            "message": "Throttled by USER Flow Control",
            "legacy": True,
            "retryAfter": 9,
        },
        THROTTLED._replace(retry_after="9"),
    ),
    "429-retry-after-never": (
        {"name": "status", "status": 429, "retryAfter": "Fri, 31 Dec 9999 23:59:59 GMT"},
        THROTTLED._replace(retry_after="3600"),
    ),
    "429-throttled-retry-after": (
        {"name": "refuse", "code": "T429PA", "message": "Throttled by APP Flow Control", "retryAfter": 5},
        THROTTLED._replace(retry_after="5"),
    ),
    "timestamp-expired": ({"name": "refuse", "status": 400, "message": "Timestamp Expired"}, CLOCK),
    "timestamp-invalid": ({"name": "refuse", "status": 400, "message": "Invalid Timestamp"}, CLOCK),
    "nonce-without-code": ({"name": "refuse", "status": 403, "message": "Nonce Used"}, NONCE),
    "silence": ({"name": "silent"}, TIMEOUT),
    "drip": ({"name": "drip", "interval": 0.05}, TIMEOUT),
    "slow": ({"name": "slow", "seconds": 30}, TIMEOUT),
    "cut": ({"name": "cut"}, UNREACHABLE),
    "rejected": ({"name": "reject"}, REJECTED),
    "rejected-bare": ({"name": "reject", "errCode": None, "errMessage": None}, REJECTED),
    "html": ({"name": "body", "contentType": "text/html"}, INVALID),
    "empty": ({"name": "body", "body": ""}, INVALID),
    "number": ({"name": "body", "body": "10"}, INVALID),
    "null": ({"name": "body", "body": "null"}, INVALID),
    "text": ({"name": "body", "body": '"10"'}, INVALID),
    "true": ({"name": "body", "body": "true"}, INVALID),
    "list": ({"name": "body", "body": f"[{LEAST}]"}, INVALID),
    "object": ({"name": "body", "body": "{}"}, INVALID),
    "byte-order-marks": ({"name": "body", "body": f"\ufeff\ufeff{LEAST}"}, INVALID),
    "no-status": ({"name": "body", "body": '{"data": {"taskId": "TASK"}}'}, INVALID),
    "status-is-text": ({"name": "body", "body": LEAST.replace("10", '"ten"')}, INVALID),
    "status-is-true": ({"name": "body", "body": LEAST.replace("10", "true")}, INVALID),
    "status-is-float": ({"name": "body", "body": LEAST.replace("10", "10.5")}, INVALID),
    "status-is-null": ({"name": "body", "body": LEAST.replace("10", "null")}, INVALID),
    "status-is-list": ({"name": "body", "body": LEAST.replace("10", "[10]")}, INVALID),
    "no-data": ({"name": "body", "body": '{"status": 10, "taskId": "TASK"}'}, INVALID),
    "data-is-null": ({"name": "body", "body": '{"status": 10, "data": null}'}, INVALID),
    "data-is-text": ({"name": "body", "body": '{"status": 10, "data": "TASK"}'}, INVALID),
    "data-is-number": ({"name": "body", "body": '{"status": 10, "data": 0.5}'}, INVALID),
    "data-is-list": ({"name": "body", "body": '{"status": 10, "data": [{"taskId": "TASK"}]}'}, INVALID),
    "no-task": ({"name": "body", "body": '{"status": 10, "data": {"status": "running"}}'}, INVALID),
    "task-is-null": ({"name": "body", "body": LEAST.replace('"TASK"', "null")}, INVALID),
    "task-is-number": ({"name": "body", "body": LEAST.replace('"TASK"', "7")}, INVALID),
    "task-is-list": ({"name": "body", "body": LEAST.replace('"TASK"', '["TASK"]')}, INVALID),
    "another-task": ({"name": "body", "body": LEAST.replace("TASK", "TASKx")}, INVALID),
    "half": ({"name": "body", "body": LEAST[:-1]}, INVALID),
    "two": ({"name": "body", "body": LEAST * 2}, INVALID),
    "nan": ({"name": "body", "body": LEAST.replace("}}", ', "progress": -NaN}}')}, INVALID),
    "infinity": ({"name": "body", "body": LEAST.replace("}}", ', "progress": inf}}')}, INVALID),
    "beyond-floats": ({"name": "body", "body": LEAST.replace("}}", ', "progress": 1e999}}')}, INVALID),
    "endless-integer": (
        {"name": "body", "body": LEAST.replace("10", f"1{'0' * 5000}")},
        INVALID,
    ),
    "deep": ({"name": "deep"}, INVALID),
    "large": ({"name": "large", "bytes": 8_388_608}, INVALID),
    "gzip-bomb": ({"name": "gzip_bomb", "bytes": 209_715_200}, INVALID),
}


@pytest.fixture(scope="module")
def socks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """Run a SOCKS proxy: it passes on every byte as it is."""
    with socks_proxy(tmp_path_factory.mktemp("socks")) as proxy:
        yield proxy


@pytest.fixture(params=["direct", "socks"])
def through(request: pytest.FixtureRequest) -> dict[str, Json]:
    """Return the settings for direct connections, or for those through a proxy."""
    return {"proxy": request.getfixturevalue("socks").url} if request.param == "socks" else {}


@pytest.mark.parametrize("name", FAULTS)
def test_upstream_fault_is_reported(
    simulator: Simulator, launch: Launch, lines: list[Json], name: str, through: dict[str, Json]
) -> None:
    """For every fault of the upstream the caller receives its problem, and the next query succeeds."""
    fault, outcome = FAULTS[name]
    gate = launch(simulator.url, **patience(outcome, **through))
    task = simulator.task()
    if "body" in fault:
        fault = fault | {"body": fault["body"].replace("TASK", task)}
    simulator.control("PUT", "/faults", **fault)
    response = assert_reported(gate, task, outcome)
    assert simulator.calls(task) == outcome.calls
    assert_logged(lines, response, *outcome.log)
    simulator.heal()
    assert_logged(lines, assert_success(gate, simulator.task()), *outcome.log_after)


def test_upstream_minimal_response_is_accepted(simulator: Simulator, gate: Gateway) -> None:
    """The minimal valid body, which the invalid ones above almost match, is accepted."""
    task = simulator.task()
    simulator.fault("body", body=LEAST.replace("TASK", task))
    assert_success(gate, task)


@pytest.mark.parametrize("name", ["cut", "500", "503", "silence", "504"])
def test_upstream_transient_fault_is_retried(simulator: Simulator, launch: Launch, name: str) -> None:
    """A transient fault causes a second call with a new signature; the caller sees only success."""
    gate = launch(simulator.url, **patience(FAULTS[name][1]))
    simulator.control("PUT", "/faults", **FAULTS[name][0], times=1)
    task = simulator.task()
    assert_success(gate, task)
    first, second = simulator.requests()
    assert first["headers"]["x-ca-nonce"] != second["headers"]["x-ca-nonce"]
    assert first["headers"]["x-ca-signature"] != second["headers"]["x-ca-signature"]
    assert simulator.stats()["refused"] == 0
    assert gate.metric("upstream_retries_total", reason=FAULTS[name][1].code) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_upstream_redirect_is_not_followed(
    simulator: Simulator, launch: Launch, lines: list[Json], status: int
) -> None:
    """A redirect is an invalid response; the other host receives no request."""
    gate = launch(simulator.url, **QUICK)
    with RawUpstream(respond_ok) as other:
        simulator.fault("redirect", location=f"{other.url}/scc/sd_get_progress", status=status)
        response = assert_reported(gate, simulator.task(), INVALID)
        assert other.requests == []
    assert "location" not in response.headers
    assert simulator.calls() == 1
    assert_logged(lines, response)
    simulator.heal()
    assert_logged(lines, assert_success(gate, simulator.task()))


def test_upstream_cookies_and_odd_headers_are_ignored(
    simulator: Simulator, launch: Launch, lines: list[Json]
) -> None:
    """Response headers reach neither the caller nor the log, and no cookie is sent back."""
    gate = launch(simulator.url, **QUICK)
    simulator.fault("cookie")
    responses = [ask(simulator.task()) for ask in (gate.get, gate.native, gate.get)]
    for response in responses:
        assert response.status_code == 200
        assert not {"set-cookie", "server", "x-powered-by", "x-odd", "x-ca-request-id"} & set(
            response.headers
        )
    assert [request for request in simulator.requests() if "cookie" in request["headers"]] == []
    until(lambda: [line["event"] for line in list(lines)].count("request") == 3, "the lines are written")
    assert not re.search(r"acw_tc|Tengine|PHP|caf(\xe9|\\)|\xbf", repr(lines))


@pytest.mark.parametrize(
    "date",
    [
        "yesterday",
        "",
        "Thu, 99999999999999999999 Jan 2026 00:00:00 GMT",  # a number that exceeds every C integer
        "Thu, 01 Jan 2026 99999999999:00:00 GMT",
        "Fri, 31 Dec 9999 23:59:59 -2359",
        "Mon, 01 Jan 0001 00:00:00 +2359",
    ],
)
def test_upstream_invalid_date_is_no_failure(launch: Launch, date: str) -> None:
    """An invalid Date header is ignored; the response counts."""

    def answers(connection: socket.socket, request: Request) -> None:
        connection.sendall(framed(request.envelope(), f"date: {date}"))

    with RawUpstream(answers) as upstream:
        assert launch(upstream.url).get(fresh_id()).status_code == 200


def test_upstream_large_or_compressed_response_is_accepted(simulator: Simulator, launch: Launch) -> None:
    """A response up to upstream.max_response_bytes is accepted, plain or with gzip."""
    gate = launch(simulator.url, **QUICK)
    for name in ("large", "gzip_bomb"):
        simulator.fault(name, bytes=900_000)
        assert_success(gate, simulator.task())
        simulator.heal()


# --- faults that need a raw socket ------------------------------------------------------------------------


def _reset_inside(connection: socket.socket, request: Request) -> None:
    connection.sendall(answer(request.envelope()[:20], "content-length: 100"))
    reset(connection)


def _sends(make: Callable[[Request], bytes], *, then_close: bool = True) -> Behaviour:
    def behaviour(connection: socket.socket, request: Request) -> None:
        connection.sendall(make(request))
        if then_close:
            connection.close()

    return behaviour


def _packed(request: Request, encoding: str, pack: Callable[[bytes], bytes]) -> bytes:
    return framed(pack(request.envelope()), f"content-encoding: {encoding}")


def _chunked(body: bytes) -> bytes:
    return answer(b"%x\r\n%s\r\n" % (len(body), body), "transfer-encoding: chunked")


WIRE: dict[str, tuple[Behaviour, Outcome | None]] = {
    "reset-before": (lambda connection, _: reset(connection), UNREACHABLE),
    "closed-before": (lambda connection, _: connection.close(), UNREACHABLE),
    "reset-inside": (_reset_inside, UNREACHABLE),
    "silence": (lambda connection, _: connection.recv(1), TIMEOUT),  # type: ignore[arg-type,return-value]
    "garbage": (_sends(lambda _: b"\x00\x01\x02 what?\r\n\r\n"), UNREACHABLE),
    "another-protocol": (_sends(lambda _: b"220 smtp.example.invalid ESMTP\r\n"), UNREACHABLE),
    "endless-header": (_sends(lambda _: b"HTTP/1.1 200 OK\r\nx: " + b"x" * 300_000), UNREACHABLE),
    "half-a-head": (_sends(lambda _: b"HTTP/1.1 200 OK\r\ncontent-"), UNREACHABLE),
    "length-too-long": (_sends(lambda r: answer(r.envelope(), "content-length: 5000")), UNREACHABLE),
    "length-too-short": (_sends(lambda r: answer(r.envelope(), "content-length: 9")), UNREACHABLE),
    "length-negative": (_sends(lambda r: answer(r.envelope(), "content-length: -1")), UNREACHABLE),
    "length-twice": (
        _sends(lambda r: answer(r.envelope(), "content-length: 5", "content-length: 6")),
        UNREACHABLE,
    ),
    "chunks-unfinished": (_sends(lambda r: _chunked(r.envelope())), UNREACHABLE),
    "chunks-garbage": (
        _sends(lambda _: answer(b"zz\r\n{}\r\n", "transfer-encoding: chunked")),
        UNREACHABLE,
    ),
    "no-content": (_sends(lambda _: answer(b"", status="HTTP/1.1 204 No Content")), INVALID),
    "not-utf-8": (_sends(lambda _: framed(b'{"status": 10, "data": "\xff"}')), INVALID),
    "encoding-unknown": (_sends(lambda r: framed(r.envelope(), "content-encoding: br")), INVALID),
    "encoding-lies": (_sends(lambda r: framed(r.envelope(), "content-encoding: gzip")), INVALID),
    "gzip-cut": (_sends(lambda r: _packed(r, "gzip", lambda body: gzip.compress(body)[:-20])), INVALID),
    "gzip-without-trailer": (
        _sends(lambda r: _packed(r, "gzip", lambda body: gzip.compress(body)[:-8])),
        INVALID,
    ),
    "gzip-with-more": (
        _sends(lambda r: _packed(r, "gzip", lambda body: gzip.compress(body) + b"more")),
        INVALID,
    ),
    "deflate-cut": (_sends(lambda r: _packed(r, "deflate", lambda body: zlib.compress(body)[:-1])), INVALID),
    "gzip": (_sends(lambda r: _packed(r, "gzip", gzip.compress)), None),
    "x-gzip": (_sends(lambda r: _packed(r, "X-Gzip ", gzip.compress)), None),
    "deflate": (_sends(lambda r: _packed(r, "deflate", zlib.compress)), None),
    "chunks": (_sends(lambda r: _chunked(r.envelope()) + b"0\r\n\r\n"), None),
    "http-1.0": (_sends(lambda r: answer(r.envelope(), status="HTTP/1.0 200 OK")), None),
    "http-1.0-kept": (
        _sends(
            lambda r: framed(r.envelope(), "connection: keep-alive", status="HTTP/1.0 200 OK"),
            then_close=False,
        ),
        None,
    ),
    "close-delimited": (_sends(lambda r: answer(r.envelope(), "connection: close")), None),
    "interim": (_sends(lambda r: b"HTTP/1.1 100 Continue\r\n\r\n" + framed(r.envelope())), None),
    # Bytes after the end of a response could be taken for the response to another task.
    "trailing-garbage": (
        _sends(lambda r: framed(r.envelope()) + b"more", then_close=False),
        UNREACHABLE,
    ),
}


@pytest.mark.parametrize("name", WIRE)
def test_upstream_fault_on_the_wire_is_reported(
    launch: Launch, lines: list[Json], name: str, through: dict[str, Json]
) -> None:
    """Invalid HTTP becomes its problem, unusual HTTP is accepted; the next query works."""
    behaviour, outcome = WIRE[name]
    if through:  # httpx notices bytes after the response only when it reuses the connection
        outcome = {"trailing-garbage": None, "length-too-short": INVALID}.get(name, outcome)
    with RawUpstream(behaviour) as upstream:
        gate = launch(upstream.url, **patience(outcome, **through))
        if outcome is None:
            response = assert_success(gate, fresh_id())
            assert gate.metric("upstream_requests_total") == 1
            assert gate.metric("upstream_requests_total", outcome="ok") == 1
        else:
            response = assert_reported(gate, fresh_id(), outcome)
        assert len(upstream.requests) == (outcome.calls if outcome else 1)
        assert_logged(lines, response)
        upstream.behaviour = respond_ok
        assert_logged(lines, assert_success(gate, fresh_id()))


def test_upstream_that_refuses_connections_is_unreachable(launch: Launch, lines: list[Json]) -> None:
    """A refused connection is reported; queries work once the upstream listens."""
    port = free_port()
    gate = launch(f"http://127.0.0.1:{port}", **QUICK)
    assert_logged(lines, assert_reported(gate, fresh_id(), UNREACHABLE))
    with RawUpstream(respond_ok, port=port):
        assert_logged(lines, assert_success(gate, fresh_id()))


def test_upstream_without_an_address_is_unreachable(launch: Launch, lines: list[Json]) -> None:
    """A host name that does not resolve is reported as unreachable."""
    upstream = {"allow_insecure": True, "attempt_timeout_seconds": 10}
    gate = launch("http://unknown.invalid", upstream=upstream, cache={"error_seconds": 0})
    assert_logged(lines, assert_reported(gate, fresh_id(), UNREACHABLE))
    assert gate.metric("upstream_certificate_errors_total") == 0


def test_upstream_with_an_untrusted_certificate_gets_nothing(
    simulator: Simulator, launch: Launch, lines: list[Json]
) -> None:
    """An unknown certificate authority ends the connection before anything is sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with running(
        simulator.stage, lifespan="off", date_header=False, ssl_context_factory=lambda *_: context
    ) as url:
        gate = launch(url, **QUICK)
        assert_logged(lines, assert_reported(gate, fresh_id(), UNREACHABLE))
        assert gate.metric("upstream_certificate_errors_total") == ATTEMPTS
    assert simulator.requests() == []


# --- retries, clocks, key pairs ---------------------------------------------------------------------------


def test_upstream_idle_connection_that_was_dropped_is_no_failure(
    simulator: Simulator, launch: Launch
) -> None:
    """An idle connection that was closed by the upstream is replaced, and the query is signed again."""
    seen: set[socket.socket] = set()

    def drops_the_second(connection: socket.socket, request: Request) -> None:
        if connection in seen:
            connection.close()
            return
        seen.add(connection)
        passed_on = relay(simulator.url, request)
        connection.sendall(passed_on.replace(b"connection: close\r\n", b""))

    with RawUpstream(drops_the_second) as upstream:
        gate = launch(upstream.url, **QUICK)
        assert_success(gate, simulator.task())
        assert_success(gate, simulator.task())
        _, dropped, again = upstream.requests
        assert dropped.body == again.body
        assert dropped.headers["x-ca-nonce"] != again.headers["x-ca-nonce"]
        for request in upstream.requests:
            verdict = verify("POST", "/scc/sd_get_progress", request.headers, request.body, secret=SECRET)
            assert verdict.fault is None
    assert simulator.stats()["refused"] == 0
    assert gate.metric("upstream_retries_total", reason="upstream-unreachable") == 1


def test_upstream_retries_have_a_budget(simulator: Simulator, launch: Launch) -> None:
    """A failing upstream receives few more calls than there are queries, not three times as many."""
    gate = launch(simulator.url, **QUICK)
    sick = simulator.task()
    simulator.fault("status", status=500, taskId=sick)
    for _ in range(30):
        for _ in range(5):  # most calls succeed, or the circuit would open
            assert_success(gate, simulator.task())
        assert gate.get(sick).status_code == 502
    assert 30 < simulator.calls(sick) <= 30 + 10 + 30 * 6 * 0.2


def test_upstream_retries_can_be_switched_off(simulator: Simulator, launch: Launch) -> None:
    """With upstream.retries = 0 a query is one call."""
    gate = launch(simulator.url, upstream={"retries": 0})
    simulator.fault("status", status=500)
    assert_reported(gate, fresh_id(), BUSY._replace(calls=1))


@pytest.mark.parametrize(
    "fault", [{"name": "silent"}, {"name": "drip", "interval": 1}], ids=["silence", "drip"]
)
def test_upstream_deadline_bounds_all_attempts(
    simulator: Simulator, launch: Launch, lines: list[Json], fault: dict[str, Any]
) -> None:
    """upstream.timeout_seconds ends a query before its last attempt; a slow body does not extend it."""
    gate = launch(simulator.url, upstream={"attempt_timeout_seconds": 60, "timeout_seconds": 0.2})
    simulator.control("PUT", "/faults", **fault)
    # Without the deadline, a missing response takes a minute, and a body at one byte per second longer.
    # The upstream works on the call all the while, so it still counts as in flight.
    assert_logged(lines, assert_reported(gate, fresh_id(), TIMEOUT._replace(calls=1), in_flight=1))


async def test_upstream_at_its_concurrency_limit_is_overload(simulator: Simulator, launch: Launch) -> None:
    """A query that waits too long for one of upstream.max_in_flight calls to end receives Retry-After."""
    bounds = {"max_in_flight": 1, "timeout_seconds": 0.2, "attempt_timeout_seconds": 0.2, "retries": 0}
    gate = launch(simulator.url, upstream=bounds)
    simulator.fault("silent")
    seen: set[tuple[str, str | None]] = set()
    async with httpx.AsyncClient(base_url=gate.url, trust_env=False, verify=False, timeout=30) as client:  # noqa: S501
        for _ in range(50):  # those with the same deadline as the call in flight are never sent
            burst = [client.get(f"/v1/progress/{fresh_id()}") for _ in range(30)]
            for response in await asyncio.gather(*burst):
                seen.add((response.json()["code"], response.headers.get("retry-after")))
            if ("overloaded", "1") in seen:
                break
    assert seen - {("upstream-timeout", None)} == {("overloaded", "1")}
    # The end of an abandoned call may be noticed only after the next one has arrived.
    assert 1 <= simulator.stats()["maxInFlight"] <= 2
    simulator.heal()
    assert_success(gate, simulator.task())


def test_upstream_works_on_no_more_calls_than_the_limit(launch: Launch) -> None:
    """A call that is cut off by its query's deadline counts until the upstream has finished it."""
    released = threading.Event()

    def held(connection: socket.socket, request: Request) -> None:
        released.wait(30)
        respond_ok(connection, request)

    bounds = {"max_in_flight": 2, "timeout_seconds": 0.2, "attempt_timeout_seconds": 60, "retries": 0}
    with RawUpstream(held) as upstream, ThreadPoolExecutor(10) as pool:
        gate = launch(upstream.url, upstream=bounds, cache={"error_seconds": 0})
        try:
            for _ in range(3):
                codes = {
                    answer.json()["code"] for answer in pool.map(gate.get, [fresh_id() for _ in range(10)])
                }
                assert codes <= {"upstream-timeout", "overloaded"}
                assert len(upstream.requests) == 2
                assert gate.metric("upstream_in_flight") == 2
        finally:
            released.set()
        until(lambda: gate.metric("upstream_in_flight") == 0, "the answers have come")
        assert_success(gate, fresh_id())


def test_upstream_refusal_without_credentials_fails_one_task(
    simulator: Simulator, launch: Launch, lines: list[Json]
) -> None:
    """A bare 401 or 403 is a failure of its task; the pair keeps signing, and no other is tried."""
    gate = launch(simulator.url, cache={"error_seconds": 60}, credentials=NEXT)
    for status, calls in ((401, 1), (403, 2)):  # the second one is confirmed on a new connection
        refused = simulator.task()
        simulator.control("PUT", "/faults", name="status", status=status, taskId=refused)
        for _ in range(2):
            response = gate.get(refused)
            assert (response.status_code, response.json()["code"]) == (502, "upstream-credentials")
        assert simulator.calls(refused) == calls
        assert_success(gate, simulator.task())
    assert {request["headers"]["x-ca-key"] for request in simulator.requests()} == {KEY}
    assert gate.client.get("/readyz").json()["degraded"] == []
    assert not [line for line in lines if line["event"].startswith("credentials")]


def test_upstream_probe_leaves_the_slots_to_others(launch: Launch) -> None:
    """Queries that wait for a probe do not count as calls: calls of another operation are made."""
    released = threading.Event()

    def behaviour(connection: socket.socket, request: Request) -> None:
        if b"comfy" in request.head:
            respond_ok(connection, request)
        elif request.headers["x-ca-key"] == KEY:
            connection.sendall(
                framed(b"", "x-ca-error-message: Invalid AppKey", status="HTTP/1.1 403 Forbidden")
            )
        else:
            released.wait(30)
            respond_ok(connection, request)

    with RawUpstream(behaviour) as upstream, ThreadPoolExecutor(10) as pool:
        gate = launch(upstream.url, upstream={"max_in_flight": 2}, credentials=NEXT)
        try:
            first = pool.submit(gate.get, fresh_id())
            until(lambda: len(upstream.requests) == 2, "the next pair is on trial")
            others = [pool.submit(gate.get, fresh_id()) for _ in range(8)]
            until(lambda: gate.metric("cache_entries") == 0, "the gateway has read their requests")
            for _ in range(5):
                assert gate.get(f"{fresh_id()}?api=comfy").status_code == 200
        finally:
            released.set()
        assert {asked.result().status_code for asked in (first, *others)} == {200}


@pytest.mark.parametrize("operation", ["sd_get_result", "comfy_get_result", "sd_get_progress"])
def test_upstream_repeated_response_is_not_taken_for_another_task(
    launch: Launch, operation: str, through: dict[str, Json]
) -> None:
    """A result contains no task ID: it is fetched over a connection that carried no other call."""
    last: dict[socket.socket, bytes] = {}

    def repeats(connection: socket.socket, request: Request) -> None:
        connection.sendall(last.get(connection, b""))  # late: the response to the previous call
        data = {"images": [request.task_id], "result": {"of": request.task_id}, "status": "succeeded"}
        named = {} if "result" in operation else {"taskId": request.task_id}
        last[connection] = framed(json.dumps({"status": 10, "data": data | named}).encode())
        connection.sendall(last[connection])

    with RawUpstream(repeats) as upstream:
        gate = launch(upstream.url, upstream={"retries": 0, **through})
        for _ in range(5):
            task = fresh_id()
            answered = gate.native(task, operation)
            if "result" in operation or answered.status_code == 200:
                assert answered.json()["data"]["images"] == [task]
            else:
                assert answered.json()["errCode"] in {"upstream-invalid", "upstream-unreachable"}
        if "result" in operation:
            assert len(last) == 5


@pytest.mark.parametrize("ahead", [3600, -3600])
def test_upstream_clock_offset_is_corrected(simulator: Simulator, launch: Launch, ahead: int) -> None:
    """The first refusal corrects the clock: its repeat succeeds, and later queries need none."""
    simulator.ahead_seconds = ahead
    gate = launch(simulator.url, **QUICK)
    assert_success(gate, simulator.task())
    assert simulator.calls() == 2
    assert abs(gate.metric("upstream_clock_skew_seconds") - ahead) < 10
    assert_success(gate, simulator.task())
    assert simulator.calls() == 3
    assert simulator.stats()["refused"] == 1


async def test_upstream_clock_is_corrected_for_all_calls_in_flight(
    simulator: Simulator, launch: Launch
) -> None:
    """Concurrent first queries all succeed: the clock is corrected once, with or without retries."""
    simulator.reset(latency_seconds=0.1)
    simulator.ahead_seconds = 3600
    gate = launch(simulator.url, upstream={"retries": 0})
    tasks = [simulator.task() for _ in range(30)]
    async with httpx.AsyncClient(base_url=gate.url, trust_env=False, verify=False, timeout=30) as client:  # noqa: S501
        answers = await asyncio.gather(*(client.get(f"/v1/progress/{task}") for task in tasks))
    assert {response.status_code for response in answers} == {200}
    assert 0 < simulator.stats()["refused"] <= len(tasks)
    assert simulator.calls() == len(tasks) + simulator.stats()["refused"]


@pytest.mark.parametrize("ahead", [3600, -3600])
def test_upstream_clock_offset_is_corrected_by_the_command(
    simulator: Simulator, tmp_path: Path, ahead: int
) -> None:
    """The first query of `sd-gateway serve` succeeds although the upstream's clock is an hour off."""
    simulator.ahead_seconds = ahead
    with serving(tmp_path, {"SD_GATEWAY_UPSTREAM__ENDPOINT": simulator.url}) as (process, gate):
        for _ in range(3):
            assert gate.get(simulator.task()).status_code == 200
        assert abs(gate.metric("upstream_clock_skew_seconds") - ahead) < 10
    assert (simulator.calls(), simulator.stats()["refused"]) == (4, 1)
    assert process.output.count("clock_corrected") == 1


def test_upstream_refused_pair_pauses(simulator: Simulator, launch: Launch) -> None:
    """A refused pair is not used for cache.error_seconds, for any task; then it is tried again."""
    del simulator.pairs["harness-access-key"]
    gate = launch(simulator.url, cache={"error_seconds": 60})
    for _ in range(3):
        response = gate.get(fresh_id())
        assert (response.status_code, response.json()["code"]) == (502, "upstream-credentials")
    assert simulator.calls() == 1
    assert gate.client.get("/readyz").json() == {
        "ready": True,
        "reasons": [],
        "degraded": ["upstream: upstream-credentials"],
        "credentials": {"slot": "active", "generation": 1},
    }


def test_upstream_pair_that_is_accepted_again_works(simulator: Simulator, launch: Launch) -> None:
    """After the pause a pair that the upstream knows again works, and no task has a failure."""
    del simulator.pairs["harness-access-key"]
    gate = launch(simulator.url, cache={"error_seconds": 0.2})
    task = simulator.task()
    assert gate.get(task).json()["code"] == "upstream-credentials"
    simulator.pairs["harness-access-key"] = SECRET
    until(lambda: gate.get(task).status_code == 200, "the pair is tried again")
    assert gate.client.get("/readyz").json()["degraded"] == []


NEXT = {"next_access_key": "next-key", "next_secret_key": "next-secret"}


def test_upstream_promotes_the_next_pair(simulator: Simulator, launch: Launch) -> None:
    """A query that is refused because of a revoked pair succeeds with the next pair, not as a retry."""
    gate = launch(simulator.url, credentials=NEXT, upstream={"retries": 0})
    assert_success(gate, simulator.task())
    assert gate.metric("credentials_active_slot", slot="active") == 1
    simulator.control("PUT", "/pairs", pairs={"next-key": "next-secret"})
    for _ in range(2):
        assert_success(gate, simulator.task())
    assert (simulator.calls(), simulator.stats()["refused"]) == (4, 1)
    assert gate.metric("upstream_retries_total") == 0
    assert gate.metric("credentials_active_slot", slot="active") == 0
    assert gate.metric("credentials_active_slot", slot="next") == 1
    assert gate.client.get("/readyz").json()["credentials"] == {"slot": "next", "generation": 1}


@pytest.mark.parametrize(
    ("message", "tried"),
    [
        ("Invalid AppKey", 2),
        ("Unauthorized", 2),
        ("Quota Exhausted", 1),
        ("Timestamp Expired", 1),
        ("Throttled by USER Flow Control", 1),
    ],
)
def test_upstream_tries_the_next_pair_for_key_errors_only(
    simulator: Simulator, launch: Launch, message: str, tried: int
) -> None:
    """Refused keys lead to the next pair; quota, clock and throttling do not."""
    simulator.control("PUT", "/pairs", pairs={KEY: SECRET, "next-key": "next-secret"})
    simulator.fault("refuse", message=message, status=403)
    gate = launch(simulator.url, credentials=NEXT, upstream={"retries": 0})
    assert gate.get(simulator.task()).is_error
    signed = [request["headers"]["x-ca-key"] for request in simulator.requests()]
    assert signed == [KEY, "next-key"][:tried]


def test_upstream_wrong_secret_is_reported_without_the_string_to_sign(
    simulator: Simulator, launch: Launch
) -> None:
    """A refused signature is reported with code and request ID, without the text that the upstream quotes."""
    simulator.pairs["harness-access-key"] = "another-secret"
    gate = launch(simulator.url)
    response = assert_reported(gate, simulator.task(), CREDENTIALS)
    upstream = response.json()["upstream"]
    assert upstream["errCode"] == "A403IS"
    assert upstream["requestId"]
    assert upstream["errMessage"].startswith("Invalid Signature")
    assert "harness" not in response.text
    assert "x-ca-timestamp" not in response.text


# --- the circuit breaker ----------------------------------------------------------------------------------


def circuit(gate: Gateway, operation: str = "sd_get_progress") -> dict[str, float]:
    """Return the value of the metric for each state."""
    states = ("closed", "open", "half-open")
    return {
        state: gate.metric("upstream_circuit_state", operation=operation, state=state) for state in states
    }


def break_circuit(gate: Gateway) -> None:
    """Query until the circuit is open."""
    until(lambda: gate.get(fresh_id()).json()["code"] == "upstream-open", "the circuit opens")
    assert circuit(gate) == {"closed": 0, "open": 1, "half-open": 0}


def test_upstream_open_circuit_makes_no_calls(simulator: Simulator, launch: Launch) -> None:
    """An open circuit makes no call and returns Retry-After; readiness and other operations stay."""
    gate = launch(simulator.url, upstream={"retries": 0}, cache={"error_seconds": 0})
    assert circuit(gate) == {"closed": 1, "open": 0, "half-open": 0}
    simulator.fault("status", status=500)
    break_circuit(gate)
    for response in (gate.get(fresh_id()), gate.native(fresh_id())):
        assert response.status_code == 503
        assert response.json().get("code", response.json().get("errCode")) == "upstream-open"
        assert response.headers["retry-after"] == "1"
    assert simulator.calls() == 10
    ready = gate.client.get("/readyz")
    assert (ready.status_code, ready.json()["degraded"]) == (
        200,
        ["upstream: upstream-invalid", "upstream: upstream-open"],
    )
    assert gate.get(f"{fresh_id()}?api=comfy").json()["code"] == "upstream-invalid"
    assert circuit(gate, "comfy_get_progress") == {"closed": 1, "open": 0, "half-open": 0}


def test_upstream_failing_tasks_of_one_client_do_not_open_the_circuit(launch: Launch) -> None:
    """While a known task is refreshed, tasks for which the upstream always fails do not count."""
    known = fresh_id()

    def answers(connection: socket.socket, request: Request) -> None:
        ok, failed = framed(request.envelope()), framed(b"", status="HTTP/1.1 500 Internal Server Error")
        connection.sendall(ok if request.task_id == known else failed)

    with RawUpstream(answers) as upstream:
        always = {"error_seconds": 0, "running_seconds": 0, "stale_while_revalidate_seconds": 0}
        gate = launch(upstream.url, upstream={"retries": 0}, cache=always)
        assert_success(gate, known)
        for _ in range(5):
            assert_success(gate, known)
            for _ in range(10):
                assert gate.get(fresh_id()).json()["code"] == "upstream-invalid"
        assert len(upstream.requests) == 56
        assert gate.metric("upstream_circuit_state", state="closed") == len(Operation)


def test_upstream_open_circuit_serves_stale_if_error(simulator: Simulator, launch: Launch) -> None:
    """While the circuit is open, a snapshot that is young enough is served, with the reason."""
    lifetimes = {"running_seconds": 0, "stale_while_revalidate_seconds": 0, "error_seconds": 0}
    gate = launch(simulator.url, upstream={"retries": 0}, cache=lifetimes)
    task = simulator.task()
    body = gate.get(task).content
    simulator.fault("status", status=500)
    break_circuit(gate)
    response = gate.get(task)
    assert (response.status_code, response.content) == (200, body)
    assert response.headers["cache-status"].endswith("; detail=upstream-open")
    assert simulator.calls(task) == 1


def test_upstream_is_probed_by_one_query(launch: Launch) -> None:
    """After the open period one query is sent; the others are refused until its outcome is known."""
    released = threading.Event()

    def failing(connection: socket.socket, _: Request) -> None:
        connection.sendall(framed(b"", status="HTTP/1.1 500 Internal Server Error"))

    def held(connection: socket.socket, request: Request) -> None:
        released.wait(30)
        respond_ok(connection, request)

    with RawUpstream(failing) as upstream, ThreadPoolExecutor() as pool:
        gate = launch(upstream.url, upstream={"retries": 0}, cache={"error_seconds": 0})
        break_circuit(gate)
        upstream.behaviour = held

        def probe() -> httpx.Response:
            def let_through() -> httpx.Response | None:
                response = gate.get(fresh_id())
                return None if response.status_code == 503 else response

            response: httpx.Response = until(let_through, "the circuit is half-open")
            return response

        probing = pool.submit(probe)
        try:
            until(lambda: len(upstream.requests) == 11, "the probe is in flight")
            for _ in range(5):
                response = gate.get(fresh_id())
                assert (response.json()["code"], response.headers["retry-after"]) == ("upstream-open", "1")
            assert circuit(gate) == {"closed": 0, "open": 0, "half-open": 1}
        finally:
            released.set()
        assert probing.result().status_code == 200
        assert circuit(gate) == {"closed": 1, "open": 0, "half-open": 0}
        assert gate.get(fresh_id()).status_code == 200
        assert len(upstream.requests) == 12


def test_upstream_that_keeps_failing_is_probed_again_later(simulator: Simulator, launch: Launch) -> None:
    """A failed probe opens the circuit for another second, and a successful one closes it."""
    gate = launch(simulator.url, upstream={"retries": 0}, cache={"error_seconds": 0})
    simulator.fault("status", status=500, times=11)
    break_circuit(gate)
    until(lambda: gate.get(fresh_id()).status_code == 502, "a probe that fails")
    assert gate.get(fresh_id()).headers["retry-after"] == "1"
    task = simulator.task()
    until(lambda: gate.get(task).status_code == 200, "a probe that is answered")
    assert simulator.calls() == 12


@pytest.mark.parametrize(("attempt_seconds", "seconds"), [(0.1, 30), (10, 0.2)], ids=["attempts", "deadline"])
def test_upstream_missing_responses_open_the_circuit(
    simulator: Simulator, launch: Launch, attempt_seconds: float, seconds: float
) -> None:
    """A missing response is a failure, if the timeout of the attempt or the deadline of the query ends it."""
    upstream = {"retries": 0, "attempt_timeout_seconds": attempt_seconds, "timeout_seconds": seconds}
    gate = launch(simulator.url, upstream=upstream, cache={"error_seconds": 0})
    simulator.fault("silent")
    codes = [gate.get(fresh_id()).json()["code"] for _ in range(11)]
    assert codes == ["upstream-timeout"] * 10 + ["upstream-open"]


# --- the rate limiter -------------------------------------------------------------------------------------


def test_upstream_exhausted_rate_limit_is_reported(simulator: Simulator, launch: Launch) -> None:
    """Beyond upstream.requests_per_second no call is made; a query for a new task gets Retry-After."""
    gate = launch(simulator.url, upstream={"requests_per_second": 0.01}, cache={"error_seconds": 0})
    assert gate.metric("upstream_budget_per_second") == 0.01
    assert_success(gate, simulator.task())
    response = gate.get(fresh_id())
    assert (response.status_code, response.json()["code"]) == (503, "upstream-throttled")
    assert 0 < int(response.headers["retry-after"]) <= 100
    assert simulator.calls() == 1
    assert gate.client.get("/readyz").json()["degraded"] == []


def test_upstream_rate_limit_queues_new_tasks(simulator: Simulator, launch: Launch) -> None:
    """A query whose permit comes before its deadline waits for it."""
    gate = launch(simulator.url, upstream={"requests_per_second": 5})
    for _ in range(3):
        assert_success(gate, simulator.task())
    assert simulator.calls() == 3


def test_upstream_rate_limit_serves_stale_snapshots_at_once(simulator: Simulator, launch: Launch) -> None:
    """A stale snapshot is served at once, while the request stays in the queue."""
    lifetimes = {"running_seconds": 0, "stale_while_revalidate_seconds": 0}
    gate = launch(simulator.url, upstream={"requests_per_second": 0.5}, cache=lifetimes)
    task = simulator.task()
    body = gate.get(task).content
    for _ in range(3):
        response = gate.get(task)
        assert (response.status_code, response.content) == (200, body)
        status = response.headers["cache-status"]
        assert status.startswith("sd-gateway; fwd=stale; ttl=-"), status
        assert status.endswith("; detail=upstream-throttled")
    until(lambda: simulator.calls(task) == 2, "the request receives its permit")


def crowded(gate: Gateway) -> httpx.AsyncClient:
    """Return a client that opens a connection for each of many concurrent requests."""
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=gate.url, trust_env=False, verify=False, timeout=30, limits=limits)  # noqa: S501


async def test_upstream_throttling_reduces_calls(simulator: Simulator, launch: Launch) -> None:
    """Under demand beyond the upstream's limit, known tasks stay answered, and few calls are throttled."""
    frozen = time.time()  # its second never ends: the limit is a total count
    simulator.reset(clock=lambda: frozen)
    lifetimes = {"running_seconds": 0, "stale_while_revalidate_seconds": 0}
    gate = launch(simulator.url, upstream={"timeout_seconds": 4, "max_in_flight": 8}, cache=lifetimes)
    hot = [simulator.task() for _ in range(10)]
    for task in hot:
        assert_success(gate, task)
    simulator.control("PUT", "/limit", calls=20)
    crowd = [simulator.task() for _ in range(200)]
    async with crowded(gate) as client:
        asked = [
            client.get(f"/v1/progress/{task}") for pair in zip(crowd, hot * 20, strict=True) for task in pair
        ]
        answers = await asyncio.gather(*asked)
    strangers, known = answers[::2], answers[1::2]
    assert {answer.status_code for answer in known} == {200}
    assert {answer.status_code for answer in strangers} == {200, 503}
    outcome = {answer.json()["code"] for answer in strangers if answer.status_code == 503}
    # On a busy machine the deadline of some queries may pass while they wait for one of the 8 calls to end.
    assert "upstream-throttled" in outcome
    assert outcome <= {"upstream-throttled", "overloaded"}
    stats = simulator.stats()
    assert simulator.calls() - stats["throttled"] == 20
    assert stats["throttled"] < 100
    assert gate.client.get("/readyz").json()["degraded"] == ["upstream: upstream-throttled"]


# --- stale-if-error and negative cache --------------------------------------------------------------------


def test_upstream_failure_serves_stale_if_error(simulator: Simulator, launch: Launch) -> None:
    """A snapshot up to cache.stale_if_error_seconds old is served instead of a failure."""
    lifetimes = {"running_seconds": 0, "stale_while_revalidate_seconds": 0, "error_seconds": 0}
    gate = launch(simulator.url, cache=lifetimes)
    task = simulator.task()
    body = gate.get(task).content
    for fault, outcome in (FAULTS["404"], FAULTS["rejected"], FAULTS["cut"], FAULTS["403"], FAULTS["429"]):
        simulator.control("PUT", "/faults", **fault)
        response = gate.get(task)
        assert (response.status_code, response.content) == (200, body)
        status = response.headers["cache-status"]
        assert status.startswith("sd-gateway; fwd=stale; ttl=-"), status
        assert status.endswith(f"; detail={outcome.code}")
        assert response.headers["cache-control"] == "max-age=0"
        simulator.heal()
    assert "detail" not in gate.get(task).headers["cache-status"]


def test_upstream_failure_serves_no_older_snapshot(simulator: Simulator, launch: Launch) -> None:
    """A snapshot older than cache.stale_if_error_seconds is not served."""
    nothing = {"running_seconds": 0, "stale_while_revalidate_seconds": 0, "stale_if_error_seconds": 0}
    gate = launch(simulator.url, cache=nothing)
    task = simulator.task()
    assert_success(gate, task)
    simulator.fault("status", status=404)
    assert gate.get(task).json()["code"] == "upstream-invalid"


@pytest.mark.parametrize("name", ["rejected", "404", "429", "cut"])
def test_upstream_failure_is_cached_for_its_task(simulator: Simulator, launch: Launch, name: str) -> None:
    """Within cache.error_seconds a failed task is answered from memory; other tasks are not affected."""
    gate = launch(simulator.url, cache={"error_seconds": 60})
    fault, outcome = FAULTS[name]
    task, other = simulator.task(), simulator.task()
    simulator.control("PUT", "/faults", **fault, taskId=task)
    for _ in range(3):
        assert gate.get(task).json()["code"] == outcome.code
    assert simulator.calls(task) == outcome.calls
    assert gate.metric("cache_lookups_total", result="negative") == 2
    assert_success(gate, other)


def test_upstream_failure_is_forgotten(simulator: Simulator, launch: Launch) -> None:
    """After cache.error_seconds the task is queried again."""
    gate = launch(simulator.url, cache={"error_seconds": 0.1})
    task = simulator.task()
    simulator.fault("status", status=404, times=1)
    assert gate.get(task).status_code == 502
    until(lambda: gate.get(task).status_code == 200, "the failure is forgotten")
    assert simulator.calls(task) == 2


def test_upstream_receives_the_configured_stage(simulator: Simulator, launch: Launch) -> None:
    """upstream.stage is sent, and signed."""
    gate = launch(simulator.url, upstream={"stage": "PRE"})
    assert_success(gate, simulator.task())
    headers = simulator.requests()[0]["headers"]
    assert headers["x-ca-stage"] == "PRE"
    assert "x-ca-stage" in headers["x-ca-signature-headers"].split(",")


def test_upstream_rejection_contains_the_vendors_codes(simulator: Simulator, gate: Gateway) -> None:
    """The vendor's codes and ids are in the problem, because its support asks for them."""
    simulator.fault("reject", errCode="E1", errMessage="no", subErrCode="E2", subErrMessage="still no")
    upstream = gate.get(simulator.task()).json()["upstream"]
    assert upstream.pop("invokeId").startswith("i_")
    assert upstream == {
        "requestId": None,
        "errCode": "E1",
        "errMessage": "no",
        "subErrCode": "E2",
        "subErrMessage": "still no",
    }


def test_upstream_body_is_compact_json(simulator: Simulator, gate: Gateway) -> None:
    """The signed body is the task ID and nothing else."""
    task = simulator.task()
    assert_success(gate, task)
    assert json.loads(simulator.requests()[0]["body"]) == {"taskId": task}


# --- dates and numbers in response headers ----------------------------------------------------------------

ODD_DATES = [
    "",
    "now",
    "Fri, 31 Dec 99999 23:59:59 GMT",
    "Fri, 31 Dec 9999 23:59:60 GMT",
    "Mon, -1 Jan -2026 00:00:00 GMT",
    "Mon, 00 Foo 2026 00:00:00 GMT",
    "Mon, 01 Jan 2026 99:99:99 GMT",
    "Mon, 1_0 Jan 2026 00:00:00 GMT",
    "Mon, 0\u0663 Jan 2026 00:00:00 GMT",
    "Mon, 01 Jan 2026 00:00:00 +999999999999",
    "Fri, 31 Dec 9999 23:59:59 -2359",
    "Mon, 01 Jan 0001 00:00:00 +2359",
    f"Mon, {'9' * 5000} Jan 2026 00:00:00 GMT",
    ",",
    "\x00",
    "a" * 100_000,
]


@pytest.mark.parametrize("date", ODD_DATES)
def test_upstream_invalid_dates_are_ignored(date: str) -> None:
    """An invalid Date or Retry-After is read as absent or as a time; it is never an error."""
    moment = parse_http_date(date)
    assert moment is None or (math.isfinite(moment) and date.endswith(("-2359", "+2359", "GMT")))
    assert parse_retry_after(date, 0.0) is None or moment is not None


@given(
    st.text() | st.from_regex(r"[A-Z][a-z]{2}, -?[0-9]{1,5} [A-Z][a-z]{2} -?[0-9]{1,6} [0-9:]{1,9} .{0,6}")
)
def test_upstream_dates_are_finite_or_none(date: str) -> None:
    """Any header value is read as a finite time or None."""
    moment = parse_http_date(date)
    assert moment is None or math.isfinite(moment)


@pytest.mark.parametrize(
    ("date", "moment"),
    [
        ("Sun, 06 Nov 1994 08:49:37 GMT", 784111777.0),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 784111777.0),
        ("Sun Nov  6 08:49:37 1994", 784111777.0),
        ("Sun, 06 Nov 1994 08:49:37 -0000", 784111777.0),
        ("Sun, 06 Nov 1994 08:49:37 XYZ", 784111777.0),
    ],
)
def test_upstream_dates_are_read_in_gmt(date: str, moment: float) -> None:
    """All three forms of RFC 9110 are accepted, and a date without zone is GMT, in any local time zone."""
    assert parse_http_date(date) == moment


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        ("9" * 5000, 3600.0),
        ("\u0667", None),
        ("1_0", None),
        ("-1", None),
        ("inf", None),
        (" 7", None),
    ],
)
def test_upstream_retry_after_is_ascii_digits(value: str, seconds: float | None) -> None:
    """A number of seconds consists of ASCII digits, and is limited to an hour."""
    assert parse_retry_after(value, 0.0) == seconds
