"""The servers behind `store.url`, through redis-py: one, a pair under Sentinel, or a cluster.

What differs between them ends here. Whoever is handed `Servers` runs scripts on the keys of a
slot, and subscribes to the slots' channels: on a cluster those are sharded, and live with their
slot's keys, so that a script may publish; elsewhere they are ordinary ones, which Redis 6.2 has.

redis-py neither retries nor reconnects for us: an operation has milliseconds, and a subscription
that came back by itself would hide that messages were lost.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from redis.asyncio import Redis, RedisCluster, Sentinel
from redis.asyncio.client import PubSub
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisClusterException, RedisError

from gateway.redaction import Redactor
from gateway.settings import Store
from gateway.stores.scripts import Script

# TimeoutError is asyncio's, too: an OSError.
ERRORS = (RedisError, RedisClusterException, OSError, ValueError)
CONNECTIONS = 32  # to each server; one more operation waits for its turn
SLOTS = 64  # hash tags, and channels: enough to spread over any cluster, few enough to subscribe to

_CONNECT_SECONDS = 2.0  # a bound for what has no closer one: finding a cluster's nodes, asking Sentinels
_RETRIES = 0
_CLUSTER_RETRIES = 1  # asks another node of the cluster where the slot has gone


class Servers:
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

    async def run(self, script: Script, keys: list[str], args: list[Any]) -> list[Any]:
        """Run a script. Raises: ERRORS."""
        parts = (str(len(keys)), *keys, *args)
        try:
            return await self._client.execute_command("EVALSHA", script.sha, *parts)  # type: ignore[no-any-return]
        except NoScriptError:  # this server's first time
            return await self._client.execute_command("EVAL", script.text, *parts)  # type: ignore[no-any-return]

    @asynccontextmanager
    async def subscribed(self) -> AsyncIterator[list[PubSub]]:
        """Subscribe to the channels of all slots, one connection per server. Raises: ERRORS."""
        async with AsyncExitStack() as stack:
            subscriptions = []
            for client, slots in await self._owners(stack):
                subscription = client.pubsub()
                stack.push_async_callback(subscription.aclose)
                channels = [self.channel(slot) for slot in slots]
                if self._sharded:
                    for channel in channels:  # one command may name channels of one slot only
                        await subscription.ssubscribe(channel)
                else:
                    await subscription.subscribe(*channels)
                confirmed = 0
                while confirmed < len(channels):
                    message = await subscription.get_message(timeout=None)
                    confirmed += message is not None and message["type"] in {"subscribe", "ssubscribe"}
                subscriptions.append(subscription)
            yield subscriptions

    async def _owners(self, stack: AsyncExitStack) -> list[tuple[Redis, list[int]]]:
        if not isinstance(self._client, RedisCluster):
            return [(self._client, list(range(SLOTS)))]
        slots: dict[tuple[str, int], list[int]] = defaultdict(list)
        for slot in range(SLOTS):
            node = self._client.get_node_from_key(self.channel(slot))
            if node is None:
                raise RedisClusterException("a slot has no node")
            slots[node.host, int(node.port)].append(slot)
        return [
            (await stack.enter_async_context(Redis(host=host, port=port, **self._options)), owned)
            for (host, port), owned in slots.items()
        ]


@asynccontextmanager
async def connected(settings: Store, *, redactor: Redactor) -> AsyncIterator[Servers]:
    """Connect to whatever the settings say; files of secrets are read anew. Raises: ERRORS."""
    username, password = settings.login()
    redactor.hide(*filter(None, (password, settings.url.get_secret_value() if password else "")))
    transport: dict[str, Any] = {
        "protocol": 2,
        "retry": Retry(NoBackoff(), _RETRIES),
        "socket_connect_timeout": _CONNECT_SECONDS,
        "socket_timeout": _CONNECT_SECONDS,
    }
    if settings.tls:
        ca_file = None if settings.ca_file is None else str(settings.ca_file)
        transport |= {"ssl": True, "ssl_ca_certs": ca_file, "ssl_check_hostname": True}
    options = {**transport, "username": username, "password": password}
    async with AsyncExitStack() as stack:
        client: Redis | RedisCluster
        if settings.cluster:
            nodes = [ClusterNode(host, port) for host, port in settings.hosts]
            cluster = options | {"retry": Retry(NoBackoff(), _CLUSTER_RETRIES)}
            client = RedisCluster(startup_nodes=nodes, max_connections=CONNECTIONS + 1, **cluster)
            stack.push_async_callback(_close, client)
            await client.initialize()
        elif settings.sentinel_service:
            sentinel = Sentinel(settings.hosts, sentinel_kwargs=transport)  # type: ignore[no-untyped-call]
            for each in sentinel.sentinels:
                stack.push_async_callback(each.aclose)
            client = sentinel.master_for(settings.sentinel_service, db=settings.database, **options)
            stack.push_async_callback(client.aclose)
        else:
            [(host, port)] = settings.hosts
            client = Redis(host=host, port=port, db=settings.database, **options)
            stack.push_async_callback(client.aclose)
        yield Servers(client, settings, options)


async def _close(client: RedisCluster) -> None:
    await client.aclose()
    # While the topology is to be read anew, redis-py's aclose does nothing.
    for nodes in ("nodes_cache", "startup_nodes"):
        await client.nodes_manager.aclose(nodes)
