"""The encoded forms of a secret, and the normalized views of a text in which they are searched.

    text -> folded: escapes decoded, white space and non-ASCII removed, lower case
            coded:  folded, with both alphabets of base64 mapped to one
            digits: folded, without the separators of hexadecimal

Each form is searched in one view. A few passes of C code create the views. Only `decode_with_positions` reads
a text byte by byte: it returns the position in the text of each byte of a view.
"""

from __future__ import annotations

import base64
import binascii
import html
import json
import re
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple
from urllib.parse import quote

MIN_SECRET = 6  # characters; shorter strings occur in ordinary words and numbers
_MIN_BASE64 = 8  # digits of base64 for 6 bytes
_MIN_HEX = 12  # digits of hexadecimal for 6 bytes
MAX_ENTITIES = 10_000  # HTML entities; decoding more takes too long
_LAYERS = 3  # of escapes; for example, a percent sign may itself be percent-encoded

# NUL is not dropped: no form contains it, so it can separate two texts.
_GAPS = bytes(byte for byte in range(2, 256) if byte <= ord(" ") or byte > ord("~"))
_DROPPED = _GAPS + b"\\"
# Percent escapes are decoded with the quoted-printable decoder, which is written in C and ignores invalid
# escapes. Its escape character is "=" instead of "%". So a real "=" is replaced by \1 in every view.
_FOLD = bytes.maketrans(b"=ABCDEFGHIJKLMNOPQRSTUVWXYZ", b"\1abcdefghijklmnopqrstuvwxyz")
_CODE = bytes.maketrans(b"-_", b"+/")
_TO_QUOTED = bytes.maketrans(b"%=", b"=\1")
_FROM_QUOTED = bytes.maketrans(b"=", b"%")
_RUN = re.compile(b"={2,}")
_SEPARATORS = b":-,._"
# The hexadecimal codes of upper and lower case differ in the first digit: 4 or 6, 5 or 7. Map them to one.
_MERGE_HEX_CASE = bytes.maketrans(b"67", b"45")
_DIGIT = re.compile(rb"(?s)0x|[:,._-]|(.)")

# Escaped wide spaces become non-ASCII bytes, which are dropped.
_WIDE_SPACES = (
    *((b"\\u20%d" % row, b"%80%8") for row in (0, 2, 5, 6)),
    *((b"\\u" + wide, b"") for wide in (b"3000", b"feff", b"FEFF")),
)
_ENTITY = re.compile(rb"&#(?:[xX]0{0,6}([0-9A-Fa-f]{2})|0{0,6}([0-9]{2,3}));")
_TOKEN = re.compile(
    rb"""(?xs)
      (?: % (?:25)* | \\ (?: u00 | x ) ) ([0-9A-Fa-f]{2})
    | &\# (?: [xX]0{0,6} ([0-9A-Fa-f]{2}) | 0{0,6} ([0-9]{2,3}) ) ;
    | \\ [nrt] | \\ u (?: 20[0256][0-9A-Fa-f] | 3000 | feff | FEFF )
    | (.)
    """
)

FOLDED, CODED, HEX_DIGITS = range(3)


class Views(NamedTuple):
    """The normalized views of a text."""

    folded: bytes
    coded: bytes
    digits: bytes


class Needle(NamedTuple):
    """A form of a secret to search for.

    Attributes:
        view: The index of the view in which the form occurs.
        form: The form, as it appears in that view.
        prefix: The shortest beginning that is recognized in truncated text.
        before: Whether the base64 digit before the form also encodes bits of the secret.
        after: Whether the base64 digit after the form also encodes bits of the secret.
    """

    view: int
    form: bytes
    prefix: bytes
    before: bool = False
    after: bool = False


class Forms(NamedTuple):
    """All forms of a set of secrets.

    Attributes:
        literals: Searched in the text in lower case.
        spaced: The literals that the views cannot find, because too few characters remain without gaps.
        needles: Searched in the views.
        prefixes: View and prefix of each needle.
    """

    literals: tuple[bytes, ...] = ()
    spaced: tuple[bytes, ...] = ()
    needles: tuple[Needle, ...] = ()
    prefixes: tuple[tuple[int, bytes], ...] = ()

    def plus(self, secrets: Iterable[str]) -> Forms:
        """Return these forms together with those of more secrets."""
        secrets = [secret for secret in secrets if len(secret) >= MIN_SECRET]
        literals = dict.fromkeys([*self.literals, *(form for each in secrets for form in _literals(each))])
        spaced = [literal for literal in literals if len(literal.translate(None, _DROPPED)) < MIN_SECRET]
        needles = dict.fromkeys([*self.needles, *(form for each in secrets for form in _needles(each))])
        prefixes = dict.fromkeys((needle.view, needle.prefix) for needle in needles)
        return Forms(tuple(literals), tuple(spaced), tuple(needles), tuple(prefixes))

    def may_be_in(self, data: bytes, more_prefixes: Iterable[tuple[int, bytes]] = ()) -> bool:
        """Return whether the data contains a prefix of a form or of `more_prefixes`. False is certain."""
        return self._any_in(data, (*self.prefixes, *more_prefixes))

    def are_in(self, data: bytes) -> bool:
        """Return whether the data contains a form."""
        return self._any_in(data, [(needle.view, needle.form) for needle in self.needles])

    def _any_in(self, data: bytes, targets: Collection[tuple[int, bytes]]) -> bool:
        if not targets:
            return False
        # If nothing needs decoding, the folded view finds every literal that is not spaced.
        plain = not (b"%" in data or b"\\" in data or b"&" in data) and data.isascii()
        if literals := self.spaced if plain else self.literals:
            low = data.lower()
            if any(literal in low for literal in literals):
                return True
        if not plain:
            if data.count(b"&#") > MAX_ENTITIES:
                return True
            data = decoded(data)
        all_views = views(data)
        for view, form in targets:  # noqa: SIM110  # `any` with a generator is 50 % slower
            if form in all_views[view]:
                return True
        return False


