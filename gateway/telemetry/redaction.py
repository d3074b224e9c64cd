"""Redacts secrets in all output of the process: log lines, problems and envelopes.

The process creates one Redactor at startup, and every secret is added to it when it is loaded. The Redactor
also finds what the vendor's API gateway leaks: when it rejects a signature, its message quotes the string to
sign, which contains the access key.

    1. Search the text's views (see `secret_encodings.py`) for the forms of all secrets, the ends of the views
       for the beginnings of forms, and the text for known patterns: a string to sign, X-Ca-* headers,
       signatures.
    2. If nothing matches, return the text unchanged.
    3. Otherwise decode the text byte by byte, locate the matches and replace them with a mask.

Redact a text before you cut it, because a cut may split a secret. Escape control characters last
(`domain/printable.py`).

The first step takes 15 ms for 1 MiB and 7 us for a log line, with two key pairs to hide.
"""

from __future__ import annotations

import re
from binascii import a2b_base64
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Self

from gateway.telemetry.secret_encodings import (
    HEX_DIGITS,
    MIN_SECRET,
    Forms,
    occurrences,
    utf8,
    views,
)
from gateway.telemetry.secret_positions import decode_with_positions, hex_positions

MASK = "[redacted]"

_MAX_DECODED = 16_384  # bytes; a larger text that contains an encoded secret is masked as a whole
_MAX_MATCHES = 1000  # a text with as many matches is masked as a whole

# The text of the vendor's API gateway, in lower case. A string to sign extends to the end of the text.
_STRING_TO_SIGN = re.compile(rb"string(?:[-_\s]|%20){0,2}to(?:[-_\s]|%20){0,2}sign\b[^:`%]{0,3}(?::|%3a)")
# As a header line, in a dict or a list of pairs; str or bytes, with nested quotes. The possessive quantifiers
# (`}+`) never go back: otherwise a megabyte of names and backslashes takes 100 ms.
_HEADER = re.compile(
    rb"""(?x) x-ca-(?:signature|key|nonce) \\{0,8}+ ["']?+ \s{0,8}+
    (?: (?: [:=] | %3[ad] ) (?:\s|%20){0,8}+ (?: b? \\{0,8}+ ["'] )?+ | , \s{0,8}+ b? \\{0,8}+ ["'] )
    ([^\s"',;\#\\]+)"""
)
# Base64 of 32 bytes, where JSON may escape "/"; or its URL-safe form.
_SIGNATURE = re.compile(
    rb"""(?x) (?<![A-Za-z0-9+/]) (?: [A-Za-z0-9+] | \\?/ ){43} = (?![A-Za-z0-9+/=])
    | (?<![A-Za-z0-9_-]) [A-Za-z0-9_-]{43} = (?![A-Za-z0-9_=-])"""
)
_ALPHANUMERIC = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
# Tables that translate base64 digits to "a", keep "=", and translate everything else to a space.
_ANY_ALPHABET, *_ALPHABETS = (
    bytes(ord("a") if byte in alphabet else byte if byte in b"=" else ord(" ") for byte in range(256))
    for alphabet in (_ALPHANUMERIC + b"+/-_", _ALPHANUMERIC + b"+/", _ALPHANUMERIC + b"-_")
)
_TRANSLATED_SIGNATURES = b" " + b"a" * 43 + b"= ", b"=" + b"a" * 43 + b"= "

Span = tuple[int, int]


class Excerpt(str):
    """A text of which a log line shows the first `limit` characters, truncated after redaction.

    Truncation before redaction could leave a part of a secret that is no longer recognized.
    """

    __slots__ = ("limit",)
    limit: int

    def __new__(cls, text: str, limit: int) -> Self:
        """Create an excerpt. `limit` is in characters."""
        excerpt = super().__new__(cls, text)
        excerpt.limit = limit
        return excerpt


