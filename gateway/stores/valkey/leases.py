"""Renews the leases that this replica holds, and ends those that it may hold without having a reply."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from contextlib import suppress

from gateway.stores.base import Lease
from gateway.stores.valkey.connection import StoreUnavailable
from gateway.stores.valkey.operations import LEASE_SECONDS, StoreOperations

_RENEW_SECONDS = LEASE_SECONDS / 3
_RELEASE_SECONDS = 0.1  # between two attempts: other replicas may be waiting
_MAX_RELEASING = 1000


class Leases:
    """The leases that this replica holds."""

    def __init__(self, operations: StoreOperations) -> None:
        self._operations = operations
        self._held: set[Lease] = set()
        self._releasing: OrderedDict[Lease, None] = OrderedDict()
        self._pending = asyncio.Event()

    def hold(self, lease: Lease) -> Lease:
        """Register a granted lease for renewal, and return it."""
        self._held.add(lease)
        return lease

    def drop(self, lease: Lease) -> bool:
        """Stop renewing a lease; return whether it was held."""
        held = lease in self._held
        self._held.discard(lease)
        return held

    def release(self, lease: Lease) -> None:
        """End a lease soon; repeat this until the server has confirmed it."""
        self._held.discard(lease)
        self._releasing[lease] = None
        if len(self._releasing) > _MAX_RELEASING:
            self._releasing.popitem(last=False)
        self._pending.set()

    async def run(self) -> None:
        """Renew and release leases until cancelled."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_RELEASE_SECONDS if self._releasing else _RENEW_SECONDS):
                    await self._pending.wait()
            self._pending.clear()
            # In parallel, and thus in few batches: thousands of leases take a few round trips.
            await asyncio.gather(*map(self._release, tuple(self._releasing)))
            await asyncio.gather(*map(self._operations.renew, tuple(self._held)), return_exceptions=True)

    async def _release(self, lease: Lease) -> None:
        with suppress(StoreUnavailable):
            await self._operations.finish(lease)
            self._releasing.pop(lease, None)
