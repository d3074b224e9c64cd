"""The promises of a shared store while messages, keys, clocks and permissions change; on a real server."""

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from gateway.domain.entity_tag import EntityTags
from gateway.domain.errors import UpstreamInvalid
from gateway.domain.permits_reply import PermitsReply
from gateway.domain.snapshot import Snapshot, version_now
from gateway.domain.task import Status, TaskKey
from gateway.stores.base import Lease, Requirement
from gateway.stores.valkey.store import ValkeyStore
from gateway.upstream.rate_limiter import RateLimiter
from tests.support.fault_proxy import FaultProxy
from tests.support.harness import Json, eventually
from tests.support.seen import said
from tests.support.storeserver import StoreServer, binary
from tests.support.valkey import (
    KEY,
    LIFETIME,
    Open,
    blocked,
    channel_of,
    errors,
    fields_of,
    leased,
    name_of,
    operations,
    read,
    save,
    server_time,
    shown,
    step_clock,
    stored,
    stores,
    waiting,
)

LEASE_SECONDS = 3.0
CLOCK_STEPS = [-600.0, 600.0]


@pytest.fixture(scope="module", params=["valkey", "redis"])
def _server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StoreServer]:
    with StoreServer(binary(request.param), tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def server(_server: StoreServer) -> StoreServer:
    """Return an empty server."""
    _server.client.flushall()
    return _server


@pytest.fixture
async def opened() -> AsyncIterator[Open]:
    """Return a function that opens a store and returns it once it is connected."""
    async with stores() as opened:
        yield opened


@pytest.fixture
async def one(opened: Open, server: StoreServer) -> ValkeyStore:
    """Return a store."""
    return await opened({"url": server.url})


@pytest.fixture
async def other(opened: Open, server: StoreServer) -> ValkeyStore:
    """Return another store that shares its entries."""
    return await opened({"url": server.url})


async def version_of(store: ValkeyStore, version: int, key: TaskKey = KEY) -> None:
    """Wait until a store shows this version or a later one."""

    def has_it() -> bool:
        snapshot = store.last_known(key)
        return snapshot is not None and snapshot.version >= version

    await eventually(has_it, "the other store has the version")


async def heard_all(one: ValkeyStore, other: ValkeyStore) -> None:
    """Wait until a store has read all messages that another one has published so far."""
    heard = asyncio.Event()
    other.add_throttling_listener(lambda _: heard.set())
    await one.announce_throttling(None)
    await heard.wait()


# Announcements


async def test_announced_snapshot_with_the_same_body_needs_no_operation(
    one: ValkeyStore, other: ValkeyStore
) -> None:
    """Other replicas have the body already: the announcement alone renews their copy."""
    first = await stored(one, lifetime=5.0)
    await other.acquire(KEY)
    known = other.last_known(KEY)
    assert known is not None
    before = operations(other)
    second = await stored(one)
    await version_of(other, second.version)
    renewed = await shown(other)
    assert renewed is not None
    assert operations(other) == before
    assert (renewed.version, renewed.revision, renewed.lifetime) == (second.version, first.revision, LIFETIME)
    assert (renewed.etag, renewed.body) == (first.etag, first.body)
    assert renewed.fetched_at > known.fetched_at
    assert abs(renewed.fetched_at - second.fetched_at) < 1


async def test_announced_snapshot_that_is_not_read_is_not_loaded(
    one: ValkeyStore, other: ValkeyStore
) -> None:
    """A copy that was not read since it arrived is only invalidated; the next request loads it."""
    await stored(one)
    await other.acquire(KEY)
    before = operations(other)
    second = await stored(one, message="second")
    await heard_all(one, other)
    assert operations(other) == before
    assert await shown(other) is None
    found = await other.acquire(KEY)
    assert isinstance(found, Snapshot)
    assert (said(found), found.version) == ("second", second.version)
    assert operations(other) == before + 1


@pytest.mark.parametrize("status", ["running", "succeeded"])
async def test_announced_snapshot_is_read_on_demand(
    status: str, one: ValkeyStore, other: ValkeyStore
) -> None:
    """It is read once, and then it is the latest known snapshot; without an announcement, nothing is read."""
    await stored(one)
    await other.acquire(KEY)
    before = operations(other)
    assert not await other.load_announced_snapshot(KEY)
    assert operations(other) == before
    second = await stored(one, message="second", status=status, progress=1)
    await heard_all(one, other)
    assert await other.load_announced_snapshot(KEY)
    assert said(await shown(other)) == "second"
    assert not await other.load_announced_snapshot(KEY)
    assert operations(other) == before + 1
    latest = other.last_known(KEY)
    assert latest is not None
    assert latest.version == second.version


@pytest.mark.parametrize("why", ["read", "watched"])
async def test_announced_snapshot_is_loaded_where_it_is_needed(
    why: str, one: ValkeyStore, other: ValkeyStore
) -> None:
    """A copy that is read or watched is replaced at once, and readable meanwhile."""
    await stored(one)
    await other.acquire(KEY)
    heard: list[Snapshot] = []
    other.add_snapshot_listener(heard.append, is_watched=lambda key: why == "watched" and key == KEY)
    if why == "read":
        await read(other)
    second = await stored(one, message="second")
    await version_of(other, second.version)
    assert said(await shown(other)) == "second"
    assert [said(snapshot) for snapshot in heard] == ["second"]
    entry = other.current_entry(KEY)
    assert entry is not None
    assert (entry.reads, entry.fetched_here) == (0, False)


async def test_announced_end_of_a_task_is_loaded_with_an_unchanged_body(
    one: ValkeyStore, other: ValkeyStore
) -> None:
    """An announcement that a task has ended is never taken as a renewal of a running one."""
    await stored(one)
    await other.acquire(KEY)
    await read(other)
    ended = await stored(one, status="succeeded", progress=1)
    await version_of(other, ended.version)
    found = await shown(other)
    assert found is not None
    assert found.status is Status.SUCCEEDED


async def test_smaller_lifetime_counts(opened: Open, server: StoreServer) -> None:
    """A snapshot is fresh for the shorter lifetime of two replicas, also when it is only announced."""
    one = await opened({"url": server.url})
    short = await opened({"url": server.url}, lifetimes=dict.fromkeys([None, *Status], 2.0))
    await stored(one)
    found = await short.acquire(KEY)
    assert isinstance(found, Snapshot)
    assert found.lifetime == 2.0
    second = await stored(one)
    await version_of(short, second.version)
    renewed = short.last_known(KEY)
    assert renewed is not None
    assert renewed.lifetime == 2.0


async def test_older_announcement_has_no_effect(one: ValkeyStore, server: StoreServer) -> None:
    """A message that was on its way for long does not hide a newer snapshot."""
    known = await stored(one)
    metadata = f"{known.version - 1} {known.version - 1} 0 60000000 0"
    server.client.publish(channel_of(server).decode(), f"S{KEY.operation}/{KEY.task_id}\n{metadata}")
    await heard_all(one, one)
    assert await shown(one) is known


async def test_unchanged_snapshot_keeps_its_entry(one: ValkeyStore) -> None:
    """A refused commit does not replace the entry with a copy, and no listener is called."""
    late = await leased(one)
    one.release_lease_early(late)
    known = await stored(one, message="newer")
    await read(one)
    entry = one.current_entry(KEY)
    heard: list[Snapshot] = []
    one.add_snapshot_listener(heard.append)
    assert await save(one, late, message="late") is known
    await one.read_arrived_messages()
    assert one.current_entry(KEY) is entry
    assert heard == []


# A process that is paused


async def test_paused_replica_catches_up_without_the_server(one: ValkeyStore, server: StoreServer) -> None:
    """After a pause the cache is hidden until all messages are read; this needs no reply of the server."""
    known = await stored(one)
    assert await shown(one) is known
    before = operations(one)
    server.freeze()
    try:
        await blocked(0.1)
        assert one.current_entry(KEY) is None
        assert one.last_known(KEY) is known
        assert await one.read_arrived_messages()
        entry = one.current_entry(KEY)
        assert entry is not None
        assert entry.snapshot is known
        assert one.is_current(entry)
        assert operations(one) == before
        for _ in range(100):  # it is up to date, unless a busy machine has paused this process again
            if not await one.read_arrived_messages():
                break
        else:
            pytest.fail("it is never up to date")
    finally:
        server.thaw()


@pytest.mark.parametrize("needed", ["", "read", "watched"])
async def test_paused_replica_reads_the_messages_that_it_has_missed(
    needed: str, one: ValkeyStore, server: StoreServer
) -> None:
    """A snapshot that was replaced during the pause is not shown after it, not even while it is loaded."""
    one.add_snapshot_listener(lambda _: None, is_watched=lambda key: needed == "watched" and key == KEY)
    known = await stored(one)
    assert await shown(one) is known
    entry = one.current_entry(KEY)
    assert entry is not None
    entry.reads = int(needed == "read")
    channel = channel_of(server).decode()
    metadata = f"{known.version + 1} {known.version + 1} 0 60000000 0"
    with server.client.pipeline(transaction=False) as pipeline:
        for number in range(5000):
            pipeline.publish(channel, f"S{KEY.operation}/other-{number}\n{metadata}")
        pipeline.publish(channel, f"S{KEY.operation}/{KEY.task_id}\n{metadata}")
        pipeline.execute()
    time.sleep(0.1)  # noqa: ASYNC251  # the loop has not read the messages
    assert not one.is_current(entry)
    assert await one.read_arrived_messages()
    assert one.current_entry(KEY) is None
    assert not one.is_current(entry)


async def test_sync_does_not_raise_when_the_connection_is_lost(opened: Open, server: StoreServer) -> None:
    """A connection that is reset during a pause of the process costs a reconnection, and no exception."""
    unexpected = unexpected_errors()
    with FaultProxy(server.port) as proxy:
        one = await opened({"url": proxy.url})
        known = await stored(one)
        for _ in range(5):
            await eventually(lambda: one.trouble is None, "it shares")
            proxy.drop()
            time.sleep(0.1)  # noqa: ASYNC251  # the loop notices the reset and its pause at the same time
            await one.read_arrived_messages()
            await eventually(lambda: one.trouble, "it notices")
            assert one.last_known(KEY) is known
    gc.collect()  # reports the exceptions of tasks that were not retrieved
    assert unexpected == []


async def test_requests_that_wait_for_a_connection_survive_its_loss(
    one: ValkeyStore, server: StoreServer
) -> None:
    """When the subscription is lost, requests whose operation is not sent yet go on without the store."""
    server.client.execute_command("CLIENT", "PAUSE", "500", "WRITE")  # operations get no reply
    requests = []
    for number in range(12):
        requests.append(asyncio.create_task(one.acquire(KEY._replace(task_id=f"task-{number}"))))
        await asyncio.sleep(0.005)
    server.client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    outcomes = await asyncio.gather(*requests, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Lease] * 12


def unexpected_errors() -> list[str]:
    """Return a list to which the event loop adds the errors that it would log."""
    found: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: found.append(context["message"]))
    return found


