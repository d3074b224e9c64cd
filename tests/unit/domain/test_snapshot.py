"""Task IDs, envelopes, statuses and snapshots."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from gateway.domain import snapshot as snapshot_module
from gateway.domain.entity_tag import same_body
from gateway.domain.envelope import read_envelope
from gateway.domain.errors import InvalidTaskId, UpstreamInvalid, UpstreamRejected
from gateway.domain.snapshot import Snapshot, build_snapshot, render_json, strict_json
from gateway.domain.task import Operation, Status, TaskKey, check_task_id
from gateway.domain.vendor_values import vendor_status
from gateway.telemetry.redaction import MASK, Redactor
from tests.support.seen import TAGS

TASK = "01j5t2qx82323pswaqykz9eq4"
KEY = TaskKey(Operation.SD_GET_PROGRESS, TASK)
RESULT = TaskKey(Operation.SD_GET_RESULT, TASK)
LIFETIMES: dict[Status | None, float] = {
    None: 30.0,
    Status.WAITING: 2.0,
    Status.RUNNING: 1.0,
    Status.UNKNOWN: 0.5,
    Status.SUCCEEDED: 600.0,
    Status.FAILED: 601.0,
    Status.CANCELED: 602.0,
}
MEMBERS = [
    "taskId",
    "api",
    "status",
    "progress",
    "queueRemaining",
    "etaSeconds",
    "message",
    "terminal",
    "state",
]
# Values of unexpected types for a number, a text or an object.
UNEXPECTED = [
    None,
    True,
    False,
    "",
    "0.5",
    "running",
    [],
    [0.5],
    {},
    {"progress": 0.5},
    -1,
    -0.0,
    10**400,
    -(10**400),
    1e308,
    "\ud800",
]
relaxed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SPELLINGS = [
    ("waiting", Status.WAITING),
    ("running", Status.RUNNING),
    ("successed", Status.SUCCEEDED),
    ("succeeded", Status.SUCCEEDED),
    ("failed", Status.FAILED),
    ("canceled", Status.CANCELED),
    ("cancelled", Status.CANCELED),
]
ENDINGS = ["succeeded", "successed", "failed", "canceled", "cancelled"]

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def mostly(usual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return usual | json_values


upstream_data = st.fixed_dictionaries(
    {},
    optional={
        "taskId": mostly(st.just(TASK)),
        "status": mostly(st.sampled_from([spelling for spelling, _ in SPELLINGS])),
        "progress": mostly(st.floats(-1, 2)),
        "lastQueueRemaining": mostly(st.integers(-2, 99)),
        "etaRelative": mostly(st.floats(-1, 100)),
        "message": mostly(st.text()),
        "state": mostly(st.dictionaries(st.text(max_size=8), json_values, max_size=4)),
    },
)


def same(text: str) -> str:
    return text


def envelope(data: Any, **changes: Any) -> bytes:
    return json.dumps({"status": 10, "apiInvokeId": "i_1", "data": data} | changes).encode()


def read(body: bytes, key: TaskKey = KEY) -> dict[str, Any]:
    return read_envelope(body, key, redact=same).data


def seen(
    previous: Snapshot | None = None, *, key: TaskKey = KEY, at: float = 0.0, version: int = 0, **data: Any
) -> Snapshot:
    """Return the snapshot of a response with `data`."""
    data = {"taskId": key.task_id} | data
    body = envelope(data)
    return build_snapshot(
        data, body, key, fetched_at=at, lifetimes=LIFETIMES, previous=previous, tags=TAGS, version=version
    )


def of(body: bytes, previous: Snapshot | None = None) -> Snapshot:
    """Return the snapshot of an envelope, parsed as it arrives from the upstream."""
    return build_snapshot(
        read_envelope(body, KEY, redact=same).data,
        body,
        KEY,
        fetched_at=0.0,
        lifetimes=LIFETIMES,
        previous=previous,
        tags=TAGS,
    )


def shown(snapshot: Snapshot) -> dict[str, Any]:
    """Return the simplified JSON, parsed strictly."""
    body: dict[str, Any] = strict_json(snapshot.body)
    return body


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


# Task IDs and operations


@pytest.mark.parametrize("task_id", ["a", "A-Z_09", "x" * 64, TASK])
def test_check_task_id_accepts_1_to_64_plain_characters(task_id: str) -> None:
    """A task ID of 1 to 64 letters, digits, underscores and hyphens is returned unchanged."""
    assert check_task_id(task_id) == task_id


@pytest.mark.parametrize("task_id", ["", "x" * 65, "a b", "a/b", "a\n", "ä", "²", "a%", ".."])
def test_check_task_id_rejects_anything_else(task_id: str) -> None:
    """An empty or longer ID, or one with another character such as a line break, is invalid."""
    with pytest.raises(InvalidTaskId, match=r"^a task ID is 1 to 64 characters of A-Z a-z 0-9 _ -$"):
        check_task_id(task_id)


def test_operation_has_path_api_and_kind() -> None:
    """Each operation has its path, its API name and whether it returns a result."""
    assert [(operation.path, operation.api, operation.is_result) for operation in Operation] == [
        ("/scc/sd_get_progress", "sd", False),
        ("/scc/comfy_get_progress", "comfy", False),
        ("/scc/sd_get_result", "sd", True),
        ("/scc/comfy_get_result", "comfy", True),
    ]


# JSON and envelopes


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"NaN",
        b'{"a":Infinity}',
        b"[-Infinity]",
        b"1e999",
        b"[-1e999]",
        b"\xff",
        b'"\xed\xa0\x80"',
        b"\xef\xbb\xbf{}",
        b"1" * 5000,
        b"{}{}",
        nested(50_000),
    ],
    ids=repr,
)
def test_strict_json_rejects_what_rfc_8259_does_not_allow(body: bytes) -> None:
    """Text that is not JSON, not UTF-8, not finite or nested too deep raises ValueError and nothing else."""
    with pytest.raises(ValueError):  # noqa: PT011  # any message
        strict_json(body)


def test_read_envelope_returns_the_data() -> None:
    """The data of the documented response is returned unchanged."""
    data = {"etaRelative": 0, "lastQueueRemaining": 1, "progress": 0, "taskId": TASK, "status": "waiting"}
    assert read(envelope(data)) == data


@pytest.mark.parametrize(
    ("given", "expected"), [("i_1", "i_1"), (None, None), (7, "7"), ("i" * 9999, "i" * 500)]
)
def test_read_envelope_returns_the_vendors_id_of_the_call(given: Any, expected: str | None) -> None:
    """The vendor's ID of the call is a text of bounded length, or None."""
    body = envelope({"taskId": TASK}, apiInvokeId=given)
    assert read_envelope(body, KEY, redact=same).invoke_id == expected


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"",
        b"\xff\xfe",
        b'{"status":10,"data":-NaN}',
        b'{"status":10,"data":nan}',
        b'{"status":10,"data":NaNs}',
        b'{"status":10,"data":{NaN:1}}',
        b'{"status":10,"data":1e999}',
        b'{"status":10,"data":{"taskId":"%b","state":{"a":[1,-1E+400]}}}' % TASK.encode(),
        b'{"status":10,"data":%b.5}' % (b"9" * 400),
        b'{"status":10,"data":{"state":{"a":"\xff"}}}',
        b'{"status":10,"data":{"state":{"a":"\n"}}}',
        b'{"status":10,"data":{"state":{"a":Infinity,}}}',
        b'{"status":10,"x":%b}' % nested(50_000),
        b'{"status":10}{}',
        b"\xef\xbb\xbf",
        b"\xef\xbb\xbf\xef\xbb\xbf{}",
    ],
    ids=lambda body: repr(body[:40]),
)
def test_read_envelope_rejects_what_is_not_json(body: bytes) -> None:
    """A response that is not strict JSON in UTF-8 is invalid."""
    with pytest.raises(UpstreamInvalid, match=r"^the upstream's answer is not JSON$"):
        read(body)


