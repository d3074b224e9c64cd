"""Opens shared stores in this process, as replicas have them, and looks at the server behind them."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

from prometheus_client import CollectorRegistry

from gateway.domain.entity_tag import EntityTags
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import Operation, Status, TaskKey
from gateway.settings.store_section import Store as StoreSettings
from gateway.stores.base import Lease, Requirement
from gateway.stores.valkey.store import ValkeyStore
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.redaction import Redactor
from tests.support.harness import Json, eventually
from tests.support.seen import TAGS, seen
from tests.support.storeserver import StoreServer

KEY = TaskKey(Operation.SD_GET_PROGRESS, "task")
LIFETIME = 60.0

Open = Callable[..., Awaitable[ValkeyStore]]

_registries: WeakKeyDictionary[ValkeyStore, CollectorRegistry] = WeakKeyDictionary()


@asynccontextmanager
async def stores() -> AsyncIterator[Open]:
    """Provide a function that opens a store, and returns it once it is connected. All share a prefix."""
    prefix = uuid4().hex
    async with AsyncExitStack() as stack:

        async def opened(
            settings: Json,
            *,
            wait_until_up: bool = True,
            redactor: Redactor | None = None,
            tags: EntityTags = TAGS,
            lifetimes: Mapping[Status | None, float] | None = None,
            error_seconds: float = 60.0,
            identity: Callable[[], str] = lambda: "account",
        ) -> ValkeyStore:
            registry = CollectorRegistry()
            store = ValkeyStore(
                StoreSettings.model_validate({"key_prefix": prefix, "timeout_seconds": 1, **settings}),
                tags=tags,
                lifetimes=lifetimes or dict.fromkeys([None, *Status], 3600.0),
                error_seconds=error_seconds,
                identity=identity,
                redactor=redactor or Redactor(),
                metrics=Metrics(registry, gateway_version="test"),
                max_tasks=2000,
                min_keep_stale_seconds=60,
            )
            _registries[store] = registry
            await stack.enter_async_context(store)
            await eventually(lambda: store.trouble is None or not wait_until_up, "the store is up")
            return store

        yield opened


def operations(store: ValkeyStore, name: str = "take_off") -> float:
    """Return how many operations of this name a store has made: `take_off` is `acquire`."""
    return _sample(store, "store_operation_duration_seconds_count", name)


def errors(store: ValkeyStore, name: str) -> float:
    """Return how many operations of this name have failed."""
    return _sample(store, "store_errors_total", name)


def _sample(store: ValkeyStore, name: str, operation: str) -> float:
    found = _registries[store].get_sample_value(f"sd_gateway_{name}", {"operation": operation})
    return found or 0.0


async def leased(store: ValkeyStore, key: TaskKey = KEY, *, after: int = 0) -> Lease:
    """Acquire a lease that the server has granted."""
    lease = await store.acquire(key, Requirement(newer_than=after))
    assert isinstance(lease, Lease)
    assert lease.token
    return lease


async def waiting(store: ValkeyStore, key: TaskKey = KEY) -> asyncio.Task[Any]:
    """Start to acquire while another store has the lease; return the task once the server has replied."""
    before = operations(store)
    flight = asyncio.create_task(store.acquire(key))
    await eventually(lambda: operations(store) > before, "the server was asked")
    assert not flight.done()
    return flight


async def save(store: ValkeyStore, lease: Lease, **values: Any) -> Snapshot | None:
    """Commit a snapshot that was fetched just now."""

    def build(previous: Snapshot | None) -> Snapshot:
        given = {"lifetime": LIFETIME, "version": lease.version, "previous": previous} | values
        return seen(lease.key, **given)

    return await store.commit(lease, build)


async def stored(store: ValkeyStore, key: TaskKey = KEY, **values: Any) -> Snapshot:
    """Acquire a lease, although the present snapshot may be fresh, and commit a snapshot."""
    known = store.last_known(key)
    lease = await leased(store, key, after=0 if known is None else known.version)
    kept = await save(store, lease, **values)
    assert kept is not None
    return kept


async def shown(store: ValkeyStore, key: TaskKey = KEY) -> Snapshot | None:
    """Return the current snapshot. First read all messages: a busy machine may have paused this process."""
    await store.read_arrived_messages()
    entry = store.current_entry(key)
    return None if entry is None else entry.snapshot


async def read(store: ValkeyStore, key: TaskKey = KEY) -> None:
    """Count a read of the current snapshot, as a cache hit does."""
    await store.read_arrived_messages()
    entry = store.current_entry(key)
    assert entry is not None
    entry.reads += 1


def name_of(server: StoreServer, key: TaskKey = KEY) -> bytes:
    """Return the name of a task's key on the server."""
    [name] = server.client.keys(f"*:{key.operation}/{key.task_id}")  # type: ignore[misc]
    return bytes(name)


def channel_of(server: StoreServer, key: TaskKey = KEY) -> bytes:
    """Return the channel of the replicas that have this task."""
    return name_of(server, key).rpartition(b":")[0]


def fields_of(server: StoreServer, key: TaskKey = KEY) -> dict[bytes, bytes]:
    """Return the fields of a task on the server; none if it has not this task."""
    names = server.client.keys(f"*:{key.operation}/{key.task_id}")
    return dict(server.client.hgetall(names[0])) if names else {}  # type: ignore[arg-type, index]


def server_time(server: StoreServer) -> int:
    """Return the server's time in microseconds."""
    seconds, microseconds = server.client.time()  # type: ignore[misc]
    return int(seconds) * 1_000_000 + int(microseconds)


def step_clock(server: StoreServer, seconds: float, key: TaskKey = KEY) -> None:
    """Change the fields of a task as if the server's clock had been stepped; negative: back."""
    fields = fields_of(server, key)
    for name in (b"fetched", b"failed_until", b"held_until"):
        if name in fields:
            moment = int(fields[name]) - int(seconds * 1_000_000)
            server.client.hset(name_of(server, key), name.decode(), str(moment))


async def blocked(seconds: float) -> None:
    """Stop the event loop, as a busy or suspended process does."""
    await asyncio.sleep(0)
    time.sleep(seconds)  # noqa: ASYNC251