async def test_cache_in_use_stays_up_to_date(one: ValkeyStore) -> None:
    """Without a pause a lookup need not wait, however long no message arrives."""
    known = await stored(one)
    ends = time.monotonic() + 2.0
    found = []
    while time.monotonic() < ends:
        await asyncio.sleep(0.01)
        found.append(one.current_entry(KEY) is not None)
        assert await shown(one) is known
    assert found.count(True) > 0.8 * len(found)  # a busy machine may pause this process


async def test_cache_that_was_not_used_is_up_to_date_again_at_once(one: ValkeyStore) -> None:
    """An idle replica runs no timer; its next lookup waits for a few iterations of the event loop."""
    known = await stored(one)
    await one.read_arrived_messages()
    await eventually(lambda: one.current_entry(KEY) is None, "the timer has stopped")
    assert await one.read_arrived_messages()
    assert await shown(one) is known


# Keys that are lost


async def test_lost_key_is_stored_again_by_a_replica_that_has_it(
    opened: Open, one: ValkeyStore, server: StoreServer
) -> None:
    """A replica without the task asks the others for it, and its own snapshot follows theirs."""
    known = await stored(one, progress=0.8)
    server.client.flushall()
    new = await opened({"url": server.url})
    lease = await leased(new)
    assert lease.version > known.version
    await eventually(lambda: b"version" in fields_of(server), "it is stored again")
    fields = fields_of(server)
    assert int(fields[b"version"]) == known.version
    assert fields[b"holder"] == lease.token.encode(), "the lease is not touched"
    kept = await save(new, lease, progress=0.3)
    assert kept is not None
    assert (kept.progress, kept.version) == (0.8, lease.version)
    await heard_all(new, one)
    found = await one.acquire(KEY)
    assert isinstance(found, Snapshot)
    assert (found.progress, found.version) == (0.8, lease.version)


