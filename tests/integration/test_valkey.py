"""Two stores on one server: what one stores and the other receives, on every kind of server."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import trustme
from redis.asyncio.cluster import RedisCluster

from gateway.domain.errors import (
    CircuitOpen,
    KeyPairRefused,
    RateLimited,
    UpstreamDetail,
    UpstreamInvalid,
    UpstreamRejected,
    UpstreamThrottled,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import Status
from gateway.settings.store_section import Store as StoreSettings
from gateway.stores.base import Lease, Requirement
from gateway.stores.valkey.batches import CONNECTIONS
from gateway.stores.valkey.codec import encode_failure
from gateway.stores.valkey.servers import connect
from gateway.stores.valkey.store import ValkeyStore
from gateway.telemetry.redaction import MASK, Redactor
from tests.support.harness import PATIENCE_SECONDS, Json, eventually, free_port
from tests.support.seen import said, seen
from tests.support.storeserver import StoreServer, binary, cluster, guarded, migrate, shared_by
from tests.support.valkey import (
    KEY,
    LIFETIME,
    Open,
    channel_of,
    errors,
    fields_of,
    leased,
    name_of,
    operations,
    save,
    server_time,
    shown,
    stored,
    stores,
    waiting,
)


@pytest.fixture(scope="module", params=["valkey", "redis", "cluster", "sentinel"])
def settings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Json]:
    """Return the settings of a shared store."""
    with shared_by(request.param, tmp_path_factory.mktemp(request.param)) as settings:
        yield settings


@pytest.fixture
async def opened() -> AsyncIterator[Open]:
    """Return a function that opens a store and returns it once it is connected."""
    async with stores() as opened:
        yield opened


@pytest.fixture
async def one(opened: Open, settings: Json) -> ValkeyStore:
    """Return a store."""
    return await opened(settings)


@pytest.fixture
async def other(opened: Open, settings: Json) -> ValkeyStore:
    """Return another store that shares its entries."""
    return await opened(settings)


async def test_valkey_wakes_a_waiter_with_the_snapshot(one: ValkeyStore, other: ValkeyStore) -> None:
    """While one store has the lease the other waits; the committed snapshot is its result, unchanged."""
    lease = await leased(one)
    flight = await waiting(other)
    landed = await save(one, lease, etaRelative=2.5, message="so\nfar", state={"job": "x"})
    found = await flight
    assert landed is not None
    assert isinstance(found, Snapshot)
    assert found is await shown(other, KEY)
    assert (found.key, found.version, found.lifetime) == (KEY, lease.version, LIFETIME)
    assert found.revision == landed.revision
    assert (found.envelope, found.body, found.etag) == (landed.envelope, landed.body, landed.etag)
    assert (found.status, found.progress, found.eta_seconds) == (Status.RUNNING, 0.5, 2.5)
    # Both clocks are the same one here. The time of a reply on its way is an estimate.
    assert landed.fetched_at - 1 < found.fetched_at <= landed.fetched_at + 0.1


@pytest.mark.parametrize(
    "failure",
    [
        UpstreamInvalid("the upstream's response is not valid"),
        UpstreamThrottled("the upstream asks to slow down", retry_after=2.5),
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
    await one.store_failure(lease, failure, seconds=60)
    found = await flight
    assert type(found) is type(failure)
    assert (str(found), found.retry_after, found.detail) == (
        str(failure),
        failure.retry_after,
        failure.detail,
    )
    assert getattr(found, "envelope", b"") == getattr(failure, "envelope", b"")
    assert other.cached_failure(KEY) is found


@pytest.mark.parametrize("end", ["release_lease", "release_lease_early", "store_failure"])
async def test_valkey_passes_a_lease_on(end: str, one: ValkeyStore, other: ValkeyStore) -> None:
    """A lease that ends without a result passes to the next store immediately."""
    lease = await leased(one)
    flight = await waiting(other)
    began = time.monotonic()
    match end:
        case "release_lease":
            await one.release_lease(lease)
        case "release_lease_early":
            one.release_lease_early(lease)
        case _:
            await one.store_failure(lease, UpstreamInvalid("nonsense"), seconds=0)
    found = await flight
    assert isinstance(found, Lease)
    assert found.version > lease.version
    assert time.monotonic() - began < 2, "it did not wait for the lease to expire"


@pytest.mark.parametrize(
    "trouble",
    [
        UpstreamTimeout("too late"),
        UpstreamUnreachable("gone"),
        CircuitOpen("resting"),
        RateLimited("full"),
        KeyPairRefused("refused"),
    ],
    ids=lambda trouble: trouble.code,
)
async def test_valkey_does_not_share_a_replicas_own_trouble(
    trouble: Any, one: ValkeyStore, other: ValkeyStore
) -> None:
    """Another replica may reach the upstream: it gets the lease and no failure."""
    lease = await leased(one)
    flight = await waiting(other)
    await one.store_failure(lease, trouble, seconds=60)
    found = await flight
    assert isinstance(found, Lease)
    assert other.cached_failure(KEY) is None
    assert one.cached_failure(KEY) is trouble


async def test_valkey_accepts_a_late_result_of_a_released_lease(one: ValkeyStore, other: ValkeyStore) -> None:
    """A retry that succeeds after the release is stored, unless another replica has the lease by then."""
    lease = await leased(one)
    one.release_lease_early(lease)
    taken = await leased(other)
    assert await save(one, lease, message="late") is None
    await save(other, taken, message="newer")
    again = await leased(other, after=taken.version)
    other.release_lease_early(again)
    await eventually(lambda: operations(other, "fail") == 1, "it is released")
    kept = await save(other, again, message="newest")
    assert said(kept) == "newest"
    found = await one.acquire(KEY, Requirement(newer_than=taken.version))
    assert isinstance(found, Snapshot)
    assert said(found) == "newest"


async def test_valkey_returns_the_stored_snapshot(one: ValkeyStore, other: ValkeyStore) -> None:
    """A store that missed the message gets the snapshot from the server."""
    await stored(one, message="answer")
    assert await shown(other, KEY) is None
    found = await other.acquire(KEY)
    assert isinstance(found, Snapshot)
    assert said(found) == "answer"


async def test_valkey_notifies_replicas_that_want_the_task(one: ValkeyStore, other: ValkeyStore) -> None:
    """A change reaches every store that has the task in its cache and wants it, and no other."""
    await stored(one, message="first")
    await other.acquire(KEY)
    heard: list[Snapshot] = []
    other.add_snapshot_listener(heard.append, is_watched=KEY.__eq__)
    unheld = await stored(one, KEY._replace(task_id="unheld"))
    await stored(one, message="second")
    await eventually(lambda: heard, "the other hears of it")
    assert [said(changed) for changed in heard] == ["second"]
    assert await shown(other, KEY) is heard[0]
    assert await shown(other, unheld.key) is None


async def test_valkey_keeps_terminal_snapshots(one: ValkeyStore, other: ValkeyStore) -> None:
    """A terminal snapshot is final while it is fresh, and not replaced when it is stale."""
    ended = await stored(one, status="succeeded", lifetime=1.0)
    found = await other.acquire(KEY, Requirement(newer_than=ended.version, seen_revision=ended.revision + 1))
    assert isinstance(found, Snapshot)
    assert found.etag == ended.etag
    await asyncio.sleep(1.0)
    assert await save(other, await leased(other), previous=None) is None
    kept = await save(other, await leased(other))
    assert kept is not None
    assert kept.status is Status.SUCCEEDED
    assert kept.fresh(time.monotonic())


async def test_valkey_acquire_times_out(one: ValkeyStore, other: ValkeyStore) -> None:
    """A request that waits too long for another replica's lease ends with a timeout."""
    await leased(one)
    assert isinstance(await other.acquire(KEY, timeout_seconds=0.05), UpstreamTimeout)


