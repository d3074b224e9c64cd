"""Responses whose form deviates from the vendor's reference, but whose meaning is plain."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.envelope import read_envelope, read_rejection
from gateway.domain.errors import UpstreamInvalid, UpstreamRejected
from gateway.domain.json_text import replace_constants
from gateway.domain.snapshot import Snapshot, build_snapshot
from gateway.domain.task import Operation, TaskKey
from gateway.domain.vendor_values import Repair
from tests.support.seen import TAGS
from tests.unit.domain.test_snapshot import LIFETIMES

KEY = TaskKey(Operation.SD_GET_PROGRESS, "task")
RESULT = TaskKey(Operation.SD_GET_RESULT, "task")
USUAL = (
    b'{"status":10,"apiInvokeId":"i_1","data":{"taskId":"task","status":"running","progress":0.35,'
    b'"lastQueueRemaining":3,"etaRelative":12.5,"message":"NaN","state":{"step":7,"loss":0.25,"all":[1,2]}}}'
)

# The change of the usual response, the repairs, and the members of the simplified JSON that change.
DEVIATIONS: dict[str, tuple[bytes, bytes, list[Repair], dict[str, Any]]] = {
    "nan-in-state": (
        b'"loss":0.25',
        b'"loss":NaN',
        [Repair.CONSTANT],
        {"state": {"step": 7, "loss": None, "all": [1, 2]}},
    ),
    "several-in-state": (
        b'"loss":0.25,"all":[1,2]',
        b'"loss":-Infinity,"all":[ NaN,Infinity ]',
        [Repair.CONSTANT],
        {"state": {"step": 7, "loss": None, "all": [None, None]}},
    ),
    "nan-elsewhere": (b'"data":', b'"startTime":NaN,"data":', [Repair.CONSTANT], {}),
    "progress-is-nan": (b"0.35", b"NaN", [Repair.CONSTANT], {"progress": 0.0}),
    "eta-is-infinite": (b"12.5", b"Infinity", [Repair.CONSTANT], {"etaSeconds": None}),
    "progress-in-text": (b"0.35", b'"0.35"', [Repair.NUMBER_IN_TEXT], {}),
    "eta-in-text": (b"12.5", b'" 12.5"', [Repair.NUMBER_IN_TEXT], {}),
    "queue-in-text": (b":3,", b':"3",', [Repair.NUMBER_IN_TEXT], {}),
    "eta-is-the-largest-integer": (
        b"12.5",
        b"9223372036854775807",
        [Repair.IMPLAUSIBLE_NUMBER],
        {"etaSeconds": None},
    ),
    "eta-is-1e308-in-text": (
        b"12.5",
        b'"1e308"',
        [Repair.NUMBER_IN_TEXT, Repair.IMPLAUSIBLE_NUMBER],
        {"etaSeconds": None},
    ),
    "eta-of-30-days": (b"12.5", b"2592000", [], {"etaSeconds": 2592000.0}),
    "eta-of-more-than-30-days": (b"12.5", b"2592000.1", [Repair.IMPLAUSIBLE_NUMBER], {"etaSeconds": None}),
    "call-status-in-text": (b'"status":10', b'"status":"10"', [Repair.NUMBER_IN_TEXT], {}),
    "call-status-with-fraction": (b'"status":10', b'"status":10.0', [], {}),
    "upper-case": (b'"running"', b'"RUNNING"', [Repair.STATUS_SPELLING], {}),
    "white-space": (b'"running"', b'" Running\\n"', [Repair.STATUS_SPELLING], {}),
    "unknown-status": (b'"running"', b'"Paused"', [], {"status": "unknown"}),
    "byte-order-mark": (b'{"status":10', b'\xef\xbb\xbf{"status":10', [Repair.BYTE_ORDER_MARK], {}),
    "both": (
        b'{"status":10,',
        b'\xef\xbb\xbf{"status":"10","endTime":NaN,',
        [Repair.BYTE_ORDER_MARK, Repair.CONSTANT, Repair.NUMBER_IN_TEXT],
        {},
    ),
    "reference": (b"", b"", [], {}),
}


def snapshot_of(body: bytes) -> Snapshot:
    """Return the snapshot of a response."""
    data = read_envelope(body, KEY, redact=str).data
    return build_snapshot(data, body, KEY, fetched_at=0.0, lifetimes=LIFETIMES, previous=None, tags=TAGS)


@pytest.mark.parametrize("name", DEVIATIONS)
def test_deviation_with_a_plain_meaning_is_repaired(name: str) -> None:
    """The response is read as meant, the deviation is reported, and the envelope stays byte for byte."""
    before, after, repairs, changes = DEVIATIONS[name]
    body = USUAL.replace(before, after, 1)
    assert list(read_envelope(body, KEY, redact=str).repairs) == repairs
    snapshot = snapshot_of(body)
    assert snapshot.envelope == body
    usual = json.loads(snapshot_of(USUAL).body)
    assert json.loads(snapshot.body, parse_constant=pytest.fail) == usual | changes


@pytest.mark.parametrize(
    ("sent", "shown", "repairs"),
    [
        (b"100000000", 100_000_000, ()),
        (b"100000001", None, (Repair.IMPLAUSIBLE_NUMBER,)),
        (b"2147483647", None, (Repair.IMPLAUSIBLE_NUMBER,)),
        (b"1e308", None, (Repair.IMPLAUSIBLE_NUMBER,)),
        (b"9" * 400, None, ()),
    ],
)
def test_queue_length_is_plausible_or_unknown(
    sent: bytes, shown: int | None, repairs: tuple[Repair, ...]
) -> None:
    """A number that no queue reaches is null, so a response never has an integer of hundreds of digits."""
    body = USUAL.replace(b"running", b"waiting").replace(b":3,", b":%b," % sent)
    assert read_envelope(body, KEY, redact=str).repairs == repairs
    assert json.loads(snapshot_of(body).body)["queueRemaining"] == shown


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (b'"taskId":"task"', b'"taskId":NaN', "another task"),
        (b'"status":10', b'"status":NaN', "not an envelope"),
        (b'"status":10', b'"status":"ten"', "not an envelope"),
        (b"0.35", b"nan", "not JSON"),
        (b"0.35", b"-NaN", "not JSON"),
    ],
)
def test_deviation_without_a_plain_meaning_is_not_repaired(before: bytes, after: bytes, reason: str) -> None:
    """The gateway does not guess: such a response stays invalid."""
    with pytest.raises(UpstreamInvalid, match=reason):
        read_envelope(USUAL.replace(before, after, 1), KEY, redact=str)


def test_rejection_with_deviations_stays_a_rejection() -> None:
    """A rejection whose status is text, with NaN in it, is passed on byte for byte."""
    body = b'{"status":"20","errCode":"E1","errMessage":"no","data":null,"endTime":NaN}'
    with pytest.raises(UpstreamRejected) as caught:
        read_envelope(body, KEY, redact=str)
    assert (caught.value.envelope, caught.value.detail and caught.value.detail.err_code) == (body, "E1")
    stored = read_rejection(body)
    assert stored.envelope == body


def test_result_with_nan_is_accepted() -> None:
    """NaN in a result is counted, and the status of a result is not read."""
    body = b'{"status":10,"data":{"status":"SUCCEEDED","images":["https://a"],"info":{"loss":NaN}}}'
    assert read_envelope(body, RESULT, redact=str).repairs == (Repair.CONSTANT,)


json_with_constants = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.text('NaN\\"Infity-,:[]{} '),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('Na\\"I'), inner, max_size=4),
    max_leaves=12,
)


@given(json_with_constants, st.booleans())
def test_constants_are_replaced_outside_of_strings_only(value: Any, ascii_only: bool) -> None:  # noqa: FBT001
    """Python's own parser, told to read the constants as null, gives the same value."""
    text = json.dumps(value, ensure_ascii=ascii_only).encode(errors="backslashreplace")
    expected = json.loads(text, parse_constant=lambda _: None)
    assert json.loads(replace_constants(text), parse_constant=pytest.fail) == expected


@pytest.mark.parametrize(
    "text", [b"", b"{}", b'"NaN"', b'"NaN', b'["Infinity \\"NaN', b"-NaN", b"NotANumber"]
)
def test_text_without_constants_is_returned_unchanged(text: bytes) -> None:
    """Text with no constant outside of its strings is the same object, valid or not."""
    assert replace_constants(text) is text
