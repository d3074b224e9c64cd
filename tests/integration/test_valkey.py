"""Two stores on one server: what one stores and the other receives, on every kind of server."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import trustme
from prometheus_client import CollectorRegistry
from redis.asyncio.cluster import RedisCluster

from gateway.domain.errors import (
    RateLimiterExhausted,
    UpstreamDetail,
    UpstreamRejected,
    UpstreamThrottled,
    UpstreamTimeout,
)
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import Operation, Status, TaskKey
from gateway.settings.model import Store as StoreSettings
from gateway.stores.base import Lease
from gateway.stores.memory import MemoryStore
from gateway.stores.valkey.backends import SLOTS, connected
from gateway.stores.valkey.clock_sync import MICROSECONDS
from gateway.stores.valkey.codec import encode_failure, encode_snapshot, split_stored
from gateway.stores.valkey.connection import slot_of
from gateway.stores.valkey.store import ValkeyStore
from gateway.stores.valkey.subscription import NEWS_SECONDS
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.redaction import MASK, Redactor
from tests.support.harness import PATIENCE_SECONDS, Json, eventually, free_port
from tests.support.seen import said, seen
from tests.support.storeserver import StoreServer, binary, cluster, guarded, migrate, shared_by

KEY = TaskKey(Operation.SD_GET_PROGRESS, "task")
Open = Callable[..., Any]


@pytest.fixture(scope="module", params=["valkey", "redis", "cluster", "sentinel"])
def settings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Json]:
    """Return the settings of a shared store."""
    with shared_by(request.param, tmp_path_factory.mktemp(request.param)) as settings:
        yield settings


@pytest.fixture
async def opened() -> AsyncIterator[Open]:
    """Return a function that opens a store and returns it once it is connected."""
    prefix = uuid4().hex
    async with AsyncExitStack() as stack:

        async def opened(
            settings: Json,
            *,
            redactor: Redactor | None = None,
            well: bool = True,
        ) -> ValkeyStore:
            store = ValkeyStore(
                StoreSettings.model_validate({"key_prefix": prefix, "timeout_seconds": 1, **settings}),
                memory=MemoryStore(max_tasks=100, stale_seconds=60),
                redactor=redactor or Redactor(),
                metrics=Metrics(CollectorRegistry(), gateway_version="test"),
                stale_seconds=2,
                stale_if_error_seconds=60,
            )
            await stack.enter_async_context(store)
            await eventually(lambda: store.trouble is None or not well, "the store is up")
            return store

        yield opened


@pytest.fixture
async def one(opened: Open, settings: Json) -> ValkeyStore:
    """Return a store."""
    store: ValkeyStore = await opened(settings)
    return store


@pytest.fixture
async def other(opened: Open, settings: Json) -> ValkeyStore:
    """Return another store that shares its entries."""
    store: ValkeyStore = await opened(settings)
    return store


def snapshot(lease: Lease, **values: Any) -> Snapshot:
    """Return a snapshot that was fetched just now."""
    return seen(lease.key, version=lease.version, **({"lifetime": 60.0} | values))


def channel_of(store: ValkeyStore, key: TaskKey) -> str:
    """Return the channel of a task, which is also the prefix of its keys on the server."""
    return store._connection.channel(slot_of(key))  # private: only clients of the store's server need it


def sample(store: ValkeyStore, name: str, operation: str) -> float:
    """Return the value of a metric of a store."""
    metrics = store._connection._metrics  # private: a store does not hand out its metrics
    value = metrics.registry.get_sample_value(f"sd_gateway_store_{name}", {"operation": operation})
    return value or 0.0  # None before the first operation


async def shown(store: ValkeyStore, key: TaskKey = KEY) -> Snapshot | None:
    """Peek behind the read barrier."""
    await store.sync()
    return store.peek(key)


async def leased(store: ValkeyStore, key: TaskKey = KEY, *, after: int | None = None) -> Lease:
    """Acquire a lease."""
    lease = await store.acquire(key, after=after)
    assert isinstance(lease, Lease)
    assert lease.token
    return lease


async def waiting(store: ValkeyStore, key: TaskKey = KEY) -> asyncio.Task[Any]:
    """Start to acquire while another store has the lease; return the task once the server has replied."""

    def acquires() -> float:
        return sample(store, "operation_duration_seconds_count", "take_off")

    before = acquires()
    flight = asyncio.create_task(store.acquire(key))
    await eventually(lambda: acquires() > before, "the server was asked")
    assert not flight.done()
    return flight


async def test_valkey_wakes_a_waiter_with_the_snapshot(one: ValkeyStore, other: ValkeyStore) -> None:
    """While one store has the lease the other waits; the committed snapshot is its result, unchanged."""
    lease = await leased(one)
    flight = await waiting(other)
    landed = await one.commit(lease, snapshot(lease, etaRelative=2.5, message="so\nfar", state={"job": "x"}))
    found = await flight
    assert landed is not None
    assert isinstance(found, Snapshot)
    assert found is await shown(other, KEY)
    assert (found.key, found.version, found.lifetime) == (KEY, lease.version, 60.0)
    assert (found.envelope, found.body, found.etag) == (landed.envelope, landed.body, landed.etag)
    assert (found.status, found.progress, found.eta_seconds) == (Status.RUNNING, 0.5, 2.5)
    # Both clocks are the same one here: to the other it may look older, and never fresher.
    assert landed.fetched_at - 1 < found.fetched_at <= landed.fetched_at


@pytest.mark.parametrize(
    "failure",
    [
        UpstreamTimeout("too late"),
        UpstreamThrottled("slow down", retry_after=2.5, detail=UpstreamDetail(err_code="T429")),
        UpstreamRejected(
            "the upstream rejected the query",
            envelope=b'{"status": 20,\n"errMessage": "no"}',
            detail=UpstreamDetail(err_message="no"),
        ),
    ],
    ids=lambda failure: failure.code,
)
async def test_valkey_wakes_a_waiter_with_the_failure(
    failure: Any, one: ValkeyStore, other: ValkeyStore
) -> None:
    """The failure of one store is the result of the other, with all its details."""
    lease = await leased(one)
    flight = await waiting(other)
    await one.fail(lease, failure, seconds=60)
    found = await flight
    assert type(found) is type(failure)
    assert (str(found), found.retry_after, found.detail) == (
        str(failure),
        failure.retry_after,
        failure.detail,
    )
    assert getattr(found, "envelope", b"") == getattr(failure, "envelope", b"")
    assert other.failure(KEY) is found


@pytest.mark.parametrize("end", ["abandon", "fail"])
async def test_valkey_passes_a_lease_on(end: str, one: ValkeyStore, other: ValkeyStore) -> None:
    """A lease that ends without a result passes to the next store immediately."""
    lease = await leased(one)
    flight = await waiting(other)
    if end == "abandon":
        await one.abandon(lease)
    else:
        await one.fail(lease, UpstreamTimeout("ours alone"), seconds=0)
    found = await flight
    assert isinstance(found, Lease)
    assert found.version > lease.version


async def test_valkey_returns_the_stored_snapshot(one: ValkeyStore, other: ValkeyStore) -> None:
    """A store that missed the message gets the snapshot from the server."""
    lease = await leased(one)
    await one.commit(lease, snapshot(lease, message="answer"))
    assert await shown(other, KEY) is None
    found = await other.acquire(KEY)
    assert isinstance(found, Snapshot)
    assert said(found) == "answer"


async def test_valkey_notifies_every_replica_with_the_task(one: ValkeyStore, other: ValkeyStore) -> None:
    """A change reaches every store that has the task in its cache, and no other."""
    lease = await leased(one)
    await one.commit(lease, snapshot(lease, message="first"))
    await other.acquire(KEY)
    heard: list[Snapshot] = []
    other.on_change(heard.append)
    unheld = await leased(one, KEY._replace(task_id="unheld"))
    await one.commit(unheld, snapshot(unheld))
    lease = await leased(one, after=lease.version)
    await one.commit(lease, snapshot(lease, message="second"))
    await eventually(lambda: heard, "the other hears of it")
    assert [said(changed) for changed in heard] == ["second"]
    assert await shown(other, KEY) is heard[0]
    assert await shown(other, unheld.key) is None


async def test_valkey_refuses_a_commit_after_the_lease(one: ValkeyStore, other: ValkeyStore) -> None:
    """A holder whose lease has expired cannot overwrite the result of a later holder."""
    late = await leased(one)
    # As if its holder had been paused for longer than a lease lasts. Private: the holder must not know.
    await one._end(late, 0, b"")
    lease = await leased(other)
    assert await one.commit(late, snapshot(late, message="late")) is None
    await other.commit(lease, snapshot(lease, message="newer"))
    kept = await one.commit(late, snapshot(late, message="late"))
    assert kept is not None
    assert said(kept) == "newer"


async def test_valkey_keeps_terminal_snapshots(one: ValkeyStore, other: ValkeyStore) -> None:
    """A terminal snapshot is not replaced by a later snapshot of another replica."""
    lease = await leased(one)
    await one.commit(lease, snapshot(lease, status="succeeded"))
    lease = await leased(one, after=lease.version)
    kept = await other.commit(lease, snapshot(lease))
    assert kept is not None
    assert kept.status is Status.SUCCEEDED


async def test_valkey_acquire_times_out(one: ValkeyStore, other: ValkeyStore) -> None:
    """A request that waits too long for another replica's lease ends with a timeout."""
    await leased(one)
    assert isinstance(await other.acquire(KEY, timeout_seconds=0.05), UpstreamTimeout)


