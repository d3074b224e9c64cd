"""Values that replicas write for each other: decoded completely, or refused."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.errors import (
    UpstreamBusy,
    UpstreamDetail,
    UpstreamError,
    UpstreamRejected,
    UpstreamTimeout,
)
from gateway.domain.snapshot import Snapshot, build_snapshot
from gateway.domain.task import Operation, Status, TaskKey
from gateway.stores.valkey.codec import (
    Head,
    InvalidStoredValue,
    _digest,
    decode_failure,
    decode_snapshot,
    encode_failure,
    encode_snapshot,
    failure_seconds,
    split_stored,
)
from tests.support.seen import answered, seen

KEY = TaskKey(Operation.SD_GET_PROGRESS, "task")
OTHERS = [KEY._replace(task_id="other"), KEY._replace(operation=Operation.SD_GET_RESULT)]
SNAPSHOT = seen(
    KEY, at=1.0, lifetime=2.0, version=7, message="a\nb", etaRelative=3, state={"job": "x", "n": 1}
)
FAILURE = UpstreamTimeout("too late", detail=UpstreamDetail(err_code="E"), retry_after=1.5)
REJECTED = UpstreamRejected(
    "the upstream rejected the query",
    envelope=b'{"status":20,\r\n"errCode":"E"}',
    detail=UpstreamDetail(err_code="E"),
)
FIELDS = [name for name in Snapshot.__slots__ if name not in {"polls", "current_until"}]

numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers()
data = st.fixed_dictionaries(
    {},
    optional={
        "progress": numbers,
        "etaRelative": numbers,
        "lastQueueRemaining": numbers,
        "message": st.none() | st.text(),
        "state": st.none() | st.dictionaries(st.text(), numbers | st.text()),
    },
)
statuses = st.sampled_from(["waiting", "running", "succeeded", "failed", "canceled", "new"])


def stored(snapshot: Snapshot) -> bytes:
    """Return a snapshot as it is stored."""
    head = (snapshot.version, 11, round(snapshot.lifetime * 1e6), 12, int(snapshot.terminal))
    return b"sdg3 %d %d %d %d %d\n%b" % (*head, encode_snapshot(snapshot))


def read(value: bytes, key: TaskKey = KEY) -> Snapshot:
    """Decode a stored value. Raises: InvalidStoredValue."""
    head, encoded = split_stored(value)
    return decode_snapshot(encoded, key, head, fetched_at=1.0)


def fields_of(snapshot: Snapshot) -> list[Any]:
    return [getattr(snapshot, name) for name in FIELDS]


def sealed(header: dict[str, Any], envelope: bytes) -> bytes:
    """Return a forged value with a valid digest."""
    content = json.dumps(header).encode() + b"\n" + envelope
    return _digest(content) + b" " + content


def opened(encoded: bytes) -> tuple[dict[str, Any], bytes]:
    header, _, envelope = encoded.partition(b" ")[2].partition(b"\n")
    return json.loads(header), envelope


@given(statuses, data, st.sampled_from([KEY, *OTHERS]), st.floats(0, 1e6), st.integers(0, 2**53))
def test_snapshot_round_trip(
    status: str, data: dict[str, Any], key: TaskKey, lifetime: float, version: int
) -> None:
    """Every field is decoded; the times come from the head."""
    snapshot = seen(key, status, at=1.0, lifetime=round(lifetime, 6), version=version, **data)
    assert fields_of(read(stored(snapshot), key)) == fields_of(snapshot)


def test_snapshot_keeps_progress_and_end() -> None:
    """The progress mark of a running task, and the end of a finished task, survive the store."""
    lifetimes: dict[Status | None, float] = dict.fromkeys([None, *Status], 2.0)

    def after(previous: Snapshot, **data: Any) -> Snapshot:
        envelope = answered(KEY, **data)
        given = json.loads(envelope)["data"]
        return build_snapshot(
            given, envelope, KEY, fetched_at=1.0, lifetimes=lifetimes, previous=previous, version=8
        )

    fallen = after(SNAPSHOT, status="running", progress=0.2)
    ended = after(seen(KEY, "failed", lifetime=2.0), status="running")
    for snapshot in (fallen, ended):
        assert fields_of(read(stored(snapshot))) == fields_of(snapshot)
    assert (fallen.progress, ended.status) == (0.5, Status.FAILED)


@given(st.data())
def test_snapshot_that_is_damaged_is_refused_or_whole(draw: st.DataObject) -> None:
    """Any byte changed, removed or added gives the same snapshot or none. Only times depend on the head."""
    value = stored(SNAPSHOT)
    start = draw.draw(st.integers(0, len(value)))
    end = draw.draw(st.integers(start, min(start + 3, len(value))))
    damaged = value[:start] + draw.draw(st.binary(max_size=3)) + value[end:]
    try:
        snapshot = read(damaged)
    except InvalidStoredValue:
        return
    assert fields_of(snapshot) == fields_of(SNAPSHOT)


@given(
    st.sampled_from(["operation", "task", "progress", "version", "lifetime", "more"]),
    st.booleans() | numbers | st.text() | st.lists(st.none()) | st.sampled_from([1e999, 0.5, 7]),
)
def test_snapshot_with_another_header_is_refused_or_whole(name: str, value: Any) -> None:
    """Any field changed with a valid digest gives the same snapshot, none, or another valid progress mark."""
    header, envelope = opened(encode_snapshot(SNAPSHOT))
    try:
        snapshot = read(b"sdg3 7 11 2000000 12 0\n" + sealed(header | {name: value}, envelope))
    except InvalidStoredValue:
        return
    if name == "progress":
        assert 0.5 <= (snapshot.progress or 0.0) <= 0.999
        assert json.loads(snapshot.body)["progress"] == snapshot.progress
    else:
        assert fields_of(snapshot) == fields_of(SNAPSHOT)


@pytest.mark.parametrize(
    "envelope",
    [
        b"",
        b"{}",
        b"[]",
        b'{"status":10,"data":null}',
        b'{"status":20,"data":{"taskId":"task"}}',
        answered(KEY._replace(task_id="other")),
        answered(KEY, "succeeded"),  # under the head of a running task
        answered(KEY, progress=0.6),  # beyond the progress mark
        answered(KEY).replace(b"0.5", b"NaN"),
        answered(KEY).replace(b"0.5", b"1e999"),
        answered(KEY) + b"x",
        b"\xff" + answered(KEY),
    ],
)
def test_snapshot_of_another_envelope_is_refused(envelope: bytes) -> None:
    """An envelope of another task, or one that contradicts its header, is refused."""
    header, _ = opened(encode_snapshot(SNAPSHOT))
    with pytest.raises(InvalidStoredValue):
        read(b"sdg3 7 11 2000000 12 0\n" + sealed(header, envelope))


@pytest.mark.parametrize(
    "head", ["7 11 2000001 12 0", "8 11 2000000 12 0", "7 11 2000000 12 1", "7 11 9999999999999 12 0", "7"]
)
def test_snapshot_under_another_head_is_refused(head: str) -> None:
    """Head and header must agree."""
    with pytest.raises(InvalidStoredValue):
        read(f"sdg3 {head}\n".encode() + encode_snapshot(SNAPSHOT))


def test_lifetime_is_within_the_settings_bounds() -> None:
    """No lifetime exceeds the maximum of the settings."""
    assert split_stored(b"sdg3 1 2 2592000000000 3 0\n") == (
        Head(1, 2, 2_592_000_000_000, 3, terminal=False),
        b"",
    )
    with pytest.raises(InvalidStoredValue):
        split_stored(b"sdg3 1 2 2592000000001 3 0\n")


@pytest.mark.parametrize("key", OTHERS)
def test_encoded_for_another_task_is_refused(key: TaskKey) -> None:
    """A snapshot or failure is never accepted for another task."""
    with pytest.raises(InvalidStoredValue):
        read(stored(SNAPSHOT), key)
    with pytest.raises(InvalidStoredValue):
        decode_failure(encode_failure(KEY, FAILURE), key)


@pytest.mark.parametrize(
    "failure",
    [
        FAILURE,
        UpstreamBusy("unwell"),
        UpstreamError("?", detail=UpstreamDetail("1", "2", "3", "4", "5", "无 　"), retry_after=0.0),
        REJECTED,
    ],
)
def test_failure_round_trip(failure: UpstreamError) -> None:
    """A failure is decoded with its type and all its details."""
    found = decode_failure(encode_failure(KEY, failure), KEY)
    assert type(found) is type(failure)
    assert (str(found), vars(found)) == (str(failure), vars(failure))


def test_failure_is_written_without_control_characters() -> None:
    """Control characters in a text of the upstream are replaced before it is stored."""
    failure = UpstreamTimeout("too late", detail=UpstreamDetail(err_message="a\r\nb\x1bc\x9b" + "x" * 600))
    found = decode_failure(encode_failure(KEY, failure), KEY)
    assert found.detail == UpstreamDetail(err_message=("a  b c " + "x" * 600)[:500])


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "SystemExit"},
        {"kind": "UpstreamRejected"},
        {"kind": None},
        {"detail": {"x": "1"}},
        {"detail": {}},
        {"detail": "x"},
        {"retry_after": "x"},
        {"retry_after": -1},
        {"retry_after": 1e9},
        {"retry_after": float("inf")},
        {"retry_after": float("nan")},
        {"message": "a\r\nSet-Cookie: a=b"},
        {"message": "\x1b[2J"},
        {"message": "x" * 501},
        {"message": None},
        {"more": 1},
    ],
)
def test_failure_with_invalid_fields_is_refused(change: dict[str, object]) -> None:
    """Only upstream failures are accepted, and only with valid fields."""
    header, envelope = opened(encode_failure(KEY, FAILURE))
    with pytest.raises(InvalidStoredValue):
        decode_failure(sealed(header | change, envelope), KEY)


@pytest.mark.parametrize("envelope", [b"", b"[]", b"{}", b'{"status":10}', b'{"status":"20"}', b"\xff", b"{"])
def test_rejection_without_its_envelope_is_refused(envelope: bytes) -> None:
    """A rejection is accepted only with an envelope that rejects."""
    header, _ = opened(encode_failure(KEY, REJECTED))
    with pytest.raises(InvalidStoredValue):
        decode_failure(sealed(header, envelope), KEY)


@given(st.data())
def test_failure_that_is_damaged_is_refused_or_whole(draw: st.DataObject) -> None:
    """Any byte changed, removed or added gives the same failure or none."""
    for failure in (FAILURE, REJECTED):
        value = encode_failure(KEY, failure)
        start = draw.draw(st.integers(0, len(value)))
        end = draw.draw(st.integers(start, min(start + 3, len(value))))
        damaged = value[:start] + draw.draw(st.binary(max_size=3)) + value[end:]
        try:
            found = decode_failure(damaged, KEY)
        except InvalidStoredValue:
            continue
        assert (type(found), str(found), vars(found)) == (type(failure), str(failure), vars(failure))


@pytest.mark.parametrize("time", [b"", b"x", b"-1", b"1_0", b" 1", b"9" * 13, b"9" * 5000, -1, 10**12, 2**80])
def test_failure_with_an_invalid_lifetime_is_refused(time: bytes | int) -> None:
    """A lifetime outside of the bounds of the settings is refused."""
    with pytest.raises(InvalidStoredValue):
        failure_seconds(time)


def test_failure_lifetime_is_in_milliseconds() -> None:
    """The lifetime is in milliseconds, from a message or from the server."""
    assert (failure_seconds(b"1500"), failure_seconds(1500)) == (1.5, 1.5)


@pytest.mark.parametrize("garbage", [b"", b"null", b"[]", b"{}", b"[" * 100_000, b"\xff", b'"text"'])
def test_garbage_is_refused(garbage: bytes) -> None:
    """Any other bytes are refused with the same exception."""
    for value in (
        garbage,
        _digest(garbage) + b" " + garbage,
        _digest(garbage + b"\n") + b" " + garbage + b"\n",
    ):
        with pytest.raises(InvalidStoredValue):
            decode_failure(value, KEY)
        with pytest.raises(InvalidStoredValue):
            read(b"sdg3 7 11 2000000 12 0\n" + value)
        with pytest.raises(InvalidStoredValue):
            read(value)
