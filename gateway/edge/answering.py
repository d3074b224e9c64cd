"""Hits, answered in uvicorn's protocol: no scope, no task, one write.

    bytes -> a request like the connection's last one -> a hit? -> out
          -> uvicorn's parser -> headers complete     -> a hit? -> out
                                                      -> uvicorn, which calls the application

What a hit is, and what it is answered with, `api.hits` decides.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from gateway.api.hits import Hit, Hits, Wishes
from gateway.api.requests import Headers
from gateway.edge.bounds import BoundedProtocol

# Answering in uvicorn's place takes knowledge of its parts that it does not promise to keep.
TESTED = frozenset({"0.53", "0.54"})

_LONGEST_LEARNT = 2048  # bytes of a request: of thousands of connections each one's last is remembered

_METHOD, _VERSION, _END = b"GET ", b" HTTP/1.1\r\n", b"\r\n\r\n"


class Heads:
    """Renders the heads of hits up to the request's id, as uvicorn does."""

    def __init__(self, names: Mapping[int, Sequence[bytes]]) -> None:
        self._names = names
        self._server_headers: Headers = []
        self._formats: dict[int, bytes] = {}

    def render(self, hit: Hit, server_headers: Headers) -> bytes:
        """Return a hit's head. uvicorn makes another list of its headers when they change: each second."""
        if server_headers is not self._server_headers or not self._formats:
            self._server_headers = server_headers
            self._formats = {status: self._format(status) for status in self._names}
        head = self._formats[hit.status] % hit.values
        hit.rendered = (server_headers, head)
        return head

    def _format(self, status: int) -> bytes:
        lines = [(name.lower() + b": " + value).replace(b"%", b"%%") for name, value in self._server_headers]
        lines += [name + b": %b" for name in self._names[status]]
        return STATUS_LINE[status] + b"\r\n".join([*lines, b"x-request-id: "])


class AnsweringProtocol(BoundedProtocol):
    """uvicorn's protocol, with the bounds, and with hits answered."""

    hits: Hits
    heads: Heads

    __slots__ = (
        "_answered_at",  # on the loop's clock, the last hit
        "_last",  # the last request, if a hit that came alone: whole, its target, all behind it, its wishes
        "_open",  # a request has begun, and is not complete
        "_wishes",  # those of the request that is parsed, if it is a hit
    )

    _last: tuple[bytes, bytes, bytes, Wishes] | None
    _wishes: Wishes | None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for a first request."""
        self._open = False
        self._last = self._wishes = None
        self._answered_at = 0.0
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Answer a hit like the last one; parse all else."""
        if self._last is not None:
            whole, target, rest, wishes = self._last
            if data != whole:
                alike = (
                    data.startswith(_METHOD) and data.endswith(rest) and len(data) <= self.max_header_bytes
                )
                target = data[len(_METHOD) : -len(rest)] if alike else b""
            if target and self._answer(target, wishes):
                return
            self._last = None
        between_requests = not self._open
        super().data_received(data)
        if self._wishes is not None and between_requests:
            self._learn(data, self._wishes)

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self._open = True
        self._wishes = None

    def on_headers_complete(self) -> None:
        """Answer a hit, and hand any other request on."""
        self._end_headers()
        if self._may_answer():
            wishes = self.hits.wishes(self.headers)
            if wishes is not None and self._answer(self.url, wishes):
                self._wishes = wishes
                return
        self._hand_on()

    def on_message_complete(self) -> None:
        """End a request."""
        self._open = False
        if self._wishes is None:  # else uvicorn has not heard of it
            super().on_message_complete()

    def timeout_keep_alive_handler(self) -> None:
        """Hang up, unless hits were answered meanwhile: each of them setting a timer would cost too much."""
        left = self._answered_at + self.timeout_keep_alive - self.loop.time()
        if left > 0:
            self._keep_alive(left)
        else:
            super().timeout_keep_alive_handler()

    def _may_answer(self) -> bool:
        """Tell whether the request that is parsed is a plain GET, and the next to be answered."""
        parser, cycle = self.parser, self.cycle
        return (
            (cycle is None or cycle.response_complete)  # type: ignore[redundant-expr]  # uvicorn says it is never None
            and parser.get_method() == b"GET"
            and parser.get_http_version() == "1.1"
            and parser.should_keep_alive()
            and not parser.should_upgrade()
            and not self.access_log
            and self.limit_concurrency is None
        )

    def _answer(self, target: bytes, wishes: Wishes) -> bool:
        """Answer if it is a hit, and tell whether it was. Whose reader does not read is left to wait."""
        if self.flow.write_paused:
            return False
        found = self.hits.answer(target, wishes, self.client)
        if found is None:
            return False
        hit, request_id = found
        state = self.server_state
        made_for, head = hit.rendered
        if made_for is not state.default_headers:
            head = self.heads.render(hit, state.default_headers)
        self._uncorked.write(b"%b%b\r\n\r\n%b" % (head, request_id, hit.body))
        state.total_requests += 1
        self._answered_at = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._keep_alive(self.timeout_keep_alive)
        return True

    def _learn(self, data: bytes, wishes: Wishes) -> None:
        """Remember the last request, a hit, if it was all of these bytes: its first empty line ends them.

        Another that differs in its target alone then need not be parsed: it is one request, complete and
        without a body, it asks for the same, and the parser, which has not seen it, is where it was.
        """
        if len(data) > _LONGEST_LEARNT:
            return
        start = _METHOD + self.url
        rest = data[len(start) :]
        if data.startswith(start + _VERSION) and rest.find(_END) == len(rest) - len(_END):
            self._last = data, self.url, rest, wishes

    def _keep_alive(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)
