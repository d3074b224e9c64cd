"""The simulated upstream, over real HTTP on a loopback socket."""

import asyncio
import json
import re
import socket
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from email.utils import formatdate
from random import Random
from typing import Any

import httpx
import pytest
from starlette.types import Message, Scope

from gateway.simulator import ControlError, Life, create_simulator, new_task_id, parse_object
from gateway.simulator.call_record import MAX_TASKS, MAX_TIMES, CallRecord
from gateway.upstream.signing import CONTENT_TYPE, sign, signed_headers, string_to_sign
from tests.support.harness import Stage, running

KEY, SECRET = "test-key", "test-secret"
BIRTH = 1_700_000_000.0
TASK = "01j5t2qx82323pswaqykz9eq4"
LIFE = Life(waiting_seconds=10, running_seconds=100, steps=100)
QUARTER = 15 * 60
FOR_EVER = 86_400.0


@dataclass
class Clock:
    """A simulated clock."""

    now: float = BIRTH

    def __call__(self) -> float:
        return self.now


@dataclass
class Bench:
    """A simulator with its clock and keys, and a client that signs."""

    stage: Stage
    client: httpx.Client
    clock: Clock = field(default_factory=Clock)
    pairs: dict[str, str] = field(default_factory=lambda: {KEY: SECRET})

    def simulate(self, latency_seconds: float = 0.0) -> None:
        """Replace the simulator by a new one."""
        self.stage.app = create_simulator(
            pairs=self.pairs,
            clock=self.clock,
            latency_seconds=latency_seconds,
            life=LIFE,
            random=Random(7),
        )

    def headers(self, target: str, body: bytes, **changes: Any) -> dict[str, str]:
        """Return the headers of a valid call, or of one signed with other values."""
        values: dict[str, Any] = {
            "access_key": KEY,
            "secret_key": SECRET,
            "timestamp_ms": int(self.clock.now * 1000),
            "nonce": str(uuid.uuid4()),
        }
        return signed_headers(target, body, **(values | changes))

    def call(self, task_id: str = TASK, operation: str = "sd_get_progress", **changes: Any) -> httpx.Response:
        """Query a task, with a valid signature by default."""
        return self.send(f"/scc/{operation}", json.dumps({"taskId": task_id}).encode(), **changes)

    def send(self, target: str, body: bytes, **changes: Any) -> httpx.Response:
        """Send a body, with a valid signature by default."""
        return self.client.post(target, content=body, headers=self.headers(target, body, **changes))

    def control(self, method: str, path: str, **given: Any) -> Any:
        """Send a control request that must succeed; return its JSON, if any."""
        answer = self.client.request(method, f"/_simulator{path}", json=given)
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    def fault(self, name: str, **given: Any) -> None:
        """Activate a fault."""
        self.control("PUT", "/faults", name=name, **given)

    def data(self, operation: str = "sd_get_progress") -> Any:
        """Return the `data` of the task's response."""
        return self.call(operation=operation).json()["data"]

    def in_flight(self, number: int) -> None:
        """Wait until this number of vendor calls is in flight."""
        for _ in range(20_000):
            if self.control("GET", "/stats")["inFlight"] == number:
                return
        pytest.fail(f"never {number} in flight")


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Stage, httpx.Client]]:
    """Run one server and one client for the module."""
    stage = Stage()
    with (
        running(stage, lifespan="off", date_header=False, timeout_graceful_shutdown=5) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=30) as client,
    ):
        yield stage, client


@pytest.fixture
def bench(served: tuple[Stage, httpx.Client]) -> Bench:
    """Return a new simulator with one task, just created."""
    stage, client = served
    client.cookies.clear()
    bench = Bench(stage, client)
    bench.simulate()
    bench.control("POST", "/tasks", taskId=TASK)
    return bench


def raw_request(bench: Bench, *, missing: int = 0) -> socket.socket:
    """Send a signed call except for its last bytes on a new connection, and leave it open."""
    body = json.dumps({"taskId": TASK}).encode()
    headers = bench.headers("/scc/sd_get_progress", body) | {"host": "test", "content-length": str(len(body))}
    lines = ["POST /scc/sd_get_progress HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    url = bench.client.base_url
    connection = socket.create_connection((url.host, url.port))
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + body[: len(body) - missing])
    return connection


def resigned(headers: dict[str, str], *names: str) -> dict[str, str]:
    """Sign headers again, listing only these names."""
    text = string_to_sign("POST", "/scc/sd_get_progress", headers, names)
    return headers | {"x-ca-signature-headers": ",".join(names), "x-ca-signature": sign(SECRET, text)}


def error_of_slow_query(answer: httpx.Response) -> tuple[int, str | None, str | None]:
    """Return status, code and message of a refusal, which has no body and always a request ID."""
    assert answer.content == b""
    assert answer.headers["x-ca-request-id"]
    return answer.status_code, answer.headers.get("x-ca-error-code"), answer.headers.get("x-ca-error-message")


