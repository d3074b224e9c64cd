"""The subscription to the replicas' channel; it also tells whether messages may be unread.

If the process was paused, or its event loop was busy, messages may wait in the socket. Then the next reader
of the cache calls `read_arrived_messages`. This method waits for a few iterations of the event loop, which
read the messages; it needs no reply of the server. While the cache is in use, a timer ticks. If the timer
ticks on time, there was no pause, and `read_arrived_messages` returns at once. The timer does not run in an
idle replica. A PING every second detects a connection that is dead but not closed.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from itertools import count
from typing import Any, Self

from redis.asyncio.client import PubSub

from gateway.stores.valkey.servers import StoreServers

PAUSE_SECONDS = 0.05  # after a longer pause, messages must be read before the cache is used
_TICK_SECONDS = 0.02
_TICKS = 50  # then the timer stops, until a reader of the cache starts it again
# So many iterations of the event loop without a message show that none is unread: one iteration reads the
# socket, one parses the message, and two are a reserve.
_QUIET_ITERATIONS = 4
_CATCH_UP_SECONDS = 1.0  # limit: messages may arrive as fast as they are read
_PING_SECONDS = 1.0
_LONGEST_TRIP_SECONDS = 1.0  # maximum of `round_trip_seconds`


class Subscription:
    """Reads messages while it is open (`async with`).

    `on_message` receives the messages. `on_up_to_date` receives a moment of the monotonic clock: until then,
    every message that reached this process more than `PAUSE_SECONDS` ago has been read.

    Attributes:
        round_trip_seconds: Estimated time between sending and arrival of a message: the last round trip.
        lost: Done when the connection has failed; its result is the reason.
    """

    def __init__(
        self,
        servers: StoreServers,
        *,
        timeout_seconds: float,
        on_message: Callable[[bytes], None],
        on_up_to_date: Callable[[float], None],
    ) -> None:
        self.round_trip_seconds = 0.0
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._servers = servers
        self._timeout_seconds = timeout_seconds
        self._on_message = on_message
        self._on_up_to_date = on_up_to_date
        self._up_to_date_until = -math.inf
        self._ticks = 0
        self._tick: asyncio.TimerHandle | None = None
        self._messages = 0
        self._catching_up: asyncio.Future[None] | None = None
        self._ping_numbers = count()
        self._pongs: dict[bytes, asyncio.Future[None]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Subscribe, and wait for the confirmation. Raises: servers.ERRORS."""
        try:
            pubsub = await self._servers.subscribe(self._stack)
            await pubsub.get_message(timeout=None)  # the confirmation
        except BaseException:
            await self._stack.aclose()
            raise
        for work in (self._read(pubsub), self._keep_pinging(pubsub)):
            task = asyncio.create_task(work)
            task.add_done_callback(self._ended)
            self._tasks.append(task)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close the connection."""
        if self._tick is not None:
            self._tick.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.lost.cancel()
        await self._stack.aclose()

    async def read_arrived_messages(self) -> bool:
        """Read all messages that have reached this process; return whether some may have been unread."""
        if time.monotonic() < self._up_to_date_until:
            return False
        if self._catching_up is not None:  # all callers wait for the same messages
            await asyncio.wait({self._catching_up})
            return True
        done = self._catching_up = asyncio.get_running_loop().create_future()
        try:
            quiet, until = 0, time.monotonic() + _CATCH_UP_SECONDS
            while quiet < _QUIET_ITERATIONS and time.monotonic() < until:
                messages = self._messages
                await asyncio.sleep(0)
                quiet = quiet + 1 if self._messages == messages else 0
        finally:
            self._catching_up = None
            done.set_result(None)
        if quiet == _QUIET_ITERATIONS:  # else the limit has passed, and messages are still unread
            self._extend()
            self._ticks = _TICKS
            if self._tick is None and not self.lost.done():
                self._start_timer()
        return True

    async def _read(self, pubsub: PubSub) -> None:
        while True:
            message = await pubsub.get_message(timeout=None)
            if message is None:
                continue
            self._messages += 1
            if message["type"] == "message":
                self._on_message(message["data"])
            elif message["type"] == "pong":
                pong = self._pongs.get(message["data"])
                if pong is not None and not pong.done():
                    pong.set_result(None)

    async def _keep_pinging(self, pubsub: PubSub) -> None:
        connection: Any = pubsub.connection  # redis-py types it as None
        while True:
            sent, pong = time.monotonic(), asyncio.get_running_loop().create_future()
            name = b"%d" % next(self._ping_numbers)
            self._pongs[name] = pong
            try:
                async with asyncio.timeout(self._timeout_seconds + PAUSE_SECONDS):
                    await connection.send_command("PING", name, check_health=False)
                    await pong
            except RuntimeError as exc:  # raised by uvloop for a closed transport
                raise ConnectionError("the connection is closed") from exc
            finally:
                del self._pongs[name]
            self.round_trip_seconds = min(time.monotonic() - sent, _LONGEST_TRIP_SECONDS)
            await asyncio.sleep(_PING_SECONDS)

    def _start_timer(self) -> None:
        self._tick = asyncio.get_running_loop().call_later(_TICK_SECONDS, self._on_tick)

    def _on_tick(self) -> None:
        """Extend the time until which no message is unread, unless the process was paused."""
        self._tick = None
        if self._ticks and time.monotonic() < self._up_to_date_until:
            self._ticks -= 1
            self._extend()
            self._start_timer()

    def _extend(self) -> None:
        self._up_to_date_until = time.monotonic() + PAUSE_SECONDS
        self._on_up_to_date(self._up_to_date_until)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and not self.lost.done() and (exc := task.exception()) is not None:
            self.lost.set_result(self._servers.reason_of(exc))
