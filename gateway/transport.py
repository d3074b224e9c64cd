"""The connections to the upstream: httpx's transport interface, over aiohttp's client.

httpx's own pool looks through all of its connections, for each of them, at every call's start and
end: what a call costs grows with the square of the calls in the air. aiohttp's does not, and its
parser is compiled. httpx-aiohttp puts the same two together, but tells a reset, a lost name and
a broken answer all as `ConnectTimeout` or not at all; here each failure keeps its kind.

What the gateway must never do, this cannot do: it follows no redirect, keeps no cookie, reads no proxy
or netrc from the environment, decodes no body, and sends no header that it was not given.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator

import aiohttp
import httpx
from yarl import URL

# Most specific first. A connection that was dropped while it lay idle is a ServerDisconnectedError.
TRANSPORT_ERRORS: tuple[tuple[type[aiohttp.ClientError], type[httpx.TransportError]], ...] = (
    (aiohttp.ClientConnectorError, httpx.ConnectError),  # DNS, connect, TLS
    (aiohttp.ServerDisconnectedError, httpx.RemoteProtocolError),
    (aiohttp.ClientOSError, httpx.ReadError),
    (aiohttp.ClientError, httpx.RemoteProtocolError),  # not HTTP, or less of it than announced
)

_KEEP_ALIVE_SECONDS = 15.0
# Whatever aiohttp adds by itself; Host and Content-Length it must make.
_NOT_SENT = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")


class AiohttpTransport(httpx.AsyncBaseTransport):
    """Carries httpx requests over pooled HTTP/1.1 connections, as many as there are calls.

    It sets no deadline: give one to the task that calls. Use it inside a running event loop.
    """

    def __init__(self, *, verify: ssl.SSLContext) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=verify, keepalive_timeout=_KEEP_ALIVE_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
            auto_decompress=False,
            skip_auto_headers=_NOT_SENT,
            trust_env=False,
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request whose body is known, and return the answer, its body yet to be read.

        Raises: httpx.TransportError.
        """
        # Raw, for httpx's Headers look for their encoding anew at each reading of one.
        headers = [(name.decode("ascii"), value.decode("latin-1")) for name, value in request.headers.raw]
        try:
            response = await self._session.request(
                request.method,
                URL(str(request.url), encoded=True),
                headers=headers,
                data=request.read(),
                allow_redirects=False,
            )
        except aiohttp.ClientError as exc:
            raise _transport_error(exc) from exc
        return httpx.Response(response.status, headers=response.raw_headers, stream=_Body(response))

    async def aclose(self) -> None:
        """Close every connection."""
        await self._session.close()


class _Body(httpx.AsyncByteStream):
    """A body as it comes off the wire."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except aiohttp.ClientError as exc:
            raise _transport_error(exc) from exc

    async def aclose(self) -> None:
        # Gives the connection back when the body was read to its end, and closes it otherwise.
        self._response.close()


def _transport_error(exc: aiohttp.ClientError) -> httpx.TransportError:
    # The text of an aiohttp error may hold what the upstream sent: only its kind is told.
    error = next(error for kind, error in TRANSPORT_ERRORS if isinstance(exc, kind))
    return error(type(exc).__name__)