async def test_lost_snapshot_does_not_hide_the_one_that_another_replica_fetches(
    one: ValkeyStore, other: ValkeyStore, server: StoreServer
) -> None:
    """While a replica waits for another one's lease, it takes its own fresh snapshot for the latest.

    That ends with the message about the new snapshot.
    """
    known = await stored(one)
    assert isinstance(await other.acquire(KEY), Snapshot)
    server.client.flushall()
    lease = await leased(other, after=known.version)
    entry = one.entry(KEY)
    assert entry is not None
    entry.outdated = True  # as after a reconnection
    flight = await waiting(one)
    assert await shown(one) is known
    newer = await save(other, lease, message="newer")
    assert newer is not None
    found = await flight
    assert isinstance(found, Snapshot)
    assert found.version == newer.version
    assert await shown(one) is not None


async def test_newer_snapshot_replaces_an_older_one_that_was_restored(
    opened: Open, other: ValkeyStore, server: StoreServer
) -> None:
    """A replica that returns with an old snapshot stores it, because the server has lost the newer one."""
    with FaultProxy(server.port) as proxy:
        one = await opened({"url": proxy.url})
        before = await stored(one, progress=0.1)
        proxy.stall(to_server=True, to_client=True)
        await eventually(lambda: one.trouble, "it is alone")
        older = await alone(one, progress=0.2)
        newer = await save(other, await leased(other, after=before.version), progress=0.3)
        assert newer is not None
        assert newer.version > older.revision
        server.client.flushall()
        proxy.heal()
        await eventually(lambda: server.client.keys("*/task"), "it has stored its snapshot")
        await eventually(
            lambda: fields_of(server).get(b"version") == b"%d" % newer.version,
            "the newer one is stored",
        )
        await eventually(lambda: one.current_entry(KEY) is None, "it has heard of the newer one")
        assert (await result(one)).version == newer.version


async def test_lost_end_of_a_task_is_stored_again(
    opened: Open, one: ValkeyStore, server: StoreServer
) -> None:
    """A task that has ended stays ended, although the server has lost it."""
    ended = await stored(one, status="succeeded", progress=1)
    server.client.flushall()
    new = await opened({"url": server.url})
    lease = await leased(new)
    await eventually(lambda: b"version" in fields_of(server), "it is stored again")
    kept = await save(new, lease, progress=0.3)
    assert kept is not None
    assert (kept.status, kept.version) == (Status.SUCCEEDED, max(ended.version, kept.version))


async def test_known_task_is_not_asked_for(one: ValkeyStore, other: ValkeyStore, server: StoreServer) -> None:
    """A replica that has a snapshot itself commits one that follows it, and needs no other replica."""
    known = await stored(one, progress=0.8)
    await other.acquire(KEY)
    server.client.flushall()
    again = await stored(other, progress=0.3)
    assert (again.progress, again.version > known.version) == (0.8, True)


# A server that was away


async def test_end_that_was_fetched_while_the_store_was_down_wins(tmp_path: Path, opened: Open) -> None:
    """A replica alone sees a task end. When the store is back, no replica sees it run any more."""
    with StoreServer(binary("valkey"), tmp_path) as server:
        one, other = await opened({"url": server.url}), await opened({"url": server.url})
        await stored(one, progress=0.1)
        await other.acquire(KEY)
        server.kill()
        for store in (one, other):
            await eventually(lambda store=store: store.trouble, "it is alone")  # type: ignore[misc]
        running = await alone(other, progress=0.9)
        ended = await alone(one, status="succeeded", progress=1)
        assert (ended.terminal, running.terminal) == (True, False)
        server.start()
        for store in (other, one):  # the running one may be stored first
            await eventually(lambda store=store: store.trouble is None, "it shares again")  # type: ignore[misc]
        await eventually(lambda: fields_of(server).get(b"terminal") == b"1", "the end is stored")
        for store in (one, other):
            found = await store.acquire(KEY)
            assert isinstance(found, Snapshot)
            assert found.status is Status.SUCCEEDED


