"""What carries calls to the upstream: the interface of the transports, and their errors in words.

    direct_transport.py   our own connections, for the usual case: little CPU time per call
    proxy_transport.py    httpx, through an egress proxy

By design, both follow no redirects, keep no cookies, read no netrc, decode no bodies, call a single host, and
send only the headers that they were given.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import httpx


class HttpResponse:
    """The parts of a response that were read so far.

    Header names are lower case. If a header is repeated, the last value is kept.

    Attributes:
        connection_id: Identifies the connection while it is open.
        reused: The connection has carried an earlier call.
    """

    __slots__ = ("body", "complete", "connection_id", "headers", "keep_alive", "reused", "status")

    def __init__(self, *, connection_id: int = 0, reused: bool = False) -> None:
        self.connection_id = connection_id
        self.reused = reused
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self.keep_alive = False
        self.complete = False


class Transport(Protocol):
    """Sends requests to one origin over HTTP/1.1, with one connection per concurrent call.

    Attributes:
        in_flight: The number of calls that the upstream may still work on.
    """

    in_flight: int

    async def send(
        self,
        target: str,
        headers: Mapping[str, str],
        body: bytes,
        *,
        timeout_seconds: float,
        new_connection: bool = False,
        on_complete: Callable[[], None] = lambda: None,
    ) -> HttpResponse:
        """Send a POST request, and return the response when it is complete.

        If a call is cancelled, the upstream still works on it. So the transport waits for the response until
        the timeout of the call, and discards it.

        Args:
            target: The path.
            headers: All headers except Content-Length, with Host.
            body: The body of the request.
            timeout_seconds: Limit for the whole call, with connecting.
            new_connection: Open a new connection, and close it after the call.
            on_complete: Called once, when the upstream does not work on the call any more: the response has
                arrived, or the call has failed. If this method is cancelled, it is called later. It is not
                called if the request cannot be encoded.

        Raises:
            httpx.TransportError: There is no valid response.
            TimeoutError: The timeout has passed. Its text says what a proxy has not done yet, or is empty.
        """

    def discard_connection(self, response: HttpResponse) -> None:
        """Close the connection of this response, if it is idle. It may carry another call by now."""

    def close_idle_connections(self) -> None:
        """Close all idle connections. Calls in flight continue."""

    async def aclose(self) -> None:
        """Close every connection and fail the calls in flight."""


def is_certificate_error(error: httpx.TransportError) -> bool:
    """Tell whether a call failed because a certificate could not be verified."""
    return any(isinstance(cause, ssl.SSLCertVerificationError) for cause in _causes(error))


def explain_connect_error(error: httpx.TransportError) -> str:
    """Return why no connection could be made, for an operator; "" if the error came later."""
    if isinstance(error, httpx.ProxyError):
        return str(error)
    if not isinstance(error, httpx.ConnectError):
        return ""
    for cause in _causes(error):
        match cause:
            case ssl.SSLCertVerificationError() as why:
                return f"the certificate could not be verified ({why.verify_message})"
            case ssl.SSLError():
                return "TLS handshake failed"
            case socket.gaierror() | UnicodeError():
                return "host name not found"
    return "connection refused, or blocked by a firewall"


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause = error.__cause__ or error.__context__
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
