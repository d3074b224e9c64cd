"""A query of one task: the callers that wait for its response, and what the query itself waits for.

    caller: join -> wait -> leave
    the last caller leaves -> a queued query is dropped, unless the gateway itself needs the response
                           -> a query on the wire is completed

A client is identified by its address; b"" stands for an unknown client.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from typing import Protocol

from gateway.domain.errors import GatewayError, UpstreamTimeout


def make_upstream_timeout() -> GatewayError:
    """Return the error of a query whose response does not come in time."""
    return UpstreamTimeout("the upstream did not answer in time")


class QueueEntry(Protocol):
    """The entry of a query in a queue; its position depends on the clients that wait for the query."""

    def join(self, client: bytes) -> None:
        """Record that another client waits."""

    def leave(self, client: bytes, others: Iterable[bytes]) -> None:
        """Record that the last caller of a client has left, while `others` still wait."""


class AwaitedQuery:
    """The callers that wait for a query of one task, and its state. It may outlive an in-flight request.

    Attributes:
        clients: Number of waiting callers, by client.
        seen_revision: The newest revision that a caller has seen. `begin` resets all attributes below.
        in_flight: An in-flight request of the task runs (`progress/in_flight_requests.py`).
        keep_without_callers: The query is kept even if no caller waits, because the gateway needs the
            response.
        runs_to_end: The query is completed even without callers: a call is on the wire, or the query has
            ended.
        on_unwanted: Callback that cancels a query which is not wanted any more. Its argument is this
            awaited query.
        dropped: The query was cancelled by `on_unwanted`.
        queue_entry: The query's entry in the queue for a permit or for a concurrency slot; None while it is
            in neither.
        queued_error: A future that receives an error when the query counts as queued. Callers that
            can serve a stale snapshot then stop waiting.
        in_flight_since: When the in-flight request began, on the clock of the progress service.
        failure: The failure of the latest call of the query, which is retried; None without one.
        seconds_before_call: Time from the beginning of the query to its latest call, with all waits and
            earlier calls.
        repeated: A call was repeated, so the duration of the query is not that of one call.
        make_deadline_error: Returns the error of the query if its deadline passes now. It depends on what the
            query waits for.
    """

    __slots__ = (
        "clients",
        "dropped",
        "failure",
        "in_flight",
        "in_flight_since",
        "keep_without_callers",
        "make_deadline_error",
        "on_unwanted",
        "queue_entry",
        "queued_error",
        "repeated",
        "runs_to_end",
        "seconds_before_call",
        "seen_revision",
    )

    def __init__(self, *, keep_without_callers: bool = False) -> None:
        self.clients: dict[bytes, int] = {}
        self.seen_revision = 0
        self.begin(keep_without_callers=keep_without_callers)
        self.in_flight = False

    def begin(
        self,
        *,
        keep_without_callers: bool = False,
        on_unwanted: Callable[[AwaitedQuery], None] = lambda _: None,
    ) -> None:
        """Reset everything but `clients` and `seen_revision` for a new in-flight request."""
        self.on_unwanted = on_unwanted
        self.in_flight = True
        self.keep_without_callers = keep_without_callers
        self.runs_to_end = False
        self.dropped = False
        self.queue_entry: QueueEntry | None = None
        self.queued_error: asyncio.Future[GatewayError] | None = None
        self.in_flight_since = math.inf
        self.failure: GatewayError | None = None
        self.seconds_before_call = 0.0
        self.repeated = False
        self.make_deadline_error: Callable[[], GatewayError] = make_upstream_timeout

    @property
    def wanted(self) -> bool:
        """Tell whether a caller or the gateway needs the response."""
        return bool(self.clients) or self.keep_without_callers

    def join(self, client: bytes) -> None:
        """Add a caller of this client."""
        count = self.clients.get(client, 0)
        self.clients[client] = count + 1
        if not count and self.queue_entry is not None:
            self.queue_entry.join(client)

    def leave(self, client: bytes) -> None:
        """Remove a caller of this client."""
        count = self.clients[client] - 1
        if count:
            self.clients[client] = count
            return
        del self.clients[client]
        if self.clients and self.queue_entry is not None:
            self.queue_entry.leave(client, self.clients)
