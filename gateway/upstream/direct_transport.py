"""The direct transport: reuses connections to the upstream (`http_connection.py`), with httpx's exceptions.

    send -> take an idle connection or open one -> write -> read the whole response, bounded

With httpx's pool, the cost of a call grows with the square of the number of concurrent calls: at the start
and at the end of each call it iterates over all connections, once per connection. aiohttp's pool does not,
but its client takes more CPU time than the rest of a query. Here a connection is one asyncio protocol with
one call at a time, and a call awaits only its response.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Callable, Mapping
from functools import cached_property

import httpx
from aiohappyeyeballs import start_connection

from gateway.upstream.http_connection import HttpConnection
from gateway.upstream.transport import HttpResponse

_HAPPY_EYEBALLS_SECONDS = 0.25  # delay before the next address of a host is tried in parallel (RFC 8305, 8)


class DirectTransport:
    """See `Transport`. `tls` returns the context for new connections.

    It stops reading a body that exceeds `max_body_bytes`. It does not reuse a connection that was idle for
    `keep_alive_seconds`, because the upstream or a proxy may have closed it, nor one that is
    `max_age_seconds` old, because the host name may resolve to another address by now.
    """

    def __init__(
        self,
        origin: httpx.URL,
        *,
        tls: Callable[[], ssl.SSLContext],
        max_body_bytes: int,
        keep_alive_seconds: float = 15.0,
        max_age_seconds: float = 300.0,
    ) -> None:
        self._host = origin.raw_host.decode("ascii")
        self._tls = tls if origin.scheme == "https" else None
        self._port = origin.port or (443 if self._tls else 80)
        self._max_body_bytes = max_body_bytes
        self._keep_alive_seconds = keep_alive_seconds
        self._max_age_seconds = max_age_seconds
        # Connections whose responses were returned by `send`, by `HttpResponse.connection_id`.
        self._held: dict[int, HttpConnection] = {}
        # Connections are taken from the right end. Under low load, those at the left end stay unused and are
        # closed.
        self._idle: deque[HttpConnection] = deque()
        self._busy: set[HttpConnection] = set()
        self._sweep_timer: asyncio.TimerHandle | None = None
        self.in_flight = 0  # calls that the upstream may still work on

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        # Under Python 3.11, each `get_running_loop` makes a system call.
        return asyncio.get_running_loop()

    async def send(
        self,
        target: str,
        headers: Mapping[str, str],
        body: bytes,
        *,
        timeout_seconds: float,
        new_connection: bool = False,
        on_upstream_done: Callable[[], None] = lambda: None,
    ) -> HttpResponse:
        """See `Transport.send`."""
        request = _encode_request(target, headers, body)
        now = self._loop.time()
        connection = None if new_connection else self._take_idle(now)
        self.in_flight += 1
        if connection is None:
            try:
                try:
                    async with asyncio.timeout_at(now + timeout_seconds):
                        connection = await self._connect()
                except TimeoutError:
                    raise TimeoutError("no connection to the upstream in time") from None
            except BaseException:
                self.in_flight -= 1
                on_upstream_done()
                raise
        connection.on_upstream_done = on_upstream_done
        connection.max_age_seconds = 0.0 if new_connection else self._max_age_seconds
        self._busy.add(connection)
        try:
            return await connection.send(request, now + timeout_seconds)
        except asyncio.CancelledError:
            if self._held.pop(id(connection), None) is not None:  # the response arrived at the same time
                connection.close()
            raise

    def release_connection(self, response: HttpResponse, *, reuse: bool) -> None:
        """See `Transport.release_connection`."""
        connection = self._held.pop(response.connection_id, None)
        if connection is None:
            return
        if not reuse or connection.idle_since is None:
            connection.close()
            return
        self._idle.append(connection)
        if self._sweep_timer is None:
            self._schedule_sweep()

    def close_idle_connections(self) -> None:
        """See `Transport.close_idle_connections`."""
        while self._idle:
            self._idle.pop().close()

    async def aclose(self) -> None:
        """See `Transport.aclose`."""
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
            self._sweep_timer = None
        self.close_idle_connections()
        for connection in self._held.values():
            connection.close()
        self._held.clear()
        for connection in tuple(self._busy):
            connection.time_out()

    def _take_idle(self, now: float) -> HttpConnection | None:
        self._close_expired(now)
        while self._idle:
            connection = self._idle.pop()
            if connection.is_reusable(now):
                return connection
            connection.close()
        return None

    def _on_call_end(self, connection: HttpConnection) -> None:
        """Hold the connection of a completed call until it is released; close it if it is not reusable."""
        self._busy.discard(connection)
        self.in_flight -= 1
        if connection.idle_since is None or connection.is_too_old(self._loop.time()):
            connection.close()
        else:
            self._held[id(connection)] = connection
        connection.on_upstream_done()

    def _close_expired(self, now: float) -> None:
        """Close connections that were idle for too long, and remove those that were lost."""
        oldest = now - self._keep_alive_seconds
        while self._idle and (self._idle[0].idle_since or 0.0) < oldest:
            self._idle.popleft().close()

    def _schedule_sweep(self) -> None:
        seconds = min(self._keep_alive_seconds, self._max_age_seconds)
        self._sweep_timer = self._loop.call_later(seconds, self._sweep)

    def _sweep(self) -> None:
        """Close expired connections, also without new calls."""
        self._sweep_timer = None
        now = self._loop.time()
        self._close_expired(now)
        for connection in tuple(self._idle):
            if connection.is_too_old(now):
                self._idle.remove(connection)
                connection.close()
        if self._idle:
            self._schedule_sweep()

    async def _connect(self) -> HttpConnection:
        try:
            addresses = await self._loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
            sock = await start_connection(addresses, happy_eyeballs_delay=_HAPPY_EYEBALLS_SECONDS)
            try:
                _, connection = await self._loop.create_connection(
                    lambda: HttpConnection(self._max_body_bytes, self._on_call_end),
                    sock=sock,
                    ssl=self._tls() if self._tls else None,
                    server_hostname=self._host if self._tls else None,
                )
            except BaseException:
                sock.close()
                raise
        except (OSError, UnicodeError) as exc:  # DNS, connect or TLS; UnicodeError: IDNA refuses the name
            raise httpx.ConnectError(type(exc).__name__) from exc
        return connection


def _encode_request(target: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """Return a POST request in wire format. Raises: httpx.LocalProtocolError for a line break in a header."""
    lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
    head = "".join(lines)
    if not head.count("\r") == head.count("\n") == len(lines):
        raise httpx.LocalProtocolError("a header contains a line break")
    return f"POST {target} HTTP/1.1\r\n{head}content-length: {len(body)}\r\n\r\n".encode("ascii") + body