# --- the gate ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["", "RELEASE"])
def test_gate_accepts_a_valid_signature(bench: Bench, stage: str) -> None:
    """A call signed with a known key pair gets the documented envelope and a request ID."""
    answer = bench.call(stage=stage)
    assert answer.status_code == 200
    assert answer.headers["x-ca-request-id"]
    envelope = answer.json()
    assert re.fullmatch(r"i_[0-9a-f]{24}", envelope.pop("apiInvokeId"))
    assert envelope == {
        "status": 10,
        "data": {
            "taskId": TASK,
            "status": "waiting",
            "progress": 0,
            "lastQueueRemaining": 10,
            "etaRelative": 0,
        },
        "errCode": None,
        "errMessage": None,
        "subErrCode": None,
        "subErrMessage": None,
        "startTime": None,
        "endTime": None,
    }


def test_gate_gives_every_call_unique_ids(bench: Bench) -> None:
    """No two responses share an invoke ID or a request ID."""
    answers = [bench.call() for _ in range(3)]
    assert len({answer.json()["apiInvokeId"] for answer in answers}) == 3
    assert len({answer.headers["x-ca-request-id"] for answer in answers}) == 3


def test_gate_reads_the_query_as_it_was_signed(bench: Bench) -> None:
    """A target with a query string is verified as sent."""
    assert bench.send("/scc/sd_get_progress?b=%20&a", b'{"taskId": "x"}').json()["status"] == 20


def test_gate_refuses_an_unknown_key(bench: Bench) -> None:
    """An unknown access key is refused."""
    assert error_of_slow_query(bench.call(access_key="unknown")) == (400, "A400IK", "Invalid AppKey")


def test_gate_follows_a_revoked_key(bench: Bench) -> None:
    """A key removed from the mapping is refused from then on."""
    assert bench.call().is_success
    del bench.pairs[KEY]
    assert error_of_slow_query(bench.call()) == (400, "A400IK", "Invalid AppKey")


def test_gate_refuses_a_wrong_secret_and_shows_the_string_to_sign(bench: Bench) -> None:
    """An invalid signature is refused with the server's string to sign, newlines as `#`."""
    body = json.dumps({"taskId": TASK}).encode()
    headers = bench.headers("/scc/sd_get_progress", body, secret_key="other")
    answer = bench.client.post("/scc/sd_get_progress", content=body, headers=headers)
    text = (
        f"POST#{CONTENT_TYPE}#{headers['content-md5']}#{CONTENT_TYPE}##x-ca-key:{KEY}"
        f"#x-ca-nonce:{headers['x-ca-nonce']}#x-ca-signature-method:HmacSHA256"
        f"#x-ca-timestamp:{headers['x-ca-timestamp']}#/scc/sd_get_progress"
    )
    assert error_of_slow_query(answer) == (403, "A403IS", f"Invalid Signature, Server StringToSign:`{text}`")


def test_gate_sends_a_valid_header(bench: Bench) -> None:
    """Characters that a header cannot hold are shown as `?` in the string to sign."""
    _, code, message = error_of_slow_query(
        bench.send("/scc/sd_get_progress?a=%0D%E4%BD%A0", b"{}", secret_key="other")
    )
    assert code == "A403IS"
    assert message is not None
    assert message.endswith("#/scc/sd_get_progress?a=??`")


def test_gate_refuses_a_body_that_is_not_the_signed_one(bench: Bench) -> None:
    """A body that does not match its Content-MD5 is refused."""
    headers = bench.headers("/scc/sd_get_progress", b"{}")
    answer = bench.client.post("/scc/sd_get_progress", content=b"[]", headers=headers)
    assert error_of_slow_query(answer) == (400, "I400MH", "Invalid Content-MD5")


def test_gate_refuses_a_body_without_md5(bench: Bench) -> None:
    """A body without Content-MD5 is refused, even if the signature is valid."""
    headers = bench.headers("/scc/sd_get_progress", b"{}")
    del headers["content-md5"]
    headers = resigned(headers, *headers["x-ca-signature-headers"].split(","))
    answer = bench.client.post("/scc/sd_get_progress", content=b"{}", headers=headers)
    assert error_of_slow_query(answer) == (400, "I400MH", "Invalid Content-MD5")


@pytest.mark.parametrize("left_out", ["x-ca-key", "x-ca-timestamp", "x-ca-nonce"])
def test_gate_refuses_unsigned_headers(bench: Bench, left_out: str) -> None:
    """Key, timestamp and nonce must each be among the signed headers."""
    headers = bench.headers("/scc/sd_get_progress", b"{}")
    names = [name for name in headers["x-ca-signature-headers"].split(",") if name != left_out]
    answer = bench.client.post("/scc/sd_get_progress", content=b"{}", headers=resigned(headers, *names))
    assert error_of_slow_query(answer)[:2] == (403, "A403IS")


@pytest.mark.parametrize("change", [{"x-ca-stage": "TEST"}, {"x-ca-signature-method": "HmacSHA1"}])
def test_gate_refuses_unsigned_stage_and_other_methods(bench: Bench, change: dict[str, str]) -> None:
    """An unsigned stage, and a method other than HmacSHA256, are refused."""
    headers = bench.headers("/scc/sd_get_progress", b"{}") | change
    headers = resigned(headers, *headers["x-ca-signature-headers"].split(","))
    answer = bench.client.post("/scc/sd_get_progress", content=b"{}", headers=headers)
    assert error_of_slow_query(answer)[:2] == (403, "A403IS")


def test_gate_refuses_an_empty_nonce(bench: Bench) -> None:
    """An empty nonce is refused, although it is signed."""
    assert error_of_slow_query(bench.call(nonce=""))[:2] == (403, "A403IS")


