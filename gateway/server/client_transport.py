"""The transport of a client connection: it writes with backpressure, pauses reading, and closes.

    write -> write buffer -> client
             the buffer is full -> `write_paused`; the client must read something within `stall_seconds`
    pause reading -> look for a disconnect each second, for at most `header_seconds`
    close -> send the rest of the write buffer -> read and drop input for a while -> closed

`Connection` is the subclass that reads.
"""

from __future__ import annotations

import asyncio
import math
import select
from collections.abc import Callable

from gateway.server.connection_limits import ConnectionLimits
from gateway.server.deadline import Deadline

LINGER_SECONDS = 2.0  # how long the client may keep sending after the last response
LINGER_BYTES = 262_144
_CHECK_SECONDS = 1.0  # interval of the checks for a disconnect
_DISCONNECT = getattr(select, "POLLRDHUP", 0)  # Linux only
_WRITE_BUFFER = 16_384  # bytes of unsent responses after which the writer waits


class ClientTransport(asyncio.Protocol):
    """The part of a connection that knows no requests; `Connection` adds them."""

    limits: ConnectionLimits

    __slots__ = (
        "_closing",  # the last response is written, or the connection is lost
        "_deadline",  # of the current state
        "_lingered",  # bytes dropped while closing
        "_paused_until",  # when a client is aborted that has sent too many later requests
        "_reading",
        "_unsent",  # bytes in the write buffer at the last check
        "_writable",  # set while writing is not paused
        "loop",
        "transport",
        "write_paused",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, on_expired: Callable[[], None]) -> None:
        self.loop = loop
        self._deadline = Deadline(loop, on_expired)
        self._lingered = self._unsent = 0
        self._writable: asyncio.Event | None = None
        self._reading = True
        self._paused_until = 0.0
        self._closing = self.write_paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport, and bound its buffers."""
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]  # always a full transport
        self.transport.set_write_buffer_limits(high=_WRITE_BUFFER)
        self.limits.bound_socket(self.transport.get_extra_info("socket"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer, and wake a writer that waits."""
        self._closing = True
        self._deadline.close()
        self.write_paused = False
        if self._writable is not None:
            self._writable.set()

    def request_dropped(self) -> None:
        """See `ClientConnection.request_dropped`."""
        self.limits.count_dropped_request()

    def pause_writing(self) -> None:
        """Start the stall timeout: the client reads more slowly than the server writes."""
        self.write_paused = True
        if self._writable is not None:
            self._writable.clear()
        self._unsent = self.transport.get_write_buffer_size()
        self._deadline.set(self.limits.stall_seconds)

    def resume_writing(self) -> None:
        """Continue: the client has read enough."""
        self.write_paused = False
        if self._writable is not None:
            self._writable.set()

    # Callbacks of the exchange (see `exchange.ClientConnection`).

    def write(self, data: bytes) -> None:
        """See `ClientConnection.write`."""
        if not self._closing and not self.transport.is_closing():
            self.transport.write(data)

    async def wait_writable(self) -> None:
        """See `ClientConnection.wait_writable`."""
        while self.write_paused:
            if self._writable is None:
                self._writable = asyncio.Event()
            await self._writable.wait()

    def client_has_left(self) -> bool:
        """See `ServerConnection.client_has_left`."""
        if self.transport.is_closing():
            return True
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket"), _DISCONNECT)
        if not poll.poll(0):
            return False
        self.transport.abort()
        return True

    # Reading.

    def _pause_reading(self) -> None:
        if self._reading:
            self._reading = False
            self.transport.pause_reading()
            self._paused_until = self.loop.time() + self.limits.header_seconds

    def _resume_reading(self) -> None:
        if not self._reading:
            self._reading = True
            self.transport.resume_reading()

    def _set_answering_deadline(self) -> None:
        """Set the deadline while a response is being sent: none, or the next check for a disconnect."""
        if self._reading:
            self._deadline.clear()
        else:
            self._deadline.set(min(_CHECK_SECONDS, self.limits.header_seconds))

    def _look_for_disconnect(self) -> None:
        """Begin to look for a disconnect each second while reading is paused, unless that has begun."""
        if self._deadline.at == math.inf:
            self._paused_until = self.loop.time() + self.limits.header_seconds
            self._set_answering_deadline()

    def _check_disconnect(self) -> None:
        """Abort if the client has disconnected, which the event loop does not notice while reading is paused.

        The kernel notices it only if the client's last bytes fit into its buffer. So the pause has a limit.
        """
        if not self._reading and self.loop.time() >= self._paused_until:
            self.transport.abort()
        elif not self.client_has_left():
            self._set_answering_deadline()

    # Closing.

    def _close_transport(self, *, linger: bool) -> None:
        """Close the connection when everything is written.

        `linger`: before closing, read and drop what the client still sends. If a socket is closed with unread
        bytes, the kernel resets the connection, and the client may lose the response (RFC 9112, 9.6).
        """
        self._closing = True
        self._unsent = self.transport.get_write_buffer_size()
        self._deadline.set(self.limits.stall_seconds if self._unsent else LINGER_SECONDS)
        if self.transport.is_closing():
            return
        if not linger:
            self.transport.close()
            return
        self._resume_reading()
        self.transport.write_eof()

    def _drop(self, data: bytes) -> None:
        """Drop input that arrives while the connection closes; abort if there is too much of it."""
        self._lingered += len(data)
        if self._lingered > LINGER_BYTES:
            self.transport.abort()

    def _check_stall(self) -> None:
        """Abort if the client has read nothing since the last check; otherwise restart the timeout."""
        unsent = self.transport.get_write_buffer_size()
        if not unsent or unsent >= self._unsent:
            self.transport.abort()
        else:
            self._unsent = unsent
            self._deadline.set(self.limits.stall_seconds)
