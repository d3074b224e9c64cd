"""The forms that a secret may have in a text, and the views of a text in which each is found.

    text -> folded: escapes decoded, white space and all that is not ASCII removed, lower case
            coded:  the same with the digits of base64, for its two alphabets
            digits: the same without separators, for hexadecimal

A form is looked for in one view. The views are made by a few passes of C code. Only `mapped` reads a text
byte by byte: it tells where in the text each byte of a view stands.
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

SHORTEST = 6  # characters; a shorter "secret" would stand in ordinary words and numbers
_SHORTEST_CODED = 8  # digits of base64 for 6 bytes; hexadecimal takes 12
_SHORTEST_DIGITS = 12
MOST_ENTITIES = 10_000  # of HTML; decoding more of them takes too long
_LAYERS = 3  # of escapes: a percent sign may be percent-encoded itself

# A NUL stays: no form goes across it.
_GAPS = bytes(byte for byte in range(2, 256) if byte <= ord(" ") or byte > ord("~"))
_DROPPED = _GAPS + b"\\"
# "=" is \1 in every view: so a decoder of quoted-printable text, the one in C that leaves alone what is no
# escape, can decode percent signs.
_FOLD = bytes.maketrans(b"=ABCDEFGHIJKLMNOPQRSTUVWXYZ", b"\1abcdefghijklmnopqrstuvwxyz")
_CODE = bytes.maketrans(b"-_", b"+/")
_TO_QUOTED = bytes.maketrans(b"%=", b"=\1")
_FROM_QUOTED = bytes.maketrans(b"=", b"%")
_RUN = re.compile(b"={2,}")
_SEPARATORS = b":-,._"
# A letter's upper and lower case differ in the first hexadecimal digit: 4 and 6, 5 and 7 are one.
_DIGITS = bytes.maketrans(b"67", b"45")
_DIGIT = re.compile(rb"(?s)0x|[:,._-]|(.)")

# A wide space in JSON becomes bytes beyond ASCII, which are dropped.
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

FOLDED, CODED, DIGITS = range(3)


class Views(NamedTuple):
    """A text as it is searched."""

    folded: bytes
    coded: bytes
    digits: bytes


class Needle(NamedTuple):
    """A form of a secret, the number of its view, and the shortest beginning that a cut may leave.

    `before` and `after` tell whether digits of base64 on either side have bits of it, too.
    """

    view: int
    form: bytes
    head: bytes
    before: bool = False
    after: bool = False


class Forms(NamedTuple):
    """What to look for: literals in a text in lower case, needles in its views. Heads begin needles.

    `spaced` are the literals that are mostly white space: no view has them.
    """

    literals: tuple[bytes, ...] = ()
    spaced: tuple[bytes, ...] = ()
    needles: tuple[Needle, ...] = ()
    heads: tuple[tuple[int, bytes], ...] = ()

    def plus(self, secrets: Iterable[str]) -> Forms:
        """Return these forms and those of more secrets."""
        secrets = [secret for secret in secrets if len(secret) >= SHORTEST]
        literals = dict.fromkeys([*self.literals, *(form for each in secrets for form in _literals(each))])
        spaced = [literal for literal in literals if len(literal.translate(None, _DROPPED)) < SHORTEST]
        needles = dict.fromkeys([*self.needles, *(form for each in secrets for form in _needles(each))])
        heads = dict.fromkeys((needle.view, needle.head) for needle in needles)
        return Forms(tuple(literals), tuple(spaced), tuple(needles), tuple(heads))

    def may_be_in(self, data: bytes, more_heads: Iterable[tuple[int, bytes]] = ()) -> bool:
        """Tell whether the beginning of a form is in the data, or another head; False is sure."""
        return self._any_in(data, (*self.heads, *more_heads))

    def are_in(self, data: bytes) -> bool:
        """Tell whether a form is in the data."""
        return self._any_in(data, [(needle.view, needle.form) for needle in self.needles])

    def _any_in(self, data: bytes, wanted: Collection[tuple[int, bytes]]) -> bool:
        if not wanted:
            return False
        # Where nothing is to be decoded the folded view has every other literal.
        plain = not (b"%" in data or b"\\" in data or b"&" in data) and data.isascii()
        if literals := self.spaced if plain else self.literals:
            low = data.lower()
            if any(literal in low for literal in literals):
                return True
        if not plain:
            if data.count(b"&#") > MOST_ENTITIES:
                return True
            data = decoded(data)
        seen = views(data)
        for view, form in wanted:  # noqa: SIM110  # `any` of a generator takes half as long again
            if form in seen[view]:
                return True
        return False


def heads_of_code(code: str) -> tuple[tuple[int, bytes], ...]:
    """Return the heads of the forms of base64 text, in 1 us: those of any secret take 40."""
    raw = code.encode()[:9]
    return (
        (FOLDED, raw[:SHORTEST].translate(_FOLD)),
        (DIGITS, raw[:SHORTEST].hex().encode().translate(_DIGITS)),
        (CODED, binascii.b2a_base64(raw)[:_SHORTEST_CODED].lower()),
        (CODED, binascii.b2a_base64(b"\0" + raw)[2 : 2 + _SHORTEST_CODED].lower()),
        (CODED, binascii.b2a_base64(b"\0\0" + raw)[3 : 3 + _SHORTEST_CODED].lower()),
    )


def utf8(text: str) -> bytes:
    """Return the text's bytes, halves of surrogate pairs included."""
    return text.encode("utf-8", "surrogatepass")


