"""Connects to the servers of `store.url` with redis-py: a single server, Sentinel, or a cluster.

The retries and reconnections of redis-py are disabled. The timeout of an operation is too short for retries,
and a subscription that reconnects by itself would hide lost messages.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from redis.asyncio import Redis, RedisCluster, Sentinel
from redis.asyncio.client import PubSub
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError

from gateway.settings.model import Store
from gateway.settings.secret_files import check_bundle
from gateway.settings.secret_text import InvalidSecret
from gateway.stores.valkey.batches import CONNECTIONS
from gateway.telemetry.redaction import Redactor

# TimeoutError, also asyncio's, is an OSError.
ERRORS = (RedisError, RedisClusterException, OSError, ValueError)

_FORMAT = "4"  # of keys, values and messages; gateways with different formats share nothing
_CONNECT_SECONDS = 2.0
_RETRIES = 0
_CLUSTER_RETRIES = 1  # asks another node of the cluster for the new owner of a slot

# The server's error codes, which scripts may report within a text, and redis-py's classes for them.
_REASONS = {
    "READONLY": "read-only: the server is a replica",
    "OOM": "full: the server has reached its maxmemory",
    "MISCONF": "read-only: the server cannot save its data to disk",
    "NOREPLICAS": "read-only: the server has too few replicas",
    "NOPERM": "a permission of the user is missing",
    "NOAUTH": "the server requires a password",
    "WRONGPASS": "the server rejects user name or password",
    "LOADING": "the server is loading its data",
    "CLUSTERDOWN": "the cluster is down",
    "MASTERDOWN": "the server has lost its primary",
}
_CODE = re.compile(rf"\b({'|'.join(_REASONS)})\b")
# How Redis and Valkey report a permission that is missing for a command of a script, without a code.
_FORBIDDEN = re.compile(r"can't run this command|ACL failure in script")
_CODES: tuple[tuple[type[Exception], str], ...] = (
    (ReadOnlyError, "READONLY"),
    (OutOfMemoryError, "OOM"),
    (NoPermissionError, "NOPERM"),
    (AuthenticationError, "WRONGPASS"),
    (BusyLoadingError, "LOADING"),
    (ClusterDownError, "CLUSTERDOWN"),
    (MasterDownError, "MASTERDOWN"),
)


class StoreServers:
    """The client of the servers, and the names of the keys and the channel.

    `identity` names the account whose data is shared.
    """

    def __init__(
        self, client: Redis | RedisCluster, settings: Store, *, identity: str, options: dict[str, Any]
    ) -> None:
        self.client = client
        self.identity = identity
        self._options = options
        account = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
        # Channels are shared by all databases of a server, hence the number.
        self.channel = f"{settings.key_prefix}:{_FORMAT}:{settings.database}:{account}"

    def key(self, name: str) -> str:
        """Return the name of a key."""
        return f"{self.channel}:{name}"

    async def warm_up(self) -> None:
        """Open the connections for commands. Raises: ERRORS."""
        if isinstance(self.client, RedisCluster):
            await self.client.ping(target_nodes=RedisCluster.PRIMARIES)
        else:
            pings = [self.client.ping() for _ in range(CONNECTIONS)]
            # Wait for each: a pending one could open its connection after the others are closed.
            for outcome in await asyncio.gather(*pings, return_exceptions=True):
                if isinstance(outcome, BaseException):
                    raise outcome

    async def subscribe(self, stack: AsyncExitStack) -> PubSub:
        """Subscribe to the channel, on any node of a cluster. `stack` closes it. Raises: ERRORS."""
        client = self.client
        if isinstance(client, RedisCluster):
            node = random.choice(client.get_primaries())  # noqa: S311  # spreads load
            client = Redis(host=node.host, port=int(node.port), **self._options)
            stack.push_async_callback(_close, client.aclose)
        pubsub = client.pubsub()
        stack.push_async_callback(_close, pubsub.aclose)
        await pubsub.subscribe(self.channel)
        return pubsub


async def _close(aclose: Callable[..., Awaitable[None]], *args: Any) -> None:
    """Close a client of redis-py completely, even if this task is cancelled meanwhile.

    redis-py closes each connection in a task of its own. A connection whose task is cancelled before it has
    started stays open.
    """
    closing = asyncio.ensure_future(aclose(*args))
    try:
        await asyncio.shield(closing)
    finally:
        await asyncio.wait({closing})


def reason_of(exc: BaseException) -> str:
    """Return in words why the store fails. The server's own text may contain keys, and is not repeated."""
    code = next((code for kind, code in _CODES if isinstance(exc, kind)), None)
    if code is None and isinstance(exc, ResponseError):
        found = _CODE.search(str(exc))
        code = found[1] if found is not None else "NOPERM" if _FORBIDDEN.search(str(exc)) else None
    if code is not None:
        return _REASONS[code]
    if isinstance(exc, InvalidSecret):
        return str(exc)  # names the file, and shows nothing of its content
    if isinstance(exc, TimeoutError):
        return "slow: no reply in time"
    # The class says whether the connection was refused or reset; the text may contain addresses.
    lost = isinstance(exc, OSError | RedisConnectionError)
    return f"no connection ({type(exc).__name__})" if lost else type(exc).__name__