async def test_valkey_shares_the_rate_limit(one: ValkeyStore, other: ValkeyStore) -> None:
    """Permits have the same rate for all replicas together; none is taken if the wait would be too long."""
    waits = [
        await store.token(0.01, saved=2, timeout_seconds=1000) for store in (one, other, one, other, one)
    ]
    assert waits[:2] == [0, 0]
    assert waits[2:] == pytest.approx([100, 200, 300], abs=60)
    with pytest.raises(RateLimiterExhausted) as spent:
        await other.token(0.01, saved=2, timeout_seconds=100)
    assert spent.value.retry_after == pytest.approx(400, abs=60)
    assert await other.token(0.01, saved=2, timeout_seconds=1000) == pytest.approx(400, abs=60)


async def test_valkey_announces_throttling(one: ValkeyStore, other: ValkeyStore) -> None:
    """Throttling is announced to every replica, with the rounded seconds of Retry-After, if known."""
    heard: list[float | None] = []
    other.on_throttled(heard.append)
    await one.announce_throttling(2.5)
    await one.announce_throttling(None)
    await eventually(lambda: len(heard) == 2, "the other hears of both")
    assert heard == [3.0, None]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    """Return a server that tests may disturb."""
    with StoreServer(binary("valkey"), tmp_path_factory.mktemp("server")) as server:
        yield server