def base64_prefixes(text: str) -> tuple[tuple[int, bytes], ...]:
    """Return the prefixes of the forms of a base64 text. Takes 1 us; the forms of a secret take 40 us."""
    raw = text.encode()[:9]
    return (
        (FOLDED, raw[:MIN_SECRET].translate(_FOLD)),
        (HEX_DIGITS, raw[:MIN_SECRET].hex().encode().translate(_MERGE_HEX_CASE)),
        (CODED, binascii.b2a_base64(raw)[:_MIN_BASE64].lower()),
        (CODED, binascii.b2a_base64(b"\0" + raw)[2 : 2 + _MIN_BASE64].lower()),
        (CODED, binascii.b2a_base64(b"\0\0" + raw)[3 : 3 + _MIN_BASE64].lower()),
    )


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
    raw = utf8(secret)
    for form in (*_literals(secret), utf8(html.escape(secret)), json.dumps(secret)[1:-1].encode()):
        folded = views(decoded(form)).folded
        if len(folded) >= MIN_SECRET:
            yield Needle(FOLDED, folded, folded[:MIN_SECRET])
    digits = raw.hex().encode().translate(_MERGE_HEX_CASE)
    yield Needle(HEX_DIGITS, digits, digits[:_MIN_HEX])
    # A secret can start at byte 0, 1 or 2 of a base64 group. For each start: the digits that do not depend
    # on neighbouring bytes.
    for before in range(3):
        coded = base64.b64encode(b"\0" * before + raw)
        first, end = -(-before * 8 // 6), (before + len(raw)) * 8 // 6
        core = coded[first:end].lower()
        if len(core) >= _MIN_BASE64 - 1:
            prefix = core[:_MIN_BASE64]
            yield Needle(CODED, core, prefix, before > 0, (before + len(raw)) % 3 > 0)


def decoded(data: bytes) -> bytes:
    """Decode percent, JSON and HTML escapes. Invalid escapes stay; white space may be lost."""
    if b"&" in data:
        data = _ENTITY.sub(lambda m: b"%" + (m[1] or b"%02x" % (int(m[2]) & 0xFF)), data)
    if b"\\u" in data:
        for space, dropped in _WIDE_SPACES:
            data = data.replace(space, dropped)
    for _ in range(_LAYERS):
        if b"\\" in data:
            data = data.replace(b"\\u00", b"%").replace(b"\\x", b"%")
            data = data.replace(b"\\n", b"").replace(b"\\r", b"").replace(b"\\t", b"")
        if b"%" not in data:
            break
        data = data.replace(b"%3d", b"\1").replace(b"%3D", b"\1")
        # White space is removed first, because the decoder removes a line break after "=". It reads "==" as
        # "=", so runs are collapsed first.
        quoted = _RUN.sub(b"=", data.translate(_TO_QUOTED, _DROPPED))
        before, data = data, binascii.a2b_qp(quoted).translate(_FROM_QUOTED)
        if len(data) == len(before):
            break
    return data


def views(data: bytes) -> Views:
    """Return the views of a decoded text."""
    folded = data.translate(_FOLD, _DROPPED)
    digits = folded.replace(b"0x", b"") if b"0x" in folded else folded
    return Views(folded, folded.translate(_CODE), digits.translate(_MERGE_HEX_CASE, _SEPARATORS))


def hex_positions(folded: bytes) -> list[int]:
    """Return the position in the folded view of each byte of the `digits` view."""
    return [match.start() for match in _DIGIT.finditer(folded) if match[1]]


def decode_with_positions(data: bytes) -> tuple[bytes, list[int], list[int]]:
    """Decode as `decoded` does. Return the result, and the start and end of each of its bytes in `data`."""
    index = [at for at, byte in enumerate(data) if byte not in _GAPS]
    plain, starts, ends = bytearray(), [], []
    for token in _TOKEN.finditer(data.translate(None, _GAPS)):
        if digits := token[1] or token[2]:
            byte = int(digits, 16)
        elif token[3]:
            byte = int(token[3]) & 0xFF
        elif token[4]:
            byte = token[4][0]
        else:
            continue
        if byte not in _DROPPED:
            plain.append(byte)
            starts.append(index[token.start()])
            ends.append(index[token.end() - 1] + 1)
    return bytes(plain), starts, ends
