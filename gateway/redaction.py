"""Keeps secrets out of whatever leaves the process: log lines, problems, envelopes.

One Redactor is made at the start and told every secret as it is loaded. It also knows what
the vendor's API gateway is wont to leak: its refusal of a signature quotes the whole string
to sign, and with it the access key.
"""

from __future__ import annotations

import re

MASK = "[redacted]"

_LEAKS = re.compile(
    r"""(?isx)
      (?P<head> string[-_\s]{0,2}to[-_\s]{0,2}sign \b [^:`]{0,3} : ) .*   # to the end: it may hold anything
    | (?P<name> x-ca-(?:signature|key|nonce) ["']? \s*
        (?: [:=] \s* (?:b?["'])? | , \s* b?["'] ) ) [^\s"',;\#]+   # in a line, a dict, pairs; bytes or not
    | (?<![A-Za-z0-9+/]) [A-Za-z0-9+/]{43} = (?![A-Za-z0-9+/=])             # base64 of 32 bytes: a signature
    """
)

# A shorter "secret" would stand in ordinary words and numbers, and blank them out.
_SHORTEST = 6


class Redactor:
    """Replaces every known secret, and every known shape of one, with a mask."""

    def __init__(self) -> None:
        self._secrets: set[str] = set()
        self._known: re.Pattern[str] | None = None

    def hide(self, *secrets: str) -> None:
        """Hide these strings from now on; strings under 6 characters cannot be told from text."""
        self._secrets.update(secret for secret in secrets if len(secret) >= _SHORTEST)
        # Longest first: one secret may begin with another.
        alternatives = sorted(map(re.escape, self._secrets), key=len, reverse=True)
        self._known = re.compile("|".join(alternatives)) if alternatives else None

    def __call__(self, text: str) -> str:
        """Return the text without secrets."""
        if self._known is not None:
            text = self._known.sub(MASK, text)
        return _LEAKS.sub(lambda m: (m["head"] or m["name"] or "") + MASK, text)