async def test_end_wins_over_a_running_snapshot_with_a_larger_version(
    opened: Open, other: ValkeyStore, server: StoreServer
) -> None:
    """A task that one replica, cut off from the store, saw end has ended for the others, too."""
    with FaultProxy(server.port) as proxy:
        one = await opened({"url": proxy.url})
        await stored(one, progress=0.1)
        proxy.stall(to_server=True, to_client=True)
        await eventually(lambda: one.trouble, "it is alone")
        ended = await alone(one, status="succeeded", progress=1)
        running = await save(other, await leased(other, after=ended.version), progress=0.2)
        assert running is not None
        assert (running.terminal, running.version > ended.version) == (False, True)
        proxy.heal()
        await eventually(lambda: one.trouble is None, "it shares again")
        await eventually(lambda: fields_of(server).get(b"terminal") == b"1", "the end is stored")
        await heard_all(one, other)
        for store in (one, other):
            assert (await result(store)).status is Status.SUCCEEDED


async def test_stored_end_wins_over_a_running_snapshot_that_was_fetched_alone(
    one: ValkeyStore, other: ValkeyStore, server: StoreServer
) -> None:
    """A running snapshot with a larger version, from a host whose clock is ahead, does not return."""
    ended = await stored(one, status="succeeded", progress=1)
    server.freeze()
    try:
        await eventually(lambda: other.trouble, "it is alone")
        running = await save(other, Lease(KEY, ended.version + 10**9), progress=0.9)
        assert running is not None
        assert not running.terminal
    finally:
        server.thaw()
    for store in (one, other):
        await eventually(lambda store=store: store.trouble is None, "it shares again")  # type: ignore[misc]
    for store in (other, one):
        assert (await result(store)).status is Status.SUCCEEDED
        assert (await result(store)).version == ended.version


async def test_snapshot_of_an_overlapping_query_is_fetched_again(
    opened: Open, other: ValkeyStore, server: StoreServer
) -> None:
    """Two queries overlapped while a replica had no store: it does not go on with a snapshot of its own."""
    with FaultProxy(server.port) as proxy:
        one = await opened({"url": proxy.url})
        before = await stored(one, progress=0.1)
        proxy.stall(to_server=True, to_client=True)
        await eventually(lambda: one.trouble, "it is alone")
        lease = await leased(other, after=before.version)
        own = await alone(one, progress=0.3)
        theirs = await save(other, lease, progress=0.2)
        assert theirs is not None
        assert theirs.version < own.version < theirs.revision
        writes = operations(one, "land")
        proxy.heal()
        await eventually(lambda: operations(one, "land") > writes, "it has tried to store its snapshot")
        assert await shown(one) is None
        newer = await save(one, await leased(one), progress=0.4)
        assert newer is not None
        await heard_all(one, other)
        for store in (one, other):
            assert (await result(store)).version == newer.version > own.version


async def overlapping(one: ValkeyStore, other: ValkeyStore, server: StoreServer) -> tuple[Lease, Lease]:
    """Let the server lose two leases, so that two replicas query and may commit at the same time."""
    first = await leased(one)
    server.client.flushall()
    second = await leased(other, after=first.version)
    server.client.flushall()
    return first, second


async def test_announced_snapshot_of_an_overlapping_query_is_fetched_again(
    one: ValkeyStore, other: ValkeyStore, server: StoreServer
) -> None:
    """A replica hears of a snapshot with a larger version, which is perhaps older than its own."""
    first, second = await overlapping(one, other, server)
    assert await save(one, first, progress=0.2) is not None
    server.client.flushall()
    assert await save(other, second, progress=0.3) is not None
    await heard_all(other, one)
    assert await shown(one) is None
    newer = await save(one, await leased(one), progress=0.4)
    assert newer is not None
    assert newer.version > second.version
    await eventually(lambda: other.current_entry(KEY) is None, "the other replica hears of it")
    assert (await result(other)).version == newer.version


async def test_snapshot_of_an_overlapping_query_is_not_committed(
    one: ValkeyStore, other: ValkeyStore, server: StoreServer
) -> None:
    """A replica has fetched a snapshot, and has heard of one that is perhaps newer: it serves neither."""
    first, second = await overlapping(one, other, server)
    await read_of(other, await save(one, first, progress=0.2))
    server.client.flushall()
    assert await save(other, second, progress=0.3) is None
    assert await shown(other) is None
    assert (await leased(other)).version > second.version


async def test_snapshot_of_an_overlapping_query_is_not_kept_without_the_store(
    opened: Open, other: ValkeyStore, server: StoreServer
) -> None:
    """A replica cannot store its snapshot, and has heard of one that is perhaps newer: it serves neither."""
    with FaultProxy(server.port) as proxy:
        one = await opened({"url": proxy.url})
        first, second = await overlapping(other, one, server)
        await read_of(one, await save(other, first, message="theirs"))
        proxy.stall(to_server=True, to_client=True)
        assert await save(one, second, message="own") is None
        assert await shown(one) is None
        lease = await one.acquire(KEY)
        assert isinstance(lease, Lease)
        assert lease.version > second.version


async def read_of(store: ValkeyStore, snapshot: Snapshot | None) -> None:
    """Read the snapshot of another store."""
    assert snapshot is not None
    found = await store.acquire(KEY)
    assert isinstance(found, Snapshot)
    assert found.version == snapshot.version