@pytest.mark.parametrize("minutes", [-16, 16])
def test_gate_refuses_a_timestamp_too_far_off(bench: Bench, minutes: int) -> None:
    """A timestamp sixteen minutes off, in either direction, is refused."""
    answer = bench.call(timestamp_ms=int((BIRTH + minutes * 60) * 1000))
    assert error_of_slow_query(answer) == (400, None, "Timestamp Expired")


@pytest.mark.parametrize("minutes", [-15, 15])
def test_gate_accepts_a_timestamp_at_the_edge(bench: Bench, minutes: int) -> None:
    """A timestamp exactly fifteen minutes off is accepted."""
    assert bench.call(timestamp_ms=int((BIRTH + minutes * 60) * 1000)).is_success


@pytest.mark.parametrize("timestamp", ["soon", "", "-1", "1e12", "9" * 5000])
def test_gate_refuses_a_timestamp_that_is_no_number(bench: Bench, timestamp: str) -> None:
    """A timestamp that is not a number of milliseconds is refused as invalid."""
    assert error_of_slow_query(bench.call(timestamp_ms=timestamp)) == (400, None, "Invalid Timestamp")


def test_gate_refuses_a_nonce_for_fifteen_minutes(bench: Bench) -> None:
    """A nonce is refused within fifteen minutes, and accepted afterwards."""
    assert bench.call(nonce="once").is_success
    bench.clock.now += QUARTER - 1
    assert error_of_slow_query(bench.call(nonce="once")) == (400, "I400NC", "Nonce Used")
    bench.clock.now += 1
    assert bench.call(nonce="once").is_success


def test_gate_uses_up_no_nonce_for_refused_calls(bench: Bench) -> None:
    """Only an accepted call uses up its nonce, so that an attacker cannot block another client's."""
    assert bench.call(nonce="mine", secret_key="other").status_code == 403
    assert bench.call(nonce="mine").is_success


@pytest.mark.parametrize("operation", ["sd_txt2img", "", "sd_get_progress/"])
def test_gate_knows_four_operations(bench: Bench, operation: str) -> None:
    """Any other path under /scc/ is refused by the API gateway."""
    assert error_of_slow_query(bench.call(operation=operation)) == (404, None, "API Not Found")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_gate_takes_only_posts(bench: Bench, method: str) -> None:
    """Any method but POST is refused."""
    answer = bench.client.request(method, "/scc/sd_get_progress")
    assert error_of_slow_query(answer)[:2] == (405, "I405UM")


def test_gate_refuses_head(bench: Bench) -> None:
    """A HEAD is refused as well, and the connection stays usable."""
    assert bench.client.head("/scc/sd_get_progress").status_code == 405
    assert bench.call().is_success


def test_gate_of_an_older_deployment_sends_no_codes(bench: Bench) -> None:
    """Older deployments send the message only, with 400 or 403, until the switch is turned back."""
    assert bench.control("PUT", "/legacy", enabled=True) == {"enabled": True}
    assert error_of_slow_query(bench.call(access_key="unknown")) == (400, None, "Invalid AppKey")
    assert error_of_slow_query(bench.call(nonce="x", secret_key="other"))[:2] == (403, None)
    assert error_of_slow_query(bench.call(operation="other")) == (400, None, "API Not Found")
    assert error_of_slow_query(bench.client.get("/scc/sd_get_progress"))[:2] == (400, None)
    assert bench.control("PUT", "/legacy", enabled=False) == {"enabled": False}
    assert error_of_slow_query(bench.call(access_key="unknown"))[1] == "A400IK"


def test_gate_accepts_replaced_pairs(bench: Bench) -> None:
    """Key pairs can be replaced at run time; no response contains them."""
    assert bench.control("PUT", "/pairs", pairs={"new-key": "new-secret"}) is None
    assert error_of_slow_query(bench.call())[1] == "A400IK"
    assert bench.call(access_key="new-key", secret_key="new-secret").is_success


def test_answers_are_dated_by_the_simulators_clock(bench: Bench) -> None:
    """`Date` has the simulator's own time, in responses and refusals."""
    bench.clock.now += 3600
    expected = formatdate(BIRTH + 3600, usegmt=True)
    assert bench.call().headers.get_list("date") == [expected]
    assert bench.call(access_key="unknown").headers.get_list("date") == [expected]


# --- tasks ------------------------------------------------------------------------------------------------


def test_task_id_is_a_ulid_in_lower_case() -> None:
    """An ID has 26 characters of Crockford's base32, the first ten from the time, so IDs sort by time."""
    random = Random(1)
    early, late = new_task_id(lambda: BIRTH, random), new_task_id(lambda: BIRTH + 1, random)
    assert re.fullmatch(r"[0-9a-hjkmnp-tv-z]{26}", early)
    assert early < late
    assert new_task_id(lambda: 1469918176.385, random).startswith(
        "01aryz6s41"
    )  # the ULID specification's example


def test_task_gets_an_id_where_none_is_given(bench: Bench) -> None:
    """A task created without an ID gets a new one."""
    task_id = bench.control("POST", "/tasks")["taskId"]
    assert bench.call(task_id).json()["data"]["taskId"] == task_id


