"""Serves simple requests directly from the connection, without the ASGI application.

    bytes equal the last request, except for the target -> a hit         -> write, without parsing
    all other bytes -> parse the head                   -> a hit         -> write
                                                        -> a simple miss -> wait -> write
                                                        -> else          -> exchange with the application

A hit needs no ASGI scope and no asyncio task. The setting `server.edge` turns this on or off; traces turn it
off. `api.cached_responses` decides whether a request is a hit or a simple miss, and builds the response.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from gateway.api.cached_responses import CachedResponse, CachedResponses, RequestTraits
from gateway.api.client_limits import client_key
from gateway.api.requests import FAILURE, Headers
from gateway.domain.task import TaskKey
from gateway.server.connection import Connection
from gateway.server.exchange import STATUS_LINES, Exchange, MakeExchange
from gateway.server.framing import Head

_MAX_REMEMBERED = 2048  # bytes of a request: each of thousands of connections may remember its last one

_METHOD, _VERSION = b"GET ", b" HTTP/1.1\r\n"


class HeadRenderer:
    """Renders the heads of cached responses up to the request ID."""

    def __init__(self, names: Mapping[int, Sequence[bytes]]) -> None:
        self._names = names
        self._server_headers: Headers = []
        self._formats: dict[int, bytes] = {}

    def render(self, hit: CachedResponse, server_headers: Headers) -> bytes:
        """Return the head of a hit. uvicorn replaces its list of headers each second, for the Date header.

        Raises: ValueError if a value contains a line break.
        """
        if server_headers is not self._server_headers or not self._formats:
            self._server_headers = server_headers
            self._formats = {status: self._format(status) for status in self._names}
        template = self._formats[hit.status]
        head = template % hit.values
        if head.count(b"\n") != template.count(b"\n"):
            raise ValueError("a header with a line break")
        hit.rendered = (server_headers, head)
        return head

    def _format(self, status: int) -> bytes:
        lines = [(name.lower() + b": " + value).replace(b"%", b"%%") for name, value in self._server_headers]
        lines += [name + b": %b" for name in self._names[status]]
        return STATUS_LINES[status] + b"\r\n".join([*lines, b"x-request-id: "])


class SimpleMiss(Exchange):
    """A request that waits for the result of a miss. The application is called only if this fails."""

    __slots__ = ("_heads", "_hits", "_key", "_task", "_traits")

    def __init__(
        self,
        hits: CachedResponses,
        heads: HeadRenderer,
        key: TaskKey,
        traits: RequestTraits,
        *args: Any,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._hits = hits
        self._heads = heads
        self._key = key
        self._traits = traits
        self._task: asyncio.Task[None] | None = None

    def disconnect(self) -> None:
        """Stop waiting."""
        super().disconnect()
        if self._task is not None:
            self._task.cancel()

    async def _call(self, app: ASGIApp) -> None:
        """Wait for the response, and send it. On a failure, let the application send the error."""
        self._task = asyncio.current_task()
        try:
            if self._connection.client_has_left():
                raise ClientDisconnect  # noqa: TRY301  # handled like the other failures
            response, request_id = await self._hits.wait(self._key, self._traits, self.scope)
            head = self._heads.render(response, self._connection.server_state.default_headers)
        except (asyncio.CancelledError, Exception) as exc:  # noqa: BLE001  # the application reports it
            self._task = None
            left = self.disconnected or isinstance(exc, ClientDisconnect)
            self.scope["state"][FAILURE] = ClientDisconnect() if left else exc
            if left:  # the application only writes the log, for few clients at a time
                await self._connection.heavy_work.turn(tasks=1, client=client_key(self.scope))
            await super()._call(app)
            return
        self._connection.response_started()
        close = b"" if self.keep_alive else b"connection: close\r\n"
        self._connection.write(b"%b%b\r\n%b\r\n%b" % (head, request_id, close, response.body))
        self.started = self.complete = True
        self._connection.response_complete(failed=False)


class FastPathConnection(Connection):
    """A connection that serves cached responses without the application."""

    hits: CachedResponses
    heads: HeadRenderer

    __slots__ = ("_last",)

    # The last request, if it was a hit and no other bytes followed: the whole request, its target, the bytes
    # after the target, and its traits.
    _last: tuple[bytes, bytes, bytes, RequestTraits] | None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the first request."""
        self._last = None
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Serve a hit without parsing, if only its target is new since the last request. Parse all else."""
        if self._last is not None and not self.limits.draining:
            whole, target, rest, traits = self._last
            if data != whole:
                same_form = (
                    data.startswith(_METHOD)
                    and data.endswith(rest)
                    and len(data) <= self.limits.max_header_bytes
                )
                target = data[len(_METHOD) : -len(rest)] if same_form else b""
            if target and not (self._closing or self.write_paused or self._waits_for_turn):
                turns = self.request_turns
                if turns.at_once > 0:  # not a call: it would cost a tenth of the hits
                    turns.at_once -= 1
                elif not self._take_turn(len(data)):
                    self._buffer += data
                    return
                if self._serve_hit(target, traits):
                    if not self.write_paused:  # else the deadline for a client that does not read stays
                        # The state is still idle: only the deadline moves.
                        self._deadline.at = self.loop.time() + self.limits.keep_alive_seconds
                    return
            self._last = None
        super().data_received(data)

    def _on_turn(self) -> None:
        if self._last is None:
            super()._on_turn()
            return
        data = bytes(self._buffer)
        self._buffer.clear()
        self.data_received(data)

    def _start_request(self, data: bytes, head: Head, make_exchange: MakeExchange = Exchange) -> None:
        """Serve a hit, or wait for the result of a simple miss; pass any other request on."""
        self._last = None
        plain = head.method == b"GET" and head.keep_alive and head.content_length == 0
        if plain and not self._over_limit and not self.limits.draining:
            traits = self.hits.traits(head.headers)
            if traits is not None and self._serve_hit(head.target, traits):
                if not self._buffer:
                    self._remember(data, head.target, traits)
                return
            if traits is not None and (key := self.hits.task_of_miss(head.target)) is not None:
                make_exchange = partial(SimpleMiss, self.hits, self.heads, key, traits)
        super()._start_request(data, head, make_exchange)

    def _serve_hit(self, target: bytes, traits: RequestTraits) -> bool:
        """Serve the request if it is a hit; tell whether it was one."""
        answer = self.hits.answer(target, traits, self.client)
        if answer is None:
            return False
        hit, request_id = answer
        state = self.server_state
        rendered_for, head = hit.rendered
        if rendered_for is not state.default_headers:
            head = self.heads.render(hit, state.default_headers)
        self.transport.write(b"%b%b\r\n\r\n%b" % (head, request_id, hit.body))
        state.total_requests += 1
        return True

    def _remember(self, data: bytes, target: bytes, traits: RequestTraits) -> None:
        """Remember a hit after which no other bytes were received.

        If a later request differs from it only in the target, that request need not be parsed: it is one
        complete request without a body, and has the same traits.
        """
        start = _METHOD + target
        if len(data) <= _MAX_REMEMBERED and data.startswith(start + _VERSION):
            self._last = data, target, data[len(start) :], traits
