"""Where snapshots live. The service knows this Protocol and never which store is behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from gateway.exceptions import GatewayError
from gateway.models import Snapshot, TaskKey


class Store(Protocol):
    """Keeps the newest snapshot of each task, and for a moment the failures to get one.

    `peek` and `failure` never wait: they answer from what this process holds. The others may
    ask a server, and never raise when it is gone.
    """

    def peek(self, key: TaskKey) -> Snapshot | None:
        """Return the newest snapshot held here, fresh or not."""
        ...

    async def load(self, key: TaskKey) -> Snapshot | None:
        """Return the newest snapshot that any replica has stored."""
        ...

    async def save(self, snapshot: Snapshot) -> Snapshot:
        """Store a snapshot unless a newer one is there; return the one that is kept."""
        ...

    def failure(self, key: TaskKey) -> GatewayError | None:
        """Return the failure that is remembered against a task, while it is."""
        ...

    async def fail(self, key: TaskKey, error: GatewayError, *, seconds: float) -> None:
        """Remember a failure for so many seconds."""
        ...

    def on_change(self, listener: Callable[[Snapshot], None]) -> None:
        """Call `listener` with every snapshot that is stored from now on, by whichever replica."""
        ...

    def __len__(self) -> int:
        """Return the number of snapshots held here."""
        ...