@pytest.mark.parametrize(("api", "success"), [("sd", "successed"), ("comfy", "succeeded")])
def test_task_goes_through_its_phases(bench: Bench, api: str, success: str) -> None:
    """A task waits, runs and succeeds by the clock; each API has its own spelling of success."""
    seen = []
    for age in (0, 9.5, 10, 60, 109, 110, 1000):
        bench.clock.now = BIRTH + age
        data = bench.data(f"{api}_get_progress")
        seen.append([data["status"], data["lastQueueRemaining"], data["progress"], data["etaRelative"]])
    assert seen == [
        ["waiting", 10, 0, 0],
        ["waiting", 1, 0, 0],
        ["running", 0, 0, 100],
        ["running", 0, 0.5, 50],
        ["running", 0, 0.99, 1],
        [success, 0, 1, 0],
        [success, 0, 1, 0],
    ]


def test_task_shows_its_state_to_sd_only(bench: Bench) -> None:
    """The native state is sent for sd only, once the task runs, with the documented fields."""
    bench.clock.now += 60
    data = bench.data()
    assert data["message"] == "step 50 of 100"
    assert data["state"] == {
        "job": "task(simulated)",
        "job_no": 0,
        "job_count": 1,
        "job_timestamp": "20231114221320",
        "sampling_step": 50,
        "sampling_steps": 100,
        "skipped": False,
        "interrupted": False,
    }
    assert "state" not in bench.data("comfy_get_progress")


@pytest.mark.parametrize(("jump_back", "expected"), [(True, [0.6, 0.4, 0.8]), (False, [0.6, 0.7, 0.8])])
def test_task_progress_jumps_back(bench: Bench, jump_back: bool, expected: list[float]) -> None:  # noqa: FBT001 - pytest passes by name
    """Progress falls at 65 % and recovers, unless `jump_back` is off."""
    life = {"waitingSeconds": 0, "runningSeconds": 100, "steps": 10, "jumpBack": jump_back}
    bench.control("POST", "/tasks", taskId=TASK, life=life)
    seen = []
    for age in (60, 72, 80):
        bench.clock.now = BIRTH + age
        seen.append(bench.data()["progress"])
    assert seen == expected


@pytest.mark.parametrize("outcome", ["failed", "canceled"])
def test_task_may_end_without_success(bench: Bench, outcome: str) -> None:
    """A failed or canceled task says so, before its last step, and has no result."""
    bench.control("POST", "/tasks", taskId=TASK, life={"outcome": outcome, "steps": 4})
    bench.clock.now += 1000
    data = bench.data()
    assert (data["status"], data["progress"]) == (outcome, 0.75)
    assert data["state"]["interrupted"] is (outcome == "canceled")
    assert bench.data("sd_get_result") == {"status": outcome}


def test_result_comes_at_the_end(bench: Bench) -> None:
    """Both result operations have only the status before the end, and URLs that expire after it."""
    assert bench.data("sd_get_result") == {"status": "waiting"}
    bench.clock.now += 20
    assert bench.data("comfy_get_result") == {"taskId": TASK, "status": "running"}
    bench.clock.now = BIRTH + 200
    url = f"http://{bench.client.base_url.netloc.decode()}/images/{TASK}.png?Expires={int(BIRTH) + 3800}"
    assert bench.data("sd_get_result") == {
        "status": "successed",
        "images": [url],
        "parameters": {"steps": 100},
        "info": "simulated",
    }
    assert bench.data("comfy_get_result") == {
        "taskId": TASK,
        "status": "succeeded",
        "result": {"images": {"url": url}},
    }


def test_result_has_images_that_expire(bench: Bench) -> None:
    """The URL of a result is an image of the simulator, different for each task, until it expires."""
    bench.clock.now = BIRTH + 200
    url = bench.data("sd_get_result")["images"][0]
    image = bench.client.get(url)
    assert (image.status_code, image.headers["content-type"]) == (200, "image/png")
    assert image.content.startswith(b"\x89PNG")
    assert bench.client.get(url.replace(TASK, "other")).content != image.content
    bench.clock.now += 3600
    assert bench.client.get(url).status_code == 403
    for target in ("/images/a.png", "/images/a.png?Expires=", "/images/a.png?Expires=x"):
        assert bench.client.get(target).status_code == 403


def test_task_vanishes(bench: Bench) -> None:
    """A task that vanishes is unknown from then on."""
    bench.control("POST", "/tasks", taskId=TASK, life={"vanishesAfterSeconds": 30})
    bench.clock.now += 29
    assert bench.call().json()["status"] == 10
    bench.clock.now += 1
    assert bench.call().json()["errCode"] == "TASK_NOT_FOUND"


def test_unknown_and_forgotten_tasks_are_refused_in_an_envelope(bench: Bench) -> None:
    """An unknown or deleted task gives HTTP 200 with status 20, a code, and no data."""
    bench.control("DELETE", f"/tasks/{TASK}")
    bench.control("DELETE", "/tasks/never-made")
    for task_id in (TASK, "never-made"):
        answer = bench.call(task_id)
        assert answer.status_code == 200
        envelope = answer.json()
        assert (envelope["status"], envelope["data"]) == (20, None)
        assert (envelope["errCode"], bool(envelope["errMessage"])) == ("TASK_NOT_FOUND", True)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"taskId": 1}', b'{"taskId": ""}', b"\xff"])
