"""The adaptive rate limit: learns from throttling responses how many calls per second the upstream accepts.

    throttled   -> ceiling = number of calls accepted in the last second; the limit drops to 85 % of it
    slow start  -> the ceiling is only a guess: the limit doubles every two seconds
    recovering  -> the limit rises quickly at first, slowly near the ceiling, faster beyond it
    no throttling for a minute, and no query queued -> the limit is removed (`remove_if_unthrottled`)

The decrease is multiplicative, slow start doubles as in TCP, and recovery follows CUBIC (RFC 9438, 4.2), with
calls per second instead of a window: limit = ceiling x (0.95 + 0.1 x (t / 15 s - 1)^3). The limit stays just
below the ceiling most of the time, so throttling is rare. If the upstream raises its limit, the gateway
finds this within two minutes. A constant increase could achieve only one of these two. All times are in
seconds of one monotonic clock.
"""

from __future__ import annotations

import math
from collections import deque

_DECREASE_TO = 0.85
_PLATEAU = 0.95
_DOUBLING_SECONDS = 2.0
_MAX_SLOW_START_SECONDS = 60.0  # bounds the exponent; the limit is 2^30 times the ceiling by then
_PLATEAU_SECONDS = 15.0  # from the decrease to the middle of the plateau
# Most upstreams count per second: after one throttled call they refuse the rest of that second, too, and
# those responses carry no new information. A second is also longer than a round trip.
_WINDOW_SECONDS = 1.0
# A new ceiling is at least this share of the old one, because the calls accepted in one second are a rough
# estimate.
_MIN_CEILING_SHARE = 0.5
_MIN_CEILING_PER_SECOND = 1.0  # some calls must pass, or the gateway never learns that the upstream recovered
# Half of the default deadline of a query: a new task that is requested during a pause still gets a response.
# An upstream that asks for a longer pause receives one call per 5 s, and can ask for a pause again.
_MAX_PAUSE_SECONDS = 5.0
_REMOVE_AFTER_SECONDS = 60.0  # time without throttling after which the learned limit can be removed


class AdaptiveRateLimit:
    """The upstream's limit, as far as it is known.

    `max_per_second` is the configured limit in calls per second, or `inf`.
    """

    def __init__(self, max_per_second: float) -> None:
        self._max_per_second = max_per_second
        self._ceiling = math.inf
        self._limit_before_decrease = math.inf
        self._decreased_at = -math.inf
        self._slow_start = False
        self._accepted_at: deque[float] = deque()  # within the last second
        self.resumes_at = -math.inf  # end of the pause that the upstream asked for

    @property
    def has_learned_limit(self) -> bool:
        """Tell whether a learned limit is in force."""
        return self._ceiling < math.inf

    @property
    def max_per_second(self) -> float:
        """The configured limit in calls per second, or `inf`."""
        return self._max_per_second

    def per_second(self, now: float) -> float:
        """Return the present limit in calls per second, or `inf`."""
        if not self.has_learned_limit:
            return self._max_per_second
        elapsed = max(now - max(self._decreased_at, self.resumes_at), 0.0)
        if self._slow_start:
            growth = _DECREASE_TO * 2 ** (min(elapsed, _MAX_SLOW_START_SECONDS) / _DOUBLING_SECONDS)
        else:
            growth = _PLATEAU + (_PLATEAU - _DECREASE_TO) * (elapsed / _PLATEAU_SECONDS - 1) ** 3
        return min(self._ceiling * growth, self._max_per_second)

    def on_accepted(self, now: float, *, sent_at: float) -> None:
        """Record that the upstream accepted a call."""
        self._accepted_at.append(now)
        recent = self._recently_accepted(now)
        if self.has_learned_limit and sent_at < self._decreased_at:
            # The API gateway throttles faster than the service behind it responds. So at the decrease, some
            # accepted calls had no response yet. They are counted now.
            self._ceiling = max(self._ceiling, min(recent, self._limit_before_decrease))

    def on_throttled(self, now: float, *, sent_at: float, retry_after: float | None) -> bool:
        """Record that the upstream throttled a call; tell whether this lowers the limit or sets a pause.

        The limit drops at most once per second, and not for a call that was sent before the last drop.
        """
        decreases = sent_at >= self._decreased_at and now - self._decreased_at >= _WINDOW_SECONDS
        if decreases:
            self._decrease(now)
        if retry_after is not None:
            self.resumes_at = max(self.resumes_at, now + min(retry_after, _MAX_PAUSE_SECONDS))
        return decreases or retry_after is not None

    def remove_if_unthrottled(self, now: float) -> bool:
        """Remove the learned limit if the upstream has not throttled for a minute; tell whether it did."""
        if not self.can_remove(now):
            return False
        self._ceiling = math.inf
        return True

    def can_remove(self, now: float) -> bool:
        """Tell whether `remove_if_unthrottled` would remove the learned limit."""
        unthrottled_seconds = now - max(self._decreased_at, self.resumes_at)
        return self.has_learned_limit and unthrottled_seconds >= _REMOVE_AFTER_SECONDS

    def _decrease(self, now: float) -> None:
        self._limit_before_decrease = self.per_second(now)
        accepted = self._recently_accepted(now)
        minimum = (
            _MIN_CEILING_SHARE * self._ceiling if self.has_learned_limit and not self._slow_start else 0.0
        )
        # The count of accepted calls is a lower bound in two cases: the first throttling response may come
        # before a full second was counted, and an upstream that accepts nothing in a second may count over a
        # longer period. In both cases the limit probes upwards.
        self._slow_start = not self.has_learned_limit or accepted == 0
        self._ceiling = max(min(self._limit_before_decrease, accepted), minimum, _MIN_CEILING_PER_SECOND)
        self._decreased_at = now

    def _recently_accepted(self, now: float) -> float:
        while self._accepted_at and self._accepted_at[0] <= now - _WINDOW_SECONDS:
            self._accepted_at.popleft()
        return len(self._accepted_at) / _WINDOW_SECONDS