async def test_valkey_announces_throttling(one: ValkeyStore, other: ValkeyStore) -> None:
    """Throttling is announced to every replica, with the rounded seconds of Retry-After, if known."""
    heard: list[float | None] = []
    other.add_throttling_listener(heard.append)
    await one.announce_throttling(2.5)
    await one.announce_throttling(None)
    await eventually(lambda: len(heard) == 2, "the other hears of both")
    assert heard == [3.0, None]


@pytest.fixture(scope="module")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    with StoreServer(binary("valkey"), tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def server(_server: StoreServer) -> StoreServer:
    """Return an empty server that tests may disturb."""
    _server.client.flushall()
    return _server


async def test_valkey_refuses_a_commit_after_the_lease(opened: Open, server: StoreServer) -> None:
    """A holder whose lease has expired cannot overwrite the result of a later holder."""
    one, other = await opened({"url": server.url}), await opened({"url": server.url})
    late = await leased(one)
    # As if its holder had been paused for longer than a lease lasts.
    server.client.hdel(name_of(server), "holder", "held_until")
    lease = await leased(other)
    assert await save(one, late, message="late") is None
    await save(other, lease, message="newer")
    kept = await save(one, late, message="late")
    assert said(kept) == "newer"


async def test_valkey_ignores_invalid_messages(opened: Open, server: StoreServer) -> None:
    """No invalid message ends the connection or has an effect; the next valid one is applied."""
    store = await opened({"url": server.url})
    heard: list[float | None] = []
    store.add_throttling_listener(heard.append)
    known = await stored(store)
    subject = b"sd_get_progress/task"
    version = known.version + 1
    messages = [
        *(b"", b"\xff", b"S", b"E", b"Q", b"T-1", b"T1e9", b"Tnan", b"X" + subject, b"S" + subject),
        *(b"S" + subject + b"\n", b"Sno_operation/task\n1 1 1 1 0", b"Esd_get_progress/../x"),
        b"S%b\n%d 1 0 60000000 2" % (subject, version),  # neither terminal nor not
        b"S%b\n%d 1 0 9999999999999999 0" % (subject, version),  # a lifetime beyond the settings
        b"S%b\n9999999999999999 1 0 60000000 0" % subject,  # a version that a script cannot represent
        b"S%b\n%d 1 -1 60000000 0" % (subject, version),
        b"S%b\n%b 1 0 60000000 0" % (subject, b"9" * 9999),
        b"S%b\n%d 1 0 60000000 0\n" % (subject, version),
    ]
    for message in messages:
        server.client.publish(channel_of(server).decode(), message)
    server.client.publish(channel_of(server).decode(), b"T999999999")
    server.client.publish(channel_of(server).decode(), b"T")
    await eventually(lambda: len(heard) == 2, "the last message is heard")
    assert heard == [3600.0, None]
    assert store.trouble is None
    assert store.cached_failure(KEY) is None
    assert await shown(store) is known


@pytest.mark.parametrize("seconds", [-1, 3600, 10**9])
async def test_valkey_ignores_a_failure_beyond_the_settings(
    opened: Open, server: StoreServer, seconds: int
) -> None:
    """A stored failure that has ended, or that would be cached for longer than the settings, is ignored."""
    store = await opened({"url": server.url})
    lease = await leased(store)
    name = name_of(server).decode()
    await store.release_lease(lease)
    failure = encode_failure(KEY, UpstreamInvalid("nonsense"))
    ends = server_time(server) + seconds * 1_000_000
    server.client.hset(name, mapping={"failure": failure, "failed_until": ends})
    assert isinstance(await store.acquire(KEY), Lease)


async def test_valkey_revalidates_after_a_lost_subscription(opened: Open, server: StoreServer) -> None:
    """After the subscription was lost, cached snapshots are revalidated before they are visible."""
    one = await opened({"url": server.url})
    landed = await stored(one)
    server.client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    await eventually(lambda: one.trouble, "it notices the loss")
    assert one.trouble is not None
    assert one.last_known(KEY) is landed
    await eventually(lambda: one.trouble is None, "it is up again")
    assert await shown(one) is None
    assert await one.acquire(KEY) is landed
    assert await shown(one) is landed


async def test_valkey_renews_a_lease(opened: Open, server: StoreServer) -> None:
    """A lease is renewed while its holder is alive, and its key is kept for as long."""
    one = await opened({"url": server.url})
    await leased(one)
    until = int(fields_of(server)[b"held_until"])
    server.client.pexpire(name_of(server).decode(), 2500)
    await eventually(lambda: int(fields_of(server)[b"held_until"]) > until, "it is renewed")
    assert int(server.client.pttl(name_of(server).decode())) > 2500  # type: ignore[arg-type]


async def test_valkey_runs_two_scripts_for_a_miss(opened: Open, server: StoreServer) -> None:
    """A miss costs the server two commands: acquire and commit. A hit costs none."""
    one = await opened({"url": server.url})
    await stored(one)
    before = [operations(one, name) for name in ("take_off", "land", "fail", "renew")]
    await stored(one, KEY._replace(task_id="miss"))
    for _ in range(100):
        await shown(one)
        await one.acquire(KEY)
    after = [operations(one, name) for name in ("take_off", "land", "fail", "renew")]
    assert [now - then for now, then in zip(after, before, strict=True)] == [1, 1, 0, 0]


async def test_valkey_releases_an_unconfirmed_lease(opened: Open, server: StoreServer) -> None:
    """A lease whose reply was lost is released, so that other replicas do not wait for it."""
    hasty = await opened({"url": server.url, "timeout_seconds": 0.05})
    key = KEY._replace(task_id="unheard")
    server.freeze()
    alone = await hasty.acquire(key)
    assert isinstance(alone, Lease)
    assert not alone.token
    server.thaw()
    await eventually(lambda: operations(hasty, "fail") > errors(hasty, "fail"), "it is given back")
    assert not server.client.keys("*/unheard")


async def test_valkey_sync_times_out(opened: Open, server: StoreServer) -> None:
    """While the server does not reply a store waits until its timeout, and then serves from its cache."""
    hasty = await opened({"url": server.url, "timeout_seconds": 0.05})
    landed = await stored(hasty, KEY._replace(task_id="silent"))
    server.freeze()
    try:
        await eventually(lambda: hasty.trouble, "it works alone, without any request")
        assert not await hasty.read_arrived_messages()
        entry = hasty.current_entry(landed.key)
        assert entry is not None
        assert entry.snapshot is landed
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
        stranger = await opened({"url": url}, wait_until_up=False)
        await eventually(
            lambda: "certificate is not trusted" in (stranger.trouble or ""), "it trusts no stranger"
        )
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
        stranger = await opened(settings, wait_until_up=False)
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
        before = await stored(one, message="before")
        assert servers.primary.client.wait(1, 5000) == 1
        servers.primary.kill()
        await eventually(lambda: one.trouble, "it is alone")
        alone = await one.acquire(KEY, Requirement(newer_than=before.version))
        assert isinstance(alone, Lease)
        assert not alone.token
        assert alone.version > before.version
        await eventually(lambda: one.trouble is None, "it has found the new one")
        other = await opened(settings)
        found = await other.acquire(KEY)
        assert isinstance(found, Snapshot)
        assert said(found) == "before"


@pytest.mark.parametrize("iterations", range(12))
async def test_valkey_closes_its_connections_though_cancelled(server: StoreServer, iterations: int) -> None:
    """A cancellation in any iteration of the close leaves no connection open."""
    settings = StoreSettings.model_validate({"url": server.url})
    closing = asyncio.Event()
    opened: set[Any] = set()

    async def use() -> None:
        async with connect(settings, identity="account", redactor=Redactor()) as servers:
            await servers.warm_up()
            pool = servers.client.connection_pool  # type: ignore[union-attr]  # a single server's
            opened.update(pool._available_connections)
            assert all(each.is_connected for each in opened)
            closing.set()

    using = asyncio.create_task(use())
    await closing.wait()
    for _ in range(iterations):
        await asyncio.sleep(0)
    using.cancel()
    await asyncio.gather(using, return_exceptions=True)
    assert len(opened) == CONNECTIONS
    assert not any(each.is_connected for each in opened)


async def test_valkey_closes_a_cluster_though_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancellation during the close leaves no connection open."""

    async def cancelled(client: RedisCluster) -> None:
        client._initialize = True  # as aclose does at once
        raise asyncio.CancelledError

    with cluster(tmp_path) as nodes, suppress(asyncio.CancelledError):
        settings = StoreSettings.model_validate({"url": nodes[0].url, "cluster": True})
        monkeypatch.setattr(RedisCluster, "aclose", cancelled)
        async with connect(settings, identity="account", redactor=Redactor()) as servers:
            await servers.warm_up()
            manager = servers.client.nodes_manager  # type: ignore[union-attr]  # a cluster's
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
            await stored(one, key)
            assert isinstance(await other.acquire(key), Snapshot)
        await moving
        for each in (one, other):
            assert each.trouble is None
            assert errors(each, "subscribe") == 0
        heard: list[Snapshot] = []
        other.add_snapshot_listener(heard.append, is_watched=lambda _: True)
        for task in range(number - 99, number + 1):  # in every shard
            await stored(one, KEY._replace(task_id=f"task-{task}"), message="changed")
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
        store = await opened({"url": f"valkey://{host}:{port}"}, wait_until_up=False)
        await eventually(lambda: store.trouble != "not reached yet", "it has found out")
        lease = await store.acquire(KEY)
        assert isinstance(lease, Lease)
        landed = seen(KEY, version=lease.version, lifetime=LIFETIME)
        assert await store.commit(lease, lambda _: landed) is landed
        assert await shown(store) is landed
        assert await store.take_permits(1.0, burst=1.0, refreshes=1, first_queries=1) is None
        await store.__aexit__()


@pytest.mark.parametrize("turns", range(8))
async def test_servers_lose_no_cancellation(turns: int, server: StoreServer) -> None:
    """A cancellation always ends a task that is sending: with redis-py's own timeout it would not.

    It sends within asyncio.wait_for then, which on Python 3.11 returns instead of raising when what it waits
    for ends in the very turn of the loop in which it is cancelled.
    """
    settings = StoreSettings.model_validate({"url": server.url})
    async with (
        connect(settings, identity="account", redactor=Redactor()) as servers,
        AsyncExitStack() as stack,
    ):
        pubsub = await servers.subscribe(stack)
        connection: Any = pubsub.connection

        async def pings_and_reads_on() -> None:
            await connection.send_command("PING", check_health=False)
            await asyncio.Event().wait()

        task = asyncio.create_task(pings_and_reads_on())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task}, timeout=PATIENCE_SECONDS)
        assert task.cancelled()