def test_body_without_a_task_is_refused_in_an_envelope(bench: Bench, body: bytes) -> None:
    """A signed body without a task ID gives HTTP 200 with status 20 and a code."""
    envelope = bench.send("/scc/sd_get_progress", body).json()
    assert (envelope["status"], envelope["data"]) == (20, None)
    assert (envelope["errCode"], bool(envelope["errMessage"])) == ("INVALID_PARAMETER", True)


def test_scripted_task_has_the_given_data(bench: Bench) -> None:
    """A scripted task has the given data for every operation, with its own ID filled in."""
    bench.control("POST", "/tasks", taskId="scripted", data={"status": "paused"})
    assert bench.call("scripted").json()["data"] == {"taskId": "scripted", "status": "paused"}
    bench.control("PUT", "/tasks/scripted", data={"progress": 0.4, "message": "进度"})
    for operation in ("sd_get_progress", "comfy_get_result"):
        data = bench.call("scripted", operation).json()["data"]
        assert data == {"taskId": "scripted", "progress": 0.4, "message": "进度"}


def test_scripted_task_may_answer_for_another(bench: Bench) -> None:
    """A script may name another task; scripting creates the task."""
    bench.control("PUT", "/tasks/new", data={"taskId": "another", "status": "running"})
    assert bench.call("new").json()["data"]["taskId"] == "another"


def test_scripted_data_may_be_invalid(bench: Bench) -> None:
    """NaN and lone surrogates in a script are sent unchanged."""
    script = b'{"data": {"progress": NaN, "message": "\\ud800"}}'
    assert bench.client.put(f"/_simulator/tasks/{TASK}", content=script).is_success
    answer = bench.call()
    assert b'"progress":NaN,"message":"?"' in answer.content


# --- faults -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected", "retry_after"),
    [
        ({}, (503, None, "Service Unavailable"), None),
        ({"code": "D504TO", "message": "Async Service"}, (504, "D504TO", "Async Service"), None),
        (
            {"status": 429, "code": "T429ID", "message": "Throttled by API Flow Control", "retryAfter": 7},
            (429, "T429ID", "Throttled by API Flow Control"),
            "7",
        ),
        (
            {"code": "T429ID", "message": "Throttled", "legacy": True, "retryAfter": "soon"},
            (403, None, "Throttled"),
            "soon",
        ),
    ],
)
def test_fault_refuse(
    bench: Bench, given: dict[str, Any], expected: tuple[int, str | None, str], retry_after: str | None
) -> None:
    """`refuse` sends any refusal of the API gateway, in the new and the older style."""
    bench.fault("refuse", **given)
    answer = bench.call()
    assert error_of_slow_query(answer) == expected
    assert answer.headers.get("retry-after") == retry_after


def test_fault_refuse_follows_the_deployment(bench: Bench) -> None:
    """`refuse` uses the deployment's style unless it is given."""
    bench.control("PUT", "/legacy", enabled=True)
    bench.fault("refuse", code="A401AC", message="Unauthorized")
    assert error_of_slow_query(bench.call()) == (403, None, "Unauthorized")
    bench.fault("refuse", code="A401AC", message="Unauthorized", legacy=False)
    assert error_of_slow_query(bench.call()) == (401, "A401AC", "Unauthorized")


def test_fault_status(bench: Bench) -> None:
    """`status` sends an HTTP status with an HTML page."""
    bench.fault("status")
    answer = bench.call()
    assert (answer.status_code, "retry-after" in answer.headers) == (502, False)
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.text.startswith("<html>")
    bench.fault("status", status=503, retryAfter=3)
    answer = bench.call()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "3")


def test_fault_reject(bench: Bench) -> None:
    """`reject` sends an envelope with status 20 and the given codes."""
    bench.fault("reject", errCode="E1", errMessage="no", subErrCode="S1", subErrMessage="nor this")
    answer = bench.call()
    envelope = answer.json()
    assert (answer.status_code, envelope["status"], envelope["data"]) == (200, 20, None)
    assert (envelope["errCode"], envelope["errMessage"]) == ("E1", "no")
    assert (envelope["subErrCode"], envelope["subErrMessage"]) == ("S1", "nor this")


def test_fault_body(bench: Bench) -> None:
    """`body` sends the given text, content type and status."""
    bench.fault("body", body='{"status": NaN}', contentType="text/plain", status=201)
    answer = bench.call()
    assert (answer.status_code, answer.headers["content-type"]) == (201, "text/plain")
    assert answer.content == b'{"status": NaN}'


def test_fault_slow_is_followed_by_the_next(bench: Bench) -> None:
    """`slow` only waits: the next fault's response, or the normal one, follows."""
    bench.fault("slow", seconds=0.001)
    assert bench.data()["taskId"] == TASK
    bench.fault("status")
    assert bench.call().status_code == 502


@pytest.mark.parametrize("name", ["slow", "silent", None])
def test_waiting_ends_when_the_client_leaves(bench: Bench, name: str | None) -> None:
    """`slow`, `silent` and the latency keep a call in flight until its client disconnects."""
    if name is None:
        bench.simulate(latency_seconds=FOR_EVER)
    else:
        bench.fault(name, **({"seconds": FOR_EVER} if name == "slow" else {}))
    with raw_request(bench):
        bench.in_flight(1)
    bench.in_flight(0)


