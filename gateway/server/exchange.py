"""One request and its response, as an ASGI application sees them.

    head -> scope -> application task: receive <- parts of the body
                                       send    -> status line, headers, body -> one write

The head of a response waits for the first part of the body, and both are sent in one write: a write is a
fifth of the cost of a response. A body of unknown length is sent in chunks. An HTTP/1.0 client receives it
without chunks, and its end is the end of the connection.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from copy import copy
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import unquote

import structlog
from starlette.types import ASGIApp, Message, Scope
from uvicorn.server import ServerState

from gateway.api.server_extensions import CONNECTION, DISCONNECTED, ON_DISCONNECT, chunk
from gateway.domain.errors import GatewayError
from gateway.domain.paced_callbacks import PacedCallbacks
from gateway.server.framing import Head

MAX_BUFFERED_BODY = 65_536  # bytes of a request body that the application has not received yet

_FIELDS = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+: [\t\x20-\x7e\x80-\xff]*\r\n)*")
# Escapes that stay in the path: of "/" and of control characters. Decoded, they would change the route.
# Starlette's patterns also match before a final line break.
_KEPT_ESCAPES = re.compile(r"(%(?:[01][0-9A-Fa-f]|2[Ff]|7[Ff]))")
# A longer path matches no route, or has an invalid task ID. It stays encoded: 31 KB of escapes take 11 ms.
_LONGEST_DECODED = 1024
_WITHOUT_BODY = frozenset({HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED})
_BODY_IGNORED = frozenset({"GET", "HEAD"})
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_LAST_CHUNK = b"0\r\n\r\n"

log = structlog.get_logger(__name__)


def _status_line(status: int) -> bytes:
    phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()


STATUS_LINES = {status: _status_line(status) for status in range(200, 600)}


class ClientConnection(Protocol):
    """What an exchange uses of its connection to the client."""

    server_state: ServerState  # has the first headers of each response; uvicorn renews their Date
    write_paused: bool  # the write buffer is full: the client does not read fast enough
    heavy_work: PacedCallbacks  # for many tasks, or for a client that has left

    def write(self, data: bytes) -> None:
        """Send bytes to the client, unless it has disconnected."""

    async def wait_writable(self) -> None:
        """Wait until the client has read enough, or has disconnected."""

    def body_consumed(self) -> None:
        """Continue to read the request body."""

    def response_started(self) -> None:
        """Decide about keep-alive; called before the head of the response is rendered."""

    def client_has_left(self) -> bool:
        """Ask the kernel whether the client has disconnected, and if so, close the connection."""

    def request_dropped(self) -> None:
        """Count a request that does not start, because its client has left."""

    def response_complete(self, *, failed: bool) -> None:
        """Continue with the next request, or close. `failed`: the response is incomplete."""


def make_scope(
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
        "path": root_path + (_decode_path(path) if "%" in path else path),
        "raw_path": root_path.encode("ascii") + raw_path,
        "query_string": query,
        "headers": head.headers,
        "state": state,
        "extensions": extensions,
    }


def _decode_path(path: str) -> str:
    if len(path) > _LONGEST_DECODED:
        return path
    parts = _KEPT_ESCAPES.split(path)
    return "".join(part if number % 2 else unquote(part) for number, part in enumerate(parts))


class Exchange:
    """One request and its response."""

    __slots__ = (
        "_body",
        "_body_complete",
        "_body_delivered",
        "_body_error",
        "_chunked",
        "_connection",
        "_dropped",
        "_empty_message_due",
        "_expects_continue",
        "_head",
        "_length_left",
        "_waiter",
        "client_may_send_more",
        "complete",
        "disconnected",
        "keep_alive",
        "scope",
        "started",
        "streams_body",
    )

    def __init__(
        self,
        connection: ClientConnection,
        head: Head,
        scope: Scope,
        *,
        has_body: bool,
    ) -> None:
        self.scope = scope
        # The client may send another request before it reads the response.
        self.client_may_send_more = head.keep_alive
        self.keep_alive = head.keep_alive
        self.disconnected = False
        self.started = False  # the application has sent the response's head
        self.complete = False  # the application has sent the whole response
        self.streams_body = False  # the head is sent, and parts of a body of unknown length follow
        self._connection = connection
        self._expects_continue = head.expects_continue and has_body
        self._body = bytearray()
        self._dropped = 0  # bytes of a body without meaning
        self._body_complete = not has_body
        self._body_error: GatewayError | None = None
        self._body_delivered = not has_body  # the application has received the end of the body
        self._empty_message_due = not has_body  # ASGI: one empty message for a request without a body
        self._waiter: asyncio.Future[None] | None = None
        self._head = b""
        self._chunked = False
        self._length_left: int | None = None  # bytes until Content-Length is reached; None: no Content-Length

    @property
    def is_body_buffer_full(self) -> bool:
        """Whether the connection must not read until the application has received a part of the body."""
        return len(self._body) + self._dropped >= MAX_BUFFERED_BODY

    def body_received(self, part: bytes, *, complete: bool) -> None:
        """Buffer a part of the body for the application, unless the response is complete.

        The body of GET or HEAD has no meaning (RFC 9110, 9.3.1), and is dropped. Otherwise it would stay in
        memory for as long as a stream is open.
        """
        self._body_complete = complete
        if self.complete:
            return
        if self.scope["method"] in _BODY_IGNORED:
            self._dropped += len(part)
        else:
            self._body += part
        self._wake()

    def body_failed(self, error: GatewayError) -> None:
        """Mark the body as invalid: `receive` raises the error."""
        self._body_error = error
        self._wake()

    def disconnect(self) -> None:
        """Mark the client as disconnected, and call the listeners; further sends are ignored."""
        self.disconnected = True
        self._wake()
        extensions = self.scope["extensions"]
        # It refers to this exchange. Only the garbage collector would free that reference cycle.
        extensions.pop(CONNECTION, None)
        listeners: dict[object, Any] = extensions[ON_DISCONNECT]
        for callback in tuple(listeners.values()):
            callback()
        listeners[DISCONNECTED] = None

    async def run(self, app: ASGIApp) -> None:
        """Run the application; an unfinished response closes the connection."""
        if self.disconnected:  # the application would register its callback too late
            self._connection.request_dropped()
        else:
            await self._call(app)

    async def _call(self, app: ASGIApp) -> None:
        try:
            await app(self.scope, self.receive, self.send)
        except asyncio.CancelledError:
            pass  # the grace period of the shutdown is over
        except Exception as exc:
            log.exception("application_failed", exc_info=exc)
        finally:
            if not self.complete and not self.disconnected:
                self.complete = True
                self._connection.response_complete(failed=True)

    async def receive(self) -> Message:
        """Return the next part of the body, then wait for the disconnect (ASGI).

        Raises: GatewayError, a new one each time, if the body is invalid.
        """
        while not self.disconnected and not self.complete:
            if self._body_error is not None:
                raise copy(self._body_error)
            if self._body or self._empty_message_due or (self._body_complete and not self._body_delivered):
                body = bytes(self._body)
                self._body.clear()
                self._body_delivered = self._body_complete
                self._empty_message_due = False
                self._connection.body_consumed()
                return {"type": "http.request", "body": body, "more_body": not self._body_complete}
            if self._expects_continue:
                self._expects_continue = False
                self._connection.write(_CONTINUE)
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Send the head or a part of the body (ASGI). Raises: RuntimeError for an invalid message."""
        if self.disconnected:
            return
        if message["type"] == "http.response.start" and not self.started:
            self._start(message["status"], message.get("headers", ()))
        elif message["type"] == "http.response.body" and self.started and not self.complete:
            if self._connection.write_paused:
                await self._connection.wait_writable()
            if not self.disconnected:
                self._send_body(message.get("body", b""), last=not message.get("more_body", False))
        else:
            raise RuntimeError(f"unexpected ASGI message {message['type']!r}")

    def _start(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self._connection.response_started()
        if not self._body_delivered:
            # It is unknown whether the next bytes are the body or a new request.
            self.keep_alive = False
        self._expects_continue = False
        bodiless = self.scope["method"] == "HEAD" or status in _WITHOUT_BODY
        lines = []
        for name, value in (*self._connection.server_state.default_headers, *headers):
            lower = name.lower()
            if lower == b"content-length":
                self._length_left = int(value)
            elif lower == b"connection":
                self.keep_alive = self.keep_alive and value.lower() != b"close"
                continue
            lines.append(b"%b: %b\r\n" % (lower, value))
        if self._length_left is None and not bodiless:
            self._chunked = self.scope["http_version"] == "1.1"
            self.keep_alive = self.keep_alive and self._chunked
            if self._chunked:
                lines.append(b"transfer-encoding: chunked\r\n")
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        if bodiless:
            self._length_left = None
        fields = b"".join(lines)
        # A line break in a value would inject another header, or another response.
        if not _FIELDS.fullmatch(fields) or fields.count(b"\r\n") != len(lines):
            raise RuntimeError("the response has an invalid header")
        self._head = b"%b%b\r\n" % (STATUS_LINES[status], fields)
        self.started = True

    def _send_body(self, body: bytes, *, last: bool) -> None:
        if self.scope["method"] == "HEAD":
            body = b""
        if self._length_left is not None:
            self._length_left -= len(body)
            if self._length_left < 0 or (last and self._length_left):
                raise RuntimeError("the response body does not match its Content-Length")
        if self._chunked:
            body = (chunk(body) if body else b"") + (_LAST_CHUNK if last else b"")
        head, self._head = self._head, b""
        if head or body:
            self._connection.write(head + body)
        self.streams_body = self._length_left is None and not last
        if last:
            self.complete = True
            self._wake()
            self._connection.response_complete(failed=False)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


MakeExchange = Callable[..., Exchange]  # with the arguments of `Exchange`
