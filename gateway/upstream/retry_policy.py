"""The retry policy: which failed calls of a query are retried, how often, and after what delay.

A call is retried if all of these are true:

- the response is still needed
- its error is `transient` (see `gateway/domain/errors.py`)
- the query has made fewer retries than `upstream.retries`
- the retry budget, which all queries share, is not used up
- the deadline leaves time for a response

The delay grows exponentially, with full jitter, and is at least the `retry_after` of the error.

Calls are repeated in five other cases, which are not retries and do not use the budget:

- after a clock correction, once (`UpstreamClient`)
- on a new connection, once, if the response may be for another task (`connection_reuse.py`)
- with another key pair, if the upstream refuses one (`credential_rotation.py`)
- a hedged call, next to a call without a response (`hedging.py`)
- a call without a response, after a hedged call has succeeded (`hedging.py`)

The metric `upstream_retries_total` counts retries and the first, the second and the fourth case.
"""

from __future__ import annotations

import random

from gateway.domain.errors import UnattributedResponse, UpstreamError

_BACKOFF_SECONDS = 0.1  # upper bound of the first delay; doubled for each further retry
# The retry budget: each query adds 0.2 retries, up to 10 in total. When the budget is used up, there is at
# most one retry for five queries. So a failing upstream does not receive a multiple of the usual load.
_BUDGET_PER_QUERY = 0.2
_MAX_BUDGET = 10.0


class RetryPolicy:
    """Decides about the retries of all queries, which share one retry budget."""

    def __init__(self, max_retries: int) -> None:
        self._max_retries = max_retries
        self._budget = _MAX_BUDGET

    def on_query(self) -> None:
        """Add 0.2 retries to the budget; call it once for each new query."""
        self._budget = min(self._budget + _BUDGET_PER_QUERY, _MAX_BUDGET)

    def take_retry(self, error: UpstreamError, *, retries: int, max_delay_seconds: float) -> float | None:
        """Take one retry out of the budget, and return the delay before it in seconds.

        Return None, and take no retry, if the query must fail with `error`. A repeat on a new connection
        takes no retry, and has no delay.

        Args:
            error: The error of the last call.
            retries: The number of retries that the query has made.
            max_delay_seconds: The longest delay that leaves time for a response before the deadline.
        """
        if isinstance(error, UnattributedResponse):
            return 0.0 if max_delay_seconds > 0 else None
        if not error.transient or retries >= self._max_retries or self._budget < 1:
            return None
        jittered = random.uniform(0, _BACKOFF_SECONDS * 2**retries)  # noqa: S311  # not security-relevant
        delay = max(jittered, error.retry_after or 0.0)
        if delay >= max_delay_seconds:
            return None
        self._budget -= 1
        return delay