def test_silence_ends_with_the_server() -> None:
    """A stopping server ends a silent call after its grace period."""
    stage = Stage()
    with ExitStack() as clients:
        with running(stage, lifespan="off", date_header=False, timeout_graceful_shutdown=0) as url:
            client = clients.enter_context(httpx.Client(base_url=url, trust_env=False, timeout=30))
            bench = Bench(stage, client)
            bench.simulate()
            bench.fault("silent")
            connection = clients.enter_context(raw_request(bench))
            bench.in_flight(1)
        assert b"200 OK" not in connection.recv(1024)  # closed, or the server's own 500


def test_latency_ends(bench: Bench) -> None:
    """With a latency, responses and refusals still arrive."""
    bench.simulate(latency_seconds=0.001)
    assert bench.call().json()["status"] == 20
    assert bench.call(access_key="unknown").status_code == 400


def test_response_has_the_state_at_the_calls_arrival(bench: Bench) -> None:
    """A delayed response has the state at the arrival of its call."""
    bench.simulate(latency_seconds=FOR_EVER)
    bench.control("PUT", f"/tasks/{TASK}", data={"status": "early"})
    body = json.dumps({"taskId": TASK}).encode()
    path, headers = b"/scc/sd_get_progress", bench.headers("/scc/sd_get_progress", body)
    scope: Scope = {
        "type": "http",
        "method": "POST",
        "path": path.decode(),
        "raw_path": path,
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    incoming: list[Message] = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]
    sent: list[Message] = []

    async def receive() -> Message:
        message = incoming.pop(0)
        if not incoming:  # the call is waiting: now the task changes, and the wait ends
            bench.control("PUT", f"/tasks/{TASK}", data={"status": "late"})
        return message

    async def send(message: Message) -> None:
        sent.append(message)

    async def call() -> None:
        assert bench.stage.app is not None
        await bench.stage.app(scope, receive, send)

    asyncio.run(call())
    assert json.loads(sent[-1]["body"])["data"]["status"] == "early"


def test_fault_drip_sends_the_headers_first(bench: Bench) -> None:
    """`drip` sends the headers immediately, although the body takes very long."""
    bench.fault("drip", interval=FOR_EVER)
    body = b'{"taskId": "x"}'
    headers = bench.headers("/scc/sd_get_progress", body)
    with bench.client.stream("POST", "/scc/sd_get_progress", content=body, headers=headers) as answer:
        assert answer.status_code == 200
        assert int(answer.headers["content-length"]) > 0
        assert bench.control("GET", "/stats")["inFlight"] == 1
    bench.in_flight(0)


def test_fault_drip_sends_the_right_answer(bench: Bench) -> None:
    """`drip` ends with the complete normal response."""
    bench.fault("drip", interval=0)
    assert bench.data()["taskId"] == TASK


def test_fault_cut_closes_in_the_middle(bench: Bench) -> None:
    """`cut` announces a whole body, sends half of it and closes the connection."""
    bench.fault("cut", times=1)
    with pytest.raises(httpx.RemoteProtocolError, match="complete message body"):
        bench.call()
    assert bench.call().is_success


def test_fault_large(bench: Bench) -> None:
    """`large` sends the normal envelope in exactly the given size, but at least its own."""
    bench.fault("large", bytes=1_000_000)
    answer = bench.call()
    assert len(answer.content) == 1_000_000
    assert answer.json()["data"]["taskId"] == TASK
    bench.fault("large", bytes=0)
    assert bench.call().json()["padding"] == ""


def test_fault_gzip_bomb(bench: Bench) -> None:
    """`gzip_bomb` is small when compressed, and has the given size when decoded."""
    bench.fault("gzip_bomb", bytes=1_000_000)
    answer = bench.call()
    assert answer.headers["content-encoding"] == "gzip"
    assert answer.num_bytes_downloaded < 10_000
    assert len(answer.content) == 1_000_000
    assert answer.json()["data"]["taskId"] == TASK


def test_fault_redirect(bench: Bench) -> None:
    """`redirect` sends a redirect."""
    bench.fault("redirect", location="http://elsewhere.invalid/")
    answer = bench.call()
    assert (answer.status_code, answer.headers["location"]) == (302, "http://elsewhere.invalid/")


def test_fault_cookie(bench: Bench) -> None:
    """`cookie` sends the normal response with a cookie and unusual headers."""
    bench.fault("cookie")
    answer = bench.call()
    assert answer.json()["data"]["taskId"] == TASK
    assert answer.cookies["acw_tc"] == "simulated"
    assert answer.headers["x-odd"] == "caf\xe9, \xbf"


def test_fault_deep(bench: Bench) -> None:
    """`deep` sends 200,000 opening brackets."""
    bench.fault("deep")
    assert bench.call().content == b"[" * 200_000


def test_fault_applies_a_number_of_times(bench: Bench) -> None:
    """A fault with `times` applies that often; the list has the remaining number."""
    bench.fault("status", times=2)
    assert bench.call().status_code == 502
    assert bench.control("GET", "/faults") == [{"name": "status", "times": 1}]
    assert bench.call().status_code == 502
    assert bench.control("GET", "/faults") == []
    assert bench.call().is_success


@pytest.mark.parametrize("aim", [{"operation": "sd_get_result"}, {"taskId": "other"}, {"probability": 0}])
def test_fault_applies_to_matching_calls(bench: Bench, aim: dict[str, Any]) -> None:
    """A fault for an operation, a task or a probability ignores other calls, which do not use its `times`."""
    bench.fault("status", times=1, **aim)
    assert bench.call().is_success
    bench.fault("status", operation="sd_get_progress", taskId=TASK, probability=1)
    assert bench.call().status_code == 502


