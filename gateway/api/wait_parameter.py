"""The wait that a long poll asks for: `?wait=N`, or the preference `wait=N` (RFC 7240)."""

from __future__ import annotations

import re

from starlette.types import Scope

from gateway.api.requests import Headers, header
from gateway.domain.errors import InvalidParameter

_SECONDS = re.compile(r"[0-9]+")
_MAX_DIGITS = 9  # a longer number is above each limit of the settings, and is not converted
_MAX_PREFERENCES = 32  # further ones are ignored
_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]++"  # RFC 9110, 5.6.2
_WORD = rf'(?:{_NAME}|"(?:[^"\\]|\\.)*+")'
# RFC 7240, 2: a name, perhaps with a value, and its parameters. A comma in a quoted string separates nothing.
_PREFERENCE = re.compile(
    rf"""
    [ \t,]*+ ({_NAME}) (?: [ \t]*+ = [ \t]*+ ({_WORD})? )?+
    (?: [ \t]*+ ; [ \t]*+ (?: {_NAME} (?: [ \t]*+ = [ \t]*+ {_WORD}? )?+ )?+ )*+
    [ \t]*+ (?: , | \Z )
    """,
    re.VERBOSE | re.DOTALL,
)


def requested_wait(
    scope: Scope, parameters: dict[str, list[str]], *, longest: float
) -> tuple[float, Headers]:
    """Return the requested wait in seconds, at most `longest`, and the response headers that confirm it.

    The wait is 0 if none is requested. Raises: InvalidParameter.
    """
    if "wait" in parameters:
        digits = parameters["wait"][0]
        if not _SECONDS.fullmatch(digits):
            raise InvalidParameter("query parameter 'wait' must be a whole number of seconds, 0 or more")
        return _bounded(digits, longest), []
    prefer = header(scope["headers"], b"prefer")
    digits = _preferred_wait(prefer) if prefer is not None else ""
    if not digits:
        return 0.0, []  # an unknown preference is ignored (RFC 7240, 2)
    wait = _bounded(digits, longest)
    return wait, [(b"preference-applied", b"wait=%d" % wait), (b"vary", b"Prefer")]


def _preferred_wait(prefer: str) -> str:
    """Return the digits of the preference `wait`, or "". The first `wait` counts, as RFC 7240 requires."""
    position = 0
    for _ in range(_MAX_PREFERENCES):
        match = _PREFERENCE.match(prefer, position)
        if match is None:
            break  # the end, or malformed
        position = match.end()
        if match[1].lower() == "wait":
            digits = (match[2] or "").strip('"')
            return digits if _SECONDS.fullmatch(digits) else ""
    return ""


def _bounded(digits: str, longest: float) -> float:
    significant = digits.lstrip("0")
    return longest if len(significant) > _MAX_DIGITS else min(float(significant or 0), longest)
