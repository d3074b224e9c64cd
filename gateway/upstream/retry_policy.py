"""The retry policy: which failed calls of a query are repeated, how often, and after what delay.

A call is retried if its error is `transient` (see `gateway/domain/errors.py`), `upstream.retries` and the
retry budget allow it, and the deadline leaves time for a response. The delay is exponential with full
jitter, and at least the `retry_after` of the error.

Two other repeats are not retries and do not use the budget. `UpstreamClient` repeats a call once after a
clock correction, and `CredentialRotation` repeats it with another key pair.
"""

from __future__ import annotations

import random

from gateway.domain.errors import UpstreamError

_BACKOFF_SECONDS = 0.1  # upper bound of the first delay; each retry doubles it
# The retry budget: each query adds 0.2 retries, up to a reserve of 10. Retries are then at most 20 % of
# recent queries, and a failing upstream does not receive a multiple of the usual load.
_RETRIES_PER_QUERY = 0.2
_RETRY_RESERVE = 10.0


class RetryPolicy:
    """Decides about retries for all queries of one upstream; they share one retry budget."""

    def __init__(self, max_retries: int) -> None:
        self._max_retries = max_retries
        self._budget = _RETRY_RESERVE

    def on_query(self) -> None:
        """Add the share of a new query to the retry budget."""
        self._budget = min(self._budget + _RETRIES_PER_QUERY, _RETRY_RESERVE)

    def delay(self, error: UpstreamError, *, retries: int, seconds_left: float) -> float | None:
        """Return the delay before the next call in seconds, or None if the query must fail with `error`.

        A returned delay takes one retry out of the budget.

        Args:
            error: How the last call failed.
            retries: The number of retries that the query has made.
            seconds_left: The longest delay that leaves time for a response before the deadline.
        """
        if not error.transient or retries >= self._max_retries or self._budget < 1:
            return None
        jittered = random.uniform(0, _BACKOFF_SECONDS * 2**retries)  # noqa: S311  # spreads load, hides nothing
        delay = max(jittered, error.retry_after or 0.0)
        if delay >= seconds_left:
            return None
        self._budget -= 1
        return delay
