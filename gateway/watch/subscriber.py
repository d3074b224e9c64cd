"""A subscriber: one open event stream or long poll, and the updates that wait for it.

    put -> the slot of the update's task -> drain, one update at a time, with the latest body

Each task has one slot, which holds the latest update only. A slot holds no large body: otherwise slow readers
would keep bodies in memory that the store has already evicted. One slot of each subscriber may hold a body,
so that a waiting subscriber also receives a task whose body is larger than the store. An evicted body is
fetched again, one at a time for each subscriber.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace

from gateway.domain.errors import GatewayError, UpstreamRejected
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import TaskKey

_SMALL_BODY = 1024  # bytes; small compared with the size of a schedule


@dataclass(slots=True, eq=False)
class Update:
    """An update of one task: its snapshot, or the failure to fetch one. Neither has a vendor envelope."""

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
    def is_complete(self) -> bool:
        """Whether the update can be sent: it is a failure, or it has its body."""
        return self.snapshot is None or bool(self.snapshot.body)

    def same_content(self, other: Update | None) -> bool:
        """Tell whether this update is no news to a subscriber that has received `other`."""
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
    """One open stream or long poll, with a slot for each of its tasks and a wake-up signal.

    `complete` returns an update from a slot with its body, or None if the body was evicted; `refetch` has it
    fetched and put into the slot again. `direct_transport` accepts writes that bypass the task which awaits
    `wait`. `idle_transport` is the same transport while that task waits with empty slots, and None otherwise:
    a write in between could overtake an older update.
    """

    __slots__ = (
        "_complete",
        "_key_with_body",
        "_refetch",
        "_refetching",
        "_slots",
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
        complete: Callable[[Update, Subscriber], Update | None] = lambda _update, _subscriber: None,
        refetch: Callable[[TaskKey, Subscriber], None] = lambda _key, _subscriber: None,
    ) -> None:
        self.keys = keys
        self.client = client
        self.shutting_down = False  # the gateway shuts down: end the stream
        self.disconnected = False  # the client has closed the connection
        self._complete = complete
        self._refetch = refetch
        self._refetching: TaskKey | None = None  # its body was evicted, and has not arrived yet
        self._slots: dict[TaskKey, Update] = {}
        self._key_with_body: TaskKey | None = None  # the only slot that may hold a large body
        self.heartbeat_due = False
        self.direct_transport: asyncio.WriteTransport | None = None
        self.idle_transport: asyncio.WriteTransport | None = None
        # A future instead of an asyncio.Event, whose queue alone takes 0.7 KB: only one task waits here.
        self.woken = False
        self._waiter: asyncio.Future[None] | None = None

    def put(self, update: Update, reduced: Update) -> None:
        """Replace the content of the task's slot by `update`, or by `reduced`, its form without a body."""
        if self._key_with_body is None or self._key_with_body == update.key:
            self._key_with_body = update.key
            self._slots[update.key] = update
        else:
            self._slots[update.key] = reduced
        if self._refetching == update.key:
            self._refetching = None
        self.wake()

    def has_pending(self, key: TaskKey) -> bool:
        """Tell whether the slot of this task holds an update."""
        return key in self._slots

    def wake(self) -> None:
        """Wake the waiting task, which then checks slots and flags."""
        self.woken = True
        self.idle_transport = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def disconnect(self) -> None:
        """Record that the client has disconnected, and wake the waiting task."""
        self.disconnected = True
        self.wake()

    async def wait(self) -> None:
        """Wait until `wake` is called, unless it was called since the last wait."""
        if not self.woken:
            self._waiter = asyncio.get_running_loop().create_future()
            self.idle_transport = None if self._slots else self.direct_transport
            try:
                await self._waiter
            finally:
                self._waiter = self.idle_transport = None
        self.woken = False

    def drain(self) -> Iterator[Update]:
        """Yield the updates in the slots; each slot is emptied when its update is reached.

        An update whose body was evicted stays in its slot.
        """
        for key in tuple(self._slots):
            reduced = self._slots.pop(key)
            if key == self._key_with_body:
                self._key_with_body = None
            update = reduced if reduced.is_complete else self._complete(reduced, self)
            if update is not None:
                yield update
            elif self._slots.setdefault(key, reduced) is reduced and self._refetching is None:
                self._refetching = key
                self._refetch(key, self)

    async def next_updates(self) -> list[Update]:
        """Wait until `wake` is called; return the updates since the previous call, possibly none."""
        await self.wait()
        return list(self.drain())