def _literals(secret: str) -> Iterator[bytes]:
    for form in (secret, secret.lower(), secret.upper()):
        yield utf8(form).lower()
        if not form.isascii():  # what is not ASCII is in no view
            yield quote(utf8(form), safe="").lower().encode()
            yield json.dumps(form)[1:-1].lower().encode()


def _needles(secret: str) -> Iterator[Needle]:
    raw = utf8(secret)
    for form in (*_literals(secret), utf8(html.escape(secret)), json.dumps(secret)[1:-1].encode()):
        folded = views(decoded(form)).folded
        if len(folded) >= SHORTEST:
            yield Needle(FOLDED, folded, folded[:SHORTEST])
    digits = raw.hex().encode().translate(_DIGITS)
    yield Needle(DIGITS, digits, digits[:_SHORTEST_DIGITS])
    # Of base64, the digits that depend on the secret alone: it may begin at each of three places of a group.
    for before in range(3):
        coded = base64.b64encode(b"\0" * before + raw)
        first, end = -(-before * 8 // 6), (before + len(raw)) * 8 // 6
        core = coded[first:end].lower()
        if len(core) >= _SHORTEST_CODED - 1:
            head = core[:_SHORTEST_CODED]
            yield Needle(CODED, core, head, before > 0, (before + len(raw)) % 3 > 0)


def decoded(data: bytes) -> bytes:
    """Decode percent signs, JSON's and HTML's escapes; what is none stays. White space may be lost."""
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
        # Without white space: an "=" before a line's end would take it away. "==" is an "=" to the decoder.
        quoted = _RUN.sub(b"=", data.translate(_TO_QUOTED, _DROPPED))
        before, data = data, binascii.a2b_qp(quoted).translate(_FROM_QUOTED)
        if len(data) == len(before):
            break
    return data


def views(data: bytes) -> Views:
    """Return the views of a text that is decoded."""
    folded = data.translate(_FOLD, _DROPPED)
    digits = folded.replace(b"0x", b"") if b"0x" in folded else folded
    return Views(folded, folded.translate(_CODE), digits.translate(_DIGITS, _SEPARATORS))


def kept_digits(folded: bytes) -> list[int]:
    """Return where in the folded view each byte of the view for hexadecimal stands."""
    return [match.start() for match in _DIGIT.finditer(folded) if match[1]]


def mapped(data: bytes) -> tuple[bytes, list[int], list[int]]:
    """Decode as `decoded` does; return what is left, and where each byte of it begins and ends."""
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