@pytest.mark.parametrize("status", ["", "ten", "10.5", True, None, 10.5, [10], {}])
def test_read_envelope_rejects_a_status_that_is_not_an_integer(status: Any) -> None:
    """Without an integer status a response is not an envelope."""
    with pytest.raises(UpstreamInvalid, match=r"^the upstream's answer is not an envelope$"):
        read(envelope({"taskId": TASK}, status=status))


@pytest.mark.parametrize("body", [b"[]", b'"text"', b"10", b"null", b"{}"])
def test_read_envelope_rejects_json_that_is_not_an_envelope(body: bytes) -> None:
    """JSON that is not an object with a status is not an envelope."""
    with pytest.raises(UpstreamInvalid, match=r"^the upstream's answer is not an envelope$"):
        read(body)


@pytest.mark.parametrize("data", [None, [], "text", 1, True])
def test_read_envelope_rejects_missing_data(data: Any) -> None:
    """A successful envelope whose data is not an object is invalid, for results too."""
    for key in (KEY, RESULT):
        with pytest.raises(UpstreamInvalid, match=r"^the upstream's envelope has no data$"):
            read(envelope(data), key)
    with pytest.raises(UpstreamInvalid, match=r"^the upstream's envelope has no data$"):
        read(b'{"status":10}')