def test_fault_is_replaced_by_name(bench: Bench) -> None:
    """Setting a fault again replaces it, and moves it to the end of the order."""
    bench.fault("status", status=500)
    bench.fault("redirect")
    bench.fault("status", status=503)
    assert [fault["name"] for fault in bench.control("GET", "/faults")] == ["redirect", "status"]
    assert bench.call().status_code == 302


def test_faults_are_cleared(bench: Bench) -> None:
    """Clearing removes all faults."""
    bench.fault("status")
    bench.fault("deep")
    bench.control("DELETE", "/faults")
    assert bench.control("GET", "/faults") == []
    assert bench.data()["taskId"] == TASK


def test_fault_used_up_during_a_delay_does_not_apply(bench: Bench) -> None:
    """A delayed call does not meet a fault that other calls have used up meanwhile."""
    bench.fault("slow", seconds=FOR_EVER, times=1)
    bench.fault("status", times=1)
    with raw_request(bench):
        bench.in_flight(1)
        assert bench.call().status_code == 502
        assert bench.control("GET", "/faults") == []
    bench.in_flight(0)


def test_faults_may_be_active_from_the_start(bench: Bench) -> None:
    """A simulator may be created with faults, in the form of control requests."""
    faults = [{"name": "status", "status": 503, "times": 1}]
    bench.stage.app = create_simulator(pairs=bench.pairs, clock=bench.clock, faults=faults)
    assert bench.call().status_code == 503
    assert bench.call().status_code == 200


@pytest.mark.parametrize(("text", "says"), [(b"[]", "JSON object"), (b'{"name": "sloth"}', "unknown fault")])
def test_invalid_fault_stops_the_start(text: bytes, says: str) -> None:
    """An invalid fault is refused when the simulator is created."""
    with pytest.raises(ControlError, match=says):
        create_simulator(pairs={}, faults=[parse_object(text)])


def test_faults_hide_no_refusal(bench: Bench) -> None:
    """An invalid signature is refused in spite of any fault, and uses up none."""
    bench.fault("status", times=1)
    assert error_of_slow_query(bench.call(access_key="unknown"))[1] == "A400IK"
    assert bench.call().status_code == 502


# --- control ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "given", "text"),
    [
        ("PUT", "/faults", {}, "name: unknown fault; known: refuse, status"),
        ("PUT", "/faults", {"name": "sloth"}, "name: unknown fault"),
        ("PUT", "/faults", {"name": ["slow"]}, "name: unknown fault"),
        ("PUT", "/faults", {"name": "slow", "minutes": 1}, "unknown: minutes; known: seconds"),
        ("PUT", "/faults", {"name": "silent", "seconds": 1}, "unknown: seconds; known: none"),
        ("PUT", "/faults", {"name": "slow", "seconds": "1"}, "seconds: "),
        ("PUT", "/faults", {"name": "slow", "seconds": -1}, "seconds: "),
        ("PUT", "/faults", {"name": "slow", "seconds": 1e300}, "seconds: "),
        ("PUT", "/faults", {"name": "large", "bytes_": 1}, "unknown: bytes_; known: bytes"),
        ("PUT", "/faults", {"name": "refuse", "message": "two\nlines"}, "message: "),
        ("PUT", "/faults", {"name": "refuse", "code": "E1"}, "code: "),
        ("PUT", "/faults", {"name": "status", "status": 99}, "status: "),
        ("PUT", "/faults", {"name": "deep", "times": 0}, "times: "),
        ("PUT", "/faults", {"name": "deep", "probability": 2}, "probability: "),
        ("PUT", "/faults", {"name": "deep", "operation": "sd_txt2img"}, "operation: "),
        ("PUT", "/legacy", {}, "missing: enabled"),
        ("PUT", "/legacy", {"enabled": 1}, "enabled: "),
        ("PUT", "/pairs", {"pairs": {"key": 1}}, "pairs: "),
        ("POST", "/tasks", {"id": "x"}, "unknown: id; known: taskId, life, data"),
        (
            "POST",
            "/tasks",
            {"life": {"waiting_seconds": 1}},
            "unknown: waiting_seconds; known: waitingSeconds",
        ),
        ("POST", "/tasks", {"life": {"outcome": "successed"}}, "outcome: "),
        ("POST", "/tasks", {"life": {"steps": 0}}, "steps: "),
        ("POST", "/tasks", {"data": None}, "data: "),
        ("PUT", "/tasks/x", {"data": []}, "data: "),
        ("PUT", "/tasks/x", {}, "missing: data"),
    ],
)
def test_control_explains_invalid_requests(
    bench: Bench, method: str, path: str, given: dict[str, Any], text: str
) -> None:
    """An invalid control request gets status 400 with the reason, and changes nothing."""
    answer = bench.client.request(method, f"/_simulator{path}", json=given)
    assert answer.status_code == 400
    assert answer.text.startswith(text)
    assert bench.control("GET", "/faults") == []
    assert bench.data()["taskId"] == TASK


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_control_requires_json_objects(bench: Bench, body: bytes) -> None:
    """A control request whose body is no JSON object gets status 400."""
    answer = bench.client.put("/_simulator/faults", content=body)
    assert (answer.status_code, answer.text) == (400, "the body is not a JSON object")


