"""A transport that sends an answer's head and the first of its body together.

uvicorn writes them one after the other, and each write is a call into the kernel: a fifth of what an
answer costs. An application that sends its head and then waits is not held up: what is held back goes out
with the next turn of the event loop.
"""

from __future__ import annotations

import asyncio
from typing import Any

_START, _END = b"HTTP/1.1 ", b"\r\n\r\n"


class Cork:
    """Stands in the place of `transport` for whoever writes answers to it."""

    __slots__ = ("_head", "_loop", "_transport")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head = b""

    def write(self, data: bytes) -> None:
        """Write, after what is held back; a head is held back."""
        if self._head:
            head, self._head = self._head, b""
            self._transport.write(head + data)
        elif data.startswith(_START) and data.endswith(_END):
            self._head = data
            self._loop.call_soon(self.flush)
        else:
            self._transport.write(data)

    def flush(self) -> None:
        """Write what is held back."""
        if self._head:
            self.write(b"")

    def close(self) -> None:
        """Close the connection once all is written."""
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