@pytest.mark.parametrize("task_id", ["another", TASK.upper(), "", 1, True, [TASK], {}])
def test_read_envelope_rejects_another_tasks_data(task_id: Any) -> None:
    """A response for a different task is invalid, for progress and for results."""
    for key in (KEY, RESULT):
        with pytest.raises(UpstreamInvalid, match=r"^the upstream answered for another task$"):
            read(envelope({"taskId": task_id}), key)


@pytest.mark.parametrize("data", [{}, {"taskId": None}])
def test_read_envelope_needs_the_task_for_progress_only(data: Any) -> None:
    """Progress must name its task. A result need not, because its reference lists no task ID."""
    assert read(envelope(data), RESULT) == data
    with pytest.raises(UpstreamInvalid, match=r"^the upstream answered for another task$"):
        read(envelope(data))


def test_read_envelope_keeps_a_rejection_byte_for_byte() -> None:
    """A rejection keeps its bytes, including spaces, and its detail has the vendor's codes."""
    body = (
        b'{ "status": 20, "apiInvokeId": "i_2",\n "data": null, "errCode": "E1", "errMessage": "\xe6\x97\xa0"'
        b', "subErrCode": 7, "subErrMessage": null }'
    )
    with pytest.raises(UpstreamRejected, match=r"^the upstream rejected the query$") as caught:
        read(body)
    assert caught.value.envelope == body
    detail = caught.value.detail
    assert detail is not None
    assert (detail.invoke_id, detail.err_code, detail.err_message) == ("i_2", "E1", "无")
    assert (detail.sub_err_code, detail.sub_err_message, detail.request_id) == ("7", None, None)


def test_read_envelope_redacts_a_rejection() -> None:
    """A rejection that quotes a secret stays JSON; neither envelope nor detail contains the secret."""
    redactor = Redactor()
    redactor.add_secrets("LTAI-fake-access-key")
    quoted = "Invalid Signature, Server StringToSign:`POST#x-ca-key:LTAI-fake-access-key#`"
    body = envelope(
        None, status=20, errMessage=quoted, subErrMessage=["of LTAI-fake-access-key", 1], subErrCode="S"
    )
    escaped = body.replace(b"LTAI", rb"\u004cTAI")
    for variant in (body, escaped):
        with pytest.raises(UpstreamRejected) as caught:
            read_envelope(variant, KEY, redact=redactor)
        clean = json.loads(caught.value.envelope)
        assert clean["errMessage"] == f"Invalid Signature, Server StringToSign:{MASK}"
        assert clean["subErrMessage"] == [f"of {MASK}", 1]
        assert (clean["status"], clean["apiInvokeId"], clean["subErrCode"]) == (20, "i_1", "S")
        detail = caught.value.detail
        assert detail is not None
        assert detail.sub_err_message == f'["of {MASK}", 1]'
        assert "LTAI" not in repr(detail)


def test_read_envelope_truncates_the_texts_of_a_rejection() -> None:
    """An upstream text is truncated to 500 characters, after its secrets are redacted."""
    redactor = Redactor()
    redactor.add_secrets("secret-of-the-tests")
    message = "x" * 490 + "secret-of-the-tests" + "x" * 2000
    with pytest.raises(UpstreamRejected) as caught:
        read_envelope(envelope(None, status=20, errMessage=message), KEY, redact=redactor)
    detail = caught.value.detail
    assert detail is not None
    assert detail.err_message == "x" * 490 + MASK


