"""Who watches: one open stream or long poll each, and what there is to tell it.

    offered -> the slot of its task -> taken, one at a time, each as it is then

A slot holds a note of the newest update and no large body: readers that do not read keep none that the store
has let go. One slot of each watcher may hold a body. So a watcher that waits is told of a task whose body is
larger than the store. A body that has made room is asked for again, one at a time for each watcher.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace

from gateway.exceptions import GatewayError, UpstreamRejected
from gateway.models import Snapshot, TaskKey

_SMALL_BODY = 1024  # bytes, little beside what a schedule takes


@dataclass(slots=True, eq=False)
class Update:
    """What there is to tell about one task: its snapshot, or why there is none; both without envelopes."""

    key: TaskKey
    snapshot: Snapshot | None = None
    failure: GatewayError | None = None

    def __post_init__(self) -> None:
        if self.snapshot is not None and self.snapshot.envelope:
            self.snapshot = replace(self.snapshot, envelope=b"")
        if isinstance(self.failure, UpstreamRejected):
            self.failure = copy(self.failure)
            self.failure.envelope = b""

    def note(self) -> Update:
        """Return the same without the snapshot's body, if that is large."""
        if self.snapshot is None or len(self.snapshot.body) <= _SMALL_BODY:
            return self
        return Update(self.key, replace(self.snapshot, body=b""))

    @property
    def whole(self) -> bool:
        """Whether it can be told: it has the body, or is a failure."""
        return self.snapshot is None or bool(self.snapshot.body)

    def says_the_same(self, other: Update | None) -> bool:
        """Tell whether a watcher who knows `other` learns nothing from this."""
        if other is None:
            return False
        if self.snapshot is not None and other.snapshot is not None:
            return self.snapshot.etag == other.snapshot.etag
        return (
            self.failure is not None
            and other.failure is not None
            and (self.failure.code, str(self.failure)) == (other.failure.code, str(other.failure))
        )


class Watcher:
    """One open stream or long poll: a slot for each task, and a bell.

    `find` returns what a note in a slot is of, if it is held anywhere; `ask` has it offered again. `outlet`:
    where its reader may be written to past whoever waits in `rings`. `idle_outlet`: the same as long as a
    task waits there and no slot holds anything, for then nothing older is under way.
    """

    __slots__ = (
        "_ask",
        "_asked",
        "_find",
        "_held",
        "_slots",
        "_waiter",
        "client",
        "heartbeat_due",
        "hung_up",
        "idle_outlet",
        "keys",
        "leaving",
        "outlet",
        "rung",
    )

    def __init__(
        self,
        keys: Sequence[TaskKey],
        client: bytes,
        *,
        find: Callable[[Update, Watcher], Update | None] = lambda _note, _watcher: None,
        ask: Callable[[TaskKey, Watcher], None] = lambda _key, _watcher: None,
    ) -> None:
        self.keys = keys
        self.client = client
        self.leaving = False  # the gateway is: say farewell
        self.hung_up = False  # the reader is gone
        self._find = find
        self._ask = ask
        self._asked: TaskKey | None = None  # what was asked for again and has not come
        self._slots: dict[TaskKey, Update] = {}
        self._held: TaskKey | None = None  # whose slot has a body
        self.heartbeat_due = False
        self.outlet: asyncio.WriteTransport | None = None
        self.idle_outlet: asyncio.WriteTransport | None = None
        # A future in place of an asyncio.Event, whose queue alone takes 0.7 KB: one task waits here.
        self.rung = False
        self._waiter: asyncio.Future[None] | None = None

    def offer(self, update: Update, note: Update) -> None:
        """Put an update, or its note, into its slot, over one that was not taken yet."""
        if self._held is None or self._held == update.key:
            self._held = update.key
            self._slots[update.key] = update
        else:
            self._slots[update.key] = note
        if self._asked == update.key:
            self._asked = None
        self.ring()

    def is_offered(self, key: TaskKey) -> bool:
        """Tell whether a task's slot holds anything."""
        return key in self._slots

    def ring(self) -> None:
        """Wake the watcher: it is to look around."""
        self.rung = True
        self.idle_outlet = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def hang_up(self) -> None:
        """Note that the reader is gone, and wake the watcher to its end."""
        self.hung_up = True
        self.ring()

    async def rings(self) -> None:
        """Wait until the bell rings."""
        if not self.rung:
            self._waiter = asyncio.get_running_loop().create_future()
            self.idle_outlet = None if self._slots else self.outlet
            try:
                await self._waiter
            finally:
                self._waiter = self.idle_outlet = None
        self.rung = False

    def updates(self) -> Iterator[Update]:
        """Give what the slots hold, and empty each as it comes to it; but for what is not held anywhere."""
        for key in tuple(self._slots):
            note = self._slots.pop(key)
            if key == self._held:
                self._held = None
            update = note if note.whole else self._find(note, self)
            if update is not None:
                yield update
            elif self._slots.setdefault(key, note) is note and self._asked is None:
                self._asked = key
                self._ask(key, self)

    async def take(self) -> list[Update]:
        """Wait until the bell rings; return the updates since the last time, maybe none."""
        await self.rings()
        return list(self.updates())
