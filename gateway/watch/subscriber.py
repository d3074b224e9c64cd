"""A subscriber: one open event stream or long poll, and its unsent updates.

    put -> unsent, only the latest update of each task -> take_unsent: one at a time, with the latest body

Unsent updates have no large body: otherwise slow clients would keep bodies in memory that the store has
already evicted. One unsent update of each subscriber may keep its body. So a subscriber also receives a body
that is too large for the store. If a body was evicted, the task is refreshed, one task at a time for each
subscriber.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace

from gateway.domain.errors import GatewayError, UpstreamRejected
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import TaskKey

_SMALL_BODY = 1024  # bytes; a schedule takes more memory than this anyway


@dataclass(slots=True, eq=False)
class Update:
    """An update of one task: its snapshot, or a failure. The vendor's envelope is removed to save memory."""

    key: TaskKey
    snapshot: Snapshot | None = None
    failure: GatewayError | None = None

    def __post_init__(self) -> None:
        if self.snapshot is not None and self.snapshot.envelope:
            self.snapshot = replace(self.snapshot, envelope=b"")
        if isinstance(self.failure, UpstreamRejected):
            self.failure = copy(self.failure)
            self.failure.envelope = b""

    def without_large_body(self) -> Update:
        """Return this update, without the snapshot's body if that is larger than 1 KiB."""
        if self.snapshot is None or len(self.snapshot.body) <= _SMALL_BODY:
            return self
        return Update(self.key, replace(self.snapshot, body=b""))

    @property
    def is_sendable(self) -> bool:
        """Whether the update can be sent as it is: it is a failure, or it has its body."""
        return self.snapshot is None or bool(self.snapshot.body)

    def same_content(self, other: Update | None) -> bool:
        """Tell whether a subscriber that has received `other` need not receive this update."""
        if other is None:
            return False
        if self.snapshot is not None and other.snapshot is not None:
            return self.snapshot.etag == other.snapshot.etag
        return (
            self.failure is not None
            and other.failure is not None
            and (self.failure.code, str(self.failure)) == (other.failure.code, str(other.failure))
        )


class Subscriber:
    """One open stream or long poll.

    `load_body` returns an update with its body, or None if the body was evicted. `refetch` then refreshes the
    task and puts the result.

    Attributes:
        direct_transport: Accepts writes that bypass the asyncio task that awaits `wait`. None if the server
            does not support this.
        idle_transport: The same transport while that task waits and no update is unsent; None otherwise,
            because a direct write would then overtake an older update.
        shutting_down: The gateway shuts down; the stream must end.
        disconnected: The client has closed the connection.
        heartbeat_due: The stream must send a heartbeat.
        woken: `wake` was called since the last `wait`.
    """

    __slots__ = (
        "_key_with_body",
        "_load_body",
        "_refetch",
        "_refetching",
        "_unsent",
        "_waiter",
        "client",
        "direct_transport",
        "disconnected",
        "heartbeat_due",
        "idle_transport",
        "keys",
        "shutting_down",
        "woken",
    )

    def __init__(
        self,
        keys: Sequence[TaskKey],
        client: bytes,
        *,
        load_body: Callable[[Update, Subscriber], Update | None] = lambda _update, _subscriber: None,
        refetch: Callable[[TaskKey, Subscriber], None] = lambda _key, _subscriber: None,
    ) -> None:
        self.keys = keys
        self.client = client
        self.shutting_down = False
        self.disconnected = False
        self._load_body = load_body
        self._refetch = refetch
        self._refetching: TaskKey | None = None  # the task whose evicted body is being fetched again
        self._unsent: dict[TaskKey, Update] = {}
        self._key_with_body: TaskKey | None = None  # of the only unsent update that may have a large body
        self.heartbeat_due = False
        self.direct_transport: asyncio.WriteTransport | None = None
        self.idle_transport: asyncio.WriteTransport | None = None
        # A future instead of an asyncio.Event, whose queue alone takes 0.7 KB: only one task waits here.
        self.woken = False
        self._waiter: asyncio.Future[None] | None = None

    def put(self, update: Update, reduced: Update) -> None:
        """Make `update` the unsent update of its task, or `reduced`, the same update without a large body."""
        if self._key_with_body is None or self._key_with_body == update.key:
            self._key_with_body = update.key
            self._unsent[update.key] = update
        else:
            self._unsent[update.key] = reduced
        if self._refetching == update.key:
            self._refetching = None
        self.wake()

    def has_unsent(self, key: TaskKey) -> bool:
        """Tell whether this task has an unsent update."""
        return key in self._unsent

    def wake(self) -> None:
        """Wake the asyncio task that awaits `wait`, which then checks unsent updates and flags."""
        self.woken = True
        self.idle_transport = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def disconnect(self) -> None:
        """Record that the client has disconnected, and wake the asyncio task that awaits `wait`."""
        self.disconnected = True
        self.wake()

    async def wait(self) -> None:
        """Wait until `wake` is called, unless it was called since the last wait."""
        if not self.woken:
            self._waiter = asyncio.get_running_loop().create_future()
            self.idle_transport = None if self._unsent else self.direct_transport
            try:
                await self._waiter
            finally:
                self._waiter = self.idle_transport = None
        self.woken = False

    def take_unsent(self) -> Iterator[Update]:
        """Yield the unsent updates. Each is removed when the iteration reaches it.

        An update whose body was evicted stays unsent, until its task has been refreshed.
        """
        for key in tuple(self._unsent):
            reduced = self._unsent.pop(key)
            if key == self._key_with_body:
                self._key_with_body = None
            update = reduced if reduced.is_sendable else self._load_body(reduced, self)
            if update is not None:
                yield update
            elif self._unsent.setdefault(key, reduced) is reduced and self._refetching is None:
                self._refetching = key
                self._refetch(key, self)

    async def next_updates(self) -> list[Update]:
        """Wait until `wake` is called; return the updates since the previous call, possibly none."""
        await self.wait()
        return list(self.take_unsent())
