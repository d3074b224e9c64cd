"""Escapes control characters in untrusted text, because a terminal executes them."""

from __future__ import annotations

import re

# C0, DEL, C1, and the invisible characters that change the text direction or break the line.
_SET = r"\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
_CONTROLS = re.compile(f"[{_SET}]")
_UNPRINTABLE = re.compile(rf"[{_SET}\ud800-\udfff]")  # a lone surrogate has no UTF-8 encoding


def printable(text: str, *, keep: str = "") -> str:
    """Return the text with control characters escaped, except those in `keep`."""
    return _UNPRINTABLE.sub(lambda m: m[0] if m[0] in keep else _escape(m[0]), text)


def json_text(text: str) -> str:
    """Return JSON text with the control characters escaped that JSON permits unescaped in a string."""
    return _CONTROLS.sub(lambda m: f"\\u{ord(m[0]):04x}", text)


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode()
