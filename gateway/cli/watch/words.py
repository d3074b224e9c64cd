"""The texts of `sd-gateway watch` for times and states.

`api/web/words.js` has those of the page. A test compares the texts that both need. The terminal shows the
time left as 1:07, because columns are few, and because such numbers keep their width.
"""

from __future__ import annotations

import math

from gateway.api.problems import PROBLEMS
from gateway.domain.errors import KeyPairMissing

ANY_MOMENT = "any moment now"
NOT_FOUND = "not found"
UNKNOWN_ID = "the vendor does not know this ID"

_NO_CREDENTIALS = PROBLEMS[KeyPairMissing][1]
_MINUTE, _HOUR = 60, 3600
_SECONDS_SHOWN_BELOW = 300
_DAYS_SHOWN_FROM_HOURS = 48
# Of several problems with one code, the first one has the title: that of its base class.
_TITLES = {kind.code: title for kind, (_, title) in reversed(list(PROBLEMS.items()))}


def clock(seconds: float) -> str:
    """Return a duration as 0:07, 1:07 or 1:02:07, rounded down."""
    whole = max(int(seconds), 0)
    minutes = f"{whole % _HOUR // _MINUTE}:{whole % _MINUTE:02}"
    return minutes if whole < _HOUR else f"{whole // _HOUR}:{minutes:0>5}"


def time_left(seconds: float) -> str:
    """Return an estimate of the time left."""
    return ANY_MOMENT if seconds < 1 else f"{clock(seconds)} left"


def ago(seconds: float) -> str:
    """Return an age, as the page does."""
    return "just now" if seconds < 1 else f"{_duration(int(seconds))} ago"


def problem_title(code: str) -> str:
    """Return the title of a problem of the gateway. A newer gateway may have other codes."""
    return _TITLES.get(code, code)


def trouble_text(trouble: str) -> str:
    """Return a sentence for an entry of `reasons` or `degraded` in `/readyz`, as the page does."""
    if trouble == "no credentials":
        return _NO_CREDENTIALS
    if trouble == "draining":
        return "The gateway is shutting down"
    part, _, rest = trouble.partition(": ")
    if part == "upstream":
        code, separator, cause = rest.partition(": ")
        return f"{problem_title(code)}{separator}{cause}"
    if part == "store":
        return f"Tasks are updated without the shared store: {rest}"
    return trouble[:1].upper() + trouble[1:]


def _duration(whole: int) -> str:
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _SECONDS_SHOWN_BELOW:
        rest = f" {whole % _MINUTE} s" if whole % _MINUTE else ""
        return f"{whole // _MINUTE} min{rest}"
    minutes = _round(whole / _MINUTE)
    if minutes < _MINUTE:
        return f"{minutes} min"
    hours, rest_minutes = divmod(minutes, _MINUTE)
    if hours < _DAYS_SHOWN_FROM_HOURS:
        return f"{hours} h {rest_minutes} min" if rest_minutes else f"{hours} h"
    return f"{_round(hours / 24)} days"


def _round(number: float) -> int:
    return math.floor(number + 0.5)  # as JavaScript does; Python's `round` prefers even numbers
