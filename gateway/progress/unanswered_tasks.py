"""Limits the tasks that wait for their first response from the upstream, of all clients and of each client.

A client can ask for any number of tasks that do not exist, and each takes memory and time until the upstream
has answered. The tasks of batches, streams and long polls count. The task of a plain request for one task
does not: the number of connections bounds these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from gateway.domain.errors import Overloaded

# A task takes 12.5 KiB in a batch and 14 KiB in a stream or long poll.
MAX_UNANSWERED_TASKS = 8_000
MAX_UNANSWERED_TASKS_PER_CLIENT = 4_000
# More of clients with few unanswered tasks, so that two clients cannot keep all others from waiting.
RESERVED_UNANSWERED_TASKS = 4_000
MAX_RESERVED_PER_CLIENT = 100
RETRY_SECONDS = 1.0


def too_many_tasks() -> Overloaded:
    """Return the error for a request for which there is no room."""
    return Overloaded("too many tasks wait for upstream calls", retry_after=RETRY_SECONDS)


class UnansweredTasks:
    """Counts the tasks without a response by client; a client is a key of `api/client_limits.py`."""

    def __init__(self) -> None:
        self._of_client: Counter[bytes] = Counter()
        self._of_all = 0

    def __len__(self) -> int:
        """Return the number of unanswered tasks of all clients."""
        return self._of_all

    def has_room(self, client: bytes, tasks: int) -> bool:
        """Tell whether so many more tasks of this client may wait. Known tasks always may: they are none."""
        of_client, of_all = self._of_client[client], self._of_all
        is_small = of_client + tasks <= MAX_RESERVED_PER_CLIENT
        most = MAX_UNANSWERED_TASKS + (RESERVED_UNANSWERED_TASKS if is_small else 0)
        # A request may have more tasks than the limits (`limits.max_tasks_per_request`), if no others wait.
        exceeds_client = of_client and of_client + tasks > MAX_UNANSWERED_TASKS_PER_CLIENT
        exceeds_all = of_all and of_all + tasks > most
        return not tasks or not (exceeds_client or exceeds_all)

    @contextmanager
    def counted(self, client: bytes, tasks: int) -> Iterator[None]:
        """Count these tasks while the context is open. Check `has_room` before."""
        self.add(client, tasks)
        try:
            yield
        finally:
            self.remove(client, tasks)

    def add(self, client: bytes, tasks: int = 1) -> None:
        """Count tasks."""
        if tasks:
            self._of_client[client] += tasks
            self._of_all += tasks

    def remove(self, client: bytes, tasks: int = 1) -> None:
        """Stop counting tasks."""
        if tasks:
            self._of_all -= tasks
            self._of_client[client] -= tasks
            if not self._of_client[client]:
                del self._of_client[client]
