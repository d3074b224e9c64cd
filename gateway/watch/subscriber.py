"""A subscriber: one open event stream or long poll, and its unsent updates.

    put -> unsent, only the latest update of each task -> take_unsent: one at a time, with the latest body
    put_overdue_notice -> unsent, only the latest of each task, if its code differs from the last one that was
                         taken -> take_overdue_notices

Unsent updates are kept without their large bodies. A body is loaded from the store when its update is sent.
Otherwise slow clients would keep bodies in memory that the store has evicted. One unsent update of each
subscriber may keep its body: a body that is too large for the store exists nowhere else. If the store has
evicted a body, the task is refreshed, one task at a time for each subscriber.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

from msgspec.structs import replace

from gateway.domain.entity_tag import same_body
from gateway.domain.errors import GatewayError, UpstreamRejected
from gateway.domain.paced_callbacks import PacedCallbacks
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import TaskKey

_SMALL_BODY = 1024  # bytes; a schedule takes more memory than this anyway


class SubscriptionKind(StrEnum):
    """How a client follows a task: by an event stream or by a long poll."""

    EVENTS = "events"
    LONGPOLL = "longpoll"


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

    @property
    def is_final(self) -> bool:
        """Whether the task has ended."""
        return self.snapshot is not None and self.snapshot.terminal

    def has_same_content(self, other: Update | None) -> bool:
        """Tell whether this update has the same content as `other`, and need not be sent after it."""
        if other is None:
            return False
        if self.snapshot is not None and other.snapshot is not None:
            return same_body(self.snapshot.etag, other.snapshot.etag)
        return (
            self.failure is not None
            and other.failure is not None
            and (self.failure.code, str(self.failure)) == (other.failure.code, str(other.failure))
        )


class OverdueNotice(NamedTuple):
    """Whether the update of a task is overdue; in the API, the event `stale`.

    `failure` is the reason why the update is overdue; None if it is not. `fetched_at` is that of the
    snapshot.
    """

    key: TaskKey
    failure: GatewayError | None
    fetched_at: float

    @property
    def code(self) -> str | None:
        """The problem code of the failure."""
        return None if self.failure is None else self.failure.code


class Subscriber:
    """One open stream or long poll.

    `wake_ups` paces the wake-ups of all subscribers. `load_body` returns an update with its body, or None if
    it cannot be sent, usually because the store has evicted the body. If there is no newer update, `refetch`
    then refreshes the task, and the hub calls `put` with the result.

    Attributes:
        seen_revisions: The revisions that the client had received before it subscribed, by task. `put`
            removes the entry of a task when it stores an update of the task.
        client_transport: The transport of the connection, for direct writes: writes that do not go through
            the stream's asyncio task (the task that awaits `wait`). None if the server does not support them.
        chunked: Whether bytes that are written directly must have the form of a chunk (RFC 9112, 7.1).
        transport_if_idle: `client_transport` while the stream's asyncio task waits and nothing is unsent, and
            no newer snapshot was seen by the client. Otherwise None: a direct write would overtake an older
            update, or could be older than what the client has.
        not_found_keys: Tasks whose queries the upstream has rejected for `watch.unknown_task_seconds`.
        must_end: The gateway shuts down, or the time of the long poll is over: the response must end.
        disconnected: The client has closed the connection.
        heartbeat_due: The stream must send a heartbeat.
        woken: `wake` was called since the last `wait`.
    """

    __slots__ = (
        "_key_with_body",
        "_load_body",
        "_refetch",
        "_refetching",
        "_sent_overdue_codes",
        "_unsent",
        "_unsent_overdue_notices",
        "_waiter",
        "_wake_ups",
        "chunked",
        "client",
        "client_transport",
        "disconnected",
        "heartbeat_due",
        "keys",
        "must_end",
        "not_found_keys",
        "seen_revisions",
        "transport_if_idle",
        "woken",
    )

    def __init__(
        self,
        keys: Sequence[TaskKey],
        client: bytes,
        *,
        wake_ups: PacedCallbacks | None = None,
        seen_revisions: Mapping[TaskKey, int] = MappingProxyType({}),
        load_body: Callable[[Update, Subscriber], Update | None] = lambda _update, _subscriber: None,
        refetch: Callable[[TaskKey, Subscriber], None] = lambda _key, _subscriber: None,
    ) -> None:
        self.keys = keys
        self.client = client
        self._wake_ups = wake_ups or PacedCallbacks()
        self.seen_revisions = dict(seen_revisions)
        self.not_found_keys: AbstractSet[TaskKey] = frozenset()
        self.must_end = False
        self.disconnected = False
        self._load_body = load_body
        self._refetch = refetch
        self._refetching: TaskKey | None = None  # the task whose evicted body is being fetched again
        self._unsent: dict[TaskKey, Update] = {}
        # None until an update is overdue, to save memory.
        self._unsent_overdue_notices: dict[TaskKey, OverdueNotice] | None = None
        self._sent_overdue_codes: dict[TaskKey, str] | None = None
        self._key_with_body: TaskKey | None = None  # the task whose unsent update may have a large body
        self.heartbeat_due = False
        self.client_transport: asyncio.WriteTransport | None = None
        self.chunked = True
        self.transport_if_idle: asyncio.WriteTransport | None = None
        # A future instead of an asyncio.Event: only one asyncio task waits, and an Event takes 0.7 KB more.
        self.woken = False
        self._waiter: asyncio.Future[None] | None = None

    def put(self, update: Update, reduced: Update) -> bool:
        """Store an update as unsent, and wake the stream.

        `reduced` is the update without its large body. It is stored instead of `update` if the unsent update
        of another task may have a large body. Return False, and store neither, if the client has already
        received a newer snapshot.
        """
        if self.seen_revisions and update.snapshot is not None:
            if not update.snapshot.may_follow(self.seen_revisions.get(update.key, 0)):
                return False
            self.seen_revisions.pop(update.key, None)  # later snapshots are newer
        if self._key_with_body is None or self._key_with_body == update.key:
            self._key_with_body = update.key
            self._unsent[update.key] = update
        else:
            self._unsent[update.key] = reduced
        if self._refetching == update.key:
            self._refetching = None
        self.wake()
        return True

    def set_not_found(self, key: TaskKey, *, not_found: bool) -> None:
        """Add a task to `not_found_keys` and wake the response, or remove the task."""
        if not_found is (key in self.not_found_keys):
            return
        if not isinstance(self.not_found_keys, set):
            self.not_found_keys = set()  # not before, to save memory
        if not_found:
            self.not_found_keys.add(key)
            self.wake()
        else:
            self.not_found_keys.discard(key)

    def put_overdue_notice(self, notice: OverdueNotice) -> None:
        """Store the overdue notice of a task as unsent, and wake the stream.

        If its code is the one that was taken last, remove the unsent one instead.
        """
        key, code = notice.key, notice.code
        if self._unsent_overdue_notices is None:
            self._unsent_overdue_notices = {}
        if code == (self._sent_overdue_codes or {}).get(key):
            self._unsent_overdue_notices.pop(key, None)
            return
        self._unsent_overdue_notices[key] = notice
        self.wake()

    def take_overdue_notices(self) -> list[OverdueNotice]:
        """Return and remove the unsent overdue notice of each task that has no unsent update."""
        if not self._unsent_overdue_notices:
            return []
        taken = [notice for key, notice in self._unsent_overdue_notices.items() if key not in self._unsent]
        if self._sent_overdue_codes is None:
            self._sent_overdue_codes = {}
        for notice in taken:
            del self._unsent_overdue_notices[notice.key]
            if notice.code is None:
                del self._sent_overdue_codes[notice.key]
            else:
                self._sent_overdue_codes[notice.key] = notice.code
        return taken

    def has_unsent(self, key: TaskKey) -> bool:
        """Tell whether this task has an unsent update."""
        return key in self._unsent

    def wake(self) -> None:
        """Wake the asyncio task that awaits `wait`, which then checks unsent updates and flags.

        If many subscribers are woken together, each wakes in its turn.
        """
        self.woken = True
        self.transport_if_idle = None
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            self._wake_ups.resolve(waiter, client=self.client)

    @contextmanager
    def expiring(self, seconds: float) -> Iterator[None]:
        """Set `must_end` after this time, unless the context ends before.

        Unlike `asyncio.timeout`, this ends only a few of many long polls in one iteration of the event loop.
        """
        timer = asyncio.get_running_loop().call_later(seconds, self._expire)
        try:
            yield
        finally:
            timer.cancel()

    def _expire(self) -> None:
        self.must_end = True
        self.wake()

    def disconnect(self) -> None:
        """Record that the client has disconnected, and wake the asyncio task that awaits `wait`."""
        self.disconnected = True
        self.wake()

    async def wait(self) -> None:
        """Wait until `wake` is called, unless it was called since the last wait."""
        if not self.woken:
            waiter = self._waiter = asyncio.get_running_loop().create_future()
            is_idle = not (self._unsent or self._unsent_overdue_notices or self.seen_revisions)
            self.transport_if_idle = self.client_transport if is_idle else None
            try:
                await waiter
            finally:
                self._waiter = self.transport_if_idle = None
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
