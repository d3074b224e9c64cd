"""ASGI extensions of our own server (`gateway/server`), with fallbacks for other servers.

They are in the scope's `extensions`. Two save memory and time with thousands of open streams: a callback on
disconnect instead of an asyncio task that awaits `receive`, and a way to send without waking one. The others
let requests with work for many tasks take turns, and check whether a client has left before its work begins.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Protocol, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from gateway.api.client_limits import client_key

# A dictionary whose values are called without arguments when the connection is lost. From then on
# DISCONNECTED is one of its keys, and values that are added later are never called.
ON_DISCONNECT = "gateway.on_disconnect"
DISCONNECTED = "disconnected"
CONNECTION = "gateway.connection"  # a `ServerConnection`, until the response ends or the client leaves

T = TypeVar("T")


class Turns(Protocol):
    """Lets requests do their work in turn."""

    async def turn(self, *, tasks: int, client: bytes) -> None:
        """Return when work for so many tasks may begin, perhaps in a later iteration of the event loop."""


class ServerConnection(Protocol):
    """What an endpoint may use of the connection of its request."""

    @property
    def heavy_work(self) -> Turns:
        """The turns of all requests of the server that have work for many tasks."""

    def client_transport(self) -> asyncio.WriteTransport | None:
        """Return the transport if the response has a body of unknown length, and its head has been sent.

        Parts may be written to it between two calls of `send`: as chunks if `is_chunked` says so.
        """

    def client_has_left(self) -> bool:
        """Ask the kernel whether the client has disconnected, and if so, close the connection.

        The event loop notices a disconnect a little later.
        """


def _connection_of(scope: Scope) -> ServerConnection | None:
    connection: ServerConnection | None = scope.get("extensions", {}).get(CONNECTION)
    return connection


def client_transport_of(scope: Scope) -> asyncio.WriteTransport | None:
    """Return the transport to which parts of this response may be written directly, if there is one.

    Call it after a part of the body was sent: until then the server may not have written the head.
    """
    connection = _connection_of(scope)
    return None if connection is None else connection.client_transport()


def require_connected(scope: Scope) -> None:
    """Check that the client is still connected. Raises: ClientDisconnect if it has left.

    Without this, clients that connect, send and leave would cause queries of which nothing is used. A client
    that half-closes its connection counts as one that has left.
    """
    connection = _connection_of(scope)
    has_left = DISCONNECTED in scope.get("extensions", {}).get(ON_DISCONNECT, ())
    if has_left or (connection is not None and connection.client_has_left()):
        raise ClientDisconnect


async def take_turn(scope: Scope, *, tasks: int, connected: bool = True) -> None:
    """Wait until the work for this many tasks may begin. Raises: ClientDisconnect if the client has left.

    So a burst of requests for a hundred tasks each does not delay all other clients. `connected`: false if
    the work needs no query, so that clients may half-close their connections.
    """
    if connected:
        require_connected(scope)
    connection = _connection_of(scope)
    if connection is not None:
        await connection.heavy_work.turn(tasks=tasks, client=client_key(scope))
        if connected:
            require_connected(scope)


def is_chunked(scope: Scope) -> bool:
    """Tell whether a body of unknown length is sent with the chunked transfer coding: not with HTTP/1.0."""
    return bool(scope["http_version"] == "1.1")


def chunk(part: bytes) -> bytes:
    """Return a part of a body as a chunk of the chunked transfer coding (RFC 9112, 7.1)."""
    return b"%x\r\n%b\r\n" % (len(part), part)


class DisconnectListener:
    """Calls `callback` when the client disconnects while the context is open.

    An ASGI server reports a disconnect through `receive`. A handler that waits for something else would not
    notice it. Without the extension, a separate task awaits `receive`.

    `tasks`: after a disconnect, leaving the context waits for the turn of the work for so many tasks, because
    the handler will now end its work for them.
    """

    __slots__ = ("_callback", "_callbacks", "_client", "_listener", "_receive", "_tasks", "_turns")

    def __init__(
        self, scope: Scope, receive: Receive, callback: Callable[[], None], *, tasks: int = 0
    ) -> None:
        extensions = scope.get("extensions", {})
        self._callbacks: dict[object, object] | None = extensions.get(ON_DISCONNECT)
        self._turns: Turns | None = None
        if tasks and CONNECTION in extensions:
            self._turns = extensions[CONNECTION].heavy_work
        self._client = client_key(scope)
        self._tasks = tasks
        self._receive = receive
        self._callback = callback
        self._listener: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        if self._callbacks is not None:
            self._callbacks[self] = self._callback
            if DISCONNECTED in self._callbacks:
                self._callback()
        else:
            self._listener = asyncio.create_task(self._listen())

    async def __aexit__(self, *exc_info: object) -> None:
        if self._callbacks is not None:
            self._callbacks.pop(self, None)
            if self._turns is not None and DISCONNECTED in self._callbacks:
                await self._turns.turn(tasks=self._tasks, client=self._client)
        if self._listener is not None:
            self._listener.cancel()
            with suppress(asyncio.CancelledError):
                await self._listener

    async def _listen(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass  # the body of a GET request is ignored
        self._callback()


async def while_connected(scope: Scope, receive: Receive, result: Coroutine[object, object, T]) -> T:
    """Await `result` for as long as the client stays connected.

    Raises: ClientDisconnect when the client disconnects, or has left before; `result` is cancelled.
    """
    try:
        require_connected(scope)
    except ClientDisconnect:
        result.close()
        raise
    loop = asyncio.get_running_loop()
    try:
        # The callback triggers this timeout, which cancels the task, and distinguishes its own cancellation
        # from any other.
        async with asyncio.timeout(None) as timeout:
            async with DisconnectListener(scope, receive, lambda: timeout.reschedule(loop.time())):
                return await result
    except TimeoutError:
        if timeout.expired():
            raise ClientDisconnect from None
        raise


async def all_while_connected(
    scope: Scope, receive: Receive, results: asyncio.Future[list[T]], *, tasks: int
) -> list[T]:
    """Await the results for so many tasks for as long as the client stays connected.

    Raises: ClientDisconnect when the client disconnects; the work for `results` is cancelled in its turn.
    """
    left: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    try:
        async with DisconnectListener(scope, receive, partial(_resolve, left), tasks=tasks):
            await asyncio.wait((results, left), return_when=asyncio.FIRST_COMPLETED)
        if left.done():
            raise ClientDisconnect
        return results.result()
    finally:
        results.add_done_callback(_retrieve_exception)
        results.cancel()
        del results  # a cancelled future keeps its exception, whose traceback refers to this frame


def _resolve(left: asyncio.Future[None]) -> None:
    if not left.done():
        left.set_result(None)


def _retrieve_exception(results: asyncio.Future[T]) -> None:
    """Keep asyncio from logging that nothing awaits a future that was cancelled."""
    if not results.cancelled():
        results.exception()
