"""Reading what is asked for of a JSON text, strictly, whatever else is in it."""

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.envelopes import read_envelope
from gateway.exceptions import UpstreamError, UpstreamInvalid
from gateway.jsontext import ABSENT, plain_text, read_object, value
from gateway.models import Operation, TaskKey, observe
from tests.test_models import LIFETIMES

KEY = TaskKey(Operation.SD_GET_PROGRESS, "task")
SIZE = 1_048_576 - 100  # of `upstream.max_response_bytes`

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


class Shape(msgspec.Struct):
    """One member."""

    a: msgspec.Raw = ABSENT


SHAPE = msgspec.json.Decoder(Shape)


def many(unit: bytes) -> bytes:
    """Return an array of about the largest size."""
    return b"[" + b",".join([unit] * (SIZE // (len(unit) + 1))) + b"]"


HOSTILE = {
    "strings": many(b'"a"'),
    "escaped strings": many(b'"\\n"'),
    "integers of 4,300 digits": many(b"9" * 4299),
    "fractions of 4,000 digits": many(b"0." + b"1" * 4000),
    "small floats": many(b"0.12345678901234567e-300"),
    "large floats": many(b"1.5e100"),
    "nested arrays": many(b"[[[[]]]]"),
    "deep": b"[" * 400 + b"]" * 400,
    "keys": b"{" + b",".join(b'"%06x":1' % number for number in range(SIZE // 11)) + b"}",
    "the same key": b"{" + b",".join([b'"a":1'] * (SIZE // 6)) + b"}",
    "one string": b'"' + b"x" * SIZE + b'"',
    "escapes": b'"' + b"\\u00e9" * (SIZE // 6) + b'"',
    "half pairs": b'"' + b"\\ud83d" * (SIZE // 6) + b'"',
    "white space": b" " * SIZE + b"1",
}


def calls_of(work: Callable[[], Any]) -> int:
    """Return how many functions of Python and of C were called: each takes well under a millisecond here."""
    calls = 0

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in {"call", "c_call"}

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("member", ["state", "x"])
def test_hostile_answer_takes_few_steps(kind: str, member: str) -> None:
    """The number of calls does not grow with what an accepted answer holds."""
    body = b'{"status":10,"data":{"taskId":"task","status":"running","%b":%b}}' % (
        member.encode(),
        HOSTILE[kind],
    )

    def work() -> None:
        with suppress(UpstreamInvalid):  # so many half pairs are no text
            data = read_envelope(body, KEY, redact=str).data
            observe(data, body, KEY, fetched_at=0.0, lifetimes=LIFETIMES, previous=None)

    assert calls_of(work) < 300


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("secret", ["", "secret-of-the-tests"])
def test_hostile_rejection_takes_few_steps(kind: str, secret: str) -> None:
    """The same of a refused answer, with a secret in it or not; and little text is searched in one step."""
    searched: list[int] = []

    def redact(text: str) -> str:
        searched.append(len(text))
        return text.replace("secret-of-the-tests", "[redacted]")

    body = b'{"status":20,"errCode":"E %b","errMessage":%b}' % (secret.encode(), HOSTILE[kind])

    def work() -> None:
        with pytest.raises(UpstreamError):
            read_envelope(body, KEY, redact=redact)

    assert calls_of(work) < 3000  # a small one is cleaned string by string
    assert sum(searched) <= 65_536


def test_numbers_are_checked_by_their_size_alone() -> None:
    """An integer of any size is JSON, and so is text that looks like a number; a float must be one."""
    for good in (b"9" * 5000, b'"1e999"', b"1e308", b"0e99999", b"1e-99999", b"[1e+0001]"):
        assert read_object(b'{"a":%b}' % good, SHAPE) is not None
    for bad in (b"1e309", b"-1E+0999", b"[0, 1e0400]", b"9" * 309 + b".0", b'["1e999", 1e999]'):
        with pytest.raises(ValueError, match="beyond every float"):
            read_object(b'{"a":%b}' % bad, SHAPE)


def test_half_pairs_are_read_up_to_a_bound() -> None:
    """Text may be cut within an emoji many times, but not a hundred thousand times."""
    members = read_object(b'{"a":"%b"}' % (rb"\ud83d" * 1000), SHAPE)
    assert members is not None
    assert value(members.a) == "\ufffd" * 1000
    with pytest.raises(ValueError, match="not JSON"):
        read_object(b'{"a":"%b"}' % (rb"\ud83d" * 1001), SHAPE)


@pytest.mark.parametrize("body", [b"[]", b"1", b'"a"', b"null", b"true"])
def test_what_is_no_object_is_none(body: bytes) -> None:
    """JSON of another type has no members."""
    assert read_object(body, SHAPE) is None


@given(json_values)
def test_members_are_read_as_json_has_them(given: Any) -> None:
    """Whatever a member is, its text means the same as in the whole; of doubled keys the last counts."""
    body = json.dumps({"b": given, "a": given}).encode()
    try:
        expected = json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return
    members = read_object(body, SHAPE)
    assert members is not None
    assert json.loads(bytes(members.a)) == json.loads(expected)
    if not isinstance(given, list | dict):
        assert value(members.a) == given
    doubled = read_object(b'{"a":1,"a":%b}' % expected, SHAPE)
    assert doubled is not None
    assert json.loads(bytes(doubled.a)) == json.loads(expected)


@given(st.lists(st.text()))
def test_plain_text_has_every_string_as_it_is(texts: list[str]) -> None:
    """No escape hides a string from a search in the text."""
    for ascii_only in (True, False):
        try:
            body = json.dumps({"a": texts}, ensure_ascii=ascii_only).encode()
        except UnicodeEncodeError:
            continue
        plain = plain_text(body)
        assert plain == '{"a": [' + ", ".join(f'"{text}"' for text in texts) + "]}"