async def test_valkey_ignores_invalid_messages(opened: Open, server: StoreServer) -> None:
    """No invalid message ends the connection or has an effect; the next valid one is applied."""
    store = await opened({"url": server.url})
    heard: list[float | None] = []
    store.on_throttled(heard.append)
    lease = await leased(store)
    known = snapshot(lease)
    assert await store.commit(lease, known) is known
    subject = b"sd_get_progress/task\n"
    future = time.time_ns() // 1000 + 7_200_000_000
    encoded = encode_snapshot(replace(known, version=future))
    failure = encode_failure(KEY, UpstreamTimeout("too late"))
    head = b"sdg3 %d %d 60000000 %d 0\n" % (future, future, future)
    messages = [
        *(b"", b"\xff", b"S", b"T-1", b"T1e9", b"Tnan", b"S" + subject, b"Sno_operation/task\n"),
        *(b"S" + subject + head, b"S" + subject + head + encoded, b"S" + subject + b"sdg3 " + b"9" * 9999),
        *(b"F" + subject + time + b"\n" + failure for time in (b"", b"-1", b"1_0", b"9" * 99, b"9" * 9999)),
        b"F" + subject + b"1000\n" + b"[" * 9999,
    ]
    channel = channel_of(store, KEY)
    for message in messages:
        server.client.publish(channel, message)
    server.client.publish(channel, b"T999999999")
    server.client.publish(channel, b"T")
    await eventually(lambda: len(heard) == 2, "the last message is heard")
    assert heard == [3600.0, None]
    assert store.trouble is None
    assert store.failure(KEY) is None
    assert await shown(store) is known


