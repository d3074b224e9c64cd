"""Hits, answered by the connection: no scope, no task, one write.

    bytes -> a request like the connection's last one -> a hit? -> out
          -> a complete head                          -> a hit? -> out
                                                      -> an exchange with the application

What a hit is, and what it is answered with, `api.hits` decides.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from gateway.api.cached_responses import CachedResponse, CachedResponses, RequestTraits
from gateway.api.requests import Headers
from gateway.server.connection import Connection
from gateway.server.exchange import STATUS_LINES
from gateway.server.framing import Head

_LONGEST_LEARNT = 2048  # bytes of a request: of thousands of connections each one's last is remembered

_METHOD, _VERSION = b"GET ", b" HTTP/1.1\r\n"


class HeadRenderer:
    """Renders the heads of hits up to the request's id."""

    def __init__(self, names: Mapping[int, Sequence[bytes]]) -> None:
        self._names = names
        self._server_headers: Headers = []
        self._formats: dict[int, bytes] = {}

    def render(self, hit: CachedResponse, server_headers: Headers) -> bytes:
        """Return a hit's head. uvicorn makes another list of its headers when they change: each second.

        Raises: ValueError for a value with a line break.
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


class FastPathConnection(Connection):
    """A connection that answers hits."""

    hits: CachedResponses
    heads: HeadRenderer

    __slots__ = (
        "_last",
    )  # the last request, if a hit that came alone: whole, its target, all behind it, its wishes

    _last: tuple[bytes, bytes, bytes, RequestTraits] | None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for a first request."""
        self._last = None
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Answer a hit like the last one; frame all else."""
        if self._last is not None and not self.policy.draining:
            whole, target, rest, traits = self._last
            if data != whole:
                alike = (
                    data.startswith(_METHOD)
                    and data.endswith(rest)
                    and len(data) <= self.policy.max_header_bytes
                )
                target = data[len(_METHOD) : -len(rest)] if alike else b""
            if target and not self._closing and not self.write_paused and self._answer(target, traits):
                # The state is idle, as it was: only the deadline moves.
                self._deadline.at = self.loop.time() + self.policy.keep_alive_seconds
                return
            self._last = None
        super().data_received(data)

    def _begin(self, data: bytes, head: Head) -> None:
        """Answer a hit, and hand any other request on."""
        self._last = None
        plain = head.method == b"GET" and head.keep_alive and head.content_length == 0
        if plain and not self._over_limit and not self.policy.draining:
            traits = self.hits.traits(head.headers)
            if traits is not None and self._answer(head.target, traits):
                if not self._buffer:
                    self._learn(data, head.target, traits)
                return
        super()._begin(data, head)

    def _answer(self, target: bytes, traits: RequestTraits) -> bool:
        """Answer if it is a hit, and tell whether it was."""
        found = self.hits.answer(target, traits, self.client)
        if found is None:
            return False
        hit, request_id = found
        state = self.server_state
        made_for, head = hit.rendered
        if made_for is not state.default_headers:
            head = self.heads.render(hit, state.default_headers)
        self.transport.write(b"%b%b\r\n\r\n%b" % (head, request_id, hit.body))
        state.total_requests += 1
        return True

    def _learn(self, data: bytes, target: bytes, traits: RequestTraits) -> None:
        """Remember the last request, a hit, if nothing came behind it.

        Another that differs in its target alone then need not be parsed: it is one request, complete and
        without a body, and it asks for the same.
        """
        start = _METHOD + target
        if len(data) <= _LONGEST_LEARNT and data.startswith(start + _VERSION):
            self._last = data, target, data[len(start) :], traits
