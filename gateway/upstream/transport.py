"""What carries calls to the upstream: the interface of the transports, and their errors in words.

    direct_transport.py   our own connections, for the usual case: little CPU time per call
    proxy_transport.py    httpx, through an egress proxy

By design, both follow no redirects, keep no cookies, read no netrc, decode no bodies, call a single host, and
send only the headers that they were given.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import httpx

CLOSED_TOO_EARLY = "the connection was closed too early"
RESET = "the connection was reset"
_WRONG_NAME = {62, 64}  # OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH
_ANOTHER_HOST = "it is for another host name"
_CLIENT_CERTIFICATE = "upstream.client_cert_file"
_REJECTED = f"the server rejects the client certificate of {_CLIENT_CERTIFICATE}"
# OpenSSL's server sends the alert "bad certificate" for a certificate that is not valid yet.
_TLS_ERRORS = (
    (re.compile("WRONG_VERSION_NUMBER|HTTP_REQUEST"), "TLS handshake failed: the server does not speak TLS"),
    (
        re.compile("ALERT_CERTIFICATE_REQUIRED"),
        f"the server requires a client certificate: set {_CLIENT_CERTIFICATE}",
    ),
    (
        re.compile("ALERT_HANDSHAKE_FAILURE"),
        f"TLS handshake failed: the server may require a client certificate: set {_CLIENT_CERTIFICATE}",
    ),
    (re.compile("ALERT_CERTIFICATE_EXPIRED"), f"{_REJECTED}: it has expired"),
    (re.compile("ALERT_CERTIFICATE_REVOKED"), f"{_REJECTED}: it has been revoked"),
    (re.compile("ALERT_UNKNOWN_CA"), f"{_REJECTED}: the server does not know its authority"),
    (re.compile("ALERT_BAD_CERTIFICATE"), f"{_REJECTED}: check its dates"),
    (re.compile("ALERT_(UNSUPPORTED_CERTIFICATE|CERTIFICATE_UNKNOWN|ACCESS_DENIED)"), _REJECTED),
)
# The beginnings of the texts for a closed connection: of `http_connection.py`, and of h11 and httpcore.
_CLOSED = re.compile("^(the connection was closed|Server disconnected|peer closed connection)")


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
        on_upstream_done: Callable[[], None] = lambda: None,
    ) -> HttpResponse:
        """Send a POST request, and return the response when it is complete.

        Pass the response to `release_connection`: no other call uses its connection before.

        If a call is cancelled, the upstream still works on it. So the transport waits for the response until
        the timeout of the call, discards it, and closes the connection.

        Args:
            target: The path.
            headers: All headers except Content-Length, with Host.
            body: The body of the request.
            timeout_seconds: Limit for the whole call, with connecting.
            new_connection: Open a new connection, and close it after the call.
            on_upstream_done: Called once, when the upstream does not work on the call any more: the response
                has arrived, or the call has failed. If this method is cancelled, it is called later. It is
                not called if the request cannot be encoded.

        Raises:
            httpx.TransportError: There is no valid response.
            TimeoutError: The timeout has passed. Its text says what was not reached yet, or is empty.
        """

    def release_connection(self, response: HttpResponse, *, reuse: bool) -> None:
        """Keep the connection of a response for another call, or close it. Later calls have no effect.

        A connection that was opened with `new_connection` is closed already.
        """

    def close_idle_connections(self) -> None:
        """Close all idle connections. Calls in flight continue."""

    async def aclose(self) -> None:
        """Close every connection and fail the calls in flight."""


def is_certificate_error(error: httpx.TransportError) -> bool:
    """Tell whether a call failed because a certificate could not be verified."""
    return any(isinstance(cause, ssl.SSLCertVerificationError) for cause in _causes(error))


def explain_failure(error: httpx.TransportError) -> str:
    """Return why a call has no response, for an operator. The text comes from a bounded set."""
    if isinstance(error, httpx.ProxyError):
        return str(error)
    if words := next(filter(None, map(_explain_cause, _causes(error))), ""):
        return words
    if isinstance(error, httpx.ConnectError):
        return "connection refused, or blocked by a firewall"
    if isinstance(error, httpx.RemoteProtocolError):
        closed = _CLOSED.search(str(error))
        return CLOSED_TOO_EARLY if closed else "the response is not valid HTTP"
    return "the connection broke"


def _explain_cause(cause: BaseException) -> str:
    words = ""
    match cause:
        case ssl.SSLCertVerificationError():
            reason = _ANOTHER_HOST if cause.verify_code in _WRONG_NAME else cause.verify_message
            words = f"the certificate could not be verified ({reason})"
        case ssl.SSLError():
            words = _explain_tls_error(cause.reason or "")
        case socket.gaierror(errno=socket.EAI_AGAIN):
            words = "the name server does not answer"
        case socket.gaierror() | UnicodeError():  # IDNA refuses the name
            words = "host name not found"
        case ConnectionResetError():
            words = RESET
        case BrokenPipeError():  # the connection was closed while something was sent
            words = CLOSED_TOO_EARLY
    return words


def _explain_tls_error(reason: str) -> str:
    """Return the words for a reason of OpenSSL. An alert comes from the server."""
    for pattern, words in _TLS_ERRORS:
        if pattern.search(reason):
            return words
    return "TLS handshake failed" + (f" ({reason.replace('_', ' ').lower()})" if reason else "")


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause = error.__cause__ or error.__context__
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