@pytest.mark.parametrize("time_to_live", [0, 10**10])
async def test_valkey_ignores_a_failure_without_an_expiry(
    opened: Open, server: StoreServer, time_to_live: int
) -> None:
    """A stored failure without an expiry, or with one beyond the settings, is ignored."""
    store = await opened({"url": server.url})
    name = f"{channel_of(store, KEY)}:{KEY.operation}:{KEY.task_id}:f"
    server.client.set(name, encode_failure(KEY, UpstreamTimeout("too late")), ex=time_to_live or None)
    assert isinstance(await store.acquire(KEY), Lease)
    assert not server.client.exists(name)


async def test_valkey_revalidates_after_a_lost_subscription(opened: Open, server: StoreServer) -> None:
    """After the subscription was lost, cached snapshots are revalidated before they are visible."""
    one = await opened({"url": server.url})
    lease = await leased(one)
    landed = await one.commit(lease, snapshot(lease))
    server.client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    await eventually(lambda: one.peek(KEY) is None, "it is up again, and doubts")
    assert one.peek_stale(KEY) is landed
    assert await one.acquire(KEY) is landed
    assert await shown(one, KEY) is landed


async def test_valkey_renews_a_lease(opened: Open, server: StoreServer) -> None:
    """A lease is renewed while its holder is alive."""
    one = await opened({"url": server.url})
    await leased(one)
    [name] = server.client.keys("*:l")  # type: ignore[misc]
    server.client.pexpire(name, 2000)
    await eventually(lambda: int(server.client.pttl(name)) > 2000, "it is renewed")  # type: ignore[arg-type]


async def test_valkey_activates_a_change_everywhere_at_once(opened: Open, server: StoreServer) -> None:
    """A replacement becomes visible at a time when all replicas have it."""
    one, key = await opened({"url": server.url}), KEY._replace(task_id="together")
    under_way, known = [], None
    for _ in range(2):
        lease = await leased(one, key, after=known)
        landed = await one.commit(lease, snapshot(lease))
        assert one.peek_stale(key) is landed
        [name] = server.client.keys("*:together:s")  # type: ignore[misc]
        head, _ = split_stored(server.client.get(name))  # type: ignore[arg-type]
        under_way.append(head.shown - head.fetched)
        known = lease.version
    assert under_way[1] >= NEWS_SECONDS * MICROSECONDS


async def test_valkey_runs_two_scripts_for_a_miss(opened: Open, server: StoreServer) -> None:
    """A miss costs the server two commands: acquire and commit."""
    one = await opened({"url": server.url})
    asked = []
    for number in range(2):  # the first one brings the scripts, too
        before = commands(server)
        lease = await leased(one, KEY._replace(task_id=f"miss-{number}"))
        await one.commit(lease, snapshot(lease))
        asked.append(commands(server) - before)
    assert asked[1] == 2


def commands(server: StoreServer) -> int:
    """Return how many scripts a server has run."""
    told = server.client.info("commandstats")
    return sum(stats["calls"] for name, stats in told.items() if name.startswith("cmdstat_eval"))  # type: ignore[union-attr]


async def test_valkey_releases_an_unconfirmed_lease(opened: Open, server: StoreServer) -> None:
    """A lease whose reply was lost is released, so that other replicas do not wait for it."""
    hasty = await opened({"url": server.url, "timeout_seconds": 0.05})
    server.freeze()
    alone = await hasty.acquire(KEY._replace(task_id="unheard"))
    assert isinstance(alone, Lease)
    assert not alone.token
    server.thaw()
    await eventually(
        lambda: (
            sample(hasty, "operation_duration_seconds_count", "fail") > 0
            and sample(hasty, "errors_total", "fail") == 0
            and not hasty._leases._unconfirmed  # private: the lease is not queued for another attempt
        ),
        "it is given back",
    )
    assert not server.client.keys("*:unheard:l")


async def test_valkey_sync_times_out(opened: Open, server: StoreServer) -> None:
    """While the server does not reply a store waits until its timeout, and then serves from its cache."""
    hasty = await opened({"url": server.url, "timeout_seconds": 0.05})
    lease = await leased(hasty, KEY._replace(task_id="silent"))
    landed = await hasty.commit(lease, snapshot(lease))
    server.freeze()
    try:
        await eventually(lambda: hasty.trouble, "it works alone, without any request")
        assert not await hasty.sync()
        assert hasty.peek(lease.key) is landed
    finally:
        server.thaw()


