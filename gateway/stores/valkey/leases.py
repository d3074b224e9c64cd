"""The leases that this replica holds, renewed; and those that it may hold unheard, given back."""

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

# A holder that dies is replaced after so long. Those alive renew, however long their query takes.
LEASE_SECONDS = 3.0
_RENEW_SECONDS = LEASE_SECONDS / 3
_GIVE_BACK_SECONDS = 0.1  # between two tries, while others may wait
_MOST_UNHEARD = 1000


class Leases:
    """Keeps leases alive. `run` runs a script, and publishes where it is told to."""

    def __init__(self, run: Callable[..., Awaitable[Any]]) -> None:
        self._run = run
        self._held: set[Lease] = set()
        self._unheard: OrderedDict[Lease, None] = OrderedDict()
        self._doubts = asyncio.Event()

    def hold(self, key: TaskKey, version: int, token: str) -> Lease:
        """Return a lease that was given, and keep it from ending."""
        lease = Lease(key, version, token)
        self._held.add(lease)
        return lease

    def drop(self, lease: Lease) -> None:
        """Renew a lease no more."""
        self._held.discard(lease)

    def doubt(self, lease: Lease) -> None:
        """Give back a lease that the server may hold for ours, though it did not answer: others wait."""
        self._unheard[lease] = None
        if len(self._unheard) > _MOST_UNHEARD:
            self._unheard.popitem(last=False)
        self._doubts.set()

    async def follow(self) -> None:
        """Renew and give back for ever."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_GIVE_BACK_SECONDS if self._unheard else _RENEW_SECONDS):
                    await self._doubts.wait()
            self._doubts.clear()
            for lease in list(self._unheard):
                with suppress(StoreUnavailable):
                    await self._run(FAIL, lease.key, [lease.token, 0, b""], told=True)
                    self._unheard.pop(lease, None)
            for lease in list(self._held):
                with suppress(StoreUnavailable):
                    await self._run(RENEW, lease.key, [lease.token, int(LEASE_SECONDS * 1000)])
