"""Looks for the cause of a failed connection where redis-py's exception does not tell it.

A server that expects TLS closes a connection without it, and a server that does not expect TLS waits for more
bytes. Both look like an outage. So this module opens a connection of its own. It sends no login and no key.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from contextlib import suppress

from redis.exceptions import ResponseError

from gateway.settings.store_section import Store
from gateway.stores.valkey.failure_reasons import (
    NO_TLS,
    NOT_VALKEY,
    UNCLEAR,
    UNREACHABLE,
    WANTS_TLS,
    StoreFailure,
    reason_of,
)
from gateway.stores.valkey.servers import SENTINEL, tls_context

_SECONDS = 0.5  # of each step
_MOST_HOSTS = 3
_TLS_RECORDS = (b"\x15\x03", b"\x16\x03")  # an alert, a handshake
_REFUSED = re.compile("DENIED|max number of clients")  # the server refuses each connection
_REPLIES = (b"+", b"-", b":", b"$", b"*")


async def explain(settings: Store, exc: BaseException) -> str:
    """Return in words why a connection to the servers of the settings could not be opened."""
    reason = reason_of(exc, key_prefix=settings.key_prefix)
    if reason.removeprefix(SENTINEL) not in UNCLEAR:
        return reason
    try:
        cause = await _diagnose_first(settings.hosts, tls_context(settings) if settings.tls else None)
    except StoreFailure as failure:
        return str(failure)
    if cause is None:
        return reason
    return SENTINEL + cause if reason.startswith(SENTINEL) else cause


async def _diagnose_first(hosts: list[tuple[str, int]], tls: ssl.SSLContext | None) -> str | None:
    for host, port in hosts[:_MOST_HOSTS]:
        reason = await _diagnose(host, port, tls)
        if reason is not None:
            return reason
    return None


async def _diagnose(host: str, port: int, tls: ssl.SSLContext | None) -> str | None:
    try:
        said = await _exchange(host, port, None, b"PING\r\n")
    except TimeoutError:
        return UNREACHABLE
    except OSError:
        return None
    if said.startswith(_REPLIES):
        refusal = ResponseError(said[1:].decode(errors="replace"))
        refused = reason_of(refusal, key_prefix="") if _REFUSED.search(str(refusal)) else None
        return refused if tls is None else NO_TLS
    if said and not said.startswith(_TLS_RECORDS):
        return NOT_VALKEY
    if tls is not None:
        return await _tls_failure(host, port, tls)
    return WANTS_TLS if await _speaks_tls(host, port) else None


async def _speaks_tls(host: str, port: int) -> bool:
    unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    try:
        await _exchange(host, port, unverified, b"")
    except ssl.SSLError as exc:
        return "ALERT" in (exc.reason or "")
    except OSError:
        return False
    return True


async def _tls_failure(host: str, port: int, tls: ssl.SSLContext) -> str | None:
    try:
        # A server that rejects the client's certificate says so after the handshake. If the client sends
        # something meanwhile, the alert may be lost.
        await _exchange(host, port, tls, b"")
    except ssl.SSLError as exc:
        return reason_of(exc, key_prefix="")
    except OSError:
        return None
    return None


async def _exchange(host: str, port: int, tls: ssl.SSLContext | None, sent: bytes) -> bytes:
    """Return the first bytes that the server sends within the time limit. Raises: OSError."""
    async with asyncio.timeout(_SECONDS):
        reader, writer = await asyncio.open_connection(
            host, port, ssl=tls, server_hostname=host if tls else None
        )
    try:
        writer.write(sent)
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(_SECONDS):
                return await reader.read(64)
        return b""
    finally:
        writer.close()
        with suppress(Exception):
            async with asyncio.timeout(_SECONDS):
                await writer.wait_closed()