def affects_all_operations(exc: BaseException) -> bool:
    """Tell whether other operations would fail with this error, too, so that the connection is of no use."""
    if isinstance(exc, ResponseError) and not isinstance(exc, tuple(kind for kind, _ in _CODES)):
        return bool(_CODE.search(str(exc)) or _FORBIDDEN.search(str(exc)))
    return True


@asynccontextmanager
async def connect(settings: Store, *, identity: str, redactor: Redactor) -> AsyncIterator[StoreServers]:
    """Connect to the servers of the settings; this reads the secret files again. Raises: ERRORS."""
    username, password = settings.login()
    _, sentinel_password = settings.sentinel_login()
    url = settings.url.get_secret_value() if password else ""
    redactor.add_secrets(*filter(None, (password, sentinel_password, url)))
    transport: dict[str, Any] = {
        "protocol": 2,
        "retry": Retry(NoBackoff(), _RETRIES),
        "socket_connect_timeout": _CONNECT_SECONDS,
        # Callers have their own timeouts. With a socket_timeout, redis-py sends each command within wait_for,
        # which on Python 3.11 loses a cancellation that arrives just when the command has been sent.
        "socket_timeout": None,
    }
    if settings.tls:
        ca_file = None if settings.ca_file is None else str(settings.ca_file)
        if settings.ca_file is not None:
            check_bundle(settings.ca_file)
        transport |= {"ssl": True, "ssl_ca_certs": ca_file, "ssl_check_hostname": True}
    options = {**transport, "username": username, "password": password}
    async with AsyncExitStack() as stack:
        client: Redis | RedisCluster
        if settings.cluster:
            hosts = [ClusterNode(host, port) for host, port in settings.hosts]
            cluster = options | {"retry": Retry(NoBackoff(), _CLUSTER_RETRIES)}
            # redis-py updates a single moved slot; a reinitialisation would close every connection.
            client = RedisCluster(
                startup_nodes=hosts, max_connections=CONNECTIONS + 1, reinitialize_steps=0, **cluster
            )
            # Separate callbacks, so that a cancellation during one does not skip the others. While the
            # topology is due to be reloaded, aclose of redis-py does nothing.
            for nodes in ("startup_nodes", "nodes_cache"):
                stack.push_async_callback(_close, client.nodes_manager.aclose, nodes)
            stack.push_async_callback(_close, client.aclose)
            async with asyncio.timeout(_CONNECT_SECONDS):
                await client.initialize()
        else:
            [(host, port), *_] = settings.hosts
            if settings.sentinel_service:
                host, port = await _primary(settings, transport)
            client = Redis(host=host, port=port, db=settings.database, **options)
            stack.push_async_callback(_close, client.aclose)
        yield StoreServers(client, settings, identity=identity, options=options)


async def _primary(settings: Store, transport: dict[str, Any]) -> tuple[str, int]:
    """Ask the Sentinels for the address of the primary. Raises: ERRORS."""
    username, password = settings.sentinel_login()
    login = {"username": username, "password": password}
    # Shuffled: a Sentinel that does not answer uses up the connect timeout, and must not always be first.
    hosts = random.sample(settings.hosts, len(settings.hosts))
    sentinel = Sentinel(hosts, sentinel_kwargs=transport | login)  # type: ignore[no-untyped-call]
    async with AsyncExitStack() as stack, asyncio.timeout(_CONNECT_SECONDS):
        for each in sentinel.sentinels:
            stack.push_async_callback(_close, each.aclose)
        host, port = await sentinel.discover_master(settings.sentinel_service)
        return str(host), int(port)
