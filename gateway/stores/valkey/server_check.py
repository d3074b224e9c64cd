"""Verifies, before a connection is used, that the server and the permissions of the user suffice.

Without this step, a missing permission would be noticed only when an operation needs it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from redis.asyncio import RedisCluster
from redis.exceptions import MovedError, ResponseError

from gateway.stores.valkey.failure_reasons import (
    IS_CLUSTER,
    NOT_VALKEY,
    StoreFailure,
    is_unsupported,
    missing_permissions,
    missing_rules,
)
from gateway.stores.valkey.scripts import CHECK
from gateway.stores.valkey.servers import StoreServers

_OLDEST_VERSION = (6, 2)
# A server of a cluster without an error has all slots, with a probability of 1 - 2^-16 or more.
_SLOTS_TO_TRY = 16
_MOST_CHARACTERS = 40  # of the server's name and version


async def verify(servers: StoreServers) -> None:
    """Run each command that the store needs, with the keys and the channel it uses. Raises: ERRORS."""
    rules: list[str] = []
    steps: tuple[Callable[[StoreServers], Awaitable[list[str]]], ...] = (_ping, _eval, _evalsha, _subscribe)
    for step in steps:
        try:
            rules += await step(servers)
        except ResponseError as exc:
            missing = missing_rules(exc, key_prefix=servers.key_prefix)
            if not missing:
                if is_unsupported(exc):
                    raise StoreFailure(await _why_unsupported(servers, exc)) from exc
                raise
            rules += missing
    if rules:
        raise StoreFailure(missing_permissions(list(dict.fromkeys(rules))))
    if problem := too_old(await server_version(servers)):
        raise StoreFailure(problem)


async def server_version(servers: StoreServers) -> str:
    """Return name and version of the server; "" if the user has no permission to ask. Raises: ERRORS."""
    try:
        return _version(await _hello(servers))
    except ResponseError as exc:
        # HELLO exists since Redis 6.0; some managed servers do not have it.
        return await _version_in_info(servers) if is_unsupported(exc) else ""


def too_old(version: str) -> str:
    """Return why a server with this name and version is not supported; "" if it is."""
    numbers = version.rpartition(" ")[2].split(".")[:2]
    if all(map(str.isdecimal, numbers)) and tuple(map(int, numbers)) < _OLDEST_VERSION:
        return f"the server is too old: {version}; Redis 6.2 or newer is required"
    return ""


async def _ping(servers: StoreServers) -> list[str]:
    client: Any = servers.client
    nodes = {"target_nodes": RedisCluster.PRIMARIES} if isinstance(client, RedisCluster) else {}
    await client.ping(**nodes)
    return []


async def _eval(servers: StoreServers) -> list[str]:
    client: Any = servers.client
    pipeline = client.pipeline(transaction=False)
    pipeline.execute_command("EVAL", CHECK.text, *_arguments(servers))
    if not isinstance(client, RedisCluster):
        for number in range(_SLOTS_TO_TRY):
            pipeline.execute_command("EVAL", "return 0", 1, servers.key(f"check-{number}"))
    replies = await pipeline.execute(raise_on_error=False)
    for reply in replies:
        if isinstance(reply, MovedError):
            raise StoreFailure(IS_CLUSTER)
        if isinstance(reply, Exception):
            raise reply
    failed = replies[0]
    if not isinstance(failed, list) or not all(isinstance(part, bytes) for part in failed):
        raise StoreFailure(NOT_VALKEY)
    rules: list[str] = []
    for command, text in zip(failed[::2], failed[1::2], strict=True):
        error = ResponseError(text.decode(errors="replace"))
        if "WRONGTYPE" in str(error):  # the command itself is permitted
            continue
        missing = missing_rules(error, key_prefix=servers.key_prefix)
        if not missing and "can't run this command" not in str(error):
            raise error
        rules += missing or [f"+{command.decode().lower()}"]
    return rules


async def _evalsha(servers: StoreServers) -> list[str]:
    client: Any = servers.client
    try:
        await client.execute_command("EVALSHA", CHECK.sha, *_arguments(servers))
    except ResponseError as exc:
        # An error that is not about EVALSHA is reported by another step, or is no error here: NOSCRIPT.
        return [rule for rule in missing_rules(exc, key_prefix=servers.key_prefix) if rule == "+evalsha"]
    return []


async def _subscribe(servers: StoreServers) -> list[str]:
    async with AsyncExitStack() as stack:
        pubsub = await servers.subscribe(stack)
        await pubsub.get_message(timeout=None)  # the confirmation, or an error
    return []


def _arguments(servers: StoreServers) -> tuple[int, str, str]:
    return 1, servers.key("check"), f"{servers.channel}:check"


async def _why_unsupported(servers: StoreServers, exc: ResponseError) -> str:
    try:
        about = await _hello(servers)
    except ResponseError as refused:
        if is_unsupported(refused):  # HELLO exists since Redis 6.0
            return "the server is too old: Redis 6.2 or newer is required"
        about = {}
    if about.get("mode") == "sentinel":
        return "the server is a Sentinel: set store.sentinel_service"
    return too_old(_version(about)) or servers.reason_of(exc)


async def _hello(servers: StoreServers) -> dict[str, str]:
    client: Any = servers.client
    node = {"target_nodes": client.get_random_node()} if isinstance(client, RedisCluster) else {}
    reply = await client.execute_command("HELLO", **node)
    if not isinstance(reply, list):
        return {}
    return {_text(name): _text(value) for name, value in zip(reply[::2], reply[1::2], strict=False)}


async def _version_in_info(servers: StoreServers) -> str:
    client: Any = servers.client
    node = {"target_nodes": client.get_random_node()} if isinstance(client, RedisCluster) else {}
    try:
        about = await client.info("server", **node)
    except ResponseError:
        return ""
    return _version({"server": "redis", "version": str(about.get("redis_version", ""))})


def _version(about: dict[str, str]) -> str:
    return f"{about.get('server', '').capitalize()} {about.get('version', '')}".strip()[:_MOST_CHARACTERS]


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
