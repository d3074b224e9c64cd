"""Keeps secrets out of everything that leaves the process: log lines, problems, envelopes.

One Redactor is made at the start and receives every secret as it is loaded. It also knows what
the vendor's API gateway leaks: its refusal of a signature quotes the whole string
to sign, and with it the access key.

    text -> bytes -> folded: escapes decoded, white space removed, lower case  | does the beginning
                     coded:  the same in its own case, for base64              | of a secret's form
                     digits: folded without separators, for hexadecimal        | occur in its view?
                     shapes: string to sign, X-Ca-* headers, signatures        |
            no -> the text as it is           yes -> find the places, put a mask there

The views are made by a few passes of C code: 10 ms for 1 MiB, 6 us for a log line, with two pairs to hide.
Only a text that seems to hold a secret is read byte by byte.
"""

from __future__ import annotations

import base64
import binascii
import html
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple, Self

MASK = "[redacted]"

# A shorter "secret" would stand in ordinary words and numbers, and blank them out.
_SHORTEST = 6
_SHORTEST_CODED = 8  # digits of base64 for 6 bytes; hexadecimal takes 12
_SHORTEST_DIGITS = 12
_EXACT_BYTES = 16_384  # a larger text with an encoded secret is masked whole
_MOST_ENTITIES = 10_000  # of HTML; a text with more of them is masked whole: decoding takes too long
_MOST_PLACES = 1000  # a text with more of them is masked whole
_LAYERS = 3  # of escapes: a percent sign may be percent-encoded itself

_SPACE = b" \t\n\r\v\f"
_WIDE_SPACES = tuple(char.encode() for char in "\x85\xa0\u200b\u2028\u2029\u3000\ufeff")
_DROPPED = _SPACE + b"\\"
# "=" is \1 in every view: so a decoder of quoted-printable text, the one in C that leaves alone what is no
# escape, can decode percent signs.
_FOLD = bytes.maketrans(b"=ABCDEFGHIJKLMNOPQRSTUVWXYZ", b"\1abcdefghijklmnopqrstuvwxyz")
_CODE = bytes.maketrans(b"=-_", b"\1+/")
_TO_QUOTED = bytes.maketrans(b"%=", b"=\1")
_FROM_QUOTED = bytes.maketrans(b"=", b"%")
_RUN = re.compile(b"={2,}")
_SEPARATORS = b":-,"
# A letter's upper and lower case differ in the first hexadecimal digit: 4 and 6, 5 and 7 are one.
_DIGITS = bytes.maketrans(b"67", b"45")

_ENTITY = re.compile(rb"&#(?:[xX]0{0,6}([0-9A-Fa-f]{2})|0{0,6}([0-9]{2,3}));")
_TOKEN = re.compile(
    rb"""(?xs)
      (?: % (?:25)* | \\ (?: u00 | x ) ) ([0-9A-Fa-f]{2})
    | &\# (?: [xX]0{0,6} ([0-9A-Fa-f]{2}) | 0{0,6} ([0-9]{2,3}) ) ;
    | \\ [nrt] | \xc2[\x85\xa0] | \xe2\x80[\x8b\xa8\xa9] | \xe3\x80\x80 | \xef\xbb\xbf
    | (.)
    """
)

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

_AFTER_CUT = b"\1.\"'`)]}>,;:\xe2\x80\xa6"  # what may follow a text that was cut off: quotes, an ellipsis

_FOLDED_VIEW, _CODED_VIEW, _DIGITS_VIEW = range(3)

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


class _Views(NamedTuple):
    """A text as it is searched."""

    folded: bytes
    coded: bytes
    digits: bytes


class _Needle(NamedTuple):
    """A form of a secret, the number of its view, and the shortest beginning that a cut may leave.

    `before` and `after` tell whether digits of base64 on either side have bits of it, too.
    """

    view: int
    form: bytes
    head: bytes
    before: bool = False
    after: bool = False