@pytest.mark.parametrize("depth", [100, 300, 500, 700, 900, 960, 990])
def test_read_envelope_survives_a_rejection_of_any_depth(depth: int) -> None:
    """A rejection of any depth is a rejection or invalid, and causes no internal error."""
    body = b'{"status":20,"errMessage":' + nested(depth) + b"}"
    with pytest.raises((UpstreamRejected, UpstreamInvalid)) as refused:
        read(body)
    assert str(refused.value) in {
        "the upstream rejected the query",
        "the upstream's answer nests too deep",
        "the upstream's answer is not JSON",
    }


@relaxed
@given(
    st.dictionaries(st.sampled_from(["status", "data", "errCode", "errMessage", "apiInvokeId"]), json_values)
    | json_values
)
def test_read_envelope_returns_data_or_raises_upstream_errors(value: Any) -> None:
    """Any JSON gives the task's data or one of two exceptions; the envelope of a rejection is unchanged."""
    body = json.dumps(value).encode()
    try:
        data = read(body)
    except UpstreamRejected as exc:
        rejected = exc
    except UpstreamInvalid:
        return
    else:
        assert data["taskId"] == TASK
        return
    assert rejected.envelope == body


# Statuses


@pytest.mark.parametrize(("spelling", "status"), SPELLINGS)
def test_vendor_status_accepts_each_spelling(spelling: str, status: Status) -> None:
    """Both spellings of success and of canceled mean the same, in any case and amid white space."""
    for written in (spelling, spelling.upper(), spelling.title(), f" {spelling}\n"):
        assert vendor_status({"status": written}) is status


@pytest.mark.parametrize(
    "status", ["", "paused", "run ning", "running,", None, True, 10, [], {}, 1e308, "\ud800"]
)
def test_vendor_status_maps_anything_else_to_unknown(status: Any) -> None:
    """An unfamiliar status of any type is unknown and not an error."""
    assert vendor_status({"status": status}) is Status.UNKNOWN
    assert vendor_status({}) is Status.UNKNOWN


def test_status_has_the_published_values() -> None:
    """Callers and dashboards depend on these values."""
    words = ["waiting", "running", "succeeded", "failed", "canceled", "unknown"]
    assert [str(status) for status in Status] == words


def test_status_is_terminal_at_the_end() -> None:
    """Succeeded, failed and canceled are terminal, and no other status is."""
    assert {status for status in Status if status.terminal} == {
        Status.SUCCEEDED,
        Status.FAILED,
        Status.CANCELED,
    }


# Snapshots


def test_observe_renders_the_published_members() -> None:
    """The simplified body has its members in order, and the envelope is kept."""
    state = {"job": "txt2img", "job_timestamp": "20260101", "sampling_step": 7}
    snapshot = seen(
        status="running", progress=0.35, lastQueueRemaining=3, etaRelative=12.3, message="…", state=state
    )
    assert shown(snapshot) == {
        "taskId": TASK,
        "api": "sd",
        "status": "running",
        "progress": 0.35,
        "queueRemaining": None,
        "etaSeconds": 12.3,
        "message": "…",
        "terminal": False,
        "state": state,
    }
    assert list(shown(snapshot)) == MEMBERS
    assert (snapshot.status, snapshot.progress, snapshot.eta_seconds) == (Status.RUNNING, 0.35, 12.3)
    assert not snapshot.terminal
    assert json.loads(snapshot.envelope)["data"]["state"] == state


def test_observe_renders_the_api() -> None:
    """A ComfyUI task has the API name comfy."""
    assert shown(seen(key=TaskKey(Operation.COMFY_GET_PROGRESS, TASK)))["api"] == "comfy"


def test_observe_renders_a_response_without_members() -> None:
    """A response with only a task ID is unknown, at 0, and not terminal."""
    assert shown(seen()) == dict(
        zip(MEMBERS, [TASK, "sd", "unknown", 0.0, None, None, None, False, None], strict=True)
    )


@pytest.mark.parametrize(("spelling", "status"), [*SPELLINGS, ("paused", Status.UNKNOWN)])
def test_observe_gives_the_lifetime_of_the_status(spelling: str, status: Status) -> None:
    """The status determines the lifetime of a snapshot, which begins when it is fetched."""
    snapshot = seen(status=spelling, at=5.0)
    assert (snapshot.lifetime, snapshot.fetched_at, snapshot.key) == (LIFETIMES[status], 5.0, KEY)
    assert snapshot.terminal is shown(snapshot)["terminal"] is status.terminal


