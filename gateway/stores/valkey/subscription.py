"""Subscriptions to the servers' channels, and the read barrier up to which they are complete.

    subscribe -> PING; with its PONG, everything published before has been read -> `sure_until`
    a slot has moved -> subscribe at its new server; messages in between are missed: `on_gap`

A server sends in order. So a PONG proves, without a query for each task, that all messages published before
the PING have arrived. Messages published later are not visible for `NEWS_SECONDS`.
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

# Maximum time for a message to reach every replica. Each change of a task becomes visible after this delay.
# A replica whose event loop, server or network stalls for longer queries the server before it serves a
# snapshot.
NEWS_SECONDS = 0.05
_SURE_SECONDS = 0.9 * NEWS_SECONDS  # the rest is a margin for clock uncertainty
_PING_SECONDS = 0.02
_PINGS_LATE = 3  # the connection is dead after this many timeouts without a PONG
_MOVE_SECONDS = 2.0  # timeout to find a slot that has moved
_RETRY_SECONDS = 0.02


class _Subscription:
    """A subscribed connection."""

    def __init__(self, pubsub: PubSub) -> None:
        self.pubsub = pubsub
        self.pinged_at = -math.inf
        self.sure_until = -math.inf
        self.pong = asyncio.Event()


class Subscriptions:
    """Reads published messages. Opened with `async with`, it runs until `lost` is done.

    `on_message` receives the messages, `on_sure` the read barrier (monotonic clock), and `on_gap` the slots
    whose messages may have been missed.
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
        self._timeout_seconds = timeout_seconds
        self._on_message = on_message
        self._on_sure = on_sure
        self._on_gap = on_gap
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._subscriptions: dict[Address, _Subscription] = {}
        self._slots = {servers.channel(slot).encode(): slot for slot in range(SLOTS)}
        self._missing = set(range(SLOTS))  # slots without a subscription
        self._gap: set[int] = set()  # slots whose messages may have been missed
        self._found = asyncio.Event()  # set while no slot is missing
        self._moved = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Subscribe to the channels of all slots. Raises: servers.ERRORS."""
        try:
            await self._subscribe_missing()
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
            self.lost.exception()  # mark the exception as retrieved, or asyncio logs it
        await self._stack.aclose()

    async def _follow(self) -> None:
        while True:
            await self._moved.wait()
            async with asyncio.timeout(_MOVE_SECONDS):
                await self._subscribe_missing()
            gap, self._gap = self._gap, set()
            self._on_gap(gap)
            self._update_barrier()

    async def _subscribe_missing(self) -> None:
        """Subscribe to the missing channels at the current servers of their slots."""
        while self._missing:
            self._moved.clear()
            for address, slots in self._servers.owners(self._missing).items():
                subscription = self._subscriptions.get(address)
                if subscription is None:
                    subscription = self._subscriptions[address] = _Subscription(
                        await self._servers.subscription(address, self._stack)
                    )
                    await self._servers.subscribe(subscription.pubsub, slots)
                    self._start(self._read(subscription))
                    self._start(self._ping(subscription))
                else:
                    await self._servers.subscribe(subscription.pubsub, slots)
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
                # The nodes learn of a moved slot one after the other: retry until all agree.
                await asyncio.sleep(_RETRY_SECONDS)
                await self._servers.refresh_topology()
        self._moved.clear()

    async def _read(self, subscription: _Subscription) -> None:
        while True:
            try:
                message = await subscription.pubsub.get_message(timeout=None)
            except ResponseError:  # the server does not own the slot
                self._moved.set()
                continue
            match message["type"]:
                case "message" | "smessage":
                    self._on_message(message["data"])
                case "pong":
                    subscription.sure_until = subscription.pinged_at + _SURE_SECONDS
                    subscription.pong.set()
                    self._update_barrier()
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
                    self._update_barrier()

    async def _ping(self, subscription: _Subscription) -> None:
        connection: Any = subscription.pubsub.connection  # redis-py types it as None
        while True:
            subscription.pong.clear()
            subscription.pinged_at = time.monotonic()
            try:
                # Fifty times a second: PubSub.ping, which also reconnects and retries, costs a third more.
                await connection.send_command("PING", check_health=False)
            except RuntimeError as exc:  # raised by uvloop for a closed transport
                raise ConnectionError("the subscription's connection is closed") from exc
            await asyncio.sleep(_PING_SECONDS)
            if not subscription.pong.is_set():
                async with asyncio.timeout(_PINGS_LATE * self._timeout_seconds):
                    await subscription.pong.wait()

    def _update_barrier(self) -> None:
        complete = not self._missing and not self._gap
        self._on_sure(
            min(subscription.sure_until for subscription in self._subscriptions.values())
            if complete
            else -math.inf
        )

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and not self.lost.done() and (exc := task.exception()) is not None:
            self.lost.set_exception(exc)
