"""Values that replicas write for each other: decoded completely, or refused."""

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import fields, replace

from gateway.domain.errors import (
    CircuitOpen,
    GatewayError,
    KeyPairRefused,
    Overloaded,
    RateLimited,
    TimestampRefused,
    UpstreamBusy,
    UpstreamDetail,
    UpstreamError,
    UpstreamForbidden,
    UpstreamInvalid,
    UpstreamRejected,
    UpstreamThrottled,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import Operation, Status, TaskKey
from gateway.stores.valkey.codec import (
    MICROS_PER_SECOND,
    InvalidStoredValue,
    StoredMetadata,
    decode_failure,
    decode_snapshot,
    encode_failure,
    encode_snapshot,
    lifetime_of,
)
from tests.support.seen import TAGS, answered, seen

KEY = TaskKey(Operation.SD_GET_PROGRESS, "task")
OTHERS = [KEY._replace(task_id="other"), KEY._replace(operation=Operation.SD_GET_RESULT)]
SNAPSHOT = seen(
    KEY, at=1.0, lifetime=2.0, version=7, message="a\nb", etaRelative=3, state={"job": "x", "n": 1}
)
FAILURE = UpstreamInvalid("the upstream's response is not valid", retry_after=1.5)
REJECTED = UpstreamRejected(
    "the upstream rejected the query",
    envelope=b'{"status":20,\r\n"errCode":"E"}',
    detail=UpstreamDetail(err_code="E"),
)
LIFETIMES: dict[Status | None, float] = dict.fromkeys([None, *Status], 1e9)

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


def metadata_of(snapshot: Snapshot, *, age: int = 0) -> StoredMetadata:
    """Return the metadata that the server keeps beside a value."""
    return StoredMetadata.checked(snapshot.version, age, lifetime_of(snapshot), int(snapshot.terminal))


METADATA = metadata_of(SNAPSHOT)


def read(
    encoded: bytes,
    key: TaskKey = KEY,
    metadata: StoredMetadata = METADATA,
    lifetimes: dict[Status | None, float] = LIFETIMES,
) -> Snapshot:
    """Decode a stored value. Raises: InvalidStoredValue."""
    return decode_snapshot(encoded, key, metadata, fetched_at=1.0, lifetimes=lifetimes, tags=TAGS)


def fields_of(snapshot: Snapshot) -> list[Any]:
    return [getattr(snapshot, field.name) for field in fields(snapshot)]


def digest(content: bytes) -> bytes:
    """Return the digest with which a value begins."""
    return hashlib.blake2b(content, digest_size=12).hexdigest().encode()


def sealed(header: dict[str, Any], envelope: bytes) -> bytes:
    """Return a forged value with a valid digest."""
    content = json.dumps(header).encode() + b"\n" + envelope
    return digest(content) + b" " + content


def opened(encoded: bytes) -> tuple[dict[str, Any], bytes]:
    header, _, envelope = encoded.partition(b" ")[2].partition(b"\n")
    return json.loads(header), envelope


@given(statuses, data, st.sampled_from([KEY, *OTHERS]), st.floats(0, 1e6), st.integers(1, 10**15))
def test_snapshot_round_trip(
    status: str, data: dict[str, Any], key: TaskKey, lifetime: float, version: int
) -> None:
    """Every field is decoded; the time comes from the reader's clock."""
    snapshot = seen(key, status, at=1.0, lifetime=round(lifetime, 6), version=version, **data)
    assert fields_of(read(encode_snapshot(snapshot), key, metadata_of(snapshot))) == fields_of(snapshot)


def test_snapshot_keeps_progress_and_end() -> None:
    """Progress, revision, and the end of a finished task survive the store."""
    fallen = seen(KEY, "running", at=1.0, version=8, previous=SNAPSHOT, progress=0.2)
    unchanged = seen(KEY, "running", at=1.0, version=9, previous=fallen, progress=0.1)
    ended = seen(KEY, "running", at=1.0, version=8, previous=seen(KEY, "failed", version=7))
    for snapshot in (fallen, unchanged, ended):
        assert fields_of(read(encode_snapshot(snapshot), metadata=metadata_of(snapshot))) == fields_of(
            snapshot
        )
    assert (fallen.progress, ended.status) == (0.5, Status.FAILED)
    assert (unchanged.revision, unchanged.etag) == (fallen.revision, fallen.etag)


def test_snapshot_has_the_smaller_lifetime() -> None:
    """The shorter one of two replicas' lifetimes counts."""
    for ours in (0.5, 60.0):
        snapshot = read(encode_snapshot(SNAPSHOT), lifetimes=dict.fromkeys([None, *Status], ours))
        assert snapshot.lifetime == min(ours, SNAPSHOT.lifetime)


@given(st.data())
def test_snapshot_that_is_damaged_is_refused_or_whole(draw: st.DataObject) -> None:
    """Any byte changed, removed or added gives the same snapshot or none."""
    value = encode_snapshot(SNAPSHOT)
    start = draw.draw(st.integers(0, len(value)))
    end = draw.draw(st.integers(start, min(start + 3, len(value))))
    damaged = value[:start] + draw.draw(st.binary(max_size=3)) + value[end:]
    try:
        snapshot = read(damaged)
    except InvalidStoredValue:
        return
    assert fields_of(snapshot) == fields_of(SNAPSHOT)


@given(
    st.sampled_from(["operation", "task", "progress", "version", "revision", "lifetime", "more"]),
    st.booleans() | numbers | st.text() | st.lists(st.none()) | st.sampled_from([1e999, 0.5, 7]),
)
def test_snapshot_with_another_header_is_refused_or_whole(name: str, value: Any) -> None:
    """Any field changed with a valid digest gives the same snapshot, none, or another valid progress."""
    header, envelope = opened(encode_snapshot(SNAPSHOT))
    try:
        snapshot = read(sealed(header | {name: value}, envelope))
    except InvalidStoredValue:
        return
    if name == "progress":
        assert 0.5 <= (snapshot.progress or 0.0) <= 0.999
        assert json.loads(snapshot.body)["progress"] == snapshot.progress
    elif name == "revision":
        assert snapshot.revision == value
        assert 0 < value < 2**53
        assert TAGS.revision(snapshot.etag, KEY) == snapshot.revision
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
        answered(KEY).replace(b"0.5", b"-NaN"),
        answered(KEY).replace(b"0.5", b"1e999"),
        answered(KEY) + b"x",
        b"\xff" + answered(KEY),
    ],
)
def test_snapshot_of_another_envelope_is_refused(envelope: bytes) -> None:
    """An envelope of another task, or one that contradicts its header, is refused."""
    header, _ = opened(encode_snapshot(SNAPSHOT))
    with pytest.raises(InvalidStoredValue):
        read(sealed(header, envelope))


