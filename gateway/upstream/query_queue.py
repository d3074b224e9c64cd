"""The queries that wait for a permit of the rate limiter or for a concurrency slot, and their order.

    refreshes      first in, first out
    first queries  round robin over clients (`fair_queue.py`)

A query is a *refresh* if an older snapshot of its task is known, and a *first query* otherwise. The two
queues are served alternately, so that both make progress. If replicas share a rate limit, a queue without a
shared permit is skipped. The store decides how many permits each queue gets (`take_permits.lua`).

A client may request many new tasks at once. With round robin it delays another client by only one call per
round. Refreshes do not need this: a task has one query at a time, so no task is served twice before all
others.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest

from gateway.upstream.fair_queue import FairQueue


class QueuedQuery:
    """A query that waits. As a `QueueEntry` it reacts to clients only if it is a first query.

    The result of `future` is None when the query is served. The rate limiter uses the other attributes:
    `expires_at` is a moment on its clock, in seconds. If the permit would come after `expires_at`, the result
    of `future` is the `retry_after` of the error, in seconds.
    """

    __slots__ = ("_fair_queue", "expires_at", "future", "on_expected_wait")

    def __init__(
        self,
        expires_at: float,
        on_expected_wait: Callable[[float], None],
        fair_queue: FairQueue[QueuedQuery] | None,
    ) -> None:
        self.future: asyncio.Future[float | None] = asyncio.get_running_loop().create_future()
        self.expires_at = expires_at
        self.on_expected_wait = on_expected_wait
        self._fair_queue = fair_queue  # None for a refresh

    @property
    def is_refresh(self) -> bool:
        """Whether an older snapshot of the task is known."""
        return self._fair_queue is None

    def join(self, client: bytes) -> None:
        """See `QueueEntry`."""
        if self._fair_queue is not None:
            self._fair_queue.join(self, client)

    def leave(self, client: bytes, others: Iterable[bytes]) -> None:
        """See `QueueEntry`."""
        if self._fair_queue is not None:
            self._fair_queue.leave(self, client, others)


class QueryQueue:
    """The queues of refreshes and of first queries, which are served alternately."""

    def __init__(self) -> None:
        self._refreshes: OrderedDict[QueuedQuery, None] = OrderedDict()
        self._first_queries: FairQueue[QueuedQuery] = FairQueue()
        self._refresh_next = True  # which of the two is served next

    def __len__(self) -> int:
        """Return the number of queued queries."""
        return len(self._refreshes) + len(self._first_queries)

    def __iter__(self) -> Iterator[QueuedQuery]:
        """Yield the queries in the order in which they will be served."""
        queues = (self._refreshes, self._first_queries)
        for pair in zip_longest(*(queues if self._refresh_next else reversed(queues))):
            for query in pair:
                if query is not None:
                    yield query

    def count(self, *, is_refresh: bool) -> int:
        """Return the number of queued refreshes, or of queued first queries."""
        return len(self._refreshes if is_refresh else self._first_queries)

    def count_ahead(self, *, is_refresh: bool, client: bytes) -> int:
        """Return how many queries would be served before a query that this client adds now."""
        same_queue, other_queue = len(self._refreshes), len(self._first_queries)
        if not is_refresh:
            same_queue, other_queue = self._first_queries.count_ahead(client), same_queue
        # For each query ahead in the same queue, one of the other queue is served, and one more if the other
        # queue is next.
        return same_queue + min(other_queue, same_queue + (self._refresh_next is not is_refresh))

    def client_with_shortest_queue(self, clients: Iterable[bytes]) -> bytes:
        """Return the client that has the fewest queued first queries, or b"" if there are no clients."""
        return self._first_queries.client_with_shortest_queue(clients)

    def add(
        self,
        *,
        is_refresh: bool,
        client: bytes,
        expires_at: float = math.inf,
        on_expected_wait: Callable[[float], None] = lambda _: None,
    ) -> QueuedQuery:
        """Queue a query, and return its entry. A first query is queued for `client`."""
        if is_refresh:
            query = QueuedQuery(expires_at, on_expected_wait, None)
            self._refreshes[query] = None
        else:
            query = QueuedQuery(expires_at, on_expected_wait, self._first_queries)
            self._first_queries.add(query, client)
        return query

    def discard(self, query: QueuedQuery) -> None:
        """Remove a query, if it is queued."""
        self._refreshes.pop(query, None)
        self._first_queries.discard(query)

    def service_order(self) -> tuple[bool, bool]:
        """Return the values of `is_refresh` in the order in which the queues are served next."""
        return self._refresh_next, not self._refresh_next

    def pop(self, *, is_refresh: bool) -> QueuedQuery | None:
        """Remove and return the first query of a queue, or None. This does not change the alternation."""
        if not is_refresh:
            return self._first_queries.pop()
        return self._refreshes.popitem(last=False)[0] if self._refreshes else None

    def record_served(self, *, is_refresh: bool) -> None:
        """Record that a query of this queue is served: the other queue is served next."""
        self._refresh_next = not is_refresh
