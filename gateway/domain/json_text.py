"""Parses selected members of a JSON object, and creates no Python objects for the others.

msgspec validates the whole text (RFC 8259) and skips unselected members, at a few nanoseconds per byte.
Hostile text therefore costs no more than ordinary text: hundreds of thousands of strings, nested arrays, or
integers of thousands of digits, whose conversion takes quadratic time.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn, TypeVar

import msgspec

T = TypeVar("T")

ABSENT = msgspec.Raw(b"")  # stands for a missing member

_MAX_NUMBER = 4300  # characters: Python's limit for the conversion of integers
# A lone surrogate. The text must have `\\` rewritten as \u005c, so that every backslash begins an escape.
_LONE_SURROGATE = re.compile(
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB]..\\u[dD])[c-fC-F][0-9a-fA-F]{2})"
)
_MAX_SURROGATES = 1000  # text truncated within an emoji has one; a megabyte of them takes 20 ms
_MAX_ESCAPES = 30_000  # backslashes in text searched for lone surrogates: a megabyte of them takes 60 ms
_MAX_ITEMS = 30_000  # items in text searched for large numbers: a megabyte of them takes 60 ms
# Text up to a constant that is not JSON, or up to the end. It matches at every position and never goes back.
# So the time is proportional to the length of the text.
_UP_TO_CONSTANT = re.compile(
    rb"""
    ( (?:
        [^"NI-]++
      | - [0-9]
      | " (?: [^"\\]++ | \\. )*+ (?: " | \\?\Z )
      | (?! NaN | -?Infinity ) [NI-] .*+  # not JSON: skip the rest
    )*+ )
    (?: NaN | -?Infinity | \Z )
    """,
    re.VERBOSE | re.DOTALL,
)
_MAX_TOKENS = 30_000  # in text that is searched for constants: a megabyte of them takes 30 ms
# Matches after all digits were replaced by zeros. The last class excludes hexadecimal and base64 in quotes.
_LARGE_EXPONENT = re.compile(rb"0e\+?000+[],}\s]")
_DIGITS_TO_ZERO = bytes.maketrans(b"123456789E", b"000000000e")


def read_object(body: bytes, shape: msgspec.json.Decoder[T]) -> T | None:
    """Return the members of a JSON object that `shape` names, or None for JSON that is not an object.

    A lone surrogate, which has no UTF-8 encoding, is read as U+FFFD: up to 1,000 of them, in text of up to
    30,000 escapes.

    Raises:
        ValueError: The text is not JSON in UTF-8, nests too deep for the stack, has a number with a fraction
            or exponent that is too large for a float, or may have such a number among more than 30,000
            items.
    """
    body.decode()
    _check_numbers(body)
    try:
        try:
            return shape.decode(body)
        except msgspec.DecodeError:
            if b"\\u" not in body:
                raise
            return shape.decode(replace_lone_surrogates(body))
    except msgspec.ValidationError:
        return None
    except msgspec.DecodeError as exc:
        raise ValueError("not JSON") from exc
    except RecursionError as exc:
        raise ValueError("nested too deep") from exc


def value(raw: msgspec.Raw) -> Any:
    """Return the Python value of a JSON string, number, true, false or null.

    An object, an array, a missing member and a number of more than 4,300 characters are returned unchanged.
    """
    text = bytes(raw)
    if not text or text[0] in b"[{" or (text[0] in b"-0123456789" and len(text) > _MAX_NUMBER):
        return raw
    return msgspec.json.decode(text)


def one_line(raw: msgspec.Raw) -> bytes:
    """Return JSON text without line breaks; valid JSON has them only between tokens."""
    return bytes(raw).replace(b"\n", b" ").replace(b"\r", b" ")


def plain_text(body: bytes) -> str:
    """Return JSON text with the escapes in its strings decoded, to be searched."""
    # The whole text is quoted as one JSON string, so that the parser decodes all escapes in one C call.
    text = body.decode().replace("\\\\", "\\u005c").replace('\\"', "\\u0022").replace('"', '\\"')
    plain: str = json.loads(f'"{text}"', strict=False)
    return plain


def replace_lone_surrogates(body: bytes) -> bytes:
    """Return JSON text with up to 1,000 lone surrogates replaced by U+FFFD.

    Text of more than 30,000 escapes is returned unchanged.
    """
    if body.count(b"\\") > _MAX_ESCAPES:
        return body
    return _LONE_SURROGATE.sub(rb"\\ufffd", body.replace(rb"\\", rb"\u005c"), _MAX_SURROGATES)


def replace_constants(body: bytes) -> bytes:
    """Return JSON text with the constants NaN, Infinity and -Infinity replaced by null, except in strings.

    Some JSON libraries write these constants, which RFC 8259 does not allow. Text without them, and text with
    more than 30,000 quotes, backslashes, minus signs and constants, is returned unchanged.
    """
    constants = body.count(b"NaN") + body.count(b"Infinity")
    if not constants or constants + sum(map(body.count, (b'"', b"\\", b"-"))) > _MAX_TOKENS:
        return body
    # The space makes the last text non-empty. The pattern matches once more after it.
    texts = _UP_TO_CONSTANT.split(body + b" ")[1::2][:-1]
    return body if len(texts) == 1 else b"null".join(texts)[:-1]


def _check_numbers(body: bytes) -> None:
    """Reject numbers that are too large for a float. Integers may have any size.

    Raises:
        ValueError: There is such a number, or there may be one among more than 30,000 items.
    """
    digits = body.translate(_DIGITS_TO_ZERO)
    large = (b"0e000" in digits or b"0e+000" in digits) and _LARGE_EXPONENT.search(digits)
    if not large and b"0" * 309 not in digits:
        return
    if body.count(b",") + body.count(b"[") + body.count(b"{") > _MAX_ITEMS:
        raise ValueError("too many items to search for large numbers")
    # The match may be inside a string; only the parser can tell. Both hooks are C functions, and `len` avoids
    # the conversion of long integers.
    numbers: list[str] = []
    decoder = json.JSONDecoder(parse_float=numbers.append, parse_int=len, parse_constant=_refuse_constant)
    try:
        decoder.decode(body.decode())
    except RecursionError as exc:
        raise ValueError("nested too deep") from exc
    if not math.isfinite(max(map(abs, map(float, numbers)), default=0.0)):
        raise ValueError("a number is too large for a float")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