class Redactor:
    """Replaces every known secret, in every common encoding, and every known shape of one, with a mask."""

    def __init__(self) -> None:
        self._secrets: set[str] = set()
        self._literals: tuple[bytes, ...] = ()
        self._needles: tuple[_Needle, ...] = ()
        self._heads: tuple[tuple[int, bytes], ...] = ()

    def hide(self, *secrets: str) -> None:
        """Hide these strings from now on; strings under 6 characters cannot be told from text."""
        new = {secret for secret in secrets if len(secret) >= _SHORTEST} - self._secrets
        if not new:
            return
        self._secrets |= new
        # Whole tuples: another thread may be logging.
        self._literals = tuple(dict.fromkeys(form for each in self._secrets for form in _literals(each)))
        self._needles = tuple(dict.fromkeys(form for each in self._secrets for form in _needles(each)))
        self._heads = tuple(dict.fromkeys((needle.view, needle.head) for needle in self._needles))

    def __call__(self, text: str) -> str:
        """Return the text without secrets; of one that its end cuts off, 5 characters may be left."""
        if len(text) < _SHORTEST:
            return text
        data = _bytes(text)
        if not self._suspects(data):
            return text
        places = list(islice(self._places(data), _MOST_PLACES))
        cleaned = _masked(data, places)
        # In a large text, and where an escape is ambiguous, a secret may be left whose place is not known.
        return MASK if len(places) == _MOST_PLACES or self._holds(_bytes(cleaned)) else cleaned

    def suspects(self, text: str) -> bool:
        """Tell whether a text may hold a secret, or the beginning of one; False is sure."""
        return self._suspects(_bytes(text))

    def _suspects(self, data: bytes) -> bool:
        low = data.lower()
        return (
            any(literal in low for literal in self._literals)
            or b"x-ca-" in low
            or (b"string" in low and _TO_SIGN.search(low) is not None)
            or _has_signature(data)
            or self._sees(data, self._heads)
        )

    def _holds(self, data: bytes) -> bool:
        low = data.lower()
        if any(literal in low for literal in self._literals):
            return True
        return self._sees(data, ((needle.view, needle.form) for needle in self._needles))

    def _sees(self, data: bytes, wanted: Iterable[tuple[int, bytes]]) -> bool:
        if not self._needles:
            return False
        if b"&" in data and data.count(b"&#") > _MOST_ENTITIES:
            return True
        views = _views(_decoded(data))
        return any(form in views[view] for view, form in wanted)

    def _places(self, data: bytes) -> Iterator[Span]:
        """Find what is to be masked."""
        low = data.lower()
        told = _TO_SIGN.search(low)
        if told is not None:
            yield told.end(), len(data)
        yield from (match.span(1) for match in _NAMED.finditer(low))
        if _has_signature(data):
            yield from (match.span() for match in _SIGNATURE.finditer(data))
        for literal in self._literals:
            yield from _occurrences(literal, low)
        if not self._needles:
            return
        if len(data) <= _EXACT_BYTES:
            yield from self._decoded_places(data, 0)
        else:  # the text's end alone: whether the rest holds an encoded secret is seen when this is done
            offset = len(data) - _EXACT_BYTES
            yield from self._decoded_places(data[offset:], offset)

    def _decoded_places(self, data: bytes, offset: int) -> Iterator[Span]:
        plain, starts, ends = _mapped(data)
        views = _views(plain)
        kept = [index for index, byte in enumerate(views.folded) if byte not in _SEPARATORS]
        for view, form, head, before, after in self._needles:
            seen = views[view]
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
                at, last = (kept[first], kept[end - 1]) if view == _DIGITS_VIEW else (first, end - 1)
                at -= before and at > 0
                last += after and end - first == len(form) and last + 1 < len(plain)
                yield offset + starts[at], offset + ends[last]


def _literals(secret: str) -> Iterator[bytes]:
    for form in (secret, secret.lower(), secret.upper()):
        yield _bytes(form).lower()


def _needles(secret: str) -> Iterator[_Needle]:
    raw = _bytes(secret)
    for form in (*_literals(secret), html.escape(secret).encode(*_UTF8), json.dumps(secret)[1:-1].encode()):
        folded = _views(_decoded(form)).folded
        if len(folded) >= _SHORTEST:
            yield _Needle(_FOLDED_VIEW, folded, folded[:_SHORTEST])
    digits = raw.hex().encode().translate(_DIGITS)
    yield _Needle(_DIGITS_VIEW, digits, digits[:_SHORTEST_DIGITS])
    # Of base64, the digits that depend on the secret alone: it may begin at each of three places of a group.
    for before in range(3):
        coded = base64.b64encode(b"\0" * before + raw)
        first, end = -(-before * 8 // 6), (before + len(raw)) * 8 // 6
        core = coded[first:end].translate(_CODE)
        if len(core) >= _SHORTEST_CODED - 1:
            head = core[:_SHORTEST_CODED]
            yield _Needle(_CODED_VIEW, core, head, before > 0, (before + len(raw)) % 3 > 0)


def _decoded(data: bytes) -> bytes:
    """Decode percent signs, JSON's and HTML's escapes; what is none stays. White space may be lost."""
    if not data.isascii():
        for space in _WIDE_SPACES:
            data = data.replace(space, b"")
    if b"&" in data:
        data = _ENTITY.sub(lambda m: b"%" + (m[1] or b"%02x" % (int(m[2]) & 0xFF)), data)
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


def _views(data: bytes) -> _Views:
    folded = data.translate(_FOLD, _DROPPED)
    return _Views(folded, data.translate(_CODE, _DROPPED), folded.translate(_DIGITS, _SEPARATORS))


def _mapped(data: bytes) -> tuple[bytes, list[int], list[int]]:
    """Decode as `_decoded` does; return what is left, and where each byte of it begins and ends."""
    index = [at for at, byte in enumerate(data) if byte not in _SPACE]
    plain, starts, ends = bytearray(), [], []
    for token in _TOKEN.finditer(data.translate(None, _SPACE)):
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
    return b"".join(pieces).decode(*_UTF8)


_UTF8 = ("utf-8", "surrogatepass")


def _bytes(text: str) -> bytes:
    return text.encode(*_UTF8)
