"""Values of response headers: HTTP dates and Retry-After."""

from __future__ import annotations

from datetime import UTC
from email.utils import parsedate_to_datetime
from functools import lru_cache

_MAX_DATE_LENGTH = 64  # characters; the longest valid form has 33
_MAX_RETRY_AFTER_SECONDS = 3600.0  # a longer time counts as this


def parse_retry_after(value: str, now: float) -> float | None:
    """Return the seconds of a Retry-After header (RFC 9110, 10.2.3), which may be a date after `now`."""
    if value.isascii() and value.isdigit():
        return min(float(value), _MAX_RETRY_AFTER_SECONDS)
    then = parse_http_date(value)
    return None if then is None else min(max(then - now, 0.0), _MAX_RETRY_AFTER_SECONDS)


@lru_cache(maxsize=2)  # all responses within a second have the same date
def parse_http_date(date: str) -> float | None:
    """Return an HTTP date (RFC 9110, 5.6.7) as Unix time, or None if it is not valid."""
    if len(date) > _MAX_DATE_LENGTH or not date.isascii() or "_" in date:  # `int` accepts digits with "_"
        return None
    try:
        moment = parsedate_to_datetime(date)
        # HTTP dates are in GMT. Python would take a date without a time zone as local time.
        return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError, TypeError, IndexError):  # the numbers do not form a date
        return None
