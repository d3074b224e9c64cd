"""Messages between replicas: parsed completely or ignored."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.domain.task import Operation, TaskKey
from gateway.stores.valkey.codec import StoredMetadata
from gateway.stores.valkey.messages import TaskMessage, ThrottlingMessage, parse_message

KEY = TaskKey(Operation.SD_GET_PROGRESS, "task")
SUBJECT = b"sd_get_progress/task"
END = 2**53
LONGEST_LIFETIME = 2_592_000_000_000  # microseconds
LONGEST_RETRY_SECONDS = 3600.0

keys = st.builds(TaskKey, st.sampled_from(Operation), st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True))
metadata = st.builds(
    StoredMetadata,
    version=st.integers(0, 1_700_000_000_000_000),
    age=st.integers(0, END - 1),
    lifetime=st.integers(0, LONGEST_LIFETIME),
    terminal=st.integers(0, 1),
)
# Parts of valid messages in any order, with and without damage.
parts = st.lists(
    st.sampled_from([b"S", b"E", b"Q", b"T", SUBJECT, b"\n", b" ", b"0", b"1", b"17", b"9" * 16, b"9" * 17])
    | st.binary(max_size=3)
).map(b"".join)


def text_of(kind: str, key: TaskKey, stored: StoredMetadata, revision: int) -> bytes:
    """Return a message as the scripts write it."""
    numbers = (stored.version, revision, stored.age, stored.lifetime, stored.terminal)
    return f"{kind}{key.operation}/{key.task_id}\n{' '.join(map(str, numbers))}".encode()


@given(keys, metadata, st.integers(0, END - 1))
def test_message_about_a_snapshot_is_parsed(key: TaskKey, stored: StoredMetadata, revision: int) -> None:
    """Every fact arrives as it was written."""
    assert parse_message(text_of("S", key, stored, revision)) == TaskMessage(b"S", key, stored, revision)


@given(st.sampled_from(["E", "Q"]), keys)
def test_message_without_a_snapshot_is_parsed(kind: str, key: TaskKey) -> None:
    """The end of a lease and the question for a snapshot name their task."""
    message = f"{kind}{key.operation}/{key.task_id}".encode()
    assert parse_message(message) == TaskMessage(kind.encode(), key, None, 0)


@pytest.mark.parametrize(
    ("message", "retry_after"),
    [(b"T", None), (b"T0", 0.0), (b"T7", 7.0), (b"T3600", 3600.0), (b"T999999999", LONGEST_RETRY_SECONDS)],
)
def test_message_of_throttling_is_parsed(message: bytes, retry_after: float | None) -> None:
    """The time is bounded as for a response of the upstream."""
    assert parse_message(message) == ThrottlingMessage(retry_after)


@given(st.binary() | parts)
@example(b"S" + SUBJECT + b"\n1 1 1 1 1\n")
@example(b"S" + SUBJECT + b"\n1 1 1 1 \xd9\xa1")
@example(b"\xff" * 100)
def test_no_message_raises(message: bytes) -> None:
    """Any bytes give nothing or values within their bounds."""
    content = parse_message(message)
    match content:
        case ThrottlingMessage(retry_after):
            assert retry_after is None or 0 <= retry_after <= LONGEST_RETRY_SECONDS
        case TaskMessage(kind, key, stored, revision):
            assert kind in (b"S", b"E", b"Q")
            assert message.startswith(b"%b%b/%b" % (kind, key.operation.encode(), key.task_id.encode()))
            assert revision >= 0
            if stored is not None:
                assert StoredMetadata.checked(*stored) == stored
        case _:
            assert content is None


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"S",
        b"X" + SUBJECT,
        b"s" + SUBJECT,
        b" S" + SUBJECT,
        b"E" + SUBJECT + b"\n",
        b"Eno_operation/task",
        b"Esd_get_progress/",
        b"Esd_get_progress/" + b"x" * 65,
        b"Esd_get_progress/../x",
        b"Esd_get_progress/\xd9\xa1",
        b"S" + SUBJECT + b"\n1 1 1 1",
        b"S" + SUBJECT + b"\n1 1 1 1 2",
        b"S" + SUBJECT + b"\n1 1 -1 1 0",
        b"S" + SUBJECT + b"\n1  1 1 1 0",
        b"S" + SUBJECT + b"\n%d 1 1 1 0" % END,
        b"S" + SUBJECT + b"\n1 1 %d 1 0" % END,
        b"S" + SUBJECT + b"\n1 1 1 %d 0" % (LONGEST_LIFETIME + 1),
        b"T-1",
        b"T1.5",
        b"T1e3",
        b"Tnan",
        b"T1000000000",
        b"T\xd9\xa1",
    ],
)
def test_message_of_another_form_is_ignored(message: bytes) -> None:
    """A message that this version does not know has no effect."""
    assert parse_message(message) is None
