"""Reads the members of a JSON object that are asked for, and makes no objects of the others.

msgspec checks the whole text (RFC 8259) and steps over what is not asked for, at a few nanoseconds a byte.
So a hostile text costs no more than a friendly one: hundreds of thousands of strings, nested arrays, or
integers of thousands of digits, whose conversion takes quadratic time.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn, TypeVar

import msgspec

T = TypeVar("T")

ABSENT = msgspec.Raw(b"")  # a member that the object does not have

_LONGEST_NUMBER = 4300  # characters: Python converts no longer integer
# Half a surrogate pair. Every backslash of the text begins an escape when `\\` is written as \u005c.
_HALF_PAIR = re.compile(
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB]..\\u[dD])[c-fC-F][0-9a-fA-F]{2})"
)
_MOST_HALVES = 1000  # text that was cut within an emoji has one; a megabyte of them takes 20 ms
_MOST_ESCAPES = 30_000  # backslashes among which halves are looked for: in a megabyte of them it takes 60 ms
_MOST_ITEMS = 30_000  # items among which numbers are looked for: a megabyte of them takes 60 ms
# Of a number, not in hexadecimal or base64: its digits are zeros here, and what follows it is no quote.
_LARGE_EXPONENT = re.compile(rb"0e\+?000+[],}\s]")
_DIGITS = bytes.maketrans(b"123456789E", b"000000000e")


def read_object(body: bytes, shape: msgspec.json.Decoder[T]) -> T | None:
    """Return the members of a JSON object that `shape` names, or None for JSON that is not an object.

    Half a surrogate pair, which has no UTF-8, is read as U+FFFD: up to 1,000 of them, in text of up to 30,000
    escapes. Raises: ValueError for what is not JSON in UTF-8, nests too deep for the stack, or has a fraction
    or exponent beyond every float; and for text that may have one among more than 30,000 items.
    """
    body.decode()
    _check_numbers(body)
    try:
        try:
            return shape.decode(body)
        except msgspec.DecodeError:
            if b"\\u" not in body:
                raise
            return shape.decode(without_half_pairs(body))
    except msgspec.ValidationError:
        return None
    except msgspec.DecodeError as exc:
        raise ValueError("not JSON") from exc
    except RecursionError as exc:
        raise ValueError("nested too deep") from exc


def value(raw: msgspec.Raw) -> Any:
    """Return a string, a number, true, false or null as Python has it; anything else, or absent, as it is.

    So is a number of more digits than Python converts.
    """
    text = bytes(raw)
    if not text or text[0] in b"[{" or (text[0] in b"-0123456789" and len(text) > _LONGEST_NUMBER):
        return raw
    return msgspec.json.decode(text)


def one_line(raw: msgspec.Raw) -> bytes:
    """Return JSON text without line breaks, which stand only between its tokens."""
    return bytes(raw).replace(b"\n", b" ").replace(b"\r", b" ")


def plain_text(body: bytes) -> str:
    """Return JSON text with the escapes in its strings decoded: for a search."""
    # Within a string of JSON the whole text is one string: so the parser decodes it in one step.
    text = body.decode().replace("\\\\", "\\u005c").replace('\\"', "\\u0022").replace('"', '\\"')
    plain: str = json.loads(f'"{text}"', strict=False)
    return plain


def without_half_pairs(body: bytes) -> bytes:
    """Return JSON text with U+FFFD in the place of each half of a surrogate pair, up to 1,000.

    Text of more than 30,000 escapes comes back as it is.
    """
    if body.count(b"\\") > _MOST_ESCAPES:
        return body
    return _HALF_PAIR.sub(rb"\\ufffd", body.replace(rb"\\", rb"\u005c"), _MOST_HALVES)


def _check_numbers(body: bytes) -> None:
    """Refuse numbers beyond every float. Integers may be of any size. Raises: ValueError."""
    digits = body.translate(_DIGITS)
    large = (b"0e000" in digits or b"0e+000" in digits) and _LARGE_EXPONENT.search(digits)
    if not large and b"0" * 309 not in digits:
        return
    if body.count(b",") + body.count(b"[") + body.count(b"{") > _MOST_ITEMS:
        raise ValueError("too many items to look for a number among them")
    # In a string, maybe. The parser finds the numbers; both hooks are C, and `len` converts no integer.
    numbers: list[str] = []
    decoder = json.JSONDecoder(parse_float=numbers.append, parse_int=len, parse_constant=_refuse_constant)
    try:
        decoder.decode(body.decode())
    except RecursionError as exc:
        raise ValueError("nested too deep") from exc
    if not math.isfinite(max(map(abs, map(float, numbers)), default=0.0)):
        raise ValueError("a number beyond every float")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
