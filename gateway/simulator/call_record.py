"""A bounded record of the calls of the simulated vendor's operations."""

from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cachetools import LRUCache

MAX_TASKS = 10_000
MAX_TIMES = 1000
MAX_REQUESTS = 200


class CallRecord:
    """Counts calls, and keeps the last requests as received."""

    def __init__(self) -> None:
        self.requests: deque[dict[str, Any]] = deque(maxlen=MAX_REQUESTS)
        self._in_flight = 0
        self.reset()

    def reset(self) -> None:
        """Reset the counters, except the number of calls in flight."""
        self.refused = 0
        self._calls: Counter[str] = Counter()
        self._calls_by_task: LRUCache[str, int] = LRUCache(MAX_TASKS)
        self._max_in_flight = self._in_flight
        self._times: deque[float] = deque(maxlen=MAX_TIMES)

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Count a request as in flight until its response is sent or its client disconnects."""
        self._in_flight += 1
        self._max_in_flight = max(self._max_in_flight, self._in_flight)
        try:
            yield
        finally:
            self._in_flight -= 1

    def count(self, operation: str, task_id: str | None, now: float) -> None:
        """Count a call of an operation, accepted or not."""
        self._calls[operation] += 1
        self._times.append(now)
        if task_id is not None:
            self._calls_by_task[task_id] = self._calls_by_task.get(task_id, 0) + 1

    def stats(self) -> dict[str, Any]:
        """Return the counters as served by `GET /_simulator/stats`."""
        return {
            "calls": dict(self._calls),
            "callsByTask": dict(self._calls_by_task),
            "refused": self.refused,
            "inFlight": self._in_flight,
            "maxInFlight": self._max_in_flight,
            "times": list(self._times),
        }
