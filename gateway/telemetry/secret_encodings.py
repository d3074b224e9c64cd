"""The encoded forms of a secret, and the normalized views of a text in which they are searched.

    text -> folded: escapes decoded; only printable ASCII without space and backslash; lower case
            coded:  folded, with both alphabets of base64 mapped to one
            digits: folded, only the digits of hexadecimal, without zeros

Each form is searched in one view. A few passes of C code create the views. `secret_positions.py` finds where
in a text the bytes of a view are.

Without zeros and with nothing between its digits, a secret has the same digits as `53 75`, `0x53, 0x75`,
`U+0053 U+0075` and in UTF-16.
"""

from __future__ import annotations

import base64
import binascii
import html
import json
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple
from urllib.parse import quote

MIN_SECRET = 6  # characters; shorter strings occur in ordinary words and numbers
_MIN_BASE64 = 8  # digits of base64 for 6 bytes
_MIN_HEX = 12  # digits of hexadecimal; fewer occur in ordinary numbers
_LONG = 128  # bytes of a view
_LAYERS = 3  # of escapes; for example, a percent sign may itself be percent-encoded

LAST_PRINTABLE = ord("~")
GAPS = bytes(byte for byte in range(256) if byte <= ord(" ") or byte > LAST_PRINTABLE)
# Percent escapes are decoded with the quoted-printable decoder, which is written in C and ignores invalid
# escapes. Its escape character is "=" instead of "%". So \1 replaces a real "=" meanwhile.
DROPPED = GAPS + b"\\"
_FOLD = bytes.maketrans(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", b"abcdefghijklmnopqrstuvwxyz")
_CODE = bytes.maketrans(b"-_", b"+/")
_TO_QUOTED = bytes.maketrans(b"%=", b"=\1")
_FROM_QUOTED = bytes.maketrans(b"=\1", b"%=")
_RUN = re.compile(b"={2,}")
NO_DIGITS = bytes(byte for byte in range(256) if byte not in b"123456789abcdef")
_LONG_RUN = b"a" * 32
_SIGNATURE_RUN = b"a" * 40  # all base64 forms of a signature of 32 bytes are longer
_RUNS = bytes(
    ord("a") if byte in b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/" else ord(" ")
    for byte in range(256)
)
# The hexadecimal codes of upper and lower case differ in the first digit: 4 or 6, 5 or 7. Map them to one.
_MERGE_HEX_CASE = bytes.maketrans(b"67", b"45")
_AFTER_CUT = b"=.\"'`)]}>,;:"  # characters that may follow truncated text: quotes, dots

_ENTITY = re.compile(rb"&#(?:[xX]([0-9A-Fa-f]{1,8})|([0-9]{1,8}));?")

FOLDED, CODED, HEX_DIGITS = range(3)


class Views(NamedTuple):
    """The normalized views of a text."""

    folded: bytes
    coded: bytes
    digits: bytes


# What to search for in each view. A fourth element is for `coded`, if that has a long run of base64 digits.
Targets = tuple[tuple[bytes, ...], ...]


class Needle(NamedTuple):
    """A form of a secret to search for.

    Attributes:
        view: The index of the view in which the form occurs.
        form: The form, as it appears in that view.
        prefix: The shortest beginning that is recognized in truncated text.
        before: Whether the digit before the form also encodes bits of the secret.
        after: Whether the digit after the form also encodes bits of the secret.
    """

    view: int
    form: bytes
    prefix: bytes
    before: bool = False
    after: bool = False


class Match(NamedTuple):
    """An occurrence of a form in its view, or of the beginning of a form at the end of the view."""

    needle: Needle
    start: int
    end: int


class Forms(NamedTuple):
    """All forms of a set of secrets.

    Attributes:
        literals: Searched in the text in lower case.
        spaced: The literals that the views cannot find, because too few characters remain without gaps.
        needles: Searched in the views.
        wholes: The forms of the needles, by view.
        prefixes: The prefixes of the needles, by view.
        longest: The length of the longest form.
    """

    literals: tuple[bytes, ...] = ()
    spaced: tuple[bytes, ...] = ()
    needles: tuple[Needle, ...] = ()
    wholes: Targets = ()
    prefixes: Targets = ()
    longest: int = 0

    def plus(self, secrets: Iterable[str], binary: Iterable[bytes] = ()) -> Forms:
        """Return these forms together with those of more secrets. `binary` are secrets that are not text."""
        secrets = [secret for secret in secrets if len(secret) >= MIN_SECRET]
        literals = dict.fromkeys([*self.literals, *(form for each in secrets for form in _literals(each))])
        spaced = [literal for literal in literals if len(literal.translate(None, DROPPED)) < MIN_SECRET]
        needles = dict.fromkeys(self.needles)
        needles |= dict.fromkeys(form for each in secrets for form in _needles(each))
        needles |= dict.fromkeys(form for each in binary for form in _binary_needles(each))
        return Forms(
            tuple(literals),
            tuple(spaced),
            tuple(needles),
            _by_view((needle.view + 2 * _is_long(needle), needle.form) for needle in needles),
            _by_view((needle.view, needle.prefix) for needle in needles),
            max((len(needle.form) for needle in needles), default=0),
        )

    def may_be_in(self, data: bytes) -> bool:
        """Return whether the data contains a prefix of a form. False is certain."""
        searched = self._searched(data)
        return searched is None or _any_in(searched, self.prefixes)

    def are_in(self, data: bytes) -> bool:
        """Return whether the data contains a form."""
        searched = self._searched(data)
        return searched is None or _any_in((*searched, _long_runs(searched.coded)), self.wholes)

    def are_in_or_signature_may_be(self, data: bytes, signature: str) -> bool:
        """Return whether the data contains a form, or the beginning of a form of a signature.

        False is certain if the data contains at most a part of a signature. The forms of a signature would
        take 90 us to create; the beginnings take 2 us.
        """
        searched = self._searched(data)
        if searched is None or _any_in((*searched, _long_runs(searched.coded)), self.wholes):
            return True
        binary, text = binascii.a2b_base64(signature[:12]), signature[:9].encode()
        if text[:MIN_SECRET].translate(_FOLD) in searched.folded or any(
            _hex_form(form[:MIN_SECRET]) in searched.digits for form in (binary, text)
        ):
            return True
        # Few responses have so long a run, and the other beginnings take twice as much time.
        return _SIGNATURE_RUN in searched.coded.translate(_RUNS) and any(
            prefix in searched.coded for prefix in _coded_signature_prefixes(binary, text)
        )

    def are_in_or_at_end_of(self, data: bytes) -> bool:
        """Return whether the data contains a form, or ends with the beginning of one."""
        searched = self._searched(data)
        if searched is None:
            return True
        ends = list(searched)
        if len(searched.folded) > _LONG:
            # Whole forms are found faster than prefixes. A prefix counts only at the end.
            if _any_in((*searched, _long_runs(searched.coded)), self.wholes):
                return True
            ends = [view.rstrip(_AFTER_CUT)[-self.longest :] for view in searched]
        return _any_in(ends, self.prefixes) and next(self.matches(searched), None) is not None

    def matches(self, searched: Views) -> Iterator[Match]:
        """Yield each occurrence of a form, and of the beginning of a form at the end of a truncated text."""
        for needle in self.needles:
            view = searched[needle.view]
            for start, end in occurrences(needle.form, view):
                yield Match(needle, start, end)
            cut = len(view.rstrip(_AFTER_CUT))
            begin = max(cut - len(needle.form), 0)
            for start, _ in occurrences(needle.prefix, view[begin:cut]):
                if needle.form.startswith(view[begin + start : cut]):
                    yield Match(needle, begin + start, cut)

    def _searched(self, data: bytes) -> Views | None:
        """Return the views of the data; None if it contains a literal."""
        # If nothing needs decoding, the folded view finds every literal that is not spaced.
        plain = not (b"%" in data or b"\\" in data or b"&" in data) and data.isascii()
        if literals := self.spaced if plain else self.literals:
            low = data.lower()
            if any(literal in low for literal in literals):
                return None
        return views(data if plain else decoded(data))


def _any_in(searched: Iterable[bytes], targets: Targets) -> bool:
    for view, forms in zip(searched, targets):  # noqa: B905  # without secrets, there are no targets
        for form in forms:  # `any` with a generator is 50 % slower
            if form in view:
                return True
    return False


def _by_view(forms: Iterable[tuple[int, bytes]]) -> Targets:
    unique = dict.fromkeys(forms)
    return tuple(tuple(form for at, form in unique if at == view) for view in range(4))


def _is_long(needle: Needle) -> bool:
    return needle.view == CODED and len(needle.form) >= len(_LONG_RUN)


def _long_runs(coded: bytes) -> bytes:
    """Return the view if it has a long run of base64 digits, else nothing. Few responses have one."""
    return coded if _LONG_RUN in coded.translate(_RUNS) else b""


def occurrences(form: bytes, data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the start and end of each occurrence of a form; they may overlap."""
    at = data.find(form)
    while at >= 0:
        yield at, at + len(form)
        at = data.find(form, at + 1)


def utf8(text: str) -> bytes:
    """Encode text as UTF-8; lone surrogates are encoded too."""
    return text.encode("utf-8", "surrogatepass")


def _literals(secret: str) -> Iterator[bytes]:
    for form in (secret, secret.lower(), secret.upper()):
        yield utf8(form).lower()
        if not form.isascii():  # the views have only ASCII
            yield quote(utf8(form), safe="").lower().encode()
            yield json.dumps(form)[1:-1].lower().encode()


def _needles(secret: str) -> Iterator[Needle]:
    for form in (*_literals(secret), utf8(html.escape(secret)), json.dumps(secret)[1:-1].encode()):
        folded = views(decoded(form)).folded
        if len(folded) >= MIN_SECRET:
            yield Needle(FOLDED, folded, folded[:MIN_SECRET])
    yield from _binary_needles(utf8(secret))
    # In UTF-16, a zero byte follows or precedes each ASCII character.
    yield from _binary_needles(secret.encode("utf-16-le", "surrogatepass").rstrip(b"\0"), width=2)
    if not secret.isascii():
        yield from _binary_needles(secret.encode("utf-16-be", "surrogatepass").lstrip(b"\0"), width=2)


def _binary_needles(secret: bytes, *, width: int = 1) -> Iterator[Needle]:
    """Yield the base64 and hexadecimal forms of a secret. `width` is the number of bytes of a character."""
    digits, form = secret.hex(), _hex_form(secret)
    if len(form) >= _MIN_HEX:
        prefix = _hex_form(secret[: MIN_SECRET * width])
        yield Needle(HEX_DIGITS, form, prefix, digits.startswith("0"), digits.endswith("0"))
    else:
        yield Needle(FOLDED, digits.encode(), digits[: 2 * MIN_SECRET * width].encode())
    # A secret can start at byte 0, 1 or 2 of a base64 group. For each start: the digits that do not depend
    # on neighbouring bytes.
    for before in range(3):
        coded = base64.b64encode(b"\0" * before + secret)
        first, end = -(-before * 8 // 6), (before + len(secret)) * 8 // 6
        core = coded[first:end].lower()
        if len(core) >= _MIN_BASE64 - 1:
            prefix = core[: _MIN_BASE64 * width]
            yield Needle(CODED, core, prefix, before > 0, (before + len(secret)) % 3 > 0)


def _coded_signature_prefixes(binary: bytes, text: bytes) -> tuple[bytes, ...]:
    utf16 = b"\0".join([text[at : at + 1] for at in range(MIN_SECRET)])
    return (*_base64_prefixes(binary), *_base64_prefixes(text), *_base64_prefixes(utf16))


def _base64_prefixes(secret: bytes) -> tuple[bytes, bytes, bytes]:
    """Return the prefixes of the base64 forms of a secret, of which at least 9 bytes are given."""
    return (
        binascii.b2a_base64(secret)[:_MIN_BASE64].lower(),
        binascii.b2a_base64(b"\0" + secret)[2 : 2 + _MIN_BASE64].lower(),
        binascii.b2a_base64(b"\0\0" + secret)[3 : 3 + _MIN_BASE64].lower(),
    )


def _hex_form(secret: bytes) -> bytes:
    return secret.hex().encode().translate(_MERGE_HEX_CASE, NO_DIGITS)


def decoded(data: bytes) -> bytes:
    """Decode percent, JSON and HTML escapes. Invalid escapes stay; white space and non-ASCII may be lost."""
    for _ in range(_LAYERS):
        size = len(data)
        if b"\\" in data:
            data = _without_backslash_escapes(data)
        if b"&#" in data:
            data = _ENTITY.sub(_entity_value, data)
        if b"%" in data:
            data = data.replace(b"%01", b"").replace(b"%3d", b"=").replace(b"%3D", b"=")
            # White space is removed first, because the decoder removes a line break after "=". It reads "=="
            # as "=", so runs are collapsed first.
            quoted = data.translate(_TO_QUOTED, DROPPED)
            if b"==" in quoted:
                quoted = _RUN.sub(b"=", quoted)
            data = binascii.a2b_qp(quoted).translate(_FROM_QUOTED)
        if len(data) == size:
            break
    return data


def _without_backslash_escapes(data: bytes) -> bytes:
    data = data.translate(None, GAPS)
    while b"\\\\" in data:  # halves each run of backslashes
        data = data.replace(b"\\\\", b"\\")
    data = data.replace(b"\\x", b"\\u00")
    for white_space in (b"\\n", b"\\r", b"\\t", b"\\f", b"\\b"):
        data = data.replace(white_space, b"")
    if b"\\u" in data or b"\\U" in data:
        data = data.decode("raw_unicode_escape", "ignore").encode("ascii", "ignore")
    return data


def _entity_value(entity: re.Match[bytes]) -> bytes:
    code = int(entity[1], 16) if entity[1] else int(entity[2])
    return b"%c" % code if code <= LAST_PRINTABLE else b""


def views(data: bytes) -> Views:
    """Return the views of a decoded text."""
    folded = data.translate(_FOLD, DROPPED)
    return Views(folded, folded.translate(_CODE), folded.translate(_MERGE_HEX_CASE, NO_DIGITS))
