"""The vendor's own clients, unchanged: through the gateway, and directly against the simulated upstream."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import speedpix
from speedpix.helpers import FileOutput

from tests.support.harness import KEY, SECRET, Gateway, Json, Simulator
from tests.support.programs import installed

SDK = Path(__file__).parents[1] / "sdk"
NODE = installed("node")
with_node = pytest.mark.skipif(
    NODE is None or not (SDK / "node_modules" / "aliyun-api-gateway").is_dir(),
    reason="node or the vendor's client is not installed: .ci/run installs npm, and make sdk the client",
)

REFUSALS = [
    pytest.param("unknown", SECRET, 400, "A400IK", id="wrong-key"),
    pytest.param(KEY, "wrong", 403, "A403IS", id="wrong-secret"),
]


def python_client(endpoint: str, key: str, secret: str) -> speedpix.Client:
    """Return the vendor's Python client, without the proxies of the environment."""
    return speedpix.Client(endpoint=endpoint, app_key=key, app_secret=secret, trust_env=False)


def node_query(endpoint: str, key: str, secret: str, task_id: str) -> Json:
    """Query with the vendor's npm client; return its output."""
    url = f"{endpoint}/scc/sd_get_progress"
    command = [str(NODE), "query.cjs", url, key, secret, task_id]
    done = subprocess.run(command, cwd=SDK, capture_output=True, text=True, timeout=30, check=True)
    printed: Json = json.loads(done.stdout)
    return printed


def assert_finished(prediction: speedpix.Prediction, task: str) -> None:
    """Check that the prediction is done and its output names the image; the image is not downloaded."""
    assert prediction.status == "succeeded"
    assert prediction.error is None
    output = prediction.output["images"]["url"]
    assert isinstance(output, FileOutput)
    assert output.url.startswith(f"https://example.invalid/{task}.png")


def test_sdk_speedpix_gets_a_finished_task(simulator: Simulator, gate: Gateway) -> None:
    """The Python SDK gets status and output through the gateway, with arbitrary credentials."""
    task = simulator.finished()
    with python_client(gate.url, "x", "x") as client:
        assert_finished(client.predictions.get(task), task)
    assert simulator.stats()["callsByTask"] == {task: 2}  # progress and result
    assert simulator.stats()["refused"] == 0


async def test_sdk_speedpix_gets_a_finished_task_asynchronously(simulator: Simulator, gate: Gateway) -> None:
    """The same for the asynchronous Python SDK."""
    task = simulator.finished()
    async with python_client(gate.url, "x", "x") as client:
        assert_finished(await client.predictions.async_get(task), task)


def test_sdk_speedpix_sees_a_running_and_an_unknown_task(simulator: Simulator, gate: Gateway) -> None:
    """A running task has its status; a task unknown to the upstream has failed, as with the vendor."""
    with python_client(gate.url, "x", "x") as client:
        assert client.predictions.get(simulator.task()).status == "running"
        unknown = client.predictions.get("unknown")
        assert (unknown.status, unknown.error) == ("failed", "No progress data returned")


def test_sdk_speedpix_is_accepted_by_the_simulator(simulator: Simulator) -> None:
    """The simulated upstream accepts the Python SDK's signature with the right key pair."""
    task = simulator.finished()
    with python_client(simulator.url, KEY, SECRET) as client:
        assert_finished(client.predictions.get(task), task)


@pytest.mark.parametrize(("key", "secret", "status", "code"), REFUSALS)
def test_sdk_speedpix_is_refused_by_the_simulator(
    simulator: Simulator, key: str, secret: str, status: int, code: str
) -> None:
    """The simulated upstream refuses the Python SDK with a wrong key pair, with the right code."""
    with python_client(simulator.url, key, secret) as client, pytest.raises(httpx.HTTPStatusError) as refused:
        client.predictions.get(simulator.finished())
    response = refused.value.response
    assert (response.status_code, response.headers["x-ca-error-code"]) == (status, code)


@with_node
def test_sdk_npm_gets_the_progress_envelope(simulator: Simulator, gate: Gateway) -> None:
    """The npm SDK gets the vendor's envelope through the gateway."""
    task = simulator.task()
    envelope = node_query(gate.url, "x", "x", task)["answer"]
    assert envelope["status"] == 10
    assert envelope["data"]["taskId"] == task
    assert envelope["data"]["status"] == "running"
    assert simulator.stats()["refused"] == 0


@with_node
def test_sdk_npm_is_accepted_by_the_simulator(simulator: Simulator) -> None:
    """The simulated upstream accepts the npm SDK's signature with the right key pair."""
    task = simulator.task()
    assert node_query(simulator.url, KEY, SECRET, task)["answer"]["data"]["taskId"] == task


@with_node
@pytest.mark.parametrize(("key", "secret", "status", "code"), REFUSALS)
def test_sdk_npm_is_refused_by_the_simulator(
    simulator: Simulator, key: str, secret: str, status: int, code: str
) -> None:
    """The simulated upstream refuses the npm SDK with a wrong key pair, with the right code."""
    printed = node_query(simulator.url, key, secret, simulator.task())
    assert (printed["status"], printed["headers"]["x-ca-error-code"]) == (status, code)


@pytest.mark.parametrize(("key", "secret", "status", "code"), REFUSALS)
def test_sdk_gateway_with_a_wrong_pair_is_refused(
    simulator: Simulator, launch: Callable[..., Gateway], key: str, secret: str, status: int, code: str
) -> None:
    """A gateway with a wrong key pair passes the upstream's code on to its clients, in both APIs."""
    gate = launch(simulator.url, credentials={"access_key": key, "secret_key": secret})
    task = simulator.task()
    response = gate.get(task)
    assert (response.status_code, response.json()["code"]) == (502, "upstream-credentials")
    assert response.json()["upstream"]["errCode"] == code
    native = gate.native(task)
    assert native.status_code == 502
    assert (native.json()["status"], native.json()["errCode"]) == (20, "upstream-credentials")
    assert simulator.stats()["refused"] == 1, f"HTTP {status} came more than once"
