"""The transport through an egress proxy: httpx, with one connection for each concurrent call.

    send -> take an idle connection or open one -> CONNECT, or the whole URL -> read the response, bounded

Each connection is an `httpx.AsyncHTTPTransport` of its own, in a stack of idle ones. One pool for all calls
would take CPU time that grows with the square of the number of concurrent calls.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from typing import Any

import httpx

from gateway.upstream.transport import HttpResponse, explain_failure

_CLOSE_SECONDS = 1.0
# The last step before the upstream is reached: TLS through a tunnel, or the connection to a proxy that
# receives whole URLs. httpcore names its steps like this.
_TUNNEL_STEPS = ("proxy.start_tls.started", "socks.start_tls.started")
_RECONNECT = ".connect_tcp.started"
_CONNECTED = ".connect_tcp.complete"
_CONNECT_STEPS = ("connection.connect_tcp.complete", "socks.setup_socks5_connection.complete")
_PROXY_TLS = "connection.start_tls.complete"  # with a proxy whose URL begins with https://
_SOCKS_FAILURE = re.compile(r"Proxy Server could not connect: (?P<reason>.+)\.")  # httpcore's text
# httpcore offers a SOCKS proxy a single method, by whether its URL has a user name.
_SOCKS_METHOD = re.compile(r"Requested (?P<offered>.+) from proxy server, but got .+\.")
_SOCKS_WRONG_LOGIN = "Invalid username/password"  # httpcore's text
_SOCKS_FORBIDDEN = "Connection not allowed by ruleset"


class ProxyTransport:
    """See `Transport`. `proxy` is an HTTP, HTTPS or SOCKS5 proxy; `tls` returns the context for connections.

    It stops reading a body that exceeds `max_body_bytes`. It does not reuse a connection that was idle for
    `keep_alive_seconds` or that is `max_age_seconds` old.
    """

    def __init__(
        self,
        origin: httpx.URL,
        *,
        proxy: httpx.URL,
        tls: Callable[[], ssl.SSLContext],
        max_body_bytes: int,
        keep_alive_seconds: float = 15.0,
        max_age_seconds: float = 300.0,
    ) -> None:
        self.in_flight = 0
        self._origin = origin
        self._proxy = proxy
        self._tls = tls
        self._max_body_bytes = max_body_bytes
        self._keep_alive_seconds = keep_alive_seconds
        self._max_age_seconds = max_age_seconds
        # Connections whose responses were returned by `send`, by `HttpResponse.connection_id`.
        self._held: dict[int, _Connection] = {}
        self._idle: deque[_Connection] = deque()  # the connection that was used last is at the right end
        self._tasks: set[asyncio.Task[Any]] = set()
        self._sweep_timer: asyncio.TimerHandle | None = None

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
        if any("\r" in value or "\n" in value for value in headers.values()):
            raise httpx.LocalProtocolError("a header contains a line break")
        request = httpx.Request("POST", self._origin.join(target), headers=dict(headers), content=body)
        self.in_flight += 1
        call = self._start(self._call(request, timeout_seconds, new_connection=new_connection))
        call.add_done_callback(partial(self._on_call_end, on_upstream_done))
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            call.add_done_callback(self._close_held)
            raise

    def release_connection(self, response: HttpResponse, *, reuse: bool) -> None:
        """See `Transport.release_connection`."""
        connection = self._held.pop(response.connection_id, None)
        if connection is None:
            return
        if not reuse:
            self._start(connection.aclose())
            return
        self._idle.append(connection)
        if self._sweep_timer is None:
            self._schedule_sweep()

    def close_idle_connections(self) -> None:
        """See `Transport.close_idle_connections`."""
        while self._idle:
            self._start(self._idle.pop().aclose())

    async def aclose(self) -> None:
        """See `Transport.aclose`."""
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
            self._sweep_timer = None
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in (*self._idle, *self._held.values()):
            await connection.aclose()
        self._idle.clear()
        self._held.clear()

    async def _call(self, request: httpx.Request, seconds: float, *, new_connection: bool) -> HttpResponse:
        connection: _Connection | None = None
        try:
            async with asyncio.timeout(seconds):
                connection = None if new_connection else await self._take_idle()
                connection = connection or _Connection(
                    self._proxy, self._tls(), tunnel=request.url.scheme == "https"
                )
                response = await connection.send(request, self._max_body_bytes)
        except TimeoutError:
            raise TimeoutError("" if connection is None else connection.open_step) from None
        except asyncio.CancelledError:  # by `aclose`
            raise TimeoutError from None
        finally:
            if connection is not None:
                await self._hold_or_close(connection, close=new_connection)
        return response

    async def _take_idle(self) -> _Connection | None:
        now = asyncio.get_running_loop().time()
        while self._idle:
            connection = self._idle.pop()
            if not self._is_expired(connection, now):
                return connection
            await connection.aclose()
        return None

    async def _hold_or_close(self, connection: _Connection, *, close: bool) -> None:
        """Hold the connection of a completed call until it is released; close it if it is not reusable."""
        now = asyncio.get_running_loop().time()
        if close or not connection.reusable or self._is_expired(connection, now):
            await connection.aclose()
        else:
            self._held[id(connection)] = connection

    def _close_held(self, call: asyncio.Task[HttpResponse]) -> None:
        """Close the connection of a cancelled call: `release_connection` is not called for it."""
        if not call.cancelled() and call.exception() is None:
            self.release_connection(call.result(), reuse=False)

    def _is_expired(self, connection: _Connection, now: float) -> bool:
        return (
            now - connection.idle_since >= self._keep_alive_seconds
            or now - connection.opened_at >= self._max_age_seconds
        )

    def _schedule_sweep(self) -> None:
        seconds = min(self._keep_alive_seconds, self._max_age_seconds)
        self._sweep_timer = asyncio.get_running_loop().call_later(seconds, self._sweep)

    def _sweep(self) -> None:
        """Close expired connections, also without new calls."""
        self._sweep_timer = None
        now = asyncio.get_running_loop().time()
        for connection in tuple(self._idle):
            if self._is_expired(connection, now):
                self._idle.remove(connection)
                self._start(connection.aclose())
        if self._idle:
            self._schedule_sweep()

    def _on_call_end(self, on_upstream_done: Callable[[], None], call: asyncio.Task[HttpResponse]) -> None:
        self.in_flight -= 1
        if not call.cancelled():
            call.exception()  # asyncio logs an error if the caller was cancelled
        on_upstream_done()

    def _start(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class _Connection:
    """One connection through the proxy, with one call at a time.

    `tunnel`: the upstream is reached by TLS through a tunnel.
    """

    def __init__(self, proxy: httpx.URL, context: ssl.SSLContext, *, tunnel: bool) -> None:
        secure = proxy.scheme == "https"
        self._protocol = "SOCKS5" if proxy.scheme.startswith("socks5") else "HTTP"
        self._transport = httpx.AsyncHTTPTransport(
            proxy=httpx.Proxy(proxy, ssl_context=context if secure else None),
            verify=context,
            trust_env=False,
            limits=httpx.Limits(max_connections=1, max_keepalive_connections=1),
        )
        self._last_steps = _TUNNEL_STEPS if tunnel else (_PROXY_TLS,) if secure else _CONNECT_STEPS
        self._reached_upstream = self._is_reused = False
        self._lacks_proxy_tls = secure
        self._stream: Any = None  # httpcore's stream of the TCP connection
        self.opened_at = self.idle_since = asyncio.get_running_loop().time()
        self.reusable = False

    @property
    def open_step(self) -> str:
        """What the proxy has not done yet; "" once the upstream is reached."""
        if self._reached_upstream:
            return ""
        if self._stream is None:
            return "no connection to the proxy in time"
        if self._lacks_proxy_tls:
            return "the TLS handshake with the proxy took too long; a proxy without TLS has an http:// URL"
        return "the proxy did not connect to the upstream in time"

    async def send(self, request: httpx.Request, max_body_bytes: int) -> HttpResponse:
        """Send a request, and return its response. Raises: httpx.TransportError."""
        self._reached_upstream = self._is_reused = self.reusable
        self.reusable = False
        request.extensions["trace"] = self._trace
        try:
            received = await self._transport.handle_async_request(request)
            response = HttpResponse(connection_id=id(self), reused=self._is_reused)
            response.status = received.status_code
            response.headers = {name.lower(): value for name, value in received.headers.multi_items()}
            async for chunk in received.aiter_raw():
                response.body += chunk
                if len(response.body) > max_body_bytes:
                    return response  # the connection is closed, because it is not reusable
            await received.aclose()
        except httpx.TransportError as exc:
            if self._reached_upstream:
                raise
            raise _proxy_error(exc) from exc
        except Exception as exc:  # httpcore and socksio do not handle every invalid reply
            if self._reached_upstream:
                raise httpx.RemoteProtocolError(type(exc).__name__) from exc
            raise httpx.ProxyError(f"no valid {self._protocol} response of the proxy") from exc
        if response.status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
            raise httpx.ProxyError(_refusal(str(response.status)))
        response.complete = True
        self.reusable = received.http_version == "HTTP/1.1" and response.headers.get("connection") != "close"
        self.idle_since = asyncio.get_running_loop().time()
        return response

    async def aclose(self) -> None:
        """Close the connection, and do not wait for the proxy to agree."""
        self.reusable = False
        with suppress(Exception):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._transport.aclose()
        if self._stream is not None:
            with suppress(Exception):  # httpcore does not close it if a SOCKS proxy refuses the password
                await self._stream.aclose()

    async def _trace(self, step: str, info: Mapping[str, Any]) -> None:
        if step.endswith(_CONNECTED):
            self._stream = info["return_value"]
        if step == _PROXY_TLS:
            self._lacks_proxy_tls = False
        if step in self._last_steps:
            self._reached_upstream = True
        elif step.endswith(_RECONNECT):  # httpcore replaces a connection that was closed while it was idle
            self._reached_upstream = self._is_reused = False


def _proxy_error(error: httpx.TransportError) -> httpx.ProxyError:
    if isinstance(error, httpx.ProxyError):
        return httpx.ProxyError(_refusal(str(error)))
    if isinstance(error, httpx.ConnectError):
        return httpx.ProxyError(f"no connection to the proxy: {explain_failure(error)}")
    return httpx.ProxyError(f"no valid response of the proxy: {explain_failure(error)}")


def _refusal(reason: str) -> str:
    """Return why a proxy opened no connection. `reason` begins with its status, or is httpx's text."""
    status = reason[:3]
    method = _SOCKS_METHOD.fullmatch(reason)
    if method and method["offered"] == "USERNAME/PASSWORD":
        return "the proxy does not accept a user name and password"
    # Not every proxy answers 407; httpx's texts of SOCKS errors are its own.
    if status in {"401", "407"} or method or reason == _SOCKS_WRONG_LOGIN:
        return "the proxy requires a valid user name and password"
    socks = _SOCKS_FAILURE.fullmatch(reason)
    short = socks["reason"] if socks else status if status.isdigit() else reason
    # Proxies answer 500, 502, 503 or 504 for a host without an address, or one that accepts no connection.
    if status.startswith("5") or (socks and short != _SOCKS_FORBIDDEN):
        return f"the proxy could not connect to the upstream ({short})"
    return f"the proxy refused the connection to the upstream ({short})"
