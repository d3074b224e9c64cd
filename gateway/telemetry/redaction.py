"""Keeps secrets out of everything that leaves the process: log lines, problems, envelopes.

One Redactor is made at the start and receives every secret as it is loaded. It also knows what
the vendor's API gateway leaks: its refusal of a signature quotes the whole string
to sign, and with it the access key.

    text -> bytes -> views (`disguises.py`): does the beginning of a secret's form occur? | no -> as it is
                     shapes: string to sign, X-Ca-* headers, signatures           | yes -> find the places,
                                                                                    put a mask there

10 ms for 1 MiB, 6 us for a log line, with two pairs to hide. Only a text that seems to hold a secret is read
byte by byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Self

from gateway.telemetry.secret_encodings import (
    DIGITS,
    SHORTEST,
    Forms,
    heads_of_code,
    kept_digits,
    mapped,
    utf8,
    views,
)

MASK = "[redacted]"

_EXACT_BYTES = 16_384  # a larger text with an encoded secret is masked whole
_MOST_PLACES = 1000  # a text with more of them is masked whole

# What the vendor's API gateway says, in lower case. A string to sign reaches to the text's end.
_TO_SIGN = re.compile(rb"string(?:[-_\s]|%20){0,2}to(?:[-_\s]|%20){0,2}sign\b[^:`%]{0,3}(?::|%3a)")
_NAMED = re.compile(  # in a line, a dict, pairs; bytes or not, quoted as often as it may be
    rb"""(?x) x-ca-(?:signature|key|nonce) \\{0,8} ["']? \s{0,8}
    (?: (?: [:=] | %3[ad] ) (?:\s|%20){0,8} (?: b? \\{0,8} ["'] )? | , \s{0,8} b? \\{0,8} ["'] )
    ([^\s"',;\#\\]+)"""
)
# Base64 of 32 bytes, with "/" as JSON may have it; or its URL-safe form.
_SIGNATURE = re.compile(
    rb"""(?x) (?<![A-Za-z0-9+/]) (?: [A-Za-z0-9+] | \\?/ ){43} = (?![A-Za-z0-9+/=])
    | (?<![A-Za-z0-9_-]) [A-Za-z0-9_-]{43} = (?![A-Za-z0-9_=-])"""
)
_ALPHANUMERIC = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_ANY_CLASS, *_CLASSES = (
    bytes(ord("a") if byte in alphabet else byte if byte in b"=" else ord(" ") for byte in range(256))
    for alphabet in (_ALPHANUMERIC + b"+/-_", _ALPHANUMERIC + b"+/", _ALPHANUMERIC + b"-_")
)
_SIGNATURE_CLASSES = b" " + b"a" * 43 + b"= ", b"=" + b"a" * 43 + b"= "

_AFTER_CUT = b"\1.\"'`)]}>,;:"  # what may follow a text that was cut off: quotes, dots

Span = tuple[int, int]


class Excerpt(str):
    """A text of which a log line shows the first `limit` characters, cut after it was redacted.

    A secret that a cut divides could not be told any more.
    """

    __slots__ = ("limit",)
    limit: int

    def __new__(cls, text: str, limit: int) -> Self:
        """Make an excerpt. `limit` is in characters."""
        made = super().__new__(cls, text)
        made.limit = limit
        return made


class Redactor:
    """Replaces every known secret, in every common encoding, and every known shape of one, with a mask."""

    def __init__(self) -> None:
        self._secrets: set[str] = set()
        self._forms = Forms()
        self._credentials = Forms()  # of these secrets, those that no answer may have in it

    def hide(self, *secrets: str) -> None:
        """Hide these strings from now on; strings under 6 characters cannot be told from text."""
        new = set(secrets) - self._secrets
        self._secrets |= new
        self._forms = self._forms.plus(new)  # the whole at once: another thread may be logging

    def hide_credentials(self, *secrets: str) -> None:
        """Hide these strings from now on, and refuse answers of the upstream that have one of them."""
        self._credentials = self._credentials.plus(secrets)
        self.hide(*secrets)

    def for_call(self, signature: str) -> Redactor:
        """Return a redactor that knows the signature of one call, too: made in 40 us."""
        signature = signature.rstrip("=")  # a base64 decoder needs no padding
        made = Redactor()
        made._secrets = {*self._secrets, signature}
        made._forms = self._forms.plus([signature])
        made._credentials = self._credentials.plus([signature])
        return made

    def __call__(self, text: str) -> str:
        """Return the text without secrets; of one that its end cuts off, 5 characters may be left."""
        if len(text) < SHORTEST:
            return text
        data = utf8(text)
        if not self._suspects(data):
            return text
        places = list(islice(self._places(data), _MOST_PLACES))
        cleaned = _masked(data, places)
        # In a large text, and where an escape is ambiguous, a secret may be left whose place is not known.
        return MASK if len(places) == _MOST_PLACES or self._forms.are_in(utf8(cleaned)) else cleaned

    def suspects(self, text: str) -> bool:
        """Tell whether a text may hold a secret, or the beginning of one; False is sure."""
        return self._suspects(utf8(text))

    def suspects_answer(self, body: bytes, signature: str) -> bool:
        """Tell whether an answer may hold a credential or its call's signature; False is sure.

        What is only shaped like a signature may be a part of an image's URL.
        """
        return self._credentials.may_be_in(body, heads_of_code(signature))

    def refuses(self, body: bytes) -> bool:
        """Tell whether an answer holds a credential, in whatever form."""
        return self._credentials.are_in(body)

    def _suspects(self, data: bytes) -> bool:
        low = data.lower()
        return (
            b"x-ca-" in low
            or (b"string" in low and _TO_SIGN.search(low) is not None)
            or _has_signature(data)
            or self._forms.may_be_in(data)
        )

    def _places(self, data: bytes) -> Iterator[Span]:
        """Find what is to be masked."""
        low = data.lower()
        told = _TO_SIGN.search(low)
        if told is not None:
            yield told.end(), len(data)
        yield from (match.span(1) for match in _NAMED.finditer(low))
        if _has_signature(data):
            yield from (match.span() for match in _SIGNATURE.finditer(data))
        for literal in self._forms.literals:
            yield from _occurrences(literal, low)
        if not self._forms.needles:
            return
        if len(data) <= _EXACT_BYTES:
            yield from self._decoded_places(data, 0)
        else:  # the text's end alone: whether the rest holds an encoded secret is seen when this is done
            offset = len(data) - _EXACT_BYTES
            yield from self._decoded_places(data[offset:], offset)

    def _decoded_places(self, data: bytes, offset: int) -> Iterator[Span]:
        plain, starts, ends = mapped(data)
        seen_in = views(plain)
        kept = kept_digits(seen_in.folded)
        for view, form, head, before, after in self._forms.needles:
            seen = seen_in[view]
            found = list(_occurrences(form, seen))
            # A text that was cut off: its end is the beginning of a secret.
            uncut = len(seen.rstrip(_AFTER_CUT))
            found += [
                (at, uncut)
                for at, _ in _occurrences(head, seen[max(uncut - len(form), 0) : uncut])
                for at in [at + max(uncut - len(form), 0)]
                if form.startswith(seen[at:uncut])
            ]
            for first, end in found:
                at, last = (kept[first], kept[end - 1]) if view == DIGITS else (first, end - 1)
                at -= before and at > 0
                last += after and end - first == len(form) and last + 1 < len(plain)
                yield offset + starts[at], offset + ends[last]


def _has_signature(data: bytes) -> bool:
    if b"=" not in data:
        return False
    shown = data.replace(b"\\/", b"/") if b"\\" in data else data
    if b"a" * 43 + b"=" not in shown.translate(_ANY_CLASS):
        return False
    classes = [b" %b " % shown.translate(each) for each in _CLASSES]
    return any(signature in each for each in classes for signature in _SIGNATURE_CLASSES)


def _occurrences(form: bytes, data: bytes) -> Iterator[Span]:
    at = data.find(form)
    while at >= 0:
        yield at, at + len(form)
        at = data.find(form, at + 1)


def _masked(data: bytes, places: Iterable[Span]) -> str:
    """Put a mask in each place; those that overlap have one."""
    pieces: list[bytes] = []
    done = 0
    for start, end in sorted(places):
        if pieces and start < done:
            done = max(done, end)
            continue
        pieces += [data[done:start], MASK.encode()]
        done = end
    pieces.append(data[done:])
    return b"".join(pieces).decode("utf-8", "surrogatepass")
