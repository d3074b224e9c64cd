"""Reads secrets and other texts as people make them, by one rule for every source.

    white space and byte order marks at the ends   removed; `echo` and editors write a final newline
    a control character inside a secret            refused
    an invisible character at an end of a secret   refused; it comes from copying
    quotes around a secret                         kept, because a password may have them; they are reported
    ASCII as UTF-16, with a byte order mark        decoded; PowerShell writes it

No message contains a secret.
"""

from __future__ import annotations

import unicodedata
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from dataclasses import dataclass, field

from pydantic import SecretStr

UTF16_MARKS = (BOM_UTF16_LE, BOM_UTF16_BE)
_BYTE_ORDER_MARK = "\ufeff"
_BLANK = "".join(filter(str.isspace, map(chr, range(0x3001)))) + _BYTE_ORDER_MARK
_LINE_ENDS = {"\n": "a final newline", "\r\n": "a final newline", "\r": "a final carriage return"}
_NAMES = {"\n": "a line break", "\r": "a line break", "\t": "a tab"}
_REFUSED = {"Cc", "Cs", "Zl", "Zp"}  # Unicode categories: control characters, surrogates, line separators
_INVISIBLE = "Cf"  # format characters, such as the zero-width space
_QUOTES = ("'", '"')


class InvalidSecret(ValueError):
    """A secret that is certainly not what its author meant. The text names the source, if it is known."""


@dataclass(frozen=True, slots=True)
class SecretText:
    """A secret. `notes` says what was removed from it, and what else is unusual."""

    text: str = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def quoted(self) -> bool:
        """Whether the secret is in quotes, which often come from a file of environment variables."""
        return len(self.text) > 1 and self.text[0] == self.text[-1] and self.text.startswith(_QUOTES)

    def describe(self, name: str) -> str:
        """Return a line about the secret that does not show it, such as "secret key: 30 characters"."""
        plural = "" if len(self.text) == 1 else "s"
        notes = (*self.notes, *(("the quotes around it are part of it",) if self.quoted else ()))
        return "; ".join([f"{name}: {len(self.text)} character{plural}", *notes])


class NotedSecret(SecretStr):
    """A secret of the settings from which something was removed."""

    notes: tuple[str, ...] = ()


def clean_text(text: str) -> str:
    """Return a text without white space and byte order marks at its ends."""
    return text.strip(_BLANK)


def clean_secret(text: str, *, source: str = "") -> SecretText:
    """Return the secret in a text.

    Raises:
        InvalidSecret: It has a control character, or an invisible character at an end.
    """
    begin = text[: len(text) - len(text.lstrip(_BLANK))]
    secret = text[len(begin) :].rstrip(_BLANK)
    end = text[len(begin) + len(secret) :]
    prefix = f"{source}: " if source else ""
    for character in secret:
        if unicodedata.category(character) in _REFUSED:
            raise InvalidSecret(f"{prefix}contains {_name(character)}")
    for character, place in ((secret[:1], "begins"), (secret[-1:], "ends")):
        if character and unicodedata.category(character) == _INVISIBLE:
            raise InvalidSecret(f"{prefix}{place} with an invisible character (U+{ord(character):04X})")
    return SecretText(secret, tuple(_notes(begin, end)))


def decode_secret(content: bytes, *, source: str) -> SecretText:
    """Return the secret in bytes: UTF-8, or ASCII characters in UTF-16 with a byte order mark.

    Raises:
        InvalidSecret: The bytes are neither, or `clean_secret` refuses the text.
    """
    utf16 = content.startswith(UTF16_MARKS)
    try:
        text = content.decode("utf-16" if utf16 else "utf-8")
        if utf16:  # two bytes of any other content would be a character, too
            text.removeprefix(_BYTE_ORDER_MARK).encode("ascii")
    except UnicodeError:  # its text quotes the content
        raise InvalidSecret(f"{source}: is not UTF-8") from None
    secret = clean_secret(text, source=source)
    return SecretText(secret.text, ("decoded from UTF-16", *secret.notes)) if utf16 else secret


def setting_text(secret: SecretStr) -> SecretText:
    """Return a secret of the settings, which are clean."""
    return SecretText(secret.get_secret_value(), secret.notes if isinstance(secret, NotedSecret) else ())


def _name(character: str) -> str:
    return _NAMES.get(character, f"a control character (U+{ord(character):04X})")


def _notes(begin: str, end: str) -> Iterator[str]:
    if _BYTE_ORDER_MARK in begin + end:
        yield "a byte order mark was removed"
    begin, end = begin.replace(_BYTE_ORDER_MARK, ""), end.replace(_BYTE_ORDER_MARK, "")
    if begin:
        yield "white space at its beginning was removed"
    if end in _LINE_ENDS:
        yield f"{_LINE_ENDS[end]} was removed"
    elif end:
        newline = " and a newline" if "\n" in end else ""
        yield f"white space{newline} at its end {'were' if newline else 'was'} removed"