async def test_valkey_logs_in_with_files(opened: Open, tmp_path: Path) -> None:
    """User and password come from files, or from the URL; neither is ever logged."""
    with StoreServer(binary("valkey"), tmp_path) as server:
        server.client.execute_command("ACL", "SETUSER", "gateway", "on", ">pass:word/1", "~*", "&*", "+@all")
        server.client.execute_command("ACL", "SETUSER", "default", "off")
        (tmp_path / "username").write_text("gateway\n")
        (tmp_path / "password").write_text("pass:word/1\n")
        redactor = Redactor()
        await opened(
            {
                "url": server.url,
                "username_file": tmp_path / "username",
                "password_file": tmp_path / "password",
            },
            redactor=redactor,
        )
        assert redactor("it is pass:word/1") == f"it is {MASK}"
        await opened({"url": server.url.replace("//", "//gateway:pass%3Aword%2F1@")})


async def test_valkey_verifies_the_servers_certificate(opened: Open, tmp_path: Path) -> None:
    """Connections to valkeys:// are encrypted, and the certificate is verified with the CA."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    options = {
        "tls-port": "0",
        "tls-cert-file": "cert.pem",
        "tls-key-file": "key.pem",
        "tls-auth-clients": "no",
    }
    with StoreServer(binary("redis"), tmp_path) as server:
        for name, value in options.items():
            server.client.config_set(name, str(tmp_path / value) if value.endswith("pem") else value)
        port = free_port()
        server.client.config_set("tls-port", str(port))
        url = server.url.replace("valkey:", "valkeys:").replace(str(server.port), str(port))
        store = await opened({"url": url, "ca_file": tmp_path / "ca.pem"})
        await leased(store)
        stranger = await opened({"url": url}, well=False)
        await eventually(lambda: stranger.trouble == "ConnectionError", "it trusts no stranger")
        # Encrypted connections take leave of each other: that is to happen before the loop is closed.
        for each in (store, stranger):
            await each.__aexit__()
        await eventually(lambda: len(server.client.client_list()) == 1, "all have left")  # type: ignore[arg-type]


async def test_valkey_logs_in_with_sentinels(opened: Open, tmp_path: Path) -> None:
    """Sentinels may have their own login, which comes from files and is never logged."""
    (tmp_path / "username").write_text("asker\n")
    (tmp_path / "password").write_text("s3ntinel/pass\n")
    with guarded(tmp_path) as servers:
        sentinel = servers.sentinel.client
        sentinel.execute_command("ACL", "SETUSER", "asker", "on", ">s3ntinel/pass", "~*", "&*", "+@all")
        sentinel.execute_command("ACL", "SETUSER", "default", "nopass", "-@all", "+auth")
        settings = {"url": servers.sentinel.url, "sentinel_service": "main"}
        stranger = await opened(settings, well=False)
        await eventually(lambda: stranger.trouble != "not reached yet", "a stranger is told nothing")
        redactor = Redactor()
        files = {
            "sentinel_username_file": tmp_path / "username",
            "sentinel_password_file": tmp_path / "password",
        }
        await opened(settings | files, redactor=redactor)
        assert redactor("it is s3ntinel/pass") == f"it is {MASK}"


async def test_valkey_follows_a_failover(opened: Open, tmp_path: Path) -> None:
    """After Sentinel has promoted the replica the store reconnects, and its entries are still there."""
    with guarded(tmp_path) as servers:
        settings = {"url": servers.sentinel.url, "sentinel_service": "main"}
        one = await opened(settings)
        lease = await leased(one)
        await one.commit(lease, snapshot(lease, message="before"))
        assert servers.primary.client.wait(1, 5000) == 1
        servers.primary.kill()
        await eventually(lambda: one.trouble, "it is alone")
        alone = await one.acquire(KEY, after=lease.version)
        assert isinstance(alone, Lease)
        assert not alone.token
        assert alone.version > lease.version
        await eventually(lambda: one.trouble is None, "it has found the new one")
        other = await opened(settings)
        found = await other.acquire(KEY)
        assert isinstance(found, Snapshot)
        assert said(found) == "before"


async def test_valkey_closes_a_cluster_though_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancellation during the close leaves no connection open."""

    async def cancelled(client: RedisCluster) -> None:
        client._initialize = True  # as aclose does at once; private in redis-py
        raise asyncio.CancelledError

    with cluster(tmp_path) as nodes, suppress(asyncio.CancelledError):
        settings = StoreSettings.model_validate({"url": nodes[0].url, "cluster": True})
        monkeypatch.setattr(RedisCluster, "aclose", cancelled)
        async with connected(settings, redactor=Redactor()) as servers:
            await servers.warm_up()
            # Private: neither our backend nor redis-py lists its connections.
            manager = servers._client.nodes_manager  # type: ignore[union-attr]  # a cluster's
            everywhere = [*manager.nodes_cache.values(), *manager.startup_nodes.values()]
            connections = [each for node in everywhere for each in node._connections]
            assert any(each.is_connected for each in connections)
    assert not any(each.is_connected for each in connections)