@pytest.mark.parametrize(
    ("raw", "progress"),
    [
        (0, 0),
        (1, 0.999),
        (0.9995, 0.999),
        (0.5, 0.5),
        (-1, 0),
        (1.5, 0.999),
        (10**30, 0.999),
        (-0.0, 0),
        (5e-324, 5e-324),
        (100, 0.999),
        ("0.35", 0.35),
        ("35e-2", 0.35),
        ("-1", 0),
        ("7", 0.999),
        (" 0.35\n", 0.35),
    ],
)
def test_observe_clamps_progress(raw: float, progress: float) -> None:
    """Progress is within 0 to 1 for any vendor number, also in a string, and 1 only for a succeeded task."""
    for status in ("waiting", "running", "paused", "failed", "canceled"):
        assert shown(seen(status=status, progress=raw))["progress"] == progress


@pytest.mark.parametrize(
    "unexpected",
    [
        *(value for value in UNEXPECTED if value not in (1e308, "0.5")),
        *("٣", "0,5", "0. 5", "0x1", "1_0", "nan", "Infinity", "1e999", "9" * 401, "."),
    ],
)
def test_observe_maps_an_invalid_progress_to_0(unexpected: Any) -> None:
    """A value that is not a number, or is too large for a float, counts as no progress."""
    assert seen(status="running", progress=unexpected).progress == 0.0


@pytest.mark.parametrize("sign", ["", "-"])
def test_observe_ignores_an_integer_that_python_does_not_convert(sign: str) -> None:
    """In every member, an integer with more digits than Python converts counts as no number."""
    endless = sign + "9" * 5000
    members = ("status", "progress", "lastQueueRemaining", "etaRelative", "message", "state")
    text = ",".join(f'"{name}":{endless}' for name in members)
    answer = shown(of(f'{{"status":10,"data":{{"taskId":"{TASK}",{text}}}}}'.encode()))
    assert answer == shown(seen(**dict.fromkeys(members)))
    for name, reason in (("status", "not an envelope"), ("data", "no data")):
        body = f'{{"status":10,"data":{{"taskId":"{TASK}"}},"{name}":{endless}}}'.encode()
        with pytest.raises(UpstreamInvalid, match=reason):
            of(body)
    with pytest.raises(UpstreamInvalid, match="another task"):
        of(f'{{"status":10,"data":{{"taskId":{endless}}}}}'.encode())


@pytest.mark.parametrize("unexpected", UNEXPECTED)
@pytest.mark.parametrize("status", ["waiting", "running", "succeeded", "paused"])
def test_observe_accepts_unexpected_types_in_every_member(status: str, unexpected: Any) -> None:
    """Unexpected types in the vendor's members give a body with the correct types."""
    names = ("progress", "lastQueueRemaining", "etaRelative", "message", "state")
    body = shown(seen(status=status, **dict.fromkeys(names, unexpected)))
    assert list(body) == MEMBERS
    assert isinstance(body["progress"], float)
    assert body["queueRemaining"] is None or (
        type(body["queueRemaining"]) is int and body["queueRemaining"] >= 0
    )
    assert body["etaSeconds"] is None or type(body["etaSeconds"]) is float
    assert body["message"] is None or isinstance(body["message"], str)
    assert body["state"] is None or isinstance(body["state"], dict)


@pytest.mark.parametrize("status", ENDINGS)
def test_observe_renders_an_eta_of_0_only_at_the_end(status: str) -> None:
    """Before the end an ETA of 0 means "unknown"; at the end the ETA is always 0."""
    assert shown(seen(status=status, etaRelative=7))["etaSeconds"] == 0.0
    assert shown(seen(status="running", etaRelative=0.5))["etaSeconds"] == 0.5
    for eta in (0, 0.0, -0.0, -3):
        for before in ("waiting", "running", "paused"):
            assert shown(seen(status=before, etaRelative=eta))["etaSeconds"] is None


def test_observe_renders_the_queue_only_while_waiting() -> None:
    """The queue length is an integer while the task waits, and null afterwards."""
    assert shown(seen(status="waiting", lastQueueRemaining=3))["queueRemaining"] == 3
    assert shown(seen(status="waiting", lastQueueRemaining=0))["queueRemaining"] == 0
    assert shown(seen(status="waiting", lastQueueRemaining=2.0))["queueRemaining"] == 2
    assert shown(seen(status="waiting", lastQueueRemaining=-1))["queueRemaining"] == 0
    assert shown(seen(status="waiting"))["queueRemaining"] is None
    for status in ("running", "paused", *ENDINGS):
        assert shown(seen(status=status, lastQueueRemaining=3))["queueRemaining"] is None


