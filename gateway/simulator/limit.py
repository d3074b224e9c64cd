"""The flow control of the API gateway in front of the simulated vendor: a limit of calls per second."""

from collections.abc import Callable

from starlette.responses import Response

from gateway.simulator.api_gateway import Gate, refusal


class Limit:
    """Accepts `calls` in each second of the clock (0: no limit), and throttles the rest.

    The vendor documents limits per second, minute, hour or day, for all calls of an app. It does not document
    whether its refusals have a `Retry-After`: `retry_after` is in seconds, or None.
    """

    def __init__(self, gate: Gate, *, clock: Callable[[], float]) -> None:
        self.calls = 0
        self.retry_after: int | None = None
        self.throttled = 0
        self._gate = gate
        self._clock = clock
        self._second = 0
        self._count = 0

    def check(self) -> Response | None:
        """Count a call; return a refusal if it exceeds the limit."""
        second = int(self._clock())
        if second != self._second:
            self._second, self._count = second, 0
        self._count += 1
        if not self.calls or self._count <= self.calls:
            return None
        self.throttled += 1
        return refusal(
            429,
            "Throttled by APP Flow Control",
            "T429PA",
            legacy=self._gate.legacy,
            retry_after=self.retry_after,
        )
