"""Connects to the store once, as the gateway does, for `sd-gateway check`."""

from __future__ import annotations

import asyncio
import time
from typing import Any, NamedTuple

from gateway.settings.store_section import Store
from gateway.stores.valkey.diagnosis import explain
from gateway.stores.valkey.scripts import PROBE
from gateway.stores.valkey.server_check import server_version, verify
from gateway.stores.valkey.servers import StoreServers, connect
from gateway.telemetry.redaction import Redactor

_SECONDS = 5.0  # for all steps
_WRITES = 5  # the fastest one counts: the first one may open a connection
_IDENTITY = "check"  # no gateway uses this account, so the keys are separate


class Outcome(NamedTuple):
    """The result: `problem` is empty if the store can be used. `seconds` is the duration of a test write."""

    problem: str
    server: str = ""
    seconds: float = 0.0


async def try_store(settings: Store, *, redactor: Redactor) -> Outcome:
    """Connect, and run each command that the gateway needs. Failures are reported, not raised."""
    try:
        async with (
            asyncio.timeout(_SECONDS),
            connect(settings, identity=_IDENTITY, redactor=redactor) as servers,
        ):
            await verify(servers)
            server = await server_version(servers)
            seconds = min([await _write(servers) for _ in range(_WRITES)])
    except Exception as exc:  # noqa: BLE001  # an invalid reply may cause any exception in redis-py
        return Outcome(await explain(settings, exc))
    problem = ""
    if seconds > settings.timeout_seconds:
        limit = f"store.timeout_seconds is {settings.timeout_seconds:g}"
        problem = f"slow: a test write took {seconds:.3f} s, and {limit}"
    return Outcome(problem, server, seconds)


async def _write(servers: StoreServers) -> float:
    client: Any = servers.client
    started = time.monotonic()
    await client.execute_command("EVAL", PROBE.text, 1, servers.key("probe"), f"{servers.channel}:probe")
    return time.monotonic() - started