def test_observe_never_decreases_progress_while_running() -> None:
    """Progress keeps its high-water mark while the task runs; the envelope keeps the vendor's number."""
    high = seen(status="running", progress=0.65)
    low = seen(high, status="running", progress=0.2)
    assert shown(low)["progress"] == low.progress == 0.65
    assert json.loads(low.envelope)["data"]["progress"] == 0.2
    assert seen(low, status="running", progress=0.1).progress == 0.65
    assert seen(low, status="running", progress=0.7).progress == 0.7
    assert seen(seen(status="running", progress=0), status="running", progress=0.2).progress == 0.2


def test_observe_keeps_the_high_water_mark_in_a_second_pass() -> None:
    """If the vendor's number restarts near its end, the mark stays until the task succeeds."""
    shown_at = None
    for number, mark in [(0.94, 0.94), (1.0, 0.999), (0.02, 0.999), (0.49, 0.999), (0.98, 0.999)]:
        shown_at = seen(shown_at, status="running", progress=number)
        assert shown_at.progress == shown(shown_at)["progress"] == mark
    assert seen(shown_at, status="succeeded", progress=0.5).progress == 1.0


def test_observe_reads_numbers_in_strings() -> None:
    """A number in a string is accepted, also for the queue length and the ETA."""
    assert shown(seen(status="waiting", lastQueueRemaining="3"))["queueRemaining"] == 3
    assert shown(seen(status="running", etaRelative="12.5"))["etaSeconds"] == 12.5
    assert shown(seen(status="running", etaRelative="0"))["etaSeconds"] is None


@pytest.mark.parametrize(
    "state",
    [
        r'{{"big":{},"neg":-{}}}'.format("9" * 5000, "8" * 400),
        r'{"a":1,"a":2,"x":1.0,"e":1E+2,"z":0.10000000000000000001}',
        rf'{{"a":"\u00e9\/\n","deep":{nested(600).decode()}}}',
        r'{"text":"1e999 and 0e000", "small":1e-999}',
        "{}",
    ],
)
def test_observe_keeps_the_state_byte_for_byte(state: str) -> None:
    """The vendor's state object is neither parsed nor rendered: integers of any size stay unchanged."""
    snapshot = of(b'{"status":10,"data":{"taskId":"%b","state":%b}}' % (TASK.encode(), state.encode()))
    assert snapshot.body.endswith(b'"state":%b}' % state.encode())


def test_observe_renders_the_state_on_one_line() -> None:
    """Line breaks in the state are removed, because they would end an event of a stream."""
    body = b'{"status":10,"data":{"taskId":"%b",\r\n"state":{"a":\r[1,\n2],"b":"\\n"}}}' % TASK.encode()
    snapshot = of(body)
    assert b"\n" not in snapshot.body
    assert b"\r" not in snapshot.body
    assert shown(snapshot)["state"] == {"a": [1, 2], "b": "\n"}
    assert snapshot.envelope == body


@pytest.mark.parametrize("between", ["waiting", "paused"])
def test_observe_decreases_progress_when_the_status_changes(between: str) -> None:
    """The high-water mark applies only while a task stays running."""
    high = seen(status="running", progress=0.65)
    assert seen(high, status=between, progress=0.1).progress == 0.1
    assert seen(seen(high, status=between, progress=0.9), status="running", progress=0.2).progress == 0.2


@pytest.mark.parametrize("spelling", ["succeeded", "successed"])
@pytest.mark.parametrize("progress", [0, 0.65, None, "x", 5])
def test_observe_renders_success_as_1(spelling: str, progress: Any) -> None:
    """A succeeded task has progress 1, whatever the vendor's number is."""
    assert shown(seen(status=spelling, progress=progress))["progress"] == 1.0


def test_observe_keeps_the_progress_of_a_failed_task() -> None:
    """A failed task keeps its last progress."""
    assert shown(seen(status="failed", progress=0.4))["progress"] == 0.4


