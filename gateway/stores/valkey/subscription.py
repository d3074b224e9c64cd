"""What the servers publish: read as it comes, and known to be whole up to a moment.

    subscribe -> PING, and what was published before it is read once its PONG is -> `sure_until`
    a slot has moved -> subscribe where it is now; what was published in between is missed: `on_gap`

A server answers in order. So its PONG says, without a question for each task, that nothing published before
the PING is still under way; and what is published later is not shown for `NEWS_SECONDS`.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection, Coroutine
from contextlib import AsyncExitStack
from typing import Any, Self

from redis.asyncio.client import PubSub
from redis.exceptions import ResponseError

from gateway.stores.valkey.backends import SLOTS, Address, RedisBackends

# How long news may be under way to every replica. It costs the change of a task so much; a replica whose
# loop, server or network stood still for longer asks before it shows anything.
NEWS_SECONDS = 0.05
_SURE_SECONDS = 0.9 * NEWS_SECONDS  # the rest is for what is not known of the clocks
_PING_SECONDS = 0.02
_PINGS_LATE = 3  # times the patience mean that the connection is dead
_MOVE_SECONDS = 2.0  # for a slot that has moved to be found
_LOOK_SECONDS = 0.02


class _Subscription:
    """A connection that is subscribed."""

    def __init__(self, subscription: PubSub) -> None:
        self.subscription = subscription
        self.pinged_at = -math.inf
        self.sure_until = -math.inf
        self.pong = asyncio.Event()


class Subscriptions:
    """Reads what is published. Open it with `async with`; then it follows by itself until `lost` is done.

    `on_message` gets what is published, `on_sure` the moment until which nothing was missed, on the
    monotonic clock, and `on_gap` the slots of which something may have been.
    """

    def __init__(
        self,
        servers: RedisBackends,
        *,
        timeout_seconds: float,
        on_message: Callable[[bytes], None],
        on_sure: Callable[[float], None],
        on_gap: Callable[[Collection[int]], None],
    ) -> None:
        self._servers = servers
        self._patience_seconds = timeout_seconds
        self._on_message = on_message
        self._on_sure = on_sure
        self._on_gap = on_gap
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._subscriptions: dict[Address, _Subscription] = {}
        self._slots = {servers.channel(slot).encode(): slot for slot in range(SLOTS)}
        self._missing = set(range(SLOTS))  # slots whose channels are not subscribed to
        self._gap: set[int] = set()  # slots of which something may have been missed
        self._found = asyncio.Event()  # when none is missing
        self._moved = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Subscribe to the channels of all slots. Raises: servers.ERRORS."""
        try:
            await self._find()
        except BaseException:
            await self.__aexit__()
            raise
        self._start(self._follow())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close every connection."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if not self.lost.cancel() and not self.lost.cancelled():
            self.lost.exception()  # looked at, or asyncio complains
        await self._stack.aclose()

    async def _follow(self) -> None:
        while True:
            await self._moved.wait()
            async with asyncio.timeout(_MOVE_SECONDS):
                await self._find()
            gap, self._gap = self._gap, set()
            self._on_gap(gap)
            self._reckon()

    async def _find(self) -> None:
        """Subscribe to the channels that are missing, wherever their slots are by now."""
        while self._missing:
            self._moved.clear()
            for address, slots in self._servers.owners(self._missing).items():
                feed = self._subscriptions.get(address)
                if feed is None:
                    feed = self._subscriptions[address] = _Subscription(
                        await self._servers.subscription(address, self._stack)
                    )
                    await self._servers.subscribe(feed.subscription, slots)
                    self._start(self._read(feed))
                    self._start(self._ping(feed))
                else:
                    await self._servers.subscribe(feed.subscription, slots)
            events = [asyncio.create_task(event.wait()) for event in (self._found, self._moved)]
            try:
                waiting: set[asyncio.Future[Any]] = {*events, self.lost}
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for event in events:
                    event.cancel()
            if self.lost.done():
                self.lost.result()
            if self._missing:
                # Servers learn of a move one after the other: whoever was asked may not know yet.
                await asyncio.sleep(_LOOK_SECONDS)
                await self._servers.look_around()
        self._moved.clear()

    async def _read(self, feed: _Subscription) -> None:
        while True:
            try:
                message = await feed.subscription.get_message(timeout=None)
            except ResponseError:  # a slot was asked for where it is not, or no more
                self._moved.set()
                continue
            match message["type"]:
                case "message" | "smessage":
                    self._on_message(message["data"])
                case "pong":
                    feed.sure_until = feed.pinged_at + _SURE_SECONDS
                    feed.pong.set()
                    self._reckon()
                case "subscribe" | "ssubscribe":
                    self._missing.discard(self._slots[message["channel"]])
                    if not self._missing:
                        self._found.set()
                case "sunsubscribe":
                    slot = self._slots[message["channel"]]
                    self._missing.add(slot)
                    self._gap.add(slot)
                    self._found.clear()
                    self._moved.set()
                    self._reckon()

    async def _ping(self, feed: _Subscription) -> None:
        connection: Any = feed.subscription.connection  # its type says that it never has one
        while True:
            feed.pong.clear()
            feed.pinged_at = time.monotonic()
            try:
                # Fifty times a second: the subscription's own way, which would connect again and try again,
                # costs a third more.
                await connection.send_command("PING", check_health=False)
            except RuntimeError as exc:  # uvloop's word for a transport that is closed
                raise ConnectionError("the subscription's connection is closed") from exc
            await asyncio.sleep(_PING_SECONDS)
            if not feed.pong.is_set():
                async with asyncio.timeout(_PINGS_LATE * self._patience_seconds):
                    await feed.pong.wait()

    def _reckon(self) -> None:
        whole = not self._missing and not self._gap
        self._on_sure(min(feed.sure_until for feed in self._subscriptions.values()) if whole else -math.inf)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and not self.lost.done() and (exc := task.exception()) is not None:
            self.lost.set_exception(exc)