@pytest.mark.parametrize(
    "change",
    [{"version": 8}, {"lifetime": 2_000_001}, {"terminal": True}],
    ids=lambda change: next(iter(change)),
)
def test_snapshot_under_other_facts_is_refused(change: dict[str, Any]) -> None:
    """The metadata beside a value and its header must agree."""
    with pytest.raises(InvalidStoredValue):
        read(encode_snapshot(SNAPSHOT), metadata=METADATA._replace(**change))


@pytest.mark.parametrize("name", ["version", "lifetime", "age", "terminal"])
@pytest.mark.parametrize("value", [-(2**53), 2**53, 2**63, None, b"1", "1", 1.0, True, float("nan"), []])
def test_facts_out_of_range_are_refused(name: str, value: Any) -> None:
    """Facts are finite, bounded integers."""
    metadata = StoredMetadata(version=7, age=0, lifetime=1, terminal=0)
    assert StoredMetadata.checked(*metadata) == metadata
    with pytest.raises(InvalidStoredValue):
        StoredMetadata.checked(*metadata._replace(**{name: value}))


def test_lifetime_is_within_the_settings_bounds() -> None:
    """No lifetime exceeds the maximum of the settings."""
    longest = 2_592_000 * MICROS_PER_SECOND
    assert StoredMetadata.checked(1, 0, longest, 0).lifetime == longest
    assert lifetime_of(replace(SNAPSHOT, lifetime=1e12)) == longest
    with pytest.raises(InvalidStoredValue):
        StoredMetadata.checked(1, 0, longest + 1, 0)


def test_snapshot_of_unknown_age_is_stale() -> None:
    """A snapshot from the future, after a step of the server's clock, counts as stale."""
    for age, fetched_at in ((0, 100.0), (500_000, 99.5), (-1, 98.0), (-(10**12), 98.0)):
        metadata = StoredMetadata.checked(7, age, 2 * MICROS_PER_SECOND, 0)
        assert metadata.fetched_at(100.0) == fetched_at