async def test_stored_snapshot_of_an_overlapping_query_is_fetched_again(
    opened: Open, other: ValkeyStore, server: StoreServer
) -> None:
    """A replica that has missed messages finds a snapshot that is perhaps older than its own."""
    with FaultProxy(server.port) as proxy:
        one = await opened({"url": proxy.url})
        first, second = await overlapping(one, other, server)
        own = await save(one, first, progress=0.2)
        assert own is not None
        proxy.stall(to_server=True, to_client=True)
        await eventually(lambda: one.trouble, "it is alone")
        server.client.flushall()
        assert await save(other, second, progress=0.3) is not None
        proxy.heal()
        await eventually(lambda: one.trouble is None, "it shares again")
        assert (await leased(one)).version > max(own.revision, second.version)
        assert await shown(one) is None


async def alone(store: ValkeyStore, **values: Any) -> Snapshot:
    """Fetch a snapshot without the store."""
    known = store.last_known(KEY)
    assert known is not None
    lease = await store.acquire(KEY, Requirement(newer_than=known.version))
    assert isinstance(lease, Lease)
    assert not lease.token
    kept = await save(store, lease, **values)
    assert kept is not None
    return kept


# Leases


async def test_commit_returns_nothing_older_than_announced(
    one: ValkeyStore, other: ValkeyStore, server: StoreServer
) -> None:
    """If the server evicts a task, two queries overlap; the older snapshot is then fetched again."""
    lease = await leased(one)
    server.client.flushall()
    newer = await stored(other, message="newer")
    assert newer.version > lease.version
    await heard_all(other, one)
    server.client.flushall()
    assert await save(one, lease, message="older") is None


async def test_late_end_of_an_earlier_lease_does_not_affect_the_next_one(
    one: ValkeyStore, other: ValkeyStore, server: StoreServer
) -> None:
    """A dropped request may end after the next one has acquired its lease; its announcements still count."""
    dropped = await leased(one)
    server.client.flushall()
    lease = await leased(one)
    await one.release_lease(dropped)
    server.client.flushall()
    newer = await stored(other, message="newer")
    assert newer.version > lease.version
    await heard_all(other, one)
    server.client.flushall()
    assert await save(one, lease, message="older") is None


async def test_leases_are_renewed_together(one: ValkeyStore, server: StoreServer) -> None:
    """Hundreds of leases are renewed with a few writes."""
    keys = [KEY._replace(task_id=f"task-{n}") for n in range(500)]
    leases: list[Lease] = []
    for group in range(0, len(keys), 50):  # a busy server may need longer than store.timeout_seconds for all
        leases += await asyncio.gather(*(leased(one, key) for key in keys[group : group + 50]))
    before = operations(one, "renew"), reads(server)
    await eventually(lambda: operations(one, "renew") >= before[0] + len(leases), "all are renewed")
    assert errors(one, "renew") == 0
    assert reads(server) - before[1] < len(leases) / 2
    names = server.client.keys("*/task-*")
    now = server_time(server)
    held = [int(server.client.hget(name, "held_until")) - now for name in names]  # type: ignore[arg-type, union-attr]
    assert len(held) == len(leases)
    assert min(held) > 0.5 * LEASE_SECONDS * 1_000_000
    await asyncio.gather(*map(one.release_lease, leases))
    assert not server.client.keys("*/task-*")


def reads(server: StoreServer) -> int:
    """Return how often a server has read from its connections."""
    return int(server.client.info("stats")["total_reads_processed"])  # type: ignore[index]


async def test_lease_of_a_dead_replica_expires(other: ValkeyStore, server: StoreServer) -> None:
    """A waiting replica gets the lease when it expires, without a message."""
    async with stores() as elsewhere:
        dead = await elsewhere({"url": server.url, "key_prefix": "shared"})
        await leased(dead)
    async with stores() as elsewhere:
        heir = await elsewhere({"url": server.url, "key_prefix": "shared"})
        began = time.monotonic()
        await leased(heir)
        assert 1 < time.monotonic() - began < LEASE_SECONDS + 2
    assert other.trouble is None


# The server's clock


@pytest.mark.parametrize("step", CLOCK_STEPS)
async def test_clock_step_does_not_hold_a_lease(
    step: float, one: ValkeyStore, other: ValkeyStore, server: StoreServer
) -> None:
    """A lease whose end is too far ahead is not respected; a renewal repairs it."""
    await leased(one)
    step_clock(server, step)
    began = time.monotonic()
    found = await other.acquire(KEY, timeout_seconds=LEASE_SECONDS + 2)
    assert isinstance(found, Lease)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("step", CLOCK_STEPS)
async def test_clock_step_does_not_prolong_a_failure(
    step: float, opened: Open, one: ValkeyStore, server: StoreServer
) -> None:
    """A failure whose end is too far ahead, or has passed, does not count."""
    lease = await leased(one)
    await one.store_failure(lease, UpstreamInvalid("nonsense"), seconds=5)
    step_clock(server, step)
    new = await opened({"url": server.url}, error_seconds=5)
    assert isinstance(await new.acquire(KEY), Lease)


@pytest.mark.parametrize("step", CLOCK_STEPS)
async def test_clock_step_makes_snapshots_stale(
    step: float, opened: Open, one: ValkeyStore, server: StoreServer
) -> None:
    """A snapshot from the future, or older than its lifetime, is queried again; its progress is kept."""
    known = await stored(one, progress=0.8)
    step_clock(server, step)
    new = await opened({"url": server.url})
    lease = await leased(new)
    assert lease.version > known.version
    kept = await save(new, lease, progress=0.3)
    assert kept is not None
    assert kept.progress == 0.8
    found = await one.acquire(KEY, Requirement(newer_than=known.version))
    assert isinstance(found, Snapshot)
    assert found.fresh(time.monotonic())


