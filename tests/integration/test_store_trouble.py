"""What the gateway says about a store that it cannot use, in `/readyz`, the log and `check`."""

import asyncio
import json
import re
import socket
import socketserver
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import trustme
from structlog.testing import capture_logs

from gateway.domain.errors import UpstreamInvalid
from gateway.settings.store_section import Store as StoreSettings
from gateway.stores.valkey.connection_check import try_store
from gateway.telemetry.redaction import Redactor
from tests.support.harness import (
    PATIENCE_SECONDS,
    Gateway,
    Json,
    Process,
    Simulator,
    eventually,
    free_port,
    run,
    until,
)
from tests.support.storeserver import Guarded, StoreServer, binary, cluster, guarded
from tests.support.valkey import KEY, Open, leased, operations, save, stored, stores, waiting

Launch = Callable[..., Gateway]

GUIDE = Path("helm/OPERATING.md").read_text()
[DOCUMENTED] = re.findall(r"ACL SETUSER gateway on >PASSWORD (.*)", GUIDE)
LEAST = [rule for rule in DOCUMENTED.split() if rule != "resetchannels"]
PASSWORD = "pa55"


async def problem_of(settings: Json) -> str:
    """Return what `check` says about the store."""
    given = {"timeout_seconds": 1, **settings}
    return (await try_store(StoreSettings.model_validate(given), redactor=Redactor())).problem


def allow(server: StoreServer, rules: list[str], user: str = "gateway") -> None:
    """Give a user these permissions and no others."""
    server.client.execute_command(
        "ACL", "SETUSER", user, "reset", "on", f">{PASSWORD}", "resetchannels", *rules
    )


def as_user(url: str) -> str:
    """Return the URL with the login of `allow`."""
    return url.replace("//", f"//gateway:{PASSWORD}@")


@pytest.fixture
async def opened() -> AsyncIterator[Open]:
    """Return a function that opens a store."""
    async with stores() as opened:
        yield opened


