"""Sends commands in batches: all waiting commands are written together, on one of a few connections.

A pipeline of redis-py takes less CPU time per command than single calls. And a long round trip makes a
command slow, but does not limit the number of commands per second.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any, NamedTuple

from redis.asyncio import Redis, RedisCluster
from redis.exceptions import ClusterDownError, NoScriptError

CONNECTIONS = 4  # batches in flight at the same time, each on its own connection
_MAX_BATCH = 256  # commands
_MAX_WAITS = 4  # if the event loop was busy, a batch waits for its timeout up to so many times
_BUSY_FACTOR = 1.5  # if a wait took longer than its timeout by this factor, the event loop was busy
# A command is sent once more after these errors: the server does not know the script yet, or a slot is moving
# from one node of a cluster to another, which takes a moment.
_SEND_AGAIN = (NoScriptError, ClusterDownError)


class Command(NamedTuple):
    """A command. If the server does not know its script, `with_script` is sent instead."""

    parts: tuple[Any, ...]
    with_script: tuple[Any, ...] | None = None


class Batches:
    """Sends commands through `client`. A batch has `timeout_seconds` for its replies."""

    def __init__(self, client: Redis | RedisCluster, *, timeout_seconds: float) -> None:
        self._client = client
        self._timeout_seconds = timeout_seconds
        self._waiting: deque[tuple[Command, asyncio.Future[Any]]] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._scheduled = False  # `_start` runs in the next iteration of the event loop

    async def send(self, command: Command) -> Any:
        """Return the reply to a command. Raises: any exception of redis-py, TimeoutError, OSError."""
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Any] = loop.create_future()
        self._waiting.append((command, reply))
        if not self._scheduled:  # commands of the same iteration of the event loop are sent together
            self._scheduled = True
            loop.call_soon(self._start)
        return await reply

    async def aclose(self) -> None:
        """Cancel all commands, and wait until their connections are free."""
        for _, reply in self._waiting:
            _fail(reply, ConnectionError("closed"))
        self._waiting.clear()
        for batch in self._running:
            batch.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _start(self) -> None:
        self._scheduled = False
        while self._waiting and len(self._running) < CONNECTIONS:
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), _MAX_BATCH))]
            task = asyncio.get_running_loop().create_task(self._run(batch))
            self._running.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._start()

    async def _run(self, batch: list[tuple[Command, asyncio.Future[Any]]]) -> None:
        try:
            replies = await self._replies([command.parts for command, _ in batch])
            again = [index for index, reply in enumerate(replies) if isinstance(reply, _SEND_AGAIN)]
            parts = [batch[index][0].with_script or batch[index][0].parts for index in again]
            for index, reply in zip(again, await self._replies(parts), strict=True):
                replies[index] = reply
        except BaseException as exc:
            failure = ConnectionError("closed") if isinstance(exc, asyncio.CancelledError) else exc
            # The server does not reply in time. So the queued commands fail now, not after another timeout.
            timed_out = isinstance(exc, TimeoutError)
            for _, reply in [*batch, *(self._waiting if timed_out else ())]:
                _fail(reply, failure)
            if timed_out:
                self._waiting.clear()
            if not isinstance(exc, Exception):
                raise
            return
        for (_, reply), value in zip(batch, replies, strict=True):
            if isinstance(value, Exception):
                _fail(reply, value)
            elif not reply.done():
                reply.set_result(value)

    async def _replies(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        if not commands:
            return []
        pipeline = self._client.pipeline(transaction=False)
        for parts in commands:
            pipeline.execute_command(*parts)
        sending = asyncio.ensure_future(pipeline.execute(raise_on_error=False))
        try:
            for _ in range(_MAX_WAITS):
                started = time.monotonic()
                await asyncio.wait({sending}, timeout=self._timeout_seconds)
                if sending.done():
                    return list(sending.result())
                if time.monotonic() - started < _BUSY_FACTOR * self._timeout_seconds:
                    break  # else the event loop was busy, and replies may wait in the socket
            raise TimeoutError
        finally:
            if not sending.done():
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
            elif not sending.cancelled():
                sending.exception()  # asyncio logs one that is not retrieved


def _fail(reply: asyncio.Future[Any], failure: BaseException) -> None:
    if not reply.done():
        reply.set_exception(failure)
        reply.exception()  # asyncio logs an error if its caller was cancelled