@pytest.mark.parametrize("step", CLOCK_STEPS)
async def test_clock_step_keeps_the_end_of_a_task(
    step: float, opened: Open, one: ValkeyStore, server: StoreServer
) -> None:
    """An ended task stays ended when the age of its snapshot is unknown."""
    await stored(one, status="succeeded", progress=1)
    step_clock(server, step)
    new = await opened({"url": server.url})
    outcome = await new.acquire(KEY)
    if isinstance(outcome, Lease):
        outcome = await save(new, outcome, progress=0.3)  # type: ignore[assignment]
    assert isinstance(outcome, Snapshot)
    assert outcome.status is Status.SUCCEEDED


@pytest.mark.parametrize("step", CLOCK_STEPS)
async def test_clock_step_does_not_stop_commits(step: float, one: ValkeyStore, server: StoreServer) -> None:
    """Versions still increase after the server's clock was set back."""
    known = await stored(one)
    server.client.hset(name_of(server).decode(), "version", known.version)
    step_clock(server, step)
    versions = [(await stored(one, message=str(n))).version for n in range(3)]
    assert sorted({known.version, *versions}) == [known.version, *versions]


# Scripts


async def test_unknown_script_is_sent_again(one: ValkeyStore, server: StoreServer) -> None:
    """After the server has lost its scripts, no operation fails."""
    await stored(one)
    for n in range(3):
        server.client.script_flush()
        await asyncio.gather(*(stored(one, KEY._replace(task_id=f"task-{n}-{m}")) for m in range(50)))
    assert [errors(one, name) for name in ("take_off", "land", "probe", "renew")] == [0, 0, 0, 0]
    assert one.trouble is None


# Identities


async def test_connection_is_opened_anew_for_another_account(opened: Open, server: StoreServer) -> None:
    """When the access key changes, the replica shares with those that have the new one, and no others."""
    account = ["old"]
    moving = await opened({"url": server.url}, identity=lambda: account[0])
    old = await opened({"url": server.url}, identity=lambda: "old")
    new = await opened({"url": server.url}, identity=lambda: "new")
    await stored(old, message="old")
    await stored(new, message="new")
    assert said(await result(moving)) == "old"
    account[0] = "new"
    await eventually(lambda: moving.trouble, "it leaves the old account")
    assert moving.trouble == "the access key has changed"
    await eventually(lambda: moving.trouble is None, "it is connected again")
    assert await shown(moving) is None, "the server is asked first"
    assert said(await result(moving)) == "new"
    assert len(server.client.keys("*:sd_get_progress/task")) == 2  # type: ignore[arg-type]


async def result(store: ValkeyStore, key: TaskKey = KEY) -> Snapshot:
    """Return the shared snapshot of a task."""
    found = await store.acquire(key)
    assert isinstance(found, Snapshot)
    return found


async def test_replicas_read_the_tags_of_each_other(opened: Open, server: StoreServer) -> None:
    """Replicas with the same secret key restore the tag that another one has issued, with its revision."""
    tags = EntityTags(lambda: "secret")
    one = await opened({"url": server.url}, tags=EntityTags(lambda: "secret"))
    other = await opened({"url": server.url}, tags=tags)
    known = await stored(one, tags=EntityTags(lambda: "secret"))
    found = await result(other)
    assert found.etag == known.etag
    assert tags.revision(found.etag, KEY) == found.revision == known.revision


# Probes


@pytest.mark.parametrize(
    ("harm", "heal", "reason"),
    [
        ("replicaof 127.0.0.1 1", "replicaof no one", "read-only"),
        ("config set maxmemory 1", "config set maxmemory 0", "full"),
        ("acl setuser default resetkeys ~other:*", "acl setuser default resetkeys ~*", "permission"),
        ("acl setuser default -evalsha -eval", "acl setuser default +evalsha +eval", "permission"),
        ("acl setuser default -publish", "acl setuser default +publish", "permission"),
        ("acl setuser default -set", "acl setuser default +set", "permission"),
    ],
    ids=["replica", "full", "keys", "scripts", "publish", "set"],
)
async def test_probe_tells_why_the_server_stores_nothing(
    harm: str, heal: str, reason: str, one: ValkeyStore, server: StoreServer
) -> None:
    """A server that cannot store or publish is noticed without any request, with the reason."""
    known = await stored(one)
    with ExitStack() as stack:
        stack.callback(server.client.execute_command, *heal.split())
        server.client.execute_command(*harm.split())
        began = time.monotonic()
        await eventually(lambda: one.trouble, "it notices")
        seconds = time.monotonic() - began
        assert reason in (one.trouble or "")
        assert seconds < 3, "half a second, and more on a busy machine"
        lease = await one.acquire(KEY, Requirement(newer_than=known.version))
        assert isinstance(lease, Lease)
        assert not lease.token
        assert await save(one, lease, message="alone") is not None
    await eventually(lambda: one.trouble is None, "it shares again")
    assert await leased(one, KEY._replace(task_id="shared"))


