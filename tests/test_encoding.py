"""What replicas write for each other: read back whole, or refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.exceptions import UpstreamBusy, UpstreamDetail, UpstreamError, UpstreamRejected, UpstreamTimeout
from gateway.models import Operation, Snapshot, Status, TaskKey
from gateway.stores.encoding import (
    Undecodable,
    decode_failure,
    decode_snapshot,
    encode_failure,
    encode_snapshot,
)

KEY = TaskKey(Operation.SD_GET_PROGRESS, "task")
OTHERS = [KEY._replace(task_id="other"), KEY._replace(operation=Operation.SD_GET_RESULT)]
SNAPSHOT = Snapshot(KEY, 1.0, 2.0, b"envelope", Status.RUNNING, 0.5, 3.0, b"body", '"tag"', 7)
FAILURE = UpstreamTimeout("too late", retry_after=1.5)


@given(
    st.builds(
        Snapshot,
        key=st.sampled_from([KEY, *OTHERS]),
        fetched_at=st.floats(0, 1e9),
        lifetime=st.floats(0, 1e6),
        envelope=st.binary(),
        status=st.none() | st.sampled_from(Status),
        progress=st.none() | st.floats(0, 1),
        eta_seconds=st.none() | st.floats(0, 1e9),
        body=st.binary(),
        etag=st.text(st.characters(codec="ascii")),
        stamp=st.integers(0, 2**53),
    )
)
def test_snapshot_is_read_as_it_was_written(snapshot: Snapshot) -> None:
    """Every field comes back; those that travel beside it are what the reader says."""
    read = decode_snapshot(
        encode_snapshot(snapshot), snapshot.key, fetched_at=snapshot.fetched_at, stamp=snapshot.stamp
    )
    for name in Snapshot.__slots__:
        assert getattr(read, name) == getattr(snapshot, name)


@given(st.integers(0, 200), st.binary(max_size=3))
def test_snapshot_that_is_damaged_is_refused_or_whole(place: int, garbage: bytes) -> None:
    """Cut off, or with other bytes within, it is refused; what is not refused is about the very task."""
    encoded = encode_snapshot(SNAPSHOT)
    damaged = encoded[:place] + garbage
    if damaged == encoded:
        return
    with pytest.raises(Undecodable):
        decode_snapshot(damaged, KEY, fetched_at=1.0, stamp=7)


@pytest.mark.parametrize("key", OTHERS)
def test_encoded_for_another_task_is_refused(key: TaskKey) -> None:
    """Neither a snapshot nor a failure is ever taken for another task's."""
    with pytest.raises(Undecodable):
        decode_snapshot(encode_snapshot(SNAPSHOT), key, fetched_at=1.0, stamp=7)
    with pytest.raises(Undecodable):
        decode_failure(encode_failure(KEY, FAILURE), key)


@pytest.mark.parametrize(
    "failure",
    [
        FAILURE,
        UpstreamBusy("unwell"),
        UpstreamError("?", detail=UpstreamDetail("1", "2", "3", "4", "5", "6"), retry_after=0.0),
        UpstreamRejected("no", envelope=bytes(range(256)), detail=UpstreamDetail(err_code="E")),
    ],
)
def test_failure_is_read_as_it_was_written(failure: UpstreamError) -> None:
    """A failure comes back as what it was, with all it tells."""
    read = decode_failure(encode_failure(KEY, failure), KEY)
    assert type(read) is type(failure)
    assert (str(read), vars(read)) == (str(failure), vars(failure))


@pytest.mark.parametrize(
    "change", [{"kind": "SystemExit"}, {"kind": None}, {"detail": {"x": 1}}, {"retryAfter": "x"}]
)
def test_failure_that_is_none_of_ours_is_refused(change: dict[str, object]) -> None:
    """Only the upstream's failures are read, and only with what belongs to them."""
    value = json.loads(encode_failure(KEY, FAILURE)) | change
    with pytest.raises(Undecodable):
        decode_failure(json.dumps(value).encode(), KEY)


@pytest.mark.parametrize("garbage", [b"", b"null", b"[]", b"{}", b"[" * 100_000, b"\xff", b'"text"'])
def test_garbage_is_refused(garbage: bytes) -> None:
    """Whatever else stands there is refused in one way."""
    with pytest.raises(Undecodable):
        decode_failure(garbage, KEY)
    with pytest.raises(Undecodable):
        decode_snapshot(garbage, KEY, fetched_at=1.0, stamp=7)
