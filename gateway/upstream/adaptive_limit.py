"""How many calls a second the upstream bears, learnt from its refusals.

    refused    -> a ceiling: what it accepted in the last second; from there 15 % down
    searching  -> the ceiling is a guess: up again, twice as much every two seconds
    steady     -> up again, quickly at first, slowly near the ceiling, ever faster beyond it
    at peace for a minute -> `relax`: no limit any more

The decrease is multiplicative, the search a slow start, the steady growth that of CUBIC (RFC 9438, 4.2),
in calls a second instead of a window: limit = ceiling x (0.95 + 0.1 x (t / 15 s - 1)^3). It spends most of
its time just below the ceiling, so that refusals are rare, and finds a limit that was raised within a
minute or two; a constant increase would do one or the other. All times are of one monotonic clock.
"""

from __future__ import annotations

import math
from collections import deque

_DECREASE = 0.85
_PLATEAU = 0.95
_DOUBLING_SECONDS = 2.0
_SEARCH_SECONDS = 60.0  # there is no such upstream
_PLATEAU_SECONDS = 15.0  # from the decrease to the plateau's middle
# Flow control mostly counts by the second: after one refusal the rest of that second is refused too, and
# says nothing new. It is also more than a round trip.
_ROUND_SECONDS = 1.0
# Of a ceiling that was found: what was accepted in one second of few calls is a rough guess.
_LEAST_SHARE = 0.5
_LEAST_PER_SECOND = 1.0  # a ceiling: somebody has to find out that upstream takes calls again
# Half of a caller's default deadline: whoever asks for a new task in a pause is answered, not refused. An
# upstream that asked for more silence is asked once in so many seconds, and says so again.
_LONGEST_PAUSE_SECONDS = 5.0
_PEACE_SECONDS = 60.0


class AdaptiveLimit:
    """The upstream's limit as far as it is known; `most` is ours: calls a second, or `inf`."""

    def __init__(self, most: float) -> None:
        self._most = most
        self._ceiling = math.inf
        self._before = math.inf  # the limit before the last decrease
        self._slowed_at = -math.inf
        self._searching = False
        self._accepted: deque[float] = deque()  # when, within the last round
        self.resumes_at = -math.inf  # no call before: upstream asked for a pause

    @property
    def throttled_now(self) -> bool:
        """Tell whether the upstream's refusals limit us now."""
        return self._ceiling < math.inf

    def per_second(self, now: float) -> float:
        """Return how many calls a second may be made now; `inf`: any number."""
        if not self.throttled_now:
            return self._most
        since = max(now - max(self._slowed_at, self.resumes_at), 0.0)
        if self._searching:
            growth = _DECREASE * 2 ** (min(since, _SEARCH_SECONDS) / _DOUBLING_SECONDS)
        else:
            growth = _PLATEAU + (_PLATEAU - _DECREASE) * (since / _PLATEAU_SECONDS - 1) ** 3
        return min(self._ceiling * growth, self._most)

    def accepted(self, now: float, *, sent_at: float) -> None:
        """Note that the upstream took a call."""
        self._accepted.append(now)
        lately = self._accepted_lately(now)
        if self.throttled_now and sent_at < self._slowed_at:
            # Refusals are made in front of the service and overtake its answers: when the first one
            # came we knew too little of what was accepted beside it.
            self._ceiling = max(self._ceiling, min(lately, self._before))

    def throttled(self, now: float, *, sent_at: float, retry_after: float | None) -> bool:
        """Note that the upstream refused a call; tell whether that slows us further.

        One decrease a round, and none for a call that was sent before the last one.
        """
        slows = sent_at >= self._slowed_at and now - self._slowed_at >= _ROUND_SECONDS
        if slows:
            self._decrease(now)
        if retry_after is not None:
            self.resumes_at = max(self.resumes_at, now + min(retry_after, _LONGEST_PAUSE_SECONDS))
        return slows or retry_after is not None

    def relax(self, now: float) -> bool:
        """Lift the limit if the upstream has refused nothing for long; tell whether it was lifted now."""
        if not self.at_peace(now):
            return False
        self._ceiling = math.inf
        return True

    def at_peace(self, now: float) -> bool:
        """Tell whether `relax` would lift the limit."""
        return self.throttled_now and now - max(self._slowed_at, self.resumes_at) >= _PEACE_SECONDS

    @property
    def most(self) -> float:
        """How many calls a second may be made where the upstream sets no limit."""
        return self._most

    def _decrease(self, now: float) -> None:
        self._before = self.per_second(now)
        accepted = self._accepted_lately(now)
        least = _LEAST_SHARE * self._ceiling if self.throttled_now and not self._searching else 0.0
        # The first refusal may come before a second's worth was accepted, and one who accepts nothing
        # counts by longer than a second, maybe: then there is more to be had than that.
        self._searching = not self.throttled_now or accepted == 0
        self._ceiling = max(min(self._before, accepted), least, _LEAST_PER_SECOND)
        self._slowed_at = now

    def _accepted_lately(self, now: float) -> float:
        while self._accepted and self._accepted[0] <= now - _ROUND_SECONDS:
            self._accepted.popleft()
        return len(self._accepted) / _ROUND_SECONDS