@pytest.fixture(scope="module", params=["valkey", "redis"])
def any_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StoreServer]:
    """Return a server of each kind; every test sets the permissions again."""
    with StoreServer(binary(request.param), tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def server(any_server: StoreServer) -> StoreServer:
    """Return a server with a user `gateway`, who may do anything."""
    any_server.client.flushall()
    allow(any_server, ["~*", "&*", "+@all"])
    return any_server


# Permissions


async def use_everything(opened: Open, settings: Json) -> None:
    """Let two stores send each command that a gateway sends."""
    one, other = await opened(settings), await opened(settings)
    lease = await leased(one)
    flight = await waiting(other)
    await save(one, lease)
    await flight
    failing = KEY._replace(task_id="failing")
    await one.store_failure(await leased(one, failing), UpstreamInvalid("no"), seconds=60)
    renewed = KEY._replace(task_id="renewed")
    await leased(one, renewed)
    assert await one.take_permits(10.0, burst=10.0, refreshes=1, first_queries=1)
    heard: list[float | None] = []
    other.add_throttling_listener(heard.append)
    await one.announce_throttling(1.0)
    await eventually(lambda: heard, "the other hears of it")
    await eventually(lambda: operations(one, "renew"), "the lease is renewed")
    await one._connection.delete("anything")
    await stored(one)
    assert (one.trouble, other.trouble) == (None, None)


async def test_documented_permissions_suffice(opened: Open, server: StoreServer) -> None:
    """A user with the documented permissions can do all that a gateway does."""
    allow(server, LEAST)
    settings = {"url": as_user(server.url), "key_prefix": "sd-gateway"}
    await use_everything(opened, settings)
    assert await problem_of(settings) == ""


async def test_documented_permissions_suffice_in_a_cluster(opened: Open, tmp_path: Path) -> None:
    """In a cluster, the two documented commands are needed, too, and named if they are missing."""
    with cluster(tmp_path) as nodes:
        more = ["+cluster|slots", "+command"]
        settings = {"url": as_user(nodes[0].url), "key_prefix": "sd-gateway", "cluster": True}
        for missing in more:
            for node in nodes:
                allow(node, [*LEAST, *(rule for rule in more if rule != missing)])
            assert await problem_of(settings) == f"missing permissions of the user: {missing}"
        for node in nodes:
            allow(node, LEAST + more)
        await use_everything(opened, settings)
    assert f"A cluster also requires `{' '.join(more)}`" in GUIDE


async def test_documented_permissions_suffice_for_sentinels(tmp_path: Path) -> None:
    """At a Sentinel, one command is needed, and named if it is missing."""
    (tmp_path / "username").write_text("asker")
    (tmp_path / "password").write_text(PASSWORD)
    with guarded(tmp_path) as servers:
        settings = {
            "url": servers.sentinel.url,
            "sentinel_service": "main",
            "sentinel_username_file": tmp_path / "username",
            "sentinel_password_file": tmp_path / "password",
        }
        allow(servers.sentinel, [], "asker")
        said = await problem_of(settings)
        assert said == "Sentinel: missing permissions of the user: +sentinel|masters"
        allow(servers.sentinel, ["+sentinel|masters"], "asker")
        assert await problem_of(settings) == ""
    assert "needs `+sentinel|masters`" in GUIDE


@pytest.mark.parametrize("missing", LEAST)
async def test_each_missing_permission_is_named(server: StoreServer, missing: str) -> None:
    """Without one of the documented permissions, the store is not used, and the permission is named."""
    allow(server, [rule for rule in LEAST if rule != missing])
    settings = {"url": as_user(server.url), "key_prefix": "sd-gateway"}
    assert await problem_of(settings) == f"missing permissions of the user: {missing}"


async def test_all_missing_permissions_are_named(opened: Open, server: StoreServer) -> None:
    """One look is enough: all that are missing are named at once, and the last one ends the trouble."""
    missing = ["+ping", "+evalsha", "+subscribe", "+hset", "+pexpire", "+del"]
    allow(server, [rule for rule in LEAST if rule not in missing])
    settings = {"url": as_user(server.url), "key_prefix": "sd-gateway"}
    said = await problem_of(settings)
    assert sorted(said.removeprefix("missing permissions of the user: ").split()) == sorted(missing)
    store = await opened(settings, wait_until_up=False)
    await eventually(lambda: store.trouble == said, "the store says the same")
    allow(server, LEAST)
    await eventually(lambda: store.trouble is None, "it is up")


async def test_a_readable_key_pattern_does_not_suffice(server: StoreServer) -> None:
    """A user who may only read the keys lacks the key pattern."""
    allow(server, ["%R~sd-gateway:*", *(rule for rule in LEAST if not rule.startswith("~"))])
    said = await problem_of({"url": as_user(server.url), "key_prefix": "sd-gateway"})
    assert said == "missing permissions of the user: ~sd-gateway:*"


# Other settings of one server


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"path": "/3"}, "missing permissions of the user: +select"),
        ({"user": ""}, ""),
        ({"user": "", "path": "/99"}, "the server has no database of this number"),
        ({"user": "gateway:wrong@"}, "login: the server rejects user name or password"),
        ({"user": "stranger:wrong@"}, "login: the server rejects user name or password"),
        ({"user": ":unneeded@"}, "login: the server's default user has no password"),
        ({"cluster": True}, "the server is not part of a cluster: unset store.cluster"),
        ({"sentinel_service": "main"}, "Sentinel: the server is not a Sentinel"),
        ({"scheme": "valkeys"}, "TLS: the server does not use it: write valkey://"),
        ({"password_file": "/no/file"}, "login: /no/file: No such file or directory"),
        ({"password_file": "/dev/zero"}, "login: /dev/zero: is not a regular file"),
    ],
    ids=str,
)
async def test_wrong_settings_are_named(server: StoreServer, change: dict[str, Any], says: str) -> None:
    """Each setting that does not fit the server is named."""
    allow(server, [*LEAST, "+cluster|slots"])
    parts = {"scheme": "valkey", "user": f"gateway:{PASSWORD}@", "path": ""} | change
    url = "{scheme}://{user}127.0.0.1:{port}{path}".format(port=server.port, **parts)
    more = {name: value for name, value in change.items() if name not in {"scheme", "user", "path"}}
    said = await problem_of({"url": url, "key_prefix": "sd-gateway", **more})
    assert said.startswith(says)
    assert bool(said) == bool(says)


