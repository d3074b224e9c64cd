"""Strict parsing of selected members of a JSON text."""

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

from gateway.domain.envelope import read_envelope
from gateway.domain.errors import UpstreamError, UpstreamInvalid
from gateway.domain.json_text import ABSENT, plain_text, read_object, value
from gateway.domain.snapshot import build_snapshot
from gateway.domain.task import Operation, TaskKey
from tests.support.hostile_text import HOSTILE_JSON
from tests.support.seen import TAGS
from tests.unit.domain.test_snapshot import LIFETIMES

KEY = TaskKey(Operation.SD_GET_PROGRESS, "task")

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


class Shape(msgspec.Struct):
    """A shape with one member."""

    a: msgspec.Raw = ABSENT


SHAPE = msgspec.json.Decoder(Shape)


def calls_of(work: Callable[[], Any]) -> int:
    """Return the number of calls of Python and C functions. Each call takes well under a millisecond here."""
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


@pytest.mark.parametrize("kind", HOSTILE_JSON)
@pytest.mark.parametrize("member", ["state", "x"])
def test_hostile_response_needs_few_calls(kind: str, member: str) -> None:
    """The number of calls does not grow with the content of an accepted response."""
    body = b'{"status":10,"data":{"taskId":"task","status":"running","%b":%b}}' % (
        member.encode(),
        HOSTILE_JSON[kind],
    )

    def work() -> None:
        with suppress(UpstreamInvalid):  # for example, too many lone surrogates
            data = read_envelope(body, KEY, redact=str).data
            build_snapshot(data, body, KEY, fetched_at=0.0, lifetimes=LIFETIMES, previous=None, tags=TAGS)

    work()  # warm up: create cached objects
    assert calls_of(work) < 300


@pytest.mark.parametrize("kind", HOSTILE_JSON)
@pytest.mark.parametrize("secret", ["", "secret-of-the-tests"])
def test_hostile_rejection_needs_few_calls(kind: str, secret: str) -> None:
    """The same for a rejection, with or without a secret; and little text is searched in one step."""
    searched: list[int] = []

    def redact(text: str) -> str:
        searched.append(len(text))
        return text.replace("secret-of-the-tests", "[redacted]")

    body = b'{"status":20,"errCode":"E %b","errMessage":%b}' % (secret.encode(), HOSTILE_JSON[kind])

    def work() -> None:
        with pytest.raises(UpstreamError):
            read_envelope(body, KEY, redact=redact)

    assert calls_of(work) < 3000  # a small envelope is redacted string by string
    assert sum(searched) <= 65_536


def test_large_numbers_are_searched_among_few_items() -> None:
    """With more items the text is rejected. Digests and quoted text do not look like a large number."""
    few, many_items = b"[%b 1]" % (b"1," * 29_000), b"[%b 1]" % (b"1," * 31_000)
    for large in (b"1e100", b"9" * 400, b'"of 1e999 "'):
        assert read_object(b'{"a":%b,"b":%b}' % (large, few), SHAPE) is not None
        with pytest.raises(ValueError, match="too many items"):
            read_object(b'{"a":%b,"b":%b}' % (large, many_items), SHAPE)
    for other in (b'"1e999"', b'"d41e8cd98f00b204e9800998ecf8427e"', b"1.5e-300", b"9" * 300):
        assert read_object(b'{"a":%b,"b":%b}' % (other, many_items), SHAPE) is not None
    for gap in (b"", b" ", b"\n"):
        with pytest.raises(ValueError, match="too large for a float"):
            read_object(b'{"b":%b,"a":1e999%b}' % (few, gap), SHAPE)


def test_lone_surrogates_are_searched_among_few_escapes() -> None:
    """Text with more escapes is rejected if it has a lone surrogate, and accepted otherwise."""
    few, many_escapes = rb"\u00e9" * 29_000, rb"\u00e9" * 31_000
    members = read_object(b'{"a":"%b"}' % (rb"\ud83d" + few), SHAPE)
    assert members is not None
    assert value(members.a) == "\ufffd" + "\xe9" * 29_000
    with pytest.raises(ValueError, match="not JSON"):
        read_object(b'{"a":"%b"}' % (rb"\ud83d" + many_escapes), SHAPE)
    assert read_object(b'{"a":"%b"}' % many_escapes, SHAPE) is not None


@given(st.lists(st.sampled_from([r"\ud83d", r"\uDE00", r"\u00e9", "x", "ude00", r"\\\\", r"\n", '\\"'])))
def test_lone_surrogates_are_distinguished_from_pairs(parts: list[str]) -> None:
    """A lone surrogate becomes U+FFFD in any context, as in Python's decoder."""
    text = json.dumps("".join(json.loads(f'"{part}"') for part in parts))
    members = read_object(b'{"a":%b}' % text.encode(), SHAPE)
    assert members is not None
    expected = json.loads(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert value(members.a) == expected


def test_numbers_are_checked_by_size_only() -> None:
    """An integer of any size is valid, and so is text that looks like a number. A float must be finite."""
    for good in (b"9" * 5000, b'"1e999"', b"1e308", b"0e99999", b"1e-99999", b"[1e+0001]"):
        assert read_object(b'{"a":%b}' % good, SHAPE) is not None
    for bad in (b"1e309", b"-1E+0999", b"[0, 1e0400]", b"9" * 309 + b".0", b'["1e999", 1e999]'):
        with pytest.raises(ValueError, match="too large for a float"):
            read_object(b'{"a":%b}' % bad, SHAPE)


def test_number_of_lone_surrogates_is_bounded() -> None:
    """Up to 1,000 lone surrogates are accepted."""
    members = read_object(b'{"a":"%b"}' % (rb"\ud83d" * 1000), SHAPE)
    assert members is not None
    assert value(members.a) == "\ufffd" * 1000
    with pytest.raises(ValueError, match="not JSON"):
        read_object(b'{"a":"%b"}' % (rb"\ud83d" * 1001), SHAPE)


@pytest.mark.parametrize("body", [b"[]", b"1", b'"a"', b"null", b"true"])
def test_other_json_than_an_object_is_none(body: bytes) -> None:
    """JSON of another type has no members."""
    assert read_object(body, SHAPE) is None


@given(json_values)
def test_members_keep_their_meaning(given: Any) -> None:
    """The text of a member means the same as in the whole text; the last of duplicate keys counts."""
    body = json.dumps({"b": given, "a": given}).encode()
    try:
        expected = json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a lone surrogate
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
def test_plain_text_contains_every_string_unescaped(texts: list[str]) -> None:
    """A search in the plain text finds every string, however it is escaped."""
    for ascii_only in (True, False):
        try:
            body = json.dumps({"a": texts}, ensure_ascii=ascii_only).encode()
        except UnicodeEncodeError:
            continue
        plain = plain_text(body)
        assert plain == '{"a": [' + ", ".join(f'"{text}"' for text in texts) + "]}"
