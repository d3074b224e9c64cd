"""Finds where in a text the bytes of its normalized views are (see `secret_encodings.py`).

The views are created by a few passes of C code, which keep no positions. So this module decodes the text
again, byte by byte.
"""

from __future__ import annotations

import re

from gateway.telemetry.secret_encodings import DROPPED, GAPS, LAST_PRINTABLE, NO_DIGITS

_TOKEN = re.compile(
    rb"""(?xs)
      (?: % (?:25)* | \\ (?: u00 (?! 26\# ) | U000000 | x ) ) ([0-9A-Fa-f]{2})
    | (?: & | \\u0026 ) \# (?: [xX] ([0-9A-Fa-f]{1,8}) | ([0-9]{1,8}) ) ;?
    | \\ (?: [bfnrt] | u [0-9A-Fa-f]{4} | U [0-9A-Fa-f]{8} )
    | (.)
    """
)


def hex_positions(folded: bytes) -> list[int]:
    """Return the position in the folded view of each byte of the `digits` view."""
    return [at for at, byte in enumerate(folded) if byte not in NO_DIGITS]


def decode_with_positions(data: bytes) -> tuple[bytes, list[int], list[int]]:
    """Decode as `decoded` does. Return the result, and the start and end of each of its bytes in `data`."""
    index = [at for at, byte in enumerate(data) if byte not in GAPS]
    plain, starts, ends = bytearray(), [], []
    for token in _TOKEN.finditer(data.translate(None, GAPS)):
        if digits := token[1] or token[2]:
            byte = int(digits, 16)
        elif token[3]:
            byte = int(token[3])
        elif token[4]:
            byte = token[4][0]
        else:
            continue
        if byte <= LAST_PRINTABLE and byte not in DROPPED:
            plain.append(byte)
            starts.append(index[token.start()])
            ends.append(index[token.end() - 1] + 1)
    return bytes(plain), starts, ends
