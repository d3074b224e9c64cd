"""A gateway that calls a gateway: itself, or another one, instead of the vendor."""

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from tests.support.harness import (
    KEY,
    SECRET,
    Gateway,
    RawUpstream,
    Request,
    Simulator,
    framed,
    free_port,
    run,
    serving,
)

Launch = Callable[..., Gateway]

MESSAGE = "upstream.endpoint is the address of an sd-progress-gateway, not of the vendor"


def assert_recognized(gate: Gateway) -> None:
    """Query both kinds of paths; the gateway must respond at once, and say what is wrong."""
    started = time.monotonic()
    problem, envelope = gate.get("abc"), gate.native("abd")
    assert time.monotonic() - started < 5  # the deadline of a query is 10 s, and 30 s in `launch`
    assert problem.status_code == envelope.status_code == 502
    assert (problem.json()["code"], problem.json()["detail"]) == ("upstream-invalid", MESSAGE)
    assert (envelope.json()["errCode"], envelope.json()["errMessage"]) == ("upstream-invalid", MESSAGE)
    assert gate.client.get("/readyz").json()["degraded"] == [f"upstream: upstream-invalid: {MESSAGE}"]


def assert_check_says_so(tmp_path: Path, endpoint: str) -> None:
    env = {"SPEEDPIX_ENDPOINT": endpoint, "SPEEDPIX_APP_KEY": KEY, "SPEEDPIX_APP_SECRET": SECRET}
    status, output = run("check", cwd=tmp_path, env=env)
    assert status == 1
    assert f"upstream: {MESSAGE}" in output.splitlines()


def test_gateway_recognizes_itself(tmp_path: Path) -> None:
    """A gateway whose endpoint is its own address responds at once; `check` and the log name the cause."""
    port = free_port()
    env = {"SD_GATEWAY_SERVER__PORT": str(port), "SPEEDPIX_ENDPOINT": f"http://127.0.0.1:{port}"}
    with serving(tmp_path, env) as (process, gate):
        assert_recognized(gate)
        assert_check_says_so(tmp_path, gate.url)
        assert MESSAGE in process.says(r'.*"upstream_is_gateway".*')


def test_gateway_recognizes_another_gateway(tmp_path: Path, simulator: Simulator, launch: Launch) -> None:
    """A gateway in front of another one reports it, and the other one makes no call for it."""
    other = launch(simulator.url)
    with capture_logs() as lines:
        assert_recognized(launch(other.url))
    assert [line["log_level"] for line in lines if line["event"] == "upstream_is_gateway"] == ["error"] * 2
    assert not [line for line in lines if line["event"] == "upstream_unreachable"]
    assert_check_says_so(tmp_path, other.url)
    assert simulator.calls() == 0


def test_gateway_recognizes_the_response_if_a_proxy_replaces_the_user_agent(
    simulator: Simulator, launch: Launch
) -> None:
    """The response alone is enough: a snapshot, a rejection, a failure, and another path."""
    other = launch(simulator.url)

    def relay(connection: socket.socket, request: Request) -> None:
        target = request.head.split()[1].decode()
        response = other.client.post(target, content=request.body, headers={"user-agent": "a proxy"})
        mark = [f"{name}: {value}" for name, value in response.headers.items() if name == "x-gateway"]
        connection.sendall(framed(response.content, *mark, status=f"HTTP/1.1 {response.status_code} X"))

    with RawUpstream(relay) as proxy:
        gate = launch(proxy.url)
        assert gate.get(simulator.task()).json()["detail"] == MESSAGE
        assert gate.get("unknown-task").json()["detail"] == MESSAGE
        simulator.fault("status", status=500)
        assert gate.get("failed").json()["detail"] == MESSAGE
        assert other.native("abc", "sd_txt2img").headers["x-gateway"] == "sd-progress-gateway"


@pytest.mark.parametrize(
    "user_agent",
    [
        "python-httpx/0.28.1",
        "sd-progress-gateway",
        "SD-Progress-Gateway/1.0",
        "speedpix sd-progress-gateway/1.0",
        "sd-gateway-watch/0.2.0",
        "",
    ],
)
def test_client_with_any_other_user_agent_is_served(
    simulator: Simulator, gate: Gateway, user_agent: str
) -> None:
    """Only our own prefix counts: the vendor's SDKs may send any other User-Agent, or none."""
    response = gate.native(simulator.task(), headers={"user-agent": user_agent})
    assert (response.status_code, response.json()["status"]) == (200, 10)


def test_request_of_a_gateway_is_refused_on_the_vendor_paths_only(
    simulator: Simulator, gate: Gateway
) -> None:
    """The refusal is an envelope with the code `invalid-parameter`; other paths serve every client."""
    headers = {"user-agent": "sd-progress-gateway/9.9.9"}
    refused: httpx.Response = gate.native(simulator.task(), headers=headers)
    envelope: dict[str, Any] = refused.json()
    assert (refused.status_code, envelope["errCode"], envelope["errMessage"]) == (
        400,
        "invalid-parameter",
        MESSAGE,
    )
    assert gate.get(simulator.task(), headers=headers).status_code == 200
    assert gate.client.get("/healthz", headers=headers).status_code == 200
