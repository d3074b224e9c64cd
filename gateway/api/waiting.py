"""The wait that a long poll asks for: `?wait=N`, or the preference `wait=N` (RFC 7240)."""

from __future__ import annotations

import re

from starlette.types import Scope

from gateway.api.requests import Headers, header
from gateway.domain.errors import InvalidParameter

# RFC 7240, 4.3: `wait=10`, perhaps among other preferences.
_PREFER_WAIT = re.compile(
    r"(?:^|,)[ \t]*wait[ \t]*=[ \t]*\"?([0-9]{1,9})\"?[ \t]*(?:[;,]|\Z)", re.IGNORECASE | re.ASCII
)
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


def requested_wait(
    scope: Scope, parameters: dict[str, list[str]], *, longest: float
) -> tuple[float, Headers]:
    """Return the requested wait in seconds, 0 for none, and the response headers that confirm it.

    Raises: InvalidParameter.
    """
    if "wait" in parameters:
        value = parameters["wait"][0]
        if not _SECONDS.fullmatch(value):
            raise InvalidParameter("query parameter 'wait' must be a number of seconds, 0 or more")
        return min(float(value), longest), []
    prefer = header(scope["headers"], b"prefer")
    match = _PREFER_WAIT.search(prefer) if prefer is not None else None
    if match is None:
        return 0.0, []  # an unknown preference is ignored (RFC 7240, 2)
    wait = min(float(match[1]), longest)
    return wait, [(b"preference-applied", b"wait=%d" % wait), (b"vary", b"Prefer")]