@pytest.mark.parametrize("first", ENDINGS)
@pytest.mark.parametrize("later", ["waiting", "running", "paused", *ENDINGS])
def test_observe_keeps_a_terminal_status(first: str, later: str) -> None:
    """The first terminal status is final. The same status again takes over the newer response."""
    ended = seen(status=first, progress=0.4, message="first", at=1.0)
    snapshot = seen(ended, status=later, progress=0.7, message="later", at=2.0)
    assert snapshot.status is ended.status
    assert (snapshot.fetched_at, snapshot.lifetime) == (2.0, ended.lifetime)
    if vendor_status({"status": later}) is ended.status:
        assert shown(snapshot)["message"] == "later"
        assert json.loads(snapshot.envelope)["data"]["message"] == "later"
    else:
        assert (snapshot.body, snapshot.etag, snapshot.envelope) == (ended.body, ended.etag, ended.envelope)
        assert (snapshot.progress, snapshot.eta_seconds) == (ended.progress, ended.eta_seconds)


def test_observe_gives_equal_bodies_equal_etags() -> None:
    """The ETag is strong: for the snapshots of a task in sequence it changes with the body alone."""
    one = seen(status="running", progress=0.5, at=1.0)
    again = seen(one, status="running", progress=0.3, at=2.0)  # the high-water mark hides the decrease
    other = seen(status="running", progress=0.51)
    assert (one.body, one.etag) == (again.body, again.etag)
    assert one.body != other.body
    assert one.etag != other.etag
    assert one.etag[0] == one.etag[-1] == '"'
    assert not one.etag.startswith("W/")
    assert all(0x21 <= ord(character) <= 0x7E and character != '"' for character in one.etag[1:-1])


def test_observe_keeps_the_revision_of_an_unchanged_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """The revision is the time when the body first arrived, at least the version; the ETag names it."""
    monkeypatch.setattr(snapshot_module, "version_now", itertools.count(13).__next__)
    first = seen(status="running", progress=0.5, version=3)
    unchanged = seen(first, status="running", progress=0.3, version=4)
    changed = seen(unchanged, status="running", progress=0.6, version=5)
    again = seen(status="running", progress=0.5, version=6)  # without the snapshot that it follows
    assert [one.revision for one in (first, unchanged, changed, again)] == [13, 13, 15, 16]
    assert [TAGS.revision(one.etag, KEY) for one in (first, unchanged, changed, again)] == [13, 13, 15, 16]
    assert unchanged.etag == first.etag
    assert again.etag != first.etag
    assert same_body(again.etag, first.etag)
    ended = seen(changed, status="failed", version=7)
    assert seen(ended, status="running", version=8).revision == ended.revision == 17
    assert seen(key=RESULT, version=9).revision == 9
    assert seen(status="running", version=99).revision == 99, "the clock was set back"


@pytest.mark.parametrize(
    ("version", "revision", "sufficient"),
    [
        (5, 9, {0, 5, 9}),  # a query that was sent later would have at least version 9
        (9, 9, {0, 5, 6, 7, 9}),
        (12, 6, {0, 5, 6, 7, 9, 12}),  # the body is older, and still right
    ],
)
def test_snapshot_may_follow_a_revision(version: int, revision: int, sufficient: set[int]) -> None:
    """A snapshot is not older than a body that had arrived when its query was sent, or that it has."""
    snapshot = replace(seen(status="running"), version=version, revision=revision)
    revisions = (0, 5, 6, 7, 9, 12, 13)
    assert {each for each in revisions if snapshot.may_follow(each)} == sufficient
    ended = replace(seen(status="failed"), version=version, revision=revision)
    assert all(map(ended.may_follow, revisions)), "the end of a task is final"


@given(st.integers(0, 99), st.integers(0, 99))
def test_snapshot_may_follow_each_revision_up_to_its_version(version: int, revision: int) -> None:
    """A snapshot that was fetched after a revision is sufficient; of the later ones, only its own."""
    snapshot = replace(seen(status="running"), version=version, revision=revision)
    sufficient = {each for each in range(101) if snapshot.may_follow(each)}
    assert sufficient == {*range(version + 1), revision}


def test_observe_keeps_a_result_unchanged() -> None:
    """A result has the lifetime of results and its envelope: no status, no progress, no body."""
    snapshot = seen(seen(key=RESULT), key=RESULT, status="succeeded", images=["u"], at=3.0)
    assert (snapshot.lifetime, snapshot.fetched_at) == (30.0, 3.0)
    assert (snapshot.status, snapshot.progress, snapshot.eta_seconds) == (None, None, None)
    assert (snapshot.body, snapshot.etag, snapshot.terminal) == (b"", "", False)
    assert json.loads(snapshot.envelope)["data"]["images"] == ["u"]


