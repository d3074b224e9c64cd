"""Who wants a task's answer: the callers that wait for it, by client, and the gateway itself.

    caller: join -> waits -> leave          background refresh: `background`
    the last caller has left -> a query that is still queued is dropped; one on the wire is completed

A client is identified by its address; b"" stands for an unknown one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol

from gateway.domain.errors import GatewayError


class QueueEntry(Protocol):
    """A queued query's place, which depends on the clients that wait for it."""

    def join(self, client: bytes) -> None:
        """Note that a caller of a further client waits."""

    def leave(self, client: bytes, others: Iterable[bytes]) -> None:
        """Note that a client's last caller has left, while these others wait."""


class Demand:
    """The demand for one task's answer, over the flights that bring it.

    Attributes:
        clients: The number of callers that wait, by client. The other attributes are the flight's.
        flying: A flight is in progress.
        background: The gateway wants the answer though no caller waits.
        committed: A call is on the wire, or its answer has come: the flight runs to its end.
        drop: Called with the demand, ends a flight before that when nothing wants its answer any more.
        dropped: It was ended so.
        place: Where its query is queued.
        held_up: Why callers that have another answer should not wait for this one.
    """

    __slots__ = ("background", "clients", "committed", "drop", "dropped", "flying", "on_queued", "place")

    def __init__(self, *, background: bool = False) -> None:
        self.clients: dict[bytes, int] = {}
        self.begin(background=background)
        self.flying = False

    def begin(self, *, background: bool = False, drop: Callable[[Demand], None] = lambda _: None) -> None:
        """Begin with a new flight."""
        self.drop = drop
        self.flying = True
        self.background = background
        self.committed = False
        self.dropped = False
        self.place: QueueEntry | None = None
        self.on_queued: asyncio.Future[GatewayError] | None = None

    @property
    def wanted(self) -> bool:
        """Tell whether the flight's answer is wanted by a caller or by the gateway."""
        return bool(self.clients) or self.background

    def join(self, client: bytes) -> None:
        """Count a caller of this client in."""
        count = self.clients.get(client, 0)
        self.clients[client] = count + 1
        if not count and self.place is not None:
            self.place.join(client)

    def leave(self, client: bytes) -> None:
        """Count a caller of this client out."""
        count = self.clients[client] - 1
        if count:
            self.clients[client] = count
            return
        del self.clients[client]
        if self.clients and self.place is not None:
            self.place.leave(client, self.clients)
