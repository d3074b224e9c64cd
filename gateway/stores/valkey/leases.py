"""The leases that the server has granted to this replica: it renews them while its queries run.

    granted:          hold -> renewed every second -> query ends -> forget
    released early:   hold -> stop_renewing, end_in_background -> query ends -> forget
    without a reply:  end_in_background -> repeated until the server has replied

Without a reply, it is not known whether the server has granted or ended the lease. The replica then ends the
lease, so that other replicas do not wait for a lease that no replica uses.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from contextlib import suppress

from gateway.domain.task import TaskKey
from gateway.stores.base import Lease
from gateway.stores.valkey.connection import StoreUnavailable
from gateway.stores.valkey.operations import StoreOperations

# A lease expires after this time unless its holder renews it. So a replica that dies does not block others.
LEASE_SECONDS = 3.0
_RENEW_SECONDS = LEASE_SECONDS / 3
_RETRY_SECONDS = 0.1  # between two attempts to end leases: other replicas may be waiting
_MAX_ENDING = 1000


class Leases:
    """Renews and ends leases while `run` runs.

    Until the query of a lease has ended, it also records the newest version that another replica announces
    for the task. Normally only the holder of a lease commits. But the server may evict a task together with
    its lease, and then grant another one.
    """

    def __init__(self, operations: StoreOperations) -> None:
        self._operations = operations
        self._renewed: set[Lease] = set()
        self._announced: dict[TaskKey, tuple[Lease, int]] = {}
        self._ending: OrderedDict[Lease, None] = OrderedDict()
        self._added = asyncio.Event()  # to `_ending`

    def hold(self, lease: Lease) -> Lease:
        """Start to renew a granted lease, and to record announcements; return the lease."""
        self._renewed.add(lease)
        self._announced[lease.key] = lease, 0
        return lease

    def stop_renewing(self, lease: Lease) -> bool:
        """Stop renewing a lease; return whether it was renewed until now."""
        renewed = lease in self._renewed
        self._renewed.discard(lease)
        return renewed

    def forget(self, lease: Lease) -> bool:
        """Forget a lease, because its query has ended; return whether it was renewed until now."""
        # A newer lease for the same task may have replaced this one: then its record stays.
        if self._announced.get(lease.key, (None, 0))[0] == lease:
            del self._announced[lease.key]
        return self.stop_renewing(lease)

    def end_in_background(self, lease: Lease) -> None:
        """End a lease soon; repeat this until the server has replied."""
        self._renewed.discard(lease)
        self._ending[lease] = None
        if len(self._ending) > _MAX_ENDING:
            self._ending.popitem(last=False)
        self._added.set()

    def record_announcement(self, key: TaskKey, version: int) -> None:
        """Record that another replica has announced this version of a task."""
        recorded = self._announced.get(key)
        if recorded is not None:
            lease, newest = recorded
            self._announced[key] = lease, max(newest, version)

    def newest_announcement(self, lease: Lease) -> int:
        """Return the newest version that another replica has announced since the lease was granted, or 0."""
        holder, newest = self._announced.get(lease.key, (None, 0))
        return newest if holder == lease else 0

    async def run(self) -> None:
        """Renew and end leases until cancelled."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_RETRY_SECONDS if self._ending else _RENEW_SECONDS):
                    await self._added.wait()
            self._added.clear()
            # In parallel, and thus in few batches: thousands of leases take a few round trips.
            await asyncio.gather(*map(self._end, tuple(self._ending)))
            await asyncio.gather(
                *map(self._operations.renew_lease, tuple(self._renewed)), return_exceptions=True
            )

    async def _end(self, lease: Lease) -> None:
        with suppress(StoreUnavailable):
            await self._operations.end_lease(lease)
            self._ending.pop(lease, None)