def test_observe_sets_the_version_of_every_snapshot() -> None:
    """Results, running tasks and tasks that stay terminal get the given version."""
    ended = seen(status="failed", version=1)
    assert seen(key=RESULT, version=2).version == 2
    assert seen(status="running", version=3).version == 3
    assert seen(ended, status="running", version=4).version == 4
    assert seen(ended, status="failed", version=5).version == 5


def test_snapshot_is_fresh_for_its_lifetime() -> None:
    """A snapshot is fresh from its arrival until its lifetime has passed."""
    snapshot = seen(status="running", at=100.0)
    assert snapshot.lifetime == LIFETIMES[Status.RUNNING]
    assert [snapshot.fresh(100.0 + age) for age in (0.0, snapshot.lifetime - 0.01)] == [True, True]
    assert not snapshot.fresh(100.0 + snapshot.lifetime)


def test_observe_rejects_a_state_that_nests_too_deep() -> None:
    """A state too deep to be rendered is invalid, and causes no internal error."""
    deep: Any = {}
    for _ in range(50_000):
        deep = {"state": deep}
    body = b"{}"
    data = {"taskId": TASK, "status": "running", "state": deep}
    with pytest.raises(UpstreamInvalid, match=r"^the upstream's answer nests too deep$"):
        build_snapshot(data, body, KEY, fetched_at=0.0, lifetimes=LIFETIMES, previous=None, tags=TAGS)
    while deep:  # released iteratively: the interpreter would recurse
        deep = deep.pop("state")


def test_render_json_escapes_a_lone_surrogate() -> None:
    """A lone surrogate becomes a JSON escape; the rest is compact UTF-8."""
    assert render_json({"a": "\ud800", "b": "画", "c": "😀"}) == '{"a":"\\ud800","b":"画","c":"😀"}'.encode()


@pytest.mark.parametrize(
    ("escaped", "read"),
    [
        (r"\ud83d", "\ufffd"),
        (r"\uDE00x", "\ufffdx"),
        (r"\ud83d\ud83d\ude00", "\ufffd😀"),
        (r"\ud83d\ude00\ude00", "😀\ufffd"),
        (r"\\ud83d\ud83d\\", "\\ud83d\ufffd\\"),
        (r"\ud83d\u0041", "\ufffdA"),
    ],
)
def test_observe_renders_a_lone_surrogate_as_the_replacement_character(escaped: str, read: str) -> None:
    """Text truncated within an emoji is rendered as valid UTF-8; the envelope stays unchanged."""
    body = (
        rf'{{"status":10,"data":{{"taskId":"{TASK}","message":"{escaped}","state":{{"job":"{escaped}"}}}}}}'
    )
    snapshot = of(body.encode())
    assert (shown(snapshot)["message"], shown(snapshot)["state"]) == (read, {"job": read})
    assert snapshot.envelope == body.encode()


def test_render_json_rejects_what_json_cannot_represent() -> None:
    """A number that JSON cannot represent raises ValueError."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        render_json({"progress": float("nan")})


@relaxed
@given(data=upstream_data, before=st.none() | upstream_data)
def test_any_data_is_invalid_or_gives_a_valid_body(
    data: dict[str, Any], before: dict[str, Any] | None
) -> None:
    """Any data is invalid or gives strict JSON with the published members and progress in 0..1."""
    previous = None if before is None else seen(**(before | {"taskId": TASK}))
    body = envelope(data)
    try:
        kept = read(body)
    except UpstreamInvalid:
        assert data.get("taskId") != TASK
        return
    snapshot = build_snapshot(
        kept, body, KEY, fetched_at=0.0, lifetimes=LIFETIMES, previous=previous, tags=TAGS
    )
    answer = shown(snapshot)
    assert list(answer) == MEMBERS
    assert 0.0 <= answer["progress"] <= 1.0
    assert answer["progress"] == snapshot.progress
    assert answer["status"] == snapshot.status
    assert answer["taskId"] == TASK
    if previous is not None and previous.status is snapshot.status is Status.RUNNING:
        assert previous.progress is not None
        assert answer["progress"] >= previous.progress
    if previous is not None and previous.terminal:
        assert snapshot.status is previous.status
