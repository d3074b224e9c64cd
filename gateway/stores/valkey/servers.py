"""Connects to the servers of `store.url` with redis-py: a single server, Sentinel, or a cluster.

The retries and reconnections of redis-py are disabled. The timeout of an operation is too short for retries,
and a subscription that reconnects by itself would hide lost messages.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from redis.asyncio import Redis, RedisCluster, Sentinel
from redis.asyncio.client import PubSub
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import MovedError

from gateway.settings.certificates import CertificateFileError, present, trust
from gateway.settings.store_section import Store
from gateway.stores.valkey.batches import CONNECTIONS
from gateway.stores.valkey.failure_reasons import (
    ERRORS,
    StoreFailure,
    affects_all_operations,
    reason_of,
    words_of_file_error,
)
from gateway.telemetry.redaction import Redactor

_FORMAT = "4"  # of keys, values and messages; gateways with different formats share nothing
_CONNECT_SECONDS = 2.0
_RETRIES = 0
SENTINEL = "Sentinel: "  # begins the reason of a failure of the Sentinels
_CLUSTER_RETRIES = 1  # asks another node of the cluster for the new owner of a slot


class StoreServers:
    """The client of the servers, and the names of the keys and the channel.

    `identity` names the account whose data is shared.
    """

    def __init__(
        self, client: Redis | RedisCluster, settings: Store, *, identity: str, options: dict[str, Any]
    ) -> None:
        self.client = client
        self.identity = identity
        self.key_prefix = settings.key_prefix
        self._options = options
        account = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
        # Channels are shared by all databases of a server, hence the number.
        self.channel = f"{settings.key_prefix}:{_FORMAT}:{settings.database}:{account}"

    def key(self, name: str) -> str:
        """Return the name of a key."""
        return f"{self.channel}:{name}"

    def reason_of(self, exc: BaseException) -> str:
        """Return in words why an operation fails."""
        return reason_of(exc, key_prefix=self.key_prefix)

    def is_broken_by(self, exc: BaseException) -> bool:
        """Tell whether other operations would fail with this error, too: the connection is of no use."""
        # A client of a cluster finds the new node of a slot; a client of a single server cannot.
        return affects_all_operations(exc) or (
            isinstance(exc, MovedError) and not isinstance(self.client, RedisCluster)
        )

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


@asynccontextmanager
async def connect(settings: Store, *, identity: str, redactor: Redactor) -> AsyncIterator[StoreServers]:
    """Connect to the servers of the settings; this reads the secret files again. Raises: ERRORS."""
    try:
        username, password = settings.login()
        _, sentinel_password = settings.sentinel_login()
    except (OSError, ValueError) as exc:
        raise StoreFailure(f"login: {words_of_file_error(exc)}") from exc
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
        tls_context(settings)
        transport |= {
            "ssl": True,
            "ssl_ca_certs": _text(settings.ca_file),
            "ssl_certfile": _text(settings.client_cert_file),
            "ssl_keyfile": _text(settings.client_key_file),
            "ssl_check_hostname": True,
        }
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
                try:
                    host, port = await _primary(settings, transport)
                except ERRORS as exc:
                    raise StoreFailure(SENTINEL + reason_of(exc, key_prefix=settings.key_prefix)) from exc
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
        failures: list[Exception] = []
        down = False
        # Not discover_master of redis-py: its error does not tell why no Sentinel has an answer.
        for each in sentinel.sentinels:
            try:
                state = (await each.sentinel_masters()).get(settings.sentinel_service)  # type: ignore[union-attr]  # a dict in RESP2
            except ERRORS as exc:
                failures.append(exc)
                continue
            if state and sentinel.check_master_state(state, settings.sentinel_service):
                return str(state["ip"]), int(state["port"])
            down = down or state is not None
        if down:
            raise StoreFailure("the primary is down")
        if len(failures) == len(sentinel.sentinels):
            raise failures[0]
        raise StoreFailure("no service of this name: correct store.sentinel_service")


def tls_context(settings: Store) -> ssl.SSLContext:
    """Return a context with the certificates of the settings; this reads their files again.

    redis-py makes such a context for each connection. But its errors do not name the file, and if the key is
    encrypted, OpenSSL asks for a password on the terminal.

    Raises: StoreFailure if a file cannot be used.
    """
    try:
        context = trust(settings.ca_file, name="ca_file")
        if settings.client_cert_file is not None and settings.client_key_file is not None:
            present(context, settings.client_cert_file, settings.client_key_file)
    except CertificateFileError as exc:
        raise StoreFailure(f"TLS: store.{exc}") from exc
    return context


def _text(file: Path | None) -> str | None:
    return None if file is None else str(file)
