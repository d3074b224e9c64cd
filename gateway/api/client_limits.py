"""What one client may cost: so many tasks a second, and so many open subscriptions.

A bucket of tokens is one float, as the generic cell rate algorithm keeps it (ITU-T I.371, "virtual
scheduling"): the moment at which it will be full again. A request is admitted when a token is there, and
takes one. A batch or a stream takes the rest of its cost, one token for each further task, once it is parsed.
The bucket may owe these tokens: so a request may cost more than a full bucket holds, and its client then
waits until the debt is paid.

The client's address is settled before: the server has put what a trusted proxy says into the scope (uvicorn's
proxy headers).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from ipaddress import IPv6Address, ip_address

from cachetools import LRUCache
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.api import operator_endpoints
from gateway.api.requests import client_host
from gateway.domain.errors import TooManyRequests

# About 5 MB of buckets. A client with more addresses than this is not held by a limit on each of them.
_MOST_CLIENTS = 16_384
_INEXACT = 1e-9  # seconds by which sums of intervals may be wrong
_NETWORK_BYTES = 8  # a /64: what one subscriber gets, and may number as it likes (RFC 6177, RFC 4291)
_SUBSCRIBE_AGAIN_SECONDS = 5.0
_NO_LIMIT = nullcontext()


class ClientRateLimiter:
    """Lets each client ask for `tasks_per_second` tasks, and for as many at once as a second brings.

    Over any time a client gets at most rate x time + burst + one request. `clock` is monotonic, in seconds.
    """

    def __init__(self, tasks_per_second: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval = 1 / tasks_per_second
        self._depth = max(1.0, self._interval)  # seconds that an empty bucket takes to be full
        self._clock = clock
        self._full_at: LRUCache[bytes, float] = LRUCache(_MOST_CLIENTS)

    def __len__(self) -> int:
        """Return the number of clients that are known."""
        return len(self._full_at)

    def admit(self, host: str) -> None:
        """Take a token from the bucket of this client. Raises: TooManyRequests when there is none."""
        full_at, wait = self._next(host)
        # A refused request takes nothing: a client that asks too early is admitted when its token is due.
        if wait > 0:
            raise TooManyRequests("this client asks for more tasks than it may", retry_after=wait)
        self._full_at[bucket_key(host)] = full_at

    def would_admit(self, host: str) -> bool:
        """Tell whether there is a token for this client, and take none."""
        return self._next(host)[1] <= 0

    def charge(self, host: str, tasks: int) -> None:
        """Take a token for each of these tasks but the first, whose token `admit` has taken."""
        key = bucket_key(host)
        now = self._clock()
        self._full_at[key] = max(self._full_at.get(key, now), now) + self._interval * (tasks - 1)

    def _next(self, host: str) -> tuple[float, float]:
        """Return when the bucket will be full after a token is taken, and for how long there is none."""
        now = self._clock()
        full_at = max(self._full_at.get(bucket_key(host), now), now) + self._interval
        wait = full_at - now - self._depth
        return full_at, wait if wait > _INEXACT else 0.0


class ClientLimits:
    """What endpoints ask about the client of a request, once they know what the request costs.

    `limiter`: None without `limits.requests_per_second`. `most_subscriptions`: of one client; 0: no limit.
    """

    def __init__(self, limiter: ClientRateLimiter | None, *, most_subscriptions: int) -> None:
        self._limiter = limiter
        self._most_subscriptions = most_subscriptions
        self._subscriptions: Counter[bytes] = Counter()

    def charge(self, scope: Scope, tasks: int) -> None:
        """Let the client of an admitted request pay for so many tasks."""
        if self._limiter is not None and tasks > 1:
            self._limiter.charge(client_host(scope), tasks)

    def subscribed(self, scope: Scope) -> AbstractContextManager[None]:
        """Count a stream or long poll of the client while the context is open.

        Raises: TooManyRequests, on entering, when the client has as many as it may.
        """
        return self._counted(bucket_key(client_host(scope))) if self._most_subscriptions else _NO_LIMIT

    @contextmanager
    def _counted(self, key: bytes) -> Iterator[None]:
        if self._subscriptions[key] >= self._most_subscriptions:
            raise TooManyRequests(
                "this client has as many open streams and long polls as it may",
                retry_after=_SUBSCRIBE_AGAIN_SECONDS,
            )
        self._subscriptions[key] += 1
        try:
            yield
        finally:
            self._subscriptions[key] -= 1
            if not self._subscriptions[key]:
                del self._subscriptions[key]


@lru_cache(maxsize=4096)  # parsing an address takes longer than all the rest of an admission
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


class ClientRateLimit:
    """Refuses requests of clients over their rate; probes and scrapes are exempt."""

    def __init__(self, app: ASGIApp, *, limiter: ClientRateLimiter) -> None:
        self._app = app
        self._limiter = limiter

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass the request on. Raises: TooManyRequests, before anything is awaited."""
        if scope["type"] == "http" and not operator_endpoints.is_probe(scope):
            self._limiter.admit(client_host(scope))
        return self._app(scope, receive, send)
