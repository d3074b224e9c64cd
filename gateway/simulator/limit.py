"""The flow control of the API gateway in front of the simulated vendor: so many calls in each second."""

from collections.abc import Callable

from starlette.responses import Response

from gateway.simulator.gate import Gate, refusal


class Limit:
    """Takes `calls` in each second of the clock, 0: any number, and throttles the rest.

    The vendor documents limits by the second, minute, hour or day, counted for an app over all its
    calls; whether its refusals tell a `Retry-After` it does not say: `retry_after` in seconds, or None.
    """

    def __init__(self, gate: Gate, *, clock: Callable[[], float]) -> None:
        self.calls = 0
        self.retry_after: int | None = None
        self.throttled = 0
        self._gate = gate
        self._clock = clock
        self._second = 0
        self._taken = 0

    def judge(self) -> Response | None:
        """Count a call; return a refusal if it is one too many."""
        second = int(self._clock())
        if second != self._second:
            self._second, self._taken = second, 0
        self._taken += 1
        if not self.calls or self._taken <= self.calls:
            return None
        self.throttled += 1
        return refusal(
            429,
            "Throttled by APP Flow Control",
            "T429PA",
            legacy=self._gate.legacy,
            retry_after=self.retry_after,
        )