@pytest.mark.parametrize(
    ("harm", "heal", "says"),
    [
        ("config set requirepass x", "config set requirepass ''", "login: the server requires a password"),
        ("config set maxmemory 1", "config set maxmemory 0", "full: the server has reached its maxmemory"),
        (
            "config set min-replicas-to-write 1",
            "config set min-replicas-to-write 0",
            "read-only: the server has too few replicas",
        ),
        ("replicaof 127.0.0.1 1", "replicaof no one", "read-only: the server is a replica"),
        ("acl setuser gateway off", "acl setuser gateway on", "login: the server rejects"),
    ],
    ids=lambda value: value.split()[2] if " " in value else value,
)
async def test_state_of_the_server_is_named(server: StoreServer, harm: str, heal: str, says: str) -> None:
    """Each state in which a server does not work is named."""
    url = as_user(server.url) if "gateway" in harm else server.url
    assert await problem_of({"url": url}) == ""
    with ExitStack() as stack:
        stack.callback(server.client.execute_command, *(part.strip("'") for part in heal.split()))
        server.client.execute_command(*harm.split())
        assert (await problem_of({"url": url})).startswith(says)


async def test_loading_is_named(tmp_path: Path) -> None:
    """A server that loads its data says so, and the store waits for it."""
    server = StoreServer(binary("redis"), tmp_path)
    with server:
        server.client.mset({f"key-{number}": number for number in range(5000)})
        server.client.save()
    slow = ("--key-load-delay", "1000", "--loading-process-events-interval-bytes", "1024")
    process = Process(
        "--port", str(server.port), "--dir", str(tmp_path), *slow, cwd=tmp_path, program=Path(binary("redis"))
    )
    with process:
        until(server.listens, "the server listens")
        said = await problem_of({"url": server.url})
        assert said == "the server is loading its data"


async def test_a_sentinel_or_node_in_place_of_a_server_is_named(tmp_path: Path) -> None:
    """A Sentinel or a node of a cluster, used as a single server, is recognised."""
    for name in ("sentinel", "cluster", "lone"):
        (tmp_path / name).mkdir()
    with guarded(tmp_path / "sentinel") as servers:
        url = servers.sentinel.url
        assert await problem_of({"url": url}) == "the server is a Sentinel: set store.sentinel_service"
        said = await problem_of({"url": url, "sentinel_service": "other"})
        assert said == "Sentinel: no service of this name: correct store.sentinel_service"
        assert (await problem_of({"url": url, "cluster": True})).endswith("unset store.cluster")
        await primary_is_down(servers)
    with cluster(tmp_path / "cluster") as nodes:
        for node in nodes:
            said = await problem_of({"url": node.url})
            assert said == "the server is part of a cluster: set store.cluster"
        assert await problem_of({"url": nodes[0].url, "cluster": True}) == ""
        nodes[2].kill()
        said = await problem_of({"url": nodes[0].url, "cluster": True})
        assert said.startswith(("no connection: refused", "the cluster is"))
    with StoreServer(binary("valkey"), tmp_path / "lone", "--cluster-enabled", "yes") as server:
        said = await problem_of({"url": server.url, "cluster": True})
        assert said == "the cluster is incomplete: some slots have no node"


async def primary_is_down(servers: Guarded) -> None:
    """Kill both servers, and wait until the Sentinel reports it."""
    servers.replica.kill()
    servers.primary.kill()
    settings = {"url": servers.sentinel.url, "sentinel_service": "main"}
    ends = time.monotonic() + PATIENCE_SECONDS
    while (said := await problem_of(settings)) != "Sentinel: the primary is down":
        assert time.monotonic() < ends, said
        await asyncio.sleep(0.1)


# Connections


