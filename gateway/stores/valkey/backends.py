"""Connections to the servers of `store.url` with redis-py: a single server, Sentinel, or a cluster.

This module hides the differences between them. `RedisBackends` runs scripts on the keys of a slot and
subscribes to the channels of slots. On a cluster these are sharded channels, on the same node as the keys
of their slot, so that a script can publish. Elsewhere they are ordinary channels, which Redis 6.2 supports.

The retries and reconnections of redis-py are disabled: an operation has milliseconds, and a subscription that
is restored silently would hide lost messages.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from redis.asyncio import Redis, RedisCluster, Sentinel
from redis.asyncio.client import PubSub
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisClusterException, RedisError

from gateway.settings.model import Store
from gateway.settings.secret_files import check_bundle
from gateway.stores.valkey.scripts import PROBE, SCRIPTS, Script
from gateway.telemetry.redaction import Redactor

# TimeoutError, also asyncio's, is an OSError.
ERRORS = (RedisError, RedisClusterException, OSError, ValueError)
CONNECTIONS = 32  # to each server; further operations wait
SLOTS = 64  # hash tags and channels: enough to spread over a cluster, few enough to subscribe to all

Address = tuple[str, int]

_SINGLE_SERVER: Address = ("", 0)
_CONNECT_SECONDS = 2.0
_RETRIES = 0
_WARM_CONNECTIONS = 8
_CLUSTER_RETRIES = 1  # asks another node of the cluster for the new owner of a slot


class RedisBackends:
    """Connections to the servers."""

    def __init__(self, client: Redis | RedisCluster, settings: Store, options: dict[str, Any]) -> None:
        self._client = client
        self._options = options
        # Channels are shared by all databases of a server: the number separates gateways on different
        # databases.
        self._prefix = f"{settings.key_prefix}:{settings.database}"
        self._sharded = isinstance(client, RedisCluster)
        self.publish = "SPUBLISH" if self._sharded else "PUBLISH"

    def channel(self, slot: int) -> str:
        """Return the name of a slot's channel, which is also the common prefix of its keys."""
        return f"{self._prefix}:{{{slot}}}"

    def probe(self) -> tuple[list[str], list[Any]]:
        """Return the keys and arguments of the PROBE script."""
        return [f"{self.channel(0)}:probe"], [self.publish, self.channel(0)]

    async def run(self, script: Script, keys: list[str], args: list[Any]) -> list[Any]:
        """Run a script. Raises: ERRORS."""
        parts = (str(len(keys)), *keys, *args)
        try:
            return await self._client.execute_command("EVALSHA", script.sha, *parts)  # type: ignore[no-any-return]
        except NoScriptError:  # not loaded on this server yet
            return await self._client.execute_command("EVAL", script.text, *parts)  # type: ignore[no-any-return]

    async def warm_up(self) -> None:
        """Load the scripts and open a few connections before the first requests. Raises: ERRORS."""
        for script in SCRIPTS:
            await self._client.script_load(script.text)
        probes = [self.run(PROBE, *self.probe()) for _ in range(_WARM_CONNECTIONS)]
        # Wait for every probe: a pending one could open its connection after the others are closed.
        for outcome in await asyncio.gather(*probes, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    def owners(self, slots: Iterable[int]) -> dict[Address, list[int]]:
        """Return the slots by the address of their server, as far as known. Raises: ERRORS."""
        if not isinstance(self._client, RedisCluster):
            return {_SINGLE_SERVER: list(slots)}
        owners: dict[Address, list[int]] = defaultdict(list)
        for slot in slots:
            node = self._client.get_node_from_key(self.channel(slot))
            if node is None:
                raise RedisClusterException("a slot has no node")
            owners[node.host, int(node.port)].append(slot)
        return owners

    async def refresh_topology(self) -> None:
        """Reload the slot map of the cluster. Raises: ERRORS."""
        if isinstance(self._client, RedisCluster):
            await self._client.nodes_manager.initialize()

    async def subscription(self, address: Address, stack: AsyncExitStack) -> PubSub:
        """Return a connection for subscriptions; `stack` closes it."""
        client = self._client
        if isinstance(client, RedisCluster):
            host, port = address
            client = await stack.enter_async_context(Redis(host=host, port=port, **self._options))
        subscription = client.pubsub()
        stack.push_async_callback(subscription.aclose)
        return subscription

    async def subscribe(self, subscription: PubSub, slots: Iterable[int]) -> None:
        """Subscribe to the channels of slots; the server confirms or refuses each. Raises: ERRORS."""
        channels = [self.channel(slot) for slot in slots]
        if self._sharded:
            for channel in channels:  # all channels of one command must be in one slot
                await subscription.ssubscribe(channel)
        else:
            await subscription.subscribe(*channels)


@asynccontextmanager
async def connected(settings: Store, *, redactor: Redactor) -> AsyncIterator[RedisBackends]:
    """Connect to the servers of the settings; secret files are read again. Raises: ERRORS."""
    username, password = settings.login()
    _, sentinel_password = settings.sentinel_login()
    url = settings.url.get_secret_value() if password else ""
    redactor.add_secrets(*filter(None, (password, sentinel_password, url)))
    transport: dict[str, Any] = {
        "protocol": 2,
        "retry": Retry(NoBackoff(), _RETRIES),
        "socket_connect_timeout": _CONNECT_SECONDS,
        # Callers have their own timeouts. With a socket_timeout, redis-py sends each command within wait_for,
        # which on Python 3.11 loses a cancellation that arrives at the moment the sending ends.
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
                stack.push_async_callback(client.nodes_manager.aclose, nodes)
            stack.push_async_callback(client.aclose)
            async with asyncio.timeout(_CONNECT_SECONDS):
                await client.initialize()
        elif settings.sentinel_service:
            host, port = await _primary(settings, transport)
            client = Redis(host=host, port=port, db=settings.database, **options)
            stack.push_async_callback(client.aclose)
        else:
            [(host, port)] = settings.hosts
            client = Redis(host=host, port=port, db=settings.database, **options)
            stack.push_async_callback(client.aclose)
        yield RedisBackends(client, settings, options)


async def _primary(settings: Store, transport: dict[str, Any]) -> Address:
    """Ask the Sentinels for the address of the primary. Raises: ERRORS."""
    username, password = settings.sentinel_login()
    login = {"username": username, "password": password}
    # Shuffled: a Sentinel that does not answer uses up the connect timeout, and must not always be first.
    hosts = random.sample(settings.hosts, len(settings.hosts))
    sentinel = Sentinel(hosts, sentinel_kwargs=transport | login)  # type: ignore[no-untyped-call]
    async with AsyncExitStack() as stack, asyncio.timeout(_CONNECT_SECONDS):
        for each in sentinel.sentinels:
            stack.push_async_callback(each.aclose)
        host, port = await sentinel.discover_master(settings.sentinel_service)
        return str(host), int(port)
