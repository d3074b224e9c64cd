"""Limits per client: tasks per second, and open subscriptions.

Each client has a token bucket, stored as one float as in the generic cell rate algorithm (ITU-T I.371,
"virtual scheduling"): the time at which the bucket will be full again. A request is admitted when a token is
available, and takes it. A batch or a stream takes one more token for each further task once its query string
is parsed. The bucket can go into debt for these tokens: a request may cost more than a full bucket holds. Its
client is then refused until the debt is paid.

The client's address is the one in the scope, to which `middleware/client_address.py` has applied the headers
of trusted proxies.
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

# About 5 MB of buckets. A client with more addresses than this can evade the limit.
_MAX_CLIENTS = 16_384
_TOLERANCE_SECONDS = 1e-9  # rounding error of sums of intervals
_NETWORK_BYTES = 8  # a /64, in which one customer can use any address (RFC 6177, RFC 4291)
_SUBSCRIPTION_RETRY_SECONDS = 5.0
_NO_LIMIT = nullcontext()


class ClientTokenBuckets:
    """Limits each client to `tasks_per_second` tasks, with a burst of one second's tasks, at least one.

    In any period a client gets at most rate x time + burst + one request. `clock` is monotonic, in seconds.
    """

    def __init__(self, tasks_per_second: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval = 1 / tasks_per_second
        self._fill_seconds = max(1.0, self._interval)  # from empty to full
        self._clock = clock
        self._full_at: LRUCache[bytes, float] = LRUCache(_MAX_CLIENTS)

    def __len__(self) -> int:
        """Return the number of clients with a bucket."""
        return len(self._full_at)

    def admit(self, host: str) -> None:
        """Take a token from the client's bucket. Raises: TooManyRequests when it has none."""
        full_at, wait = self._next(host)
        # A refused request takes no token: an early retry does not postpone the time from which the client
        # is admitted.
        if wait > 0:
            raise TooManyRequests("this client exceeds its limit of tasks per second", retry_after=wait)
        self._full_at[bucket_key(host)] = full_at

    def would_admit(self, host: str) -> bool:
        """Tell whether the client's bucket has a token, without taking it."""
        return self._next(host)[1] <= 0

    def charge(self, host: str, tasks: int) -> None:
        """Take a token for each task but the first, whose token `admit` has taken."""
        key = bucket_key(host)
        now = self._clock()
        self._full_at[key] = max(self._full_at.get(key, now), now) + self._interval * (tasks - 1)

    def _next(self, host: str) -> tuple[float, float]:
        """Return when the bucket will be full after taking a token, and the seconds until it has one."""
        now = self._clock()
        full_at = max(self._full_at.get(bucket_key(host), now), now) + self._interval
        wait = full_at - now - self._fill_seconds
        return full_at, wait if wait > _TOLERANCE_SECONDS else 0.0


class ClientLimits:
    """Applies the limits that depend on the content of a request.

    `limiter` is None without `limits.requests_per_second`. `max_subscriptions` is the maximum number of open
    streams and long polls of one client; 0 means no limit.
    """

    def __init__(self, limiter: ClientTokenBuckets | None, *, max_subscriptions: int) -> None:
        self._limiter = limiter
        self._max_subscriptions = max_subscriptions
        self._subscriptions: Counter[bytes] = Counter()

    def charge(self, scope: Scope, tasks: int) -> None:
        """Take the tokens of an admitted request for `tasks` tasks."""
        if self._limiter is not None and tasks > 1:
            self._limiter.charge(client_host(scope), tasks)

    def subscription(self, scope: Scope) -> AbstractContextManager[None]:
        """Count a stream or long poll of the client while the context is open.

        Raises: TooManyRequests on entering, when the client has reached its maximum.
        """
        return self._counted(bucket_key(client_host(scope))) if self._max_subscriptions else _NO_LIMIT

    @contextmanager
    def _counted(self, key: bytes) -> Iterator[None]:
        if self._subscriptions[key] >= self._max_subscriptions:
            raise TooManyRequests(
                "this client has reached its limit of open streams and long polls",
                retry_after=_SUBSCRIPTION_RETRY_SECONDS,
            )
        self._subscriptions[key] += 1
        try:
            yield
        finally:
            self._subscriptions[key] -= 1
            if not self._subscriptions[key]:
                del self._subscriptions[key]


@lru_cache(maxsize=4096)  # parsing an address takes longer than the rest of the admission
def bucket_key(host: str) -> bytes:
    """Return the key that identifies a client: an IPv4 address, or the /64 of an IPv6 address.

    An IPv4-mapped IPv6 address, as seen by a dual-stack listener, counts as IPv4. All values that are no
    address share one key, so that invented names do not get a bucket each.
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


def client_key(scope: Scope) -> bytes:
    """Return the key of the request's client; see `bucket_key`. Empty if the address is unknown."""
    client = scope.get("client")
    return bucket_key(client[0]) if client else b""


class RateLimitMiddleware:
    """Middleware that refuses requests of clients over their rate; probes and scrapes are exempt."""

    def __init__(self, app: ASGIApp, *, limiter: ClientTokenBuckets) -> None:
        self._app = app
        self._limiter = limiter

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass the request on. Raises: TooManyRequests before anything is awaited."""
        if scope["type"] == "http" and not operator_endpoints.is_probe(scope):
            self._limiter.admit(client_host(scope))
        return self._app(scope, receive, send)
