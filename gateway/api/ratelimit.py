"""How many requests a second one client may make: a token bucket for each address.

A bucket is one float, as the generic cell rate algorithm keeps it (ITU-T I.371, "virtual
scheduling"): the moment at which it will be full again. Who a client is was settled before: the
server has put what a trusted proxy says into the scope (uvicorn's proxy headers).
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from ipaddress import IPv6Address, ip_address

from cachetools import LRUCache
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.api import ops
from gateway.exceptions import TooManyRequests

# About 5 MB of buckets. Whoever has more addresses than this is not held by a limit on each of them.
_MOST_CLIENTS = 16_384
_INEXACT = 1e-9  # seconds by which sums of intervals may be wrong
_NETWORK_BYTES = 8  # a /64: what one subscriber gets, and may number as it likes (RFC 6177, RFC 4291)


class RateLimiter:
    """Lets each client make `requests_per_second`, and as many at once as a second brings.

    `clock` is monotonic, in seconds.
    """

    def __init__(self, requests_per_second: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval = 1 / requests_per_second
        self._depth = max(1.0, self._interval)  # seconds that an empty bucket takes to be full
        self._clock = clock
        self._full_at: LRUCache[bytes, float] = LRUCache(_MOST_CLIENTS)

    def __len__(self) -> int:
        """Return the number of clients that are known."""
        return len(self._full_at)

    def admit(self, host: str) -> None:
        """Take a token from the bucket of this client. Raises: TooManyRequests when there is none."""
        full_at, wait = self._next(host)
        # A refused request takes nothing: a client that keeps knocking is let in when its token is due.
        if wait > 0:
            raise TooManyRequests("this client makes more requests than it may", retry_after=wait)
        self._full_at[bucket_key(host)] = full_at

    def would_admit(self, host: str) -> bool:
        """Tell whether there is a token for this client, and take none."""
        return self._next(host)[1] <= 0

    def _next(self, host: str) -> tuple[float, float]:
        """Return when the bucket will be full after a token is taken, and for how long there is none."""
        now = self._clock()
        full_at = max(self._full_at.get(bucket_key(host), now), now) + self._interval
        wait = full_at - now - self._depth
        return full_at, wait if wait > _INEXACT else 0.0


def bucket_key(host: str) -> bytes:
    """Return what tells clients apart: an IPv4 address, or the /64 of an IPv6 one.

    IPv4 within IPv6, as a dual-stack listener names it, is IPv4. Whatever is no address shares one
    key: it cannot be had by the thousand.
    """
    try:
        address = ip_address(host)
    except ValueError:
        return b""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is None:
            return address.packed[:_NETWORK_BYTES]
        address = address.ipv4_mapped
    return address.packed


def client_of(scope: Scope) -> bytes:
    """Return what tells this request's client apart from others: see `bucket_key`."""
    client = scope.get("client")
    return bucket_key(client[0]) if client else b""


class RateLimit:
    """Refuses requests of clients over their rate; probes and scrapes are exempt."""

    def __init__(self, app: ASGIApp, *, limiter: RateLimiter) -> None:
        self._app = app
        self._limiter = limiter

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass the request on. Raises: TooManyRequests, before anything is awaited."""
        if scope["type"] == "http" and scope["path"].removeprefix(scope["root_path"]) not in ops.PROBES:
            client = scope.get("client")
            self._limiter.admit(client[0] if client else "")
        return self._app(scope, receive, send)