async def test_valkey_follows_slots_that_move(opened: Open, tmp_path: Path) -> None:
    """While slots of a cluster move all replicas share entries, and messages reach the others."""
    with cluster(tmp_path) as nodes:
        settings = {"url": nodes[0].url, "cluster": True}
        one, other = await opened(settings), await opened(settings)
        moving = asyncio.create_task(asyncio.to_thread(migrate, nodes[0], nodes[1]))
        number = 0
        while not moving.done() or number < 100:
            number += 1
            key = KEY._replace(task_id=f"task-{number}")
            lease = await leased(one, key)
            await one.commit(lease, snapshot(lease))
            assert isinstance(await other.acquire(key), Snapshot)
        await moving
        for each in (one, other):
            # Private: the state of the read barrier is not visible otherwise.
            await eventually(
                lambda each=each: time.monotonic() < each._connection.sure_until, "it follows again"
            )  # type: ignore[misc]
            assert sample(each, "errors_total", "subscribe") == 0
        heard: list[Snapshot] = []
        other.on_change(heard.append)
        for task in range(number - 99, number + 1):  # in every shard, and no more than are kept
            key = KEY._replace(task_id=f"task-{task}")
            lease = await leased(one, key, after=one.latest(key).version)  # type: ignore[union-attr]
            await one.commit(lease, snapshot(lease))
        await eventually(lambda: len(heard) == 100, "the other hears of every change")


@pytest.mark.parametrize(
    "says", [b"+OK\r\n", b"*1\r\n:1\r\n", b"$-1\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n", b""]
)
async def test_valkey_works_alone_with_an_invalid_server(opened: Open, says: bytes) -> None:
    """A server that sends invalid replies costs only the sharing: the store works from its memory."""

    async def lie(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionResetError):
            while await reader.read(65536) and says:
                writer.write(says)
        writer.close()

    liar = await asyncio.start_server(lie, "127.0.0.1", 0)
    async with liar:
        host, port = liar.sockets[0].getsockname()
        store = await opened({"url": f"valkey://{host}:{port}"}, well=False)
        await eventually(lambda: store.trouble != "not reached yet", "it has found out")
        lease = await store.acquire(KEY)
        assert isinstance(lease, Lease)
        landed = snapshot(lease)
        assert await store.commit(lease, landed) is landed
        assert store.peek(KEY) is landed
        assert await store.token(1.0, saved=1, timeout_seconds=0) == 0
        await store.__aexit__()


@pytest.mark.parametrize("turns", range(8))
async def test_servers_lose_no_cancellation(turns: int, server: StoreServer) -> None:
    """A cancellation always ends a task that is sending: with redis-py's own timeout it would not.

    It sends within asyncio.wait_for then, which on Python 3.11 returns instead of raising when what it waits
    for ends in the very turn of the loop in which it is cancelled.
    """
    settings = StoreSettings.model_validate({"url": server.url})
    async with connected(settings, redactor=Redactor()) as servers, AsyncExitStack() as stack:
        [(address, slots)] = servers.owners(range(SLOTS)).items()
        subscription = await servers.subscription(address, stack)
        await servers.subscribe(subscription, slots)

        async def pings_and_reads_on() -> None:
            await subscription.ping()
            await asyncio.Event().wait()

        task = asyncio.create_task(pings_and_reads_on())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task}, timeout=PATIENCE_SECONDS)
        assert task.cancelled()
