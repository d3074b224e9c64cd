"""What our own server (`edge/`) offers for a request beyond ASGI; on any other, ASGI must do.

It stands in the scope's `extensions`, and is worth its place with thousands of open streams: a
call when the caller leaves in place of a task that receives, and a way to send that wakes nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

# A dictionary: its values are called, without arguments, when the connection is lost. From then on LOST is
# among its keys: what comes later is never called.
ON_DISCONNECT = "gateway.on_hang_up"
DISCONNECTED = "lost"
# A callable: returns the connection's transport, on which chunks of a streamed body may be written between
# two that are sent; None where the body that is being sent is not one of chunks.
DIRECT_TRANSPORT = "gateway.outlet"

T = TypeVar("T")


def direct_transport_of(scope: Scope) -> asyncio.WriteTransport | None:
    """Return where chunks of this request's answer may be written, if the server lets us.

    To be asked once a part of the body was sent: until then the head may be held back.
    """
    find: Callable[[], asyncio.WriteTransport | None] | None = scope.get("extensions", {}).get(
        DIRECT_TRANSPORT
    )
    return None if find is None else find()


def chunk(part: bytes) -> bytes:
    """Return a part of a body as it stands on the wire (RFC 9112, 7.1)."""
    return b"%x\r\n%b\r\n" % (len(part), part)


class DisconnectListener:
    """Calls `notice` when the caller leaves while the context is open.

    An ASGI server tells a disconnect to whoever receives, and a handler that only waits never
    would: without the extension, a task of its own receives.
    """

    __slots__ = ("_listening", "_notice", "_receive", "_subscribers")

    def __init__(self, scope: Scope, receive: Receive, notice: Callable[[], None]) -> None:
        self._subscribers: dict[object, object] | None = scope.get("extensions", {}).get(ON_DISCONNECT)
        self._receive = receive
        self._notice = notice
        self._listening: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        if self._subscribers is not None:
            self._subscribers[self] = self._notice
            if DISCONNECTED in self._subscribers:
                self._notice()
        else:
            self._listening = asyncio.create_task(self._listen())

    async def __aexit__(self, *exc_info: object) -> None:
        if self._subscribers is not None:
            self._subscribers.pop(self, None)
        if self._listening is not None:
            self._listening.cancel()
            with suppress(asyncio.CancelledError):
                await self._listening

    async def _listen(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass  # a GET's body says nothing
        self._notice()


async def while_connected(scope: Scope, receive: Receive, answer: Awaitable[T]) -> T:
    """Return an answer that has to be waited for, as long as its caller does.

    Raises: ClientDisconnect, when the caller leaves; `answer` is cancelled.
    """
    loop = asyncio.get_running_loop()
    try:
        # A time-out that is set off by hand: it cancels this task, and knows that cancellation from others.
        async with asyncio.timeout(None) as patience:
            async with DisconnectListener(scope, receive, lambda: patience.reschedule(loop.time())):
                return await answer
    except TimeoutError:
        if patience.expired():
            raise ClientDisconnect from None
        raise