class Redactor:
    """Masks known secrets in every common encoding, and text with the pattern of a credential."""

    def __init__(self) -> None:
        self._secrets: set[str] = set()
        self._forms = Forms()
        self._credentials = Forms()  # the secrets that no upstream response may contain

    def add_secrets(self, *secrets: str) -> None:
        """Add secrets. Strings shorter than 6 characters are ignored: they occur in ordinary text."""
        new = set(secrets) - self._secrets
        self._secrets |= new
        self._forms = self._forms.plus(new)  # replaced in one step: another thread may be logging

    def add_credentials(self, *secrets: str) -> None:
        """Add secrets that, in addition, no upstream response may contain."""
        self._credentials = self._credentials.plus(secrets)
        self.add_secrets(*secrets)

    def for_call(self, signature: str) -> Redactor:
        """Return a redactor that also hides the signature of one request. Takes 100 us."""
        binary = [a2b_base64(signature)]
        signature = signature.rstrip("=")  # the padding may be missing
        redactor = Redactor()
        redactor._secrets = {*self._secrets, signature}
        redactor._forms = self._forms.plus([signature], binary)
        redactor._credentials = self._credentials.plus([signature], binary)
        return redactor

    def __call__(self, text: str) -> str:
        """Return the text with all secrets masked.

        Of a secret that is truncated at the end of the text, up to 5 characters may remain.
        """
        if len(text) < MIN_SECRET:
            return text
        data = utf8(text)
        has_secret = self._forms.are_in_or_at_end_of(data)
        spans = list(islice(self._spans(data, has_secret=has_secret), _MAX_MATCHES))
        if not spans and not has_secret:
            return text
        masked = _mask(data, spans)
        # In a large text, or next to an ambiguous escape, the position of a secret may be unknown. Then the
        # whole text is masked.
        located = 0 < len(spans) < _MAX_MATCHES
        return masked if located and not self._forms.are_in(utf8(masked)) else MASK

    def suspects(self, text: str) -> bool:
        """Return whether a text may contain a secret or the beginning of one. False is certain."""
        data = utf8(text)
        low = data.lower()
        return (
            (b"x-ca-" in low and _HEADER.search(low) is not None)
            or (b"string" in low and _STRING_TO_SIGN.search(low) is not None)
            or _has_signature(data)
            or self._forms.may_be_in(data)
        )

    def may_contain_credential(self, body: bytes, signature: str) -> bool:
        """Return whether a response may contain a credential or the request's signature. False is certain.

        Other text with the pattern of a signature does not count: it may be part of an image URL.
        """
        return self._credentials.are_in_or_signature_may_be(body, signature)

    def contains_credential(self, body: bytes) -> bool:
        """Return whether a response contains a credential, in any encoding."""
        return self._credentials.are_in(body)

    def _spans(self, data: bytes, *, has_secret: bool) -> Iterator[Span]:
        """Yield the spans to mask; they may overlap. Secrets are only located if `has_secret`."""
        low = data.lower()
        string_to_sign = _STRING_TO_SIGN.search(low) if b"string" in low else None
        if string_to_sign is not None:
            yield string_to_sign.end(), len(data)
        if b"x-ca-" in low:
            yield from (match.span(1) for match in _HEADER.finditer(low))
        if _has_signature(data):
            yield from (match.span() for match in _SIGNATURE.finditer(data))
        if not has_secret:
            return
        for literal in self._forms.literals:
            yield from occurrences(literal, low)
        if len(data) <= _MAX_DECODED:
            yield from self._decoded_spans(data, 0)
        else:  # only the end of the text; `__call__` checks the rest for remaining secrets
            offset = len(data) - _MAX_DECODED
            yield from self._decoded_spans(data[offset:], offset)

    def _decoded_spans(self, data: bytes, offset: int) -> Iterator[Span]:
        plain, starts, ends = decode_with_positions(data)
        searched = views(plain)
        hex_digits = hex_positions(searched.folded)
        for needle, first, end in self._forms.matches(searched):
            at, last = (
                (hex_digits[first], hex_digits[end - 1]) if needle.view == HEX_DIGITS else (first, end - 1)
            )
            at -= needle.before and at > 0
            last += needle.after and end - first == len(needle.form) and last + 1 < len(plain)
            yield offset + starts[at], offset + ends[last]


def _has_signature(data: bytes) -> bool:
    if b"=" not in data:
        return False
    unescaped = data.replace(b"\\/", b"/") if b"\\" in data else data
    if b"a" * 43 + b"=" not in unescaped.translate(_ANY_ALPHABET):
        return False
    texts = [b" %b " % unescaped.translate(alphabet) for alphabet in _ALPHABETS]
    return any(signature in text for text in texts for signature in _TRANSLATED_SIGNATURES)


def _mask(data: bytes, spans: Iterable[Span]) -> str:
    """Replace each span with a mask; overlapping spans share one."""
    pieces: list[bytes] = []
    done = 0
    for start, end in sorted(spans):
        if pieces and start < done:
            done = max(done, end)
            continue
        pieces += [data[done:start], MASK.encode()]
        done = end
    pieces.append(data[done:])
    return b"".join(pieces).decode("utf-8", "surrogatepass")