def test_control_survives_text_that_is_not_unicode(bench: Bench) -> None:
    """A lone surrogate in a control request breaks neither its refusal nor a later list."""
    answer = bench.client.put("/_simulator/faults", content=b'{"name": "deep", "\\ud800": 1}')
    assert (answer.status_code, answer.text) == (400, "unknown: ?; known: none")


def test_control_works_under_every_fault(bench: Bench) -> None:
    """No fault affects the control API, which can always clear them."""
    for name in ("silent", "cut", "deep", "redirect", "status"):
        bench.fault(name)
    assert len(bench.control("GET", "/faults")) == 5
    assert bench.control("GET", "/stats")["calls"] == {}
    bench.control("DELETE", "/faults")
    assert bench.call().is_success


def test_limit_throttles_what_exceeds_it_in_a_second(bench: Bench) -> None:
    """Calls above the limit are throttled until the next second."""
    assert bench.control("PUT", "/limit", calls=2) == {"calls": 2, "retryAfter": None}
    assert [bench.call().status_code for _ in range(4)] == [200, 200, 429, 429]
    refused = bench.call()
    assert refused.headers["x-ca-error-code"] == "T429PA"
    assert refused.headers["x-ca-error-message"] == "Throttled by APP Flow Control"
    assert "retry-after" not in refused.headers
    stats = bench.control("GET", "/stats")
    assert (stats["throttled"], stats["refused"]) == (3, 0)
    bench.clock.now += 1
    assert bench.call().is_success
    bench.control("PUT", "/limit", calls=1, retryAfter=3)
    bench.control("PUT", "/legacy", enabled=True)
    refused = bench.call()
    assert (refused.status_code, refused.headers["retry-after"]) == (403, "3")
    bench.control("PUT", "/limit", calls=0)
    assert [bench.call().status_code for _ in range(4)] == [200] * 4
    bench.control("DELETE", "/stats")
    assert bench.control("GET", "/stats")["throttled"] == 0


def test_stats_count_calls(bench: Bench) -> None:
    """The stats count calls by operation and task, refusals, calls in flight, and record arrival times."""
    bench.call()
    bench.clock.now += 5
    bench.call(operation="comfy_get_result")
    bench.call("other", secret_key="other")
    bench.call(operation="sd_txt2img")
    assert bench.control("GET", "/stats") == {
        "calls": {"sd_get_progress": 2, "comfy_get_result": 1},
        "callsByTask": {TASK: 2, "other": 1},
        "refused": 2,
        "inFlight": 0,
        "maxInFlight": 1,
        "throttled": 0,
        "times": [BIRTH, BIRTH + 5, BIRTH + 5],
    }


def test_stats_are_reset_but_for_what_is_in_flight(bench: Bench) -> None:
    """A reset clears all counters except the calls in flight."""
    bench.fault("silent")
    with raw_request(bench), raw_request(bench):
        bench.in_flight(2)
        bench.control("DELETE", "/stats")
        assert bench.control("GET", "/stats") == {
            "calls": {},
            "callsByTask": {},
            "refused": 0,
            "inFlight": 2,
            "maxInFlight": 2,
            "throttled": 0,
            "times": [],
        }
    bench.in_flight(0)


def test_client_that_leaves_in_its_body_is_not_a_call(bench: Bench) -> None:
    """A client that disconnects before its body is complete leaves nothing behind."""
    with raw_request(bench, missing=1):
        bench.in_flight(1)
    bench.in_flight(0)
    assert bench.control("GET", "/stats")["calls"] == {}


def test_stats_stay_bounded() -> None:
    """With any number of calls and tasks, the stats keep the latest and drop the oldest."""
    calls = CallRecord()
    for number in range(MAX_TASKS + 1):
        calls.count("sd_get_progress", f"task-{number}", float(number))
    stats = calls.stats()
    assert (len(stats["callsByTask"]), len(stats["times"])) == (MAX_TASKS, MAX_TIMES)
    assert "task-0" not in stats["callsByTask"]
    assert stats["times"][-1] == MAX_TASKS


def test_requests_are_kept_as_they_came(bench: Bench) -> None:
    """The last 200 vendor requests are recorded with method, target, headers and body."""
    body = b'{"taskId": "\xff"}'
    sent = bench.headers("/scc/sd_get_progress?x=%41", body)
    bench.client.post("/scc/sd_get_progress?x=%41", content=body, headers=sent)
    (kept,) = bench.control("GET", "/requests")
    assert (kept["method"], kept["target"]) == ("POST", "/scc/sd_get_progress?x=%41")
    assert kept["body"] == '{"taskId": "�"}'
    assert sent.items() <= {name: value for name, value in kept["headers"]}.items()  # noqa: C416 - lists, not pairs
    for number in range(201):
        bench.client.get(f"/scc/{number}")
    assert [kept["target"] for kept in bench.control("GET", "/requests")] == [
        f"/scc/{n}" for n in range(1, 201)
    ]


def test_simulator_has_a_default_random_source(bench: Bench) -> None:
    """Without a random source of its own, the simulator uses the system's."""
    bench.stage.app = create_simulator(pairs=bench.pairs, clock=bench.clock)
    first, second = (bench.control("POST", "/tasks")["taskId"] for _ in range(2))
    assert first != second
    assert bench.call(first).json()["data"]["lastQueueRemaining"] == 2