@pytest.mark.parametrize("command", ["hset", "hmget", "pexpire"])
async def test_operation_tells_which_kind_of_permission_is_missing(
    command: str, one: ValkeyStore, server: StoreServer
) -> None:
    """A command that the probe does not use is named by the first operation that needs it."""
    known = await stored(one)
    with ExitStack() as stack:
        stack.callback(server.client.execute_command, *f"acl setuser default +{command}".split())
        server.client.execute_command(*f"acl setuser default -{command}".split())
        lease = await one.acquire(KEY._replace(task_id="new"))
        assert isinstance(lease, Lease)
        assert not lease.token
        assert "permission" in (one.trouble or "")
        named = f"missing permissions of the user: +{command}"  # by Redis only after a reconnect
        await eventually(lambda: one.trouble == named, "the command is named")
        assert await shown(one) is known
        assert fields_of(server), "the key is not deleted"
    await eventually(lambda: one.trouble is None, "it shares again")
    assert await leased(one, KEY._replace(task_id="shared"))


# PermitsReply

Take = Callable[..., Any]


def permits_name(server: StoreServer) -> str:
    """Return the name of the shared rate limiter's key."""
    [name] = server.client.keys("*:permits")  # type: ignore[misc]
    return str(name.decode())


async def take(
    store: ValkeyStore,
    refreshes: int = 0,
    first_queries: int = 0,
    *,
    per_second: float = 0.01,
    burst: float = 8.0,
) -> PermitsReply:
    """Take permits; by default from a bucket that hardly fills."""
    permits = await store.take_permits(
        per_second, burst=burst, refreshes=refreshes, first_queries=first_queries
    )
    assert permits is not None
    return permits


async def granted(store: ValkeyStore, refreshes: int = 0, first_queries: int = 0) -> tuple[int, int]:
    """Return how many permits are granted to refreshes, and to first queries."""
    permits = await take(store, refreshes, first_queries)
    return permits.refreshes, permits.first_queries


async def test_permits_are_shared(one: ValkeyStore, other: ValkeyStore) -> None:
    """All replicas together get as many permits as the bucket holds, and no more than they ask for."""
    assert [await granted(each, 3) for each in (one, other, one)] == [(3, 0), (3, 0), (2, 0)]
    none = await take(other, 3)
    assert (none.refreshes, none.first_queries) == (0, 0)
    assert (none.refreshes_elsewhere, none.first_queries_elsewhere) == (1, 0)
    assert 0 < none.next_seconds <= 100


async def test_permits_go_to_refreshes_first(
    one: ValkeyStore, other: ValkeyStore, server: StoreServer
) -> None:
    """Refreshes of any replica go before first queries; one permit in four is for first queries."""
    assert await granted(one, 8) == (8, 0)
    assert await granted(one, 9) == (0, 0)
    server.client.hset(permits_name(server), mapping={"tokens": 8, "refreshes_since": 0})
    assert await granted(other, 0, 5) == (0, 0), "they are for the refreshes of the other replica"
    assert await granted(one, 9) == (3, 0), "the fourth is for a first query"
    assert await granted(other, 0, 5) == (0, 1)
    assert await granted(one, 6) == (3, 0)
    assert await granted(other, 0, 4) == (0, 1)


async def test_permits_alternate_on_one_replica(one: ValkeyStore) -> None:
    """Three refreshes, then one first query."""
    assert await granted(one, 9, 9) == (6, 2)


async def test_permits_go_to_first_queries_without_refreshes(one: ValkeyStore, other: ValkeyStore) -> None:
    """Without any refreshes, all permits are for first queries; old numbers of a replica do not count."""
    assert await granted(one, 7) == (7, 0)
    assert await granted(one, 9) == (1, 0)
    assert (await take(other, 0, 1)).refreshes_elsewhere == 8
    await asyncio.sleep(1.1)
    permits = await take(other, 0, 1)
    assert (permits.refreshes_elsewhere, permits.first_queries_elsewhere) == (0, 0)


async def test_permits_of_a_replica_without_queries_are_not_kept(
    one: ValkeyStore, other: ValkeyStore
) -> None:
    """A replica whose queries are all served is not in the way of others."""
    assert await granted(one, 8) == (8, 0)
    await take(one, 5)
    assert (await take(other, 1)).refreshes_elsewhere == 5
    await take(one)
    assert (await take(other, 1)).refreshes_elsewhere == 0


async def test_permits_have_their_rate(one: ValkeyStore, other: ValkeyStore) -> None:
    """The bucket fills at the given rate, whatever number of replicas asks."""
    began = time.monotonic()
    total = 0
    while total < 30:
        for each in (one, other):
            permits = await take(each, 30, per_second=20, burst=2)
            total += permits.refreshes
            await asyncio.sleep(min(permits.next_seconds, 0.01))
    seconds = time.monotonic() - began
    assert seconds >= (30 - 2) / 20 - 0.1


