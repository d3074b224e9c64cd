"""One request and its response, as an ASGI application sees them.

    head -> scope -> the application's task: receive <- the body's parts
                                             send    -> status line, headers, body -> one write

The response's head waits for the first part of its body: both go out in one write. A body without a known
length is sent in chunks, to an HTTP/1.0 client up to the connection's end.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from copy import copy
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import unquote

import structlog
from starlette.types import ASGIApp, Message, Scope

from gateway.api.server_extensions import chunk
from gateway.domain.errors import GatewayError
from gateway.server.framing import Head

MAX_BUFFERED_BODY = 65_536  # bytes of a body that the application has not taken yet

_FIELDS = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+: [\t\x20-\x7e\x80-\xff]*\r\n)*")
_WITHOUT_BODY = frozenset({HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED})
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_LAST_CHUNK = b"0\r\n\r\n"

log = structlog.get_logger(__name__)


def _status_line(status: int) -> bytes:
    phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()


STATUS_LINES = {status: _status_line(status) for status in range(200, 600)}


class Peer(Protocol):
    """What an exchange needs of its connection."""

    write_paused: bool  # the client has not read enough of what was written

    def write(self, data: bytes) -> None:
        """Send bytes to the client, unless it is gone."""

    async def drain(self) -> None:
        """Wait until the client has read enough, or is gone."""

    def body_taken(self) -> None:
        """Go on reading the request's body."""

    def response_started(self) -> None:
        """Note that the response's head is about to be sent."""

    def response_complete(self, *, failed: bool) -> None:
        """Go on with the next request, or close; `failed`: the response is broken off."""


def scope_of(
    head: Head,
    *,
    root_path: str,
    client: tuple[str, int] | None,
    server: tuple[str, int | None] | None,
    state: dict[str, Any],
    extensions: dict[str, Any],
) -> Scope:
    """Return the ASGI scope of a request."""
    raw_path, _, query = head.target.partition(b"#")[0].partition(b"?")
    path = raw_path.decode("ascii")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": head.http_version,
        "server": server,
        "client": client,
        "scheme": "http",
        "method": head.method.decode("ascii"),
        "root_path": root_path,
        "path": root_path + (unquote(path) if "%" in path else path),
        "raw_path": root_path.encode("ascii") + raw_path,
        "query_string": query,
        "headers": head.headers,
        "state": state,
        "extensions": extensions,
    }