@pytest.mark.parametrize("more", [{}, {"cluster": True}, {"sentinel_service": "main"}], ids=str)
@pytest.mark.parametrize(
    ("host", "says"),
    [
        ("no-such-host.invalid:6379", "no connection: host name not found"),
        ("127.0.0.1:{port}", "no connection: refused (no server listens there, or a firewall blocks it)"),
        ("localhost:{port}", "no connection: refused (no server listens there, or a firewall blocks it)"),
    ],
    ids=["dns", "refused", "two-addresses"],
)
async def test_no_connection_is_explained(host: str, says: str, more: Json) -> None:
    """The reason says whether the host name is unknown or no server listens, for each kind of store."""
    said = await problem_of({"url": f"valkey://{host.format(port=free_port())}", **more})
    assert said.removeprefix("Sentinel: ") == says


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "no Valkey or Redis server: its replies have another protocol"),
        (b"-DENIED Running in protected mode\r\n", "login: the server is in protected mode"),
        (b"-ERR max number of clients reached\r\n", "full: the server accepts no more connections"),
        (b"-BUSY Redis is busy running a script\r\n", "busy: the server runs a long script"),
        (
            b"-MISCONF Errors writing to the AOF file\r\n",
            "read-only: the server cannot save its data to disk",
        ),
        (b"-LOADING dataset in memory\r\n", "the server is loading its data"),
        (b"-MASTERDOWN Link with MASTER is down\r\n", "the server has lost its primary"),
        (b"-ERR unknown command `HELLO`\r\n", "the server is too old: Redis 6.2 or newer is required"),
        (b"+OK\r\n", "no Valkey or Redis server"),
        (b"", "no connection: the server has closed it"),
    ],
    ids=lambda value: value.decode()[:20].strip() if isinstance(value, bytes) else "",
)
async def test_replies_are_explained(reply: bytes, says: str) -> None:
    """The cause is found in the replies of a server, whatever else it does."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                if not reply:
                    break
                writer.write(reply * (1 if reply.startswith(b"HTTP") else max(data.count(b"*"), 1)))
        writer.close()

    fake = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with fake:
        host, port = fake.sockets[0].getsockname()
        said = await problem_of({"url": f"valkey://{host}:{port}"})
    assert said.startswith(says)


@pytest.mark.parametrize(
    ("hello", "says"),
    [
        (
            ["server", "redis", "version", "6.0.16", "mode", "standalone"],
            "the server is too old: Redis 6.0.16",
        ),
        (["server", "redis", "version", "7.0.0", "mode", "sentinel"], "the server is a Sentinel"),
        (["server", "redis", "version", "7.0.0"], "the server does not know the command EVAL"),
    ],
    ids=["old", "sentinel", "renamed"],
)
async def test_an_unknown_command_is_explained(hello: list[str], says: str) -> None:
    """If the server does not know a command, its own description tells why."""
    about = f"*{len(hello)}\r\n" + "".join(f"${len(part)}\r\n{part}\r\n" for part in hello)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        replies = {b"HELLO": about, b"PING": "+PONG\r\n", b"EVAL": "-ERR unknown command 'EVAL'\r\n"}
        while data := await reader.read(65536):
            for name in re.findall(rb"\*\d+\r\n\$\d+\r\n(\w+)\r\n", data):
                writer.write(replies.get(name, "+OK\r\n").encode())
        writer.close()

    fake = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with fake:
        host, port = fake.sockets[0].getsockname()
        assert (await problem_of({"url": f"valkey://{host}:{port}"})).startswith(says)


class _OlderServer(socketserver.StreamRequestHandler):
    """Forwards to a real server, and makes it look like one of another version."""

    def handle(self) -> None:
        """Forward one connection, in both directions."""
        assert isinstance(self.server, _Older)
        with socket.create_connection(("127.0.0.1", self.server.target)) as target:
            back = threading.Thread(target=self._forward, args=(target, self.connection, self.server.replies))
            back.start()
            self._forward(self.connection, target, self.server.requests)
            back.join()

    def _forward(self, source: socket.socket, to: socket.socket, changes: dict[bytes, bytes]) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                for old, new in changes.items():
                    data = data.replace(old, new)
                to.sendall(data)
        with suppress(OSError):
            to.shutdown(socket.SHUT_RDWR)


class _Older(socketserver.ThreadingTCPServer):
    daemon_threads = True
    target: int
    requests: dict[bytes, bytes]
    replies: dict[bytes, bytes]


@pytest.mark.parametrize(("version", "hello"), [("6.0.1", b"HELLO"), ("5.0.1", b"NOHEL")])
def test_an_old_server_is_refused(
    tmp_path: Path, simulator: Simulator, launch: Launch, version: str, hello: bytes
) -> None:
    """`serve` does not use a server that is too old, even if all commands work; it says so everywhere."""
    with (
        StoreServer(binary("redis"), tmp_path) as real,
        _Older(("127.0.0.1", 0), _OlderServer) as older,
        capture_logs() as lines,
    ):
        present = str(real.client.info()["redis_version"])
        shown = version.ljust(len(present), "9")
        older.target = real.port
        older.requests, older.replies = {b"HELLO": hello}, {present.encode(): shown.encode()}
        threading.Thread(target=older.serve_forever, daemon=True).start()
        url = f"redis://127.0.0.1:{older.server_address[1]}"
        says = f"the server is too old: Redis {shown}; Redis 6.2 or newer is required"
        gate = launch(simulator.url, store={"url": url, "timeout_seconds": 1})
        until(lambda: f"store: {says}" in gate.client.get("/readyz").json()["degraded"], "/readyz says it")
        assert gate.metric("store_up") == 0
        assert [line["reason"] for line in lines if line["event"] == "store_down"] == [says]
        assert asyncio.run(problem_of({"url": url})) == says
        older.shutdown()


async def test_a_server_without_replies_is_slow(tmp_path: Path) -> None:
    """A server that accepts connections, and does not reply, is slow."""
    with StoreServer(binary("valkey"), tmp_path) as server:
        server.freeze()
        try:
            assert await problem_of({"url": server.url}) == "slow: no reply in time"
        finally:
            server.thaw()


async def test_a_timeout_below_the_round_trip_is_named(server: StoreServer) -> None:
    """`check` compares the duration of a write with the setting."""
    said = await problem_of({"url": server.url, "timeout_seconds": 0.000_001})
    assert re.fullmatch(r"slow: a test write took 0\.\d+ s, and store\.timeout_seconds is 1e-06", said)


# TLS


class Encrypted:
    """A Redis server with TLS, whose certificates are files in its folder."""

    def __init__(self, folder: Path, stack: ExitStack, *options: str) -> None:
        self.authority, self.folder = trustme.CA(), folder
        self.authority.cert_pem.write_to_path(folder / "ca.pem")
        self.port = free_port()
        self._stack = stack
        self._options = options

    def issue(self, name: str, host: str, *, authority: trustme.CA | None = None, **more: Any) -> None:
        """Write a certificate for a host and its key."""
        issued = (authority or self.authority).issue_cert(host, **more)
        (self.folder / f"{name}.pem").write_bytes(b"".join(each.bytes() for each in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(self.folder / f"{name}.key")

    def start(self, name: str = "server", *, auth_clients: str = "no") -> StoreServer:
        """Start the server with a certificate."""
        options = {
            "tls-port": str(self.port),
            "tls-cert-file": f"{name}.pem",
            "tls-key-file": f"{name}.key",
            "tls-ca-cert-file": "ca.pem",
            "tls-auth-clients": auth_clients,
        }
        arguments = [part for option, value in options.items() for part in (f"--{option}", value)]
        return self._stack.enter_context(
            StoreServer(binary("redis"), self.folder, *arguments, *self._options)
        )

    def settings(self, **more: Any) -> Json:
        """Return settings with the right authority."""
        return {"url": f"valkeys://127.0.0.1:{self.port}", "ca_file": self.folder / "ca.pem"} | more

    def client(self, name: str) -> Json:
        """Return the settings of a client certificate."""
        return {
            "client_cert_file": self.folder / f"{name}.pem",
            "client_key_file": self.folder / f"{name}.key",
        }


@pytest.fixture
def encrypted(tmp_path: Path) -> Iterator[Encrypted]:
    """Return a server with TLS that is not started."""
    with ExitStack() as stack:
        encrypted = Encrypted(tmp_path, stack)
        encrypted.issue("server", "127.0.0.1")
        yield encrypted


async def test_certificates_of_the_server_are_explained(encrypted: Encrypted, tmp_path: Path) -> None:
    """Each certificate error has a reason of its own; so has TLS that is missing, or not expected."""
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    (tmp_path / "broken.pem").write_text("no certificate")
    encrypted.start()
    settings = encrypted.settings()
    untrusted = "TLS: the server's certificate is not trusted ("
    broken, missing = tmp_path / "broken.pem", tmp_path / "missing.pem"
    for more, says in (
        ({}, ""),
        ({"ca_file": None}, untrusted),
        ({"ca_file": tmp_path / "other.pem"}, untrusted),
        ({"ca_file": broken}, f"TLS: store.ca_file: {broken}: has no certificate in PEM format"),
        ({"ca_file": missing}, f"TLS: store.ca_file: {missing}: No such file or directory"),
        (
            {"url": settings["url"].replace("127.0.0.1", "localhost")},
            "TLS: the server's certificate is for an",
        ),
        (
            {"url": settings["url"].replace("valkeys", "valkey")},
            "TLS: the server requires it: write valkeys://",
        ),
    ):
        said = await problem_of(settings | more)
        assert said.startswith(says)
        assert bool(said) == bool(says), said


async def test_an_expired_certificate_is_named(encrypted: Encrypted) -> None:
    """The reason says that the certificate has expired."""
    encrypted.issue("old", "127.0.0.1", not_before=datetime(2019, 1, 1), not_after=datetime(2020, 1, 1))  # noqa: DTZ001
    encrypted.start("old")
    said = await problem_of(encrypted.settings())
    assert said == "TLS: the server's certificate is not valid (certificate has expired)"


async def test_client_certificates_are_sent_and_read_again(
    opened: Open, encrypted: Encrypted, tmp_path: Path
) -> None:
    """A server may require a client certificate. What is missing is named, and changed files are used."""
    encrypted.issue("client", "gateway")
    encrypted.issue("stranger", "gateway", authority=trustme.CA())
    (tmp_path / "broken.pem").write_text("no certificate")
    encrypted.start(auth_clients="yes")
    client, stranger = encrypted.client("client"), encrypted.client("stranger")
    required = "TLS: the server requires a client certificate: set store.client_cert_file and"
    broken = tmp_path / "broken.pem"
    for more, says in (
        ({}, required),
        (client, ""),
        (stranger, "TLS: the server rejects the client certificate of store.client_cert_file"),
        (client | {"client_key_file": stranger["client_key_file"]}, "TLS: store.client_cert_file: "),
        (client | {"client_cert_file": broken}, f"TLS: store.client_cert_file: {broken}: "),
        (client | {"client_key_file": tmp_path / "none"}, "TLS: store.client_key_file: "),
    ):
        said = await problem_of(encrypted.settings(**more))
        assert said.startswith(says)
        assert bool(said) == bool(says), said
    store = await opened(encrypted.settings(**stranger), wait_until_up=False)
    await eventually(lambda: "rejects the client certificate" in (store.trouble or ""), "it is named")
    for kind in ("pem", "key"):
        (tmp_path / f"client.{kind}").replace(tmp_path / f"stranger.{kind}")
    await eventually(lambda: store.trouble is None, "the new files are used")
    await leased(store)
    await store.__aexit__()


async def test_an_encrypted_key_is_refused_without_a_question(encrypted: Encrypted, tmp_path: Path) -> None:
    """A key with a password is an error; OpenSSL does not ask for the password on the terminal."""
    run_openssl = Process(
        *("genpkey", "-algorithm", "RSA", "-aes256", "-pass", "pass:x", "-out", "locked.key"),
        cwd=tmp_path,
        program=Path("/usr/bin/openssl"),
    )
    with run_openssl:
        until(lambda: not run_openssl.alive, "the key is made")
    encrypted.start(auth_clients="yes")
    files = encrypted.client("server") | {"client_key_file": tmp_path / "locked.key"}
    said = await problem_of(encrypted.settings(**files))
    assert said.startswith(f"TLS: store.client_key_file: {tmp_path}/locked.key: the private key is encrypted")


async def test_client_certificates_work_in_a_cluster(tmp_path: Path) -> None:
    """All connections to a cluster carry the client certificate."""
    with ExitStack() as stack:
        options = ("--cluster-enabled", "yes", "--tls-cluster", "yes")
        encrypted = Encrypted(tmp_path, stack, *options)
        encrypted.issue("server", "127.0.0.1")
        node = encrypted.start(auth_clients="yes")
        node.client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        until(lambda: b"cluster_state:ok" in node.client.execute_command("CLUSTER", "INFO"), "it is formed")
        with_cluster = encrypted.settings(cluster=True)
        assert await problem_of(with_cluster | encrypted.client("server")) == ""
        assert "requires a client certificate" in await problem_of(with_cluster)


async def test_client_certificates_work_with_sentinels(tmp_path: Path) -> None:
    """The connections to the Sentinels carry the client certificate, too."""
    with ExitStack() as stack:
        encrypted = Encrypted(tmp_path, stack, "--tls-replication", "yes")
        encrypted.issue("server", "127.0.0.1")
        encrypted.start(auth_clients="yes")
        port = free_port()
        files = "tls-cert-file server.pem\ntls-key-file server.key\ntls-ca-cert-file ca.pem\n"
        configuration = (
            f"sentinel monitor main 127.0.0.1 {encrypted.port} 1\ntls-port {port}\n{files}"
            "tls-auth-clients yes\ntls-replication yes\n"
        )
        stack.enter_context(StoreServer(binary("redis"), tmp_path, sentinel=configuration))
        settings = encrypted.settings(sentinel_service="main", url=f"valkeys://127.0.0.1:{port}")
        assert await problem_of(settings | encrypted.client("server")) == ""
        assert "requires a client certificate" in await problem_of(settings)


# Where the cause is shown


def environment(simulator: Simulator, url: str) -> dict[str, str]:
    """Return the environment of a gateway with a store."""
    return {
        "SD_GATEWAY_UPSTREAM__ENDPOINT": simulator.url,
        "SD_GATEWAY_CREDENTIALS__ACCESS_KEY": "key",
        "SD_GATEWAY_CREDENTIALS__SECRET_KEY": "secret",
        "SD_GATEWAY_STORE__URL": url,
        "SD_GATEWAY_STORE__TIMEOUT_SECONDS": "1",
    }


def test_cause_is_in_readyz_and_in_the_log(
    server: StoreServer, launch: Launch, simulator: Simulator, capfd: pytest.CaptureFixture[str]
) -> None:
    """`/readyz` reports the cause as degraded, and the log has it once."""
    allow(server, [rule for rule in LEAST if rule != "+hdel"])
    store = {"url": as_user(server.url), "key_prefix": "sd-gateway", "timeout_seconds": 1}
    gate = launch(simulator.url, store=store)
    cause = "missing permissions of the user: +hdel"
    until(lambda: f"store: {cause}" in gate.client.get("/readyz").json()["degraded"], "it is named")
    until(lambda: gate.client.get("/readyz").status_code == 200, "it is ready nevertheless")
    allow(server, [rule for rule in LEAST if rule != "+hmget"])
    cause = "missing permissions of the user: +hmget"
    until(lambda: f"store: {cause}" in gate.client.get("/readyz").json()["degraded"], "the next one is named")
    allow(server, LEAST)
    until(lambda: gate.client.get("/readyz").json()["degraded"] == [], "it is up")
    logged = re.findall(r"missing permissions of the user: \S+\w", capfd.readouterr().out)
    assert logged == [f"missing permissions of the user: +{name}" for name in ("hdel", "hmget")]


@pytest.mark.parametrize(
    ("harm", "heal", "change", "says"),
    [
        ("", "", {"path": "/99"}, "the server has no database of this number"),
        ("", "", {"user": "gateway:wrong@"}, "login: the server rejects user name or password"),
        ("", "", {"scheme": "valkeys"}, "TLS: the server does not use it: write valkey://"),
        (
            "config set maxmemory 1",
            "config set maxmemory 0",
            {},
            "full: the server has reached its maxmemory",
        ),
        ("replicaof 127.0.0.1 1", "replicaof no one", {}, "read-only: the server is a replica"),
    ],
    ids=["database", "password", "TLS", "full", "read-only"],
)
def test_each_cause_is_in_readyz_the_log_and_check(
    server: StoreServer,
    launch: Launch,
    simulator: Simulator,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    harm: str,
    heal: str,
    change: dict[str, str],
    says: str,
) -> None:
    """The three places name a cause in the same words, and none shows the password."""
    parts = {"scheme": "valkey", "user": "", "path": ""} | change
    url = "{scheme}://{user}127.0.0.1:{port}{path}".format(port=server.port, **parts)
    with ExitStack() as stack:
        if harm:
            stack.callback(server.client.execute_command, *heal.split())
            server.client.execute_command(*harm.split())
        gate = launch(simulator.url, store={"url": url, "timeout_seconds": 1})
        degraded: list[str] = []

        def is_named() -> bool:
            degraded[:] = gate.client.get("/readyz").json()["degraded"]
            return any(reason.startswith(f"store: {says}") for reason in degraded)

        until(is_named, "/readyz names the cause")
        status, checked = run("check", cwd=tmp_path, env=environment(simulator, url))
    logged = capfd.readouterr().out
    assert says in logged
    assert status == 1
    assert f"store: {says}" in checked
    assert "wrong" not in "".join(degraded) + logged + checked


def test_cli_check_names_the_cause(server: StoreServer, simulator: Simulator, tmp_path: Path) -> None:
    """`check` fails with the cause, and shows server and duration when there is none."""
    allow(server, [rule for rule in LEAST if rule != "&sd-gateway:*"])
    env = environment(simulator, as_user(server.url))
    status, output = run("check", cwd=tmp_path, env=env)
    assert status == 1
    assert f"connecting to the store at 127.0.0.1:{server.port}" in output
    assert "store: missing permissions of the user: &sd-gateway:*" in output
    assert PASSWORD not in output
    allow(server, ["~*", "&*", "+@all"])
    status, output = run("check", cwd=tmp_path, env=env)
    assert re.search(r"^OK: (Valkey|Redis) \d[\d.]+, a test write took \d+\.\d ms$", output, re.MULTILINE)
    assert status == (0 if "OK: key" in output else 1)


def test_cli_check_names_a_store_without_upstream(tmp_path: Path) -> None:
    """`check` tests the store, also if the key pair is missing."""
    env = {"SD_GATEWAY_STORE__URL": f"valkey://127.0.0.1:{free_port()}"}
    status, output = run("check", cwd=tmp_path, env=env)
    assert status == 1
    assert "no key pair" in output
    assert "store: no connection: refused" in output


# Readiness


def test_readiness_waits_for_the_store(launch: Launch, simulator: Simulator, tmp_path: Path) -> None:
    """A new replica is ready when it has connected; without the store, after two seconds."""
    with StoreServer(binary("valkey"), tmp_path) as server:
        store = {"url": server.url, "timeout_seconds": 1}
        server.freeze()
        gate = launch(simulator.url, store=store)
        response = gate.client.get("/readyz")
        assert (response.status_code, response.json()["reasons"]) == (503, ["connecting to the store"])
        until(lambda: gate.client.get("/readyz").status_code == 200, "it does not wait for ever")
        assert gate.metric("store_up") == 0
        server.thaw()
        second = launch(simulator.url, store=store)
        until(lambda: second.client.get("/readyz").status_code == 200, "it is ready")
        assert second.metric("store_up") == 1


def test_a_lost_store_does_not_affect_readiness(launch: Launch, simulator: Simulator, tmp_path: Path) -> None:
    """Once connected, a replica stays ready without the store."""
    with StoreServer(binary("valkey"), tmp_path) as server:
        gate = launch(simulator.url, store={"url": server.url, "timeout_seconds": 1})
        until(lambda: gate.metric("store_up") == 1, "it is connected")
        server.kill()
        until(lambda: gate.metric("store_up") == 0, "it notices")
        response = gate.client.get("/readyz")
        assert response.status_code == 200
        assert json.dumps(response.json()["degraded"]).startswith('["store: no connection')
