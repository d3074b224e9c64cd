"""Texts of about a mebibyte that are expensive to read for a parser or a redactor that is not careful."""

import base64
import random

MIB = 1 << 20
SIZE = MIB - 100  # room for an envelope within `upstream.max_response_bytes`


def many(unit: bytes) -> bytes:
    """Return an array of about the maximum size."""
    return b"[" + b",".join([unit] * (SIZE // (len(unit) + 1))) + b"]"


HOSTILE_JSON = {
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
    "lone surrogates": b'"' + b"\\ud83d" * (SIZE // 6) + b'"',
    "white space": b" " * SIZE + b"1",
    "lone surrogate and backslashes": b'"\\ud83d' + b"\\\\" * (SIZE // 2 - 9) + b'"',
    "lone surrogate and pairs": b'"\\ud83d' + b"\\ud83d\\ude00" * (SIZE // 12 - 1) + b'"',
    "lone surrogate and strings": b'["\\ud83d",' + many(b'"a"')[1 + 4 * 9 :],
    "large integer and arrays": b"[%b," % (b"9" * 310) + many(b"[]")[1 + 3 * 200 :],
    "large integer and objects": b"[%b," % (b"9" * 310) + many(b'{"a":1}')[1 + 8 * 50 :],
    "exponents in text": b'"' + b"1e999 " * (SIZE // 6) + b'"',
    "digits and exponents in text": b'"' + b"1e" * (SIZE // 2 - 9) + b'1e999 "',
    "lone surrogates among escapes, numbers among items": b'["%b%b",1e100,%b"%b"]'
    % (rb"\ud83dx" * 990, rb"\u00e9" * 29_000, b'{"a":1},' * 14_900, b"1" * (SIZE - 310_000)),
}
HOSTILE_JSON |= {
    "constants": many(b"NaN"),
    "constants within the limit": b"[" + b"NaN," * 29_000 + b"1," * (SIZE // 2 - 59_000) + b"1]",
    "constant and strings": many(b'"a"')[:-5] + b",NaN]",
    "constant and escapes": b'[NaN,"' + b"\\n" * (SIZE // 2 - 9) + b'"]',
    "constant and a string without an end": b"[NaN," + b'"a",' * 14_000 + b'"' + b"x" * (SIZE - 60_000),
    "constant and its first letter": b"NaN" + b"N" * (SIZE - 9),
    "constant and minus signs": b"[NaN," + b"-" * (SIZE - 9) + b"]",
    "constant and negative numbers": b"[NaN," + b"-1," * 29_000 + b"1]",
}

ORDINARY_JSON = many(b'{"step":1,"name":"a"}')


def hostile_texts(secret: str, signature: str) -> dict[str, str]:
    """Return texts that resemble, or contain, a secret key and a signature."""
    pieces = {
        "letters": "a",
        "base64": base64.b64encode(random.Random(1).randbytes(3 * 4096)).decode(),
        "spaces": " ",
        "percent signs": "%",
        "percent signs, encoded": "%25",
        "backslashes": "\\",
        "entities": "&#65;",
        "half entities": "&#",
        "equals signs": "=",
        "headers": "x-ca-key \\",
        "headers with backslashes": "x-ca-signature" + "\\" * 8,
        "headers with spaces": "x-ca-key" + " " * 8,
        "strings to sign": "string to sign",
        "beginnings of the secret": secret[:6],
        "all but the end of the secret": secret[:-1],
        "the secret, spaced": " ".join(secret) + " ",
        "signatures": signature + " ",
        "wide": "\u8bf7\u3000",
    }
    return {name: (piece * (MIB // len(piece) + 1))[:MIB] for name, piece in pieces.items()}
