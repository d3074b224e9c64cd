"""The servers behind `store.url`, through redis-py: one, a pair under Sentinel, or a cluster.

What differs between them ends here. Whoever is handed `RedisBackends` runs scripts on the keys of a
slot, and subscribes to the slots' channels: on a cluster those are sharded, and live with their
slot's keys, so that a script may publish; elsewhere they are ordinary ones, which Redis 6.2 has.

redis-py neither retries nor reconnects for us: an operation has milliseconds, and a subscription
that came back by itself would hide that messages were lost.
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

# TimeoutError is asyncio's, too: an OSError.
ERRORS = (RedisError, RedisClusterException, OSError, ValueError)
CONNECTIONS = 32  # to each server; one more operation waits for its turn
SLOTS = 64  # hash tags, and channels: enough to spread over any cluster, few enough to subscribe to

Address = tuple[str, int]

_THE_ONE: Address = ("", 0)
_CONNECT_SECONDS = 2.0
_RETRIES = 0
_WARM_CONNECTIONS = 8
_CLUSTER_RETRIES = 1  # asks another node of the cluster where the slot has gone


class RedisBackends:
    """Connections to the servers."""

    def __init__(self, client: Redis | RedisCluster, settings: Store, options: dict[str, Any]) -> None:
        self._client = client
        self._options = options
        # Channels know no databases: without its number two gateways' would be one.
        self._prefix = f"{settings.key_prefix}:{settings.database}"
        self._sharded = isinstance(client, RedisCluster)
        self.publish = "SPUBLISH" if self._sharded else "PUBLISH"

    def channel(self, slot: int) -> str:
        """Return the name of a slot's channel, which is also its keys' common beginning."""
        return f"{self._prefix}:{{{slot}}}"

    def probe(self) -> tuple[list[str], list[Any]]:
        """Return the keys and arguments to probe the servers with."""
        return [f"{self.channel(0)}:probe"], [self.publish, self.channel(0)]

    async def run(self, script: Script, keys: list[str], args: list[Any]) -> list[Any]:
        """Run a script. Raises: ERRORS."""
        parts = (str(len(keys)), *keys, *args)
        try:
            return await self._client.execute_command("EVALSHA", script.sha, *parts)  # type: ignore[no-any-return]
        except NoScriptError:  # this server's first time
            return await self._client.execute_command("EVAL", script.text, *parts)  # type: ignore[no-any-return]

    async def warm_up(self) -> None:
        """Bring the scripts, open a few connections: a crowd of questions is to come. Raises: ERRORS."""
        for script in SCRIPTS:
            await self._client.script_load(script.text)
        probes = [self.run(PROBE, *self.probe()) for _ in range(_WARM_CONNECTIONS)]
        # Each to its end: one that is left alone would open its connection after the rest are closed.
        for outcome in await asyncio.gather(*probes, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    def owners(self, slots: Iterable[int]) -> dict[Address, list[int]]:
        """Return which server has which of these slots, as far as is known. Raises: ERRORS."""
        if not isinstance(self._client, RedisCluster):
            return {_THE_ONE: list(slots)}
        owners: dict[Address, list[int]] = defaultdict(list)
        for slot in slots:
            node = self._client.get_node_from_key(self.channel(slot))
            if node is None:
                raise RedisClusterException("a slot has no node")
            owners[node.host, int(node.port)].append(slot)
        return owners

    async def look_around(self) -> None:
        """Find out anew which server has which slot. Raises: ERRORS."""
        if isinstance(self._client, RedisCluster):
            await self._client.nodes_manager.initialize()

    async def subscription(self, address: Address, stack: AsyncExitStack) -> PubSub:
        """Return a connection to subscribe with, which `stack` closes."""
        client = self._client
        if isinstance(client, RedisCluster):
            host, port = address
            client = await stack.enter_async_context(Redis(host=host, port=port, **self._options))
        subscription = client.pubsub()
        stack.push_async_callback(subscription.aclose)
        return subscription

    async def subscribe(self, subscription: PubSub, slots: Iterable[int]) -> None:
        """Ask for the channels of slots; the server confirms each, or refuses. Raises: ERRORS."""
        channels = [self.channel(slot) for slot in slots]
        if self._sharded:
            for channel in channels:  # one command may name channels of one slot only
                await subscription.ssubscribe(channel)
        else:
            await subscription.subscribe(*channels)


@asynccontextmanager
async def connected(settings: Store, *, redactor: Redactor) -> AsyncIterator[RedisBackends]:
    """Connect to whatever the settings say; files of secrets are read anew. Raises: ERRORS."""
    username, password = settings.login()
    _, sentinel_password = settings.sentinel_login()
    url = settings.url.get_secret_value() if password else ""
    redactor.hide(*filter(None, (password, sentinel_password, url)))
    transport: dict[str, Any] = {
        "protocol": 2,
        "retry": Retry(NoBackoff(), _RETRIES),
        "socket_connect_timeout": _CONNECT_SECONDS,
        # Whoever asks has a deadline. With one of redis-py's own it sends each command within wait_for, which
        # on Python 3.11 loses a cancellation that comes as the sending ends.
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
            # A slot that moves is noted; told anew of all of them, redis-py would close every connection.
            client = RedisCluster(
                startup_nodes=hosts, max_connections=CONNECTIONS + 1, reinitialize_steps=0, **cluster
            )
            # One by one: whoever is cancelled as he closes still closes the rest. And while the topology is
            # to be read anew, redis-py's aclose does nothing.
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
    """Ask the Sentinels for the address of the server that is written to. Raises: ERRORS."""
    username, password = settings.sentinel_login()
    login = {"username": username, "password": password}
    # In any order: a silent one takes all the time there is to connect, and must not always be first.
    hosts = random.sample(settings.hosts, len(settings.hosts))
    sentinel = Sentinel(hosts, sentinel_kwargs=transport | login)  # type: ignore[no-untyped-call]
    async with AsyncExitStack() as stack, asyncio.timeout(_CONNECT_SECONDS):
        for each in sentinel.sentinels:
            stack.push_async_callback(each.aclose)
        host, port = await sentinel.discover_master(settings.sentinel_service)
        return str(host), int(port)