@pytest.mark.parametrize("step", CLOCK_STEPS)
async def test_permits_survive_a_clock_step(step: float, one: ValkeyStore, server: StoreServer) -> None:
    """After a step of the server's clock the bucket fills at its rate, and is not larger than before."""
    await take(one, 20, per_second=20, burst=2)
    name = permits_name(server)
    server.client.hset(name, "refilled_at", server_time(server) - int(step * 1_000_000))
    server.client.hset(name, "elsewhere", f"9 9 {server_time(server) - int(step * 1_000_000)}")
    first = await take(one, 20, per_second=20, burst=2)
    assert first.refreshes <= 2
    assert first.refreshes_elsewhere == 0
    assert first.next_seconds <= 0.1
    total = 0
    began = time.monotonic()
    while total < 10:
        total += (await take(one, 20, per_second=20, burst=2)).refreshes
        await asyncio.sleep(0.02)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    "forged",
    [
        {"tokens": "garbage"},
        {"tokens": "1e300"},
        {"tokens": "inf"},
        {"tokens": "-1e300"},
        {"refilled_at": "garbage"},
        {"refilled_at": "1e300"},
        {"refilled_at": "-1e300"},
        {"refreshes_since": "1e300"},
        {"tokens": "nan"},
        {"tokens": "9" * 400},
        {"refilled_at": "nan"},
        {"refreshes_since": "nan"},
        {"refreshes_since": "-1e300"},
        {"unknown": "9" * 400 + " 9 1"},
        {"unknown": "garbage"},
        {"unknown": "9 9 garbage"},
        {"unknown": "1 1 " + "9" * 400},
    ],
    ids=str,
)
async def test_permits_survive_forged_fields(forged: Json, one: ValkeyStore, server: StoreServer) -> None:
    """No stored value grants more than the bucket holds, or nothing for long."""
    await take(one, 20, per_second=20, burst=2)
    server.client.hset(permits_name(server), mapping=forged)
    assert (await take(one, 20, per_second=20, burst=2)).refreshes <= 2
    refreshes = first_queries = 0
    refilled = 0.0
    began = filled_until = server_time(server)
    while server_time(server) < began + 1_000_000:
        permits = await take(one, 20, 20, per_second=20, burst=2)
        refreshes, first_queries = refreshes + permits.refreshes, first_queries + permits.first_queries
        now = server_time(server)
        refilled += min(2, (now - filled_until) / 1_000_000 * 20)  # what is above the burst is lost
        filled_until = now
        await asyncio.sleep(0.02)
    passed = (server_time(server) - began) / 1_000_000
    assert refilled / 2 <= refreshes + first_queries <= 20 * passed + 4
    assert first_queries >= round(refilled / 10), "one in four"


async def test_permits_survive_a_key_of_another_type(one: ValkeyStore, server: StoreServer) -> None:
    """The key is replaced by a new bucket."""
    await take(one, 1)
    name = permits_name(server)
    server.client.delete(name)
    server.client.lpush(name, "of another type")
    assert await granted(one, 20) == (8, 0)


async def test_permits_are_not_taken_while_this_replica_is_throttled(one: ValkeyStore) -> None:
    """A replica that waits for a token of its own leaves the permits to the others."""
    taken = 0

    async def counted(per_second: float, **queued: Any) -> PermitsReply | None:
        nonlocal taken
        permits = await one.take_permits(per_second, **queued)
        if permits is not None:
            taken += permits.refreshes + permits.first_queries
        return permits

    limiter = RateLimiter(50, take_permits=counted)
    limiter.slow_down(retry_after=1.0)
    await asyncio.gather(*(call(limiter) for _ in range(8)))
    assert 8 <= taken <= 12


async def test_permits_of_the_store_cost_no_time(one: ValkeyStore) -> None:
    """A replica that shares its rate limiter with no other is about as fast as one without a store."""
    shared, alone = RateLimiter(20, take_permits=one.take_permits), RateLimiter(20)
    began = time.monotonic()
    ends = await asyncio.gather(calls(shared), calls(alone))
    assert ends[0] - began < 1.5 * (ends[1] - began) + 0.5


async def calls(limiter: RateLimiter) -> float:
    """Make twenty calls at once; return when the last one was made."""
    await asyncio.gather(*(call(limiter) for _ in range(20)))
    return time.monotonic()


async def call(limiter: RateLimiter) -> None:
    """Wait for a permit, and use it."""
    with await limiter.acquire(is_refresh=True, timeout_seconds=60) as permit:
        permit.mark_sent()


# Values that no gateway has stored


async def test_facts_without_a_value_count_as_absent(one: ValkeyStore, server: StoreServer) -> None:
    """If a task's metadata is stored without its snapshot, the replica commits its own one."""
    late = await leased(one)
    one.release_lease_early(late)
    version = version_now() + 1_000_000
    server.client.hset(
        name_of(server), mapping={"version": version, "fetched": version, "lifetime": 60_000_000}
    )
    kept = await stored(one)
    assert await shown(one) is kept


async def test_version_of_the_far_future_is_ignored(one: ValkeyStore, server: StoreServer) -> None:
    """A forged announcement with the largest version does not keep replicas from sharing."""
    await stored(one)
    metadata = "9007199254740990 9007199254740990 0 60000000 0"
    server.client.publish(channel_of(server), f"S{KEY.operation}/{KEY.task_id}\n{metadata}")
    await heard_all(one, one)
    lease = await leased(one, after=version_now())
    assert lease.version < version_now() + 60_000_000


async def test_shorter_lifetime_needs_few_operations(
    one: ValkeyStore, opened: Open, server: StoreServer
) -> None:
    """A replica with a shorter lifetime than the stored snapshot's asks for the lease, once."""
    other = await opened({"url": server.url}, lifetimes=dict.fromkeys([None, *Status], 0.001))
    await stored(one)
    await asyncio.sleep(0.01)
    before = operations(other)
    assert isinstance(await other.acquire(KEY), Lease)
    assert operations(other) - before <= 2


async def test_watched_task_without_an_entry_is_loaded(one: ValkeyStore, other: ValkeyStore) -> None:
    """A replica whose first query has failed receives the snapshot that another one has fetched."""
    heard: list[Snapshot] = []
    other.add_snapshot_listener(heard.append, is_watched=lambda key: key == KEY)
    await stored(one)
    await eventually(lambda: heard, "the snapshot is loaded")


async def test_own_commit_is_not_loaded_back(one: ValkeyStore) -> None:
    """The message about a replica's own commit starts no operation, although the task is watched."""
    one.add_snapshot_listener(lambda _: None, is_watched=lambda _: True)
    for _ in range(5):
        await stored(one)
    await heard_all(one, one)
    assert operations(one) == 5