class Exchange:
    """A request under way. `default_headers` come first in every response."""

    __slots__ = (
        "_body",
        "_body_complete",
        "_body_error",
        "_chunked",
        "_default_headers",
        "_delivered",
        "_empty_due",
        "_expects_continue",
        "_head",
        "_left",
        "_peer",
        "_waiter",
        "client_goes_on",
        "complete",
        "disconnected",
        "keep_alive",
        "scope",
        "started",
        "streams_chunks",
    )

    def __init__(
        self,
        peer: Peer,
        scope: Scope,
        *,
        keep_alive: bool,
        has_body: bool,
        expects_continue: bool,
        default_headers: Sequence[tuple[bytes, bytes]],
    ) -> None:
        self.scope = scope
        self.client_goes_on = keep_alive  # it may send another request before it has read this response
        self.keep_alive = keep_alive
        self.disconnected = False  # the client is gone
        self.started = False  # the application has sent the response's head
        self.complete = False  # ... and all of its body
        self.streams_chunks = False  # the head is on the wire, and chunks follow
        self._peer = peer
        self._default_headers = default_headers
        self._expects_continue = expects_continue and has_body
        self._body = bytearray()
        self._body_complete = not has_body
        self._body_error: GatewayError | None = None
        self._delivered = not has_body  # to its end
        self._empty_due = not has_body  # the one empty message that an application gets for no body
        self._waiter: asyncio.Future[None] | None = None
        self._head = b""
        self._chunked = False
        self._left: int | None = None  # bytes that Content-Length promises; None: any number

    @property
    def body_full(self) -> bool:
        """Whether no more of the body should be read before the application takes some."""
        return len(self._body) >= MAX_BUFFERED_BODY

    def body_received(self, part: bytes, *, complete: bool) -> None:
        """Hand a part of the body to the application; it is dropped once the response is complete."""
        self._body_complete = complete
        if not self.complete:
            self._body += part
            self._wake()

    def body_failed(self, error: GatewayError) -> None:
        """Note that the body is broken: an application that wants it gets the error instead."""
        self._body_error = error
        self._wake()

    def disconnect(self) -> None:
        """Note that the client is gone; what the application still sends is lost."""
        self.disconnected = True
        self._wake()

    async def run(self, app: ASGIApp) -> None:
        """Run the application; a response that it leaves unfinished closes the connection."""
        if self.disconnected:
            return  # nothing would tell the application any more that the client is gone
        try:
            await app(self.scope, self.receive, self.send)
        except asyncio.CancelledError:
            pass  # the server has waited long enough; the application has answered what it could
        except Exception as exc:
            log.exception("application failed", exc_info=exc)
        finally:
            if not self.complete and not self.disconnected:
                self.complete = True
                self._peer.response_complete(failed=True)

    async def receive(self) -> Message:
        """Return the next part of the body, or wait for the disconnect (ASGI).

        Raises: GatewayError, a new one each time, where the body is broken.
        """
        while not self.disconnected and not self.complete:
            if self._body_error is not None:
                raise copy(self._body_error)
            if self._body or self._empty_due or (self._body_complete and not self._delivered):
                body = bytes(self._body)
                self._body.clear()
                self._delivered = self._body_complete
                self._empty_due = False
                self._peer.body_taken()
                return {"type": "http.request", "body": body, "more_body": not self._body_complete}
            if self._expects_continue:
                self._expects_continue = False
                self._peer.write(_CONTINUE)
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Send the response's head or a part of its body (ASGI). Raises: RuntimeError when it is wrong."""
        if self.disconnected:
            return
        if message["type"] == "http.response.start" and not self.started:
            self._start(message["status"], message.get("headers", ()))
        elif message["type"] == "http.response.body" and self.started and not self.complete:
            if self._peer.write_paused:
                await self._peer.drain()
            if not self.disconnected:
                self._send_body(message.get("body", b""), last=not message.get("more_body", False))
        else:
            raise RuntimeError(f"unexpected ASGI message {message['type']!r}")

    def _start(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self._peer.response_started()
        if not self._delivered:
            # The client may still send the body, or may never do it: the next request could be taken for it.
            self.keep_alive = False
        self._expects_continue = False
        bodiless = self.scope["method"] == "HEAD" or status in _WITHOUT_BODY
        lines = []
        for name, value in (*self._default_headers, *headers):
            lower = name.lower()
            if lower == b"content-length":
                self._left = int(value)
            elif lower == b"connection":
                self.keep_alive = self.keep_alive and value.lower() != b"close"
                continue
            lines.append(b"%b: %b\r\n" % (lower, value))
        if self._left is None and not bodiless:
            self._chunked = self.scope["http_version"] == "1.1"
            self.keep_alive = self.keep_alive and self._chunked
            if self._chunked:
                lines.append(b"transfer-encoding: chunked\r\n")
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        if bodiless:
            self._left = None
        fields = b"".join(lines)
        # A line break in a value would be another header, or another response.
        if not _FIELDS.fullmatch(fields) or fields.count(b"\r\n") != len(lines):
            raise RuntimeError("the response has an invalid header")
        self._head = b"%b%b\r\n" % (STATUS_LINES[status], fields)
        self.started = True

    def _send_body(self, body: bytes, *, last: bool) -> None:
        if self.scope["method"] == "HEAD":
            body = b""
        if self._left is not None:
            self._left -= len(body)
            if self._left < 0 or (last and self._left):
                raise RuntimeError("the response's body is not as long as its Content-Length")
        if self._chunked:
            body = (chunk(body) if body else b"") + (_LAST_CHUNK if last else b"")
        head, self._head = self._head, b""
        if head or body:
            self._peer.write(head + body)
        self.streams_chunks = self._chunked and not last
        if last:
            self.complete = True
            self._wake()
            self._peer.response_complete(failed=False)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