@pytest.mark.parametrize(
    ("failure", "shared"),
    [
        (FAILURE, True),
        (REJECTED, True),
        (UpstreamBusy("busy"), True),
        (UpstreamForbidden("no"), True),
        (UpstreamThrottled("slowly"), True),
        (UpstreamError("?"), False),
        (UpstreamTimeout("too late"), False),
        (UpstreamUnreachable("gone"), False),
        (CircuitOpen("resting"), False),
        (RateLimited("full"), False),
        (Overloaded("full"), False),
        (KeyPairRefused("refused"), False),
        (TimestampRefused("refused"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_the_upstreams_failures_are_shared(failure: GatewayError, shared: bool) -> None:  # noqa: FBT001
    """A replica's own trouble is not shared, and not accepted from another replica."""
    encoded = encode_failure(KEY, failure)
    if shared:
        assert type(decode_failure(encoded, KEY)) is type(failure)
    else:
        assert encoded == b""
        header, envelope = opened(encode_failure(KEY, FAILURE))
        with pytest.raises(InvalidStoredValue):
            decode_failure(sealed(header | {"kind": type(failure).__name__}, envelope), KEY)


@pytest.mark.parametrize("key", OTHERS)
def test_encoded_for_another_task_is_refused(key: TaskKey) -> None:
    """A snapshot or failure is never accepted for another task."""
    with pytest.raises(InvalidStoredValue):
        read(encode_snapshot(SNAPSHOT), key)
    with pytest.raises(InvalidStoredValue):
        decode_failure(encode_failure(KEY, FAILURE), key)


@pytest.mark.parametrize(
    "failure",
    [
        FAILURE,
        UpstreamBusy("the upstream is temporarily unavailable"),
        UpstreamForbidden("the upstream refused this query without a reason", retry_after=0.0),
        UpstreamThrottled("the upstream asks to slow down", retry_after=3600.0),
        REJECTED,
    ],
    ids=lambda failure: failure.code,
)
def test_failure_round_trip(failure: UpstreamError) -> None:
    """A failure is decoded with its type, its text and its Retry-After."""
    found = decode_failure(encode_failure(KEY, failure), KEY)
    assert type(found) is type(failure)
    assert (str(found), vars(found)) == (str(failure), vars(failure))


def test_failure_is_written_without_texts_of_the_upstream() -> None:
    """Neither the text of an error nor its details are stored: callers of other replicas see a fixed text."""
    failure = UpstreamInvalid("evil", detail=UpstreamDetail("evil", "evil", "evil", "evil", "evil", "evil"))
    encoded = encode_failure(KEY, failure)
    assert b"evil" not in encoded
    found = decode_failure(encoded, KEY)
    assert (str(found), found.detail) == (str(FAILURE), None)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "SystemExit"},
        {"kind": "UpstreamRejected"},
        {"kind": "UpstreamTimeout"},
        {"kind": "CredentialsRefused"},
        {"kind": None},
        {"kind": "UpstreamError"},
        {"kind": 1},
        {"retry_after": "x"},
        {"retry_after": -1},
        {"retry_after": 1e9},
        {"retry_after": float("inf")},
        {"retry_after": float("nan")},
        {"message": "evil"},  # there are only the fixed texts
        {"detail": {"err_message": "evil"}},
        {"more": 1},
    ],
)
def test_failure_with_invalid_fields_is_refused(change: dict[str, object]) -> None:
    """Only upstream failures are accepted, and only with valid fields."""
    header, envelope = opened(encode_failure(KEY, FAILURE))
    with pytest.raises(InvalidStoredValue):
        decode_failure(sealed(header | change, envelope), KEY)


@pytest.mark.parametrize("envelope", [b"", b"[]", b"{}", b'{"status":10}', b'{"status":"x"}', b"\xff", b"{"])
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


@pytest.mark.parametrize("garbage", [b"", b"null", b"[]", b"{}", b"[" * 100_000, b"\xff", b'"text"'])
def test_garbage_is_refused(garbage: bytes) -> None:
    """Any other bytes are refused with the same exception."""
    for value in (
        garbage,
        digest(garbage) + b" " + garbage,
        digest(garbage + b"\n") + b" " + garbage + b"\n",
    ):
        with pytest.raises(InvalidStoredValue):
            decode_failure(value, KEY)
        with pytest.raises(InvalidStoredValue):
            read(value)
