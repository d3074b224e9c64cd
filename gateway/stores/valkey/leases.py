"""Renews the leases of this replica, and releases those that may have been granted without a reply."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from gateway.domain.task import TaskKey
from gateway.stores.base import Lease
from gateway.stores.valkey.connection import StoreUnavailable
from gateway.stores.valkey.scripts import FAIL, RENEW

# A lease whose holder dies expires after this time. Live holders renew theirs for as long as the query takes.
LEASE_SECONDS = 3.0
_RENEW_SECONDS = LEASE_SECONDS / 3
_RELEASE_SECONDS = 0.1  # between two attempts: other replicas may be waiting
_MAX_UNCONFIRMED = 1000


class Leases:
    """Keeps leases alive. `run` runs a script; with `publish=True` the script publishes."""

    def __init__(self, run: Callable[..., Awaitable[Any]]) -> None:
        self._run = run
        self._held: set[Lease] = set()
        self._unconfirmed: OrderedDict[Lease, None] = OrderedDict()
        self._pending = asyncio.Event()

    def hold(self, key: TaskKey, version: int, token: str) -> Lease:
        """Register a granted lease for renewal, and return it."""
        lease = Lease(key, version, token)
        self._held.add(lease)
        return lease

    def drop(self, lease: Lease) -> None:
        """Stop renewing a lease."""
        self._held.discard(lease)

    def release(self, lease: Lease) -> None:
        """Release a lease that the server may have granted although its reply was lost."""
        self._unconfirmed[lease] = None
        if len(self._unconfirmed) > _MAX_UNCONFIRMED:
            self._unconfirmed.popitem(last=False)
        self._pending.set()

    async def follow(self) -> None:
        """Renew and release leases until cancelled."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_RELEASE_SECONDS if self._unconfirmed else _RENEW_SECONDS):
                    await self._pending.wait()
            self._pending.clear()
            for lease in list(self._unconfirmed):
                with suppress(StoreUnavailable):
                    await self._run(FAIL, lease.key, [lease.token, 0, b""], publish=True)
                    self._unconfirmed.pop(lease, None)
            for lease in list(self._held):
                with suppress(StoreUnavailable):
                    await self._run(RENEW, lease.key, [lease.token, int(LEASE_SECONDS * 1000)])
