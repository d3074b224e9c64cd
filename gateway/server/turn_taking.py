"""Connections take turns to parse and serve their requests.

The event loop serves all sockets that are readable before it runs anything else. Without turns, a thousand
connections with pipelined requests keep it busy for a quarter of a second each time, and a new connection
waits three seconds for its first response; with turns, 17 ms. But with a thousand connections that send
requests without pause, a hit takes a quarter more CPU time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gateway.api.client_limits import bucket_key
from gateway.domain.paced_callbacks import PacedCallbacks, Run, Running
from gateway.server.client_transport import ClientTransport

# The weights of the requests of one iteration of the event loop: those that are served when they arrive, and
# those that have waited. A hit takes some ten microseconds.
_AT_ONCE = 192
_WAITED = 256
_PARSED = 2  # the weight of a request that is parsed; it takes twice the time of a hit that is not
_BYTES_OF_WEIGHT = 2048  # of a head; many fields or query parameters take as long as a short request
MAX_IN_A_ROW = 8  # requests of one connection


class RequestTurns:
    """The turns of all connections.

    `at_once` is the weight of the requests that may still be served when they arrive. It is restored in the
    next iteration after it was used up, and not in each: a callback keeps the event loop from waiting for
    more sockets, which would cost a tenth of the hits.
    """

    def __init__(self) -> None:
        self.at_once = _AT_ONCE
        self._restoring = False
        self._waiting = PacedCallbacks(per_iteration=_WAITED)

    def wait(
        self, loop: asyncio.AbstractEventLoop, callback: Callable[[], object], *, weight: int, client: bytes
    ) -> None:
        """Call `callback` in a later iteration, when it is the turn of this client."""
        if self.at_once <= 0 and not self._restoring:
            self._restoring = True
            loop.call_soon(self._restore)
        self._waiting.postpone(loop, callback, weight=weight, client=client)

    def _restore(self) -> None:
        self._restoring = False
        self.at_once = _AT_ONCE


class TurnTaking(ClientTransport):
    """The part of a connection that waits for its turn. `Connection` parses and serves the requests."""

    request_turns: RequestTurns
    request_starts: PacedCallbacks  # of requests that the application serves

    __slots__ = (
        "_has_turn",  # the next request has waited
        "_in_a_row",  # requests that this connection may serve before it waits for another turn
        "_waits_for_turn",
        "client",  # its address; None on a Unix socket
    )

    client: tuple[str, int] | None

    def __init__(self, loop: asyncio.AbstractEventLoop, on_expired: Callable[[], None]) -> None:
        super().__init__(loop, on_expired)
        self._has_turn = self._waits_for_turn = False
        self._in_a_row = MAX_IN_A_ROW

    def _take_turn(self, length: int) -> bool:
        """Tell whether a request whose head has so many bytes may be parsed now.

        If not, `_on_turn` is called in a later iteration of the event loop.
        """
        if self._has_turn:
            self._has_turn = False
            return True
        turns = self.request_turns
        weight = _PARSED + length // _BYTES_OF_WEIGHT
        if self._in_a_row and turns.at_once > 0:
            self._in_a_row -= 1
            turns.at_once -= weight
            return True
        self._waits_for_turn = True
        if not self.write_paused:  # the deadline of the previous state must not end this one
            self._deadline.set(self.limits.keep_alive_seconds)
        turns.wait(self.loop, self._end_wait, weight=weight, client=self._client_key())
        return False

    def _end_wait(self) -> None:
        if self._waits_for_turn:
            self._waits_for_turn = False
            if not self._closing:
                self._has_turn = True
                self._in_a_row = MAX_IN_A_ROW
                self._on_turn()
                self._has_turn = False

    def _on_turn(self) -> None:
        """Serve the request that has waited."""
        self._process()

    def _process(self) -> None:
        """Serve what is buffered."""
        raise NotImplementedError

    def _start_in_turn(self, run: Run, running: Running, length: int) -> None:
        """Run a request with so many bytes in an asyncio task, perhaps in a later iteration."""
        weight = 1 + length // _BYTES_OF_WEIGHT
        self.request_starts.start(self.loop, run, running, weight=weight, client=self._client_key())

    def _client_key(self) -> bytes:
        return bucket_key(self.client[0]) if self.client else b""
