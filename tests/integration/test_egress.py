"""Egress proxies, private certificate authorities and client certificates, with real proxies and real TLS."""

import os
import re
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trustme
from structlog.testing import capture_logs

from gateway.settings.errors import SettingsError
from gateway.settings.model import PROXY_FORMS, Upstream
from gateway.upstream.egress_proxy import find_proxy
from tests.support.egress import PASSWORD, Proxy, http_proxy, socks_proxy, squid_proxy
from tests.support.harness import (
    KEY,
    PATIENCE_SECONDS,
    SECRET,
    Gateway,
    Json,
    Simulator,
    free_port,
    fresh_id,
    gateway,
    run,
    running,
    serving,
    until,
)
from tests.support.programs import required

Launch = Callable[..., Gateway]
FORGETFUL: Json = {"error_seconds": 0}
WRONG = "wrong-password-2"


class Vendor:
    """The simulated upstream behind TLS, with a private authority; it may ask for client certificates."""

    def __init__(self, folder: Path, authority: trustme.CA, url: str) -> None:
        self.authority = authority
        self.url = url
        self.ca_file = folder / "ca.pem"
        authority.cert_pem.write_to_path(self.ca_file)

    @property
    def port(self) -> int:
        """The port of the upstream."""
        return int(self.url.rpartition(":")[2])


@pytest.fixture
def vendor(simulator: Simulator, tmp_path: Path) -> Iterator[Callable[..., Vendor]]:
    """Return a function that runs the simulated upstream with TLS.

    Tests name it before `launch`, so that gateways stop first: otherwise the server's end of an idle TLS
    connection waits for theirs.
    """
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(_tls_upstream(simulator, tmp_path, **options))


@contextmanager
def _tls_upstream(simulator: Simulator, folder: Path, *, clients: bool = False) -> Iterator[Vendor]:
    """Run the simulated upstream with TLS. `clients`: it requires a client certificate."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    if clients:
        authority.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    # With uvloop, a connection whose client has refused the certificate stays open when the server stops.
    options = {"lifespan": "off", "date_header": False, "loop": "asyncio"}
    options["ssl_context_factory"] = lambda *_: context
    with running(simulator.stage, **options) as url:
        yield Vendor(folder, authority, url)


@pytest.fixture(params=[http_proxy, squid_proxy, socks_proxy], ids=["tinyproxy", "squid", "socks5"])
def proxy(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Proxy]:
    """Run a proxy that requires a password."""
    with request.param(tmp_path) as started:
        yield started


def settings(upstream: Vendor, **more: Json) -> dict[str, Json]:
    """Return the settings for the private authority."""
    return {"upstream": {"ca_file": str(upstream.ca_file), "retries": 0, **more}, "cache": FORGETFUL}


def problem(gate: Gateway) -> str:
    """Return the text of the problem that a query gets, which has no secret."""
    response = gate.get(fresh_id())
    assert response.status_code == 502
    assert response.json()["code"] == "upstream-unreachable"
    for secret in (PASSWORD, WRONG):
        assert secret not in response.text
    return str(response.json()["detail"])


def checked(tmp_path: Path, upstream: str, **env: str) -> tuple[int, str]:
    """Run `check`; its output has no secret."""
    variables = {
        "SD_GATEWAY_UPSTREAM__ENDPOINT": upstream,
        "SD_GATEWAY_CREDENTIALS__ACCESS_KEY": KEY,
        "SD_GATEWAY_CREDENTIALS__SECRET_KEY": SECRET,
    }
    status, output = run("check", cwd=tmp_path, env=variables | env)
    for secret in (PASSWORD, WRONG, SECRET, "Traceback"):
        assert secret not in output
    return status, output


def variables(upstream: Vendor, proxy: Proxy) -> dict[str, str]:
    """Return the settings for the private authority and the proxy, as variables."""
    return {
        "SD_GATEWAY_UPSTREAM__PROXY": proxy.url,
        "SD_GATEWAY_UPSTREAM__CA_FILE": str(upstream.ca_file),
    }


def test_egress_queries_pass_through_the_proxy(
    simulator: Simulator, vendor: Callable[..., Vendor], proxy: Proxy
) -> None:
    """Calls of both kinds reach the upstream, over one connection if possible."""
    upstream = vendor()
    with gateway(upstream.url, **settings(upstream, proxy=proxy.url)) as gate:
        for _ in range(3):
            assert gate.get(simulator.task()).status_code == 200
        assert gate.native(simulator.task(), "sd_get_result").status_code == 200
        assert gate.metric("upstream_in_flight") == 0
    assert simulator.stats()["refused"] == 0
    if proxy.scheme == "http":
        # Progress calls share a connection; the result has one of its own.
        until(lambda: proxy.tunnels >= 2, "the proxy has logged both")
        assert proxy.tunnels == 2


def test_egress_wrong_password_is_named(
    simulator: Simulator, vendor: Callable[..., Vendor], launch: Launch, proxy: Proxy, tmp_path: Path
) -> None:
    """The problem says that the proxy refused the password, not that the upstream did."""
    upstream = vendor()
    gate = launch(upstream.url, **settings(upstream, proxy=proxy.with_password(WRONG)))
    said = problem(gate)
    env = {
        "SD_GATEWAY_UPSTREAM__PROXY": proxy.with_password(WRONG),
        "SD_GATEWAY_UPSTREAM__CA_FILE": str(upstream.ca_file),
    }
    status, output = checked(tmp_path, upstream.url, **env)
    words = "user name and password"
    assert words in said
    assert status == 1
    assert words in output
    assert f"through the proxy {proxy.scheme}://127.0.0.1:{proxy.port}" in output
    assert simulator.calls() == 0


def test_egress_unreachable_proxy_is_named(
    vendor: Callable[..., Vendor], launch: Launch, tmp_path: Path
) -> None:
    """The problem says whether the proxy or the upstream does not listen."""
    url = f"http://127.0.0.1:{free_port()}"
    upstream = vendor()
    gate = launch(upstream.url, **settings(upstream, proxy=url))
    assert "no connection to the proxy" in problem(gate)
    env = {"SD_GATEWAY_UPSTREAM__PROXY": url}
    status, output = checked(tmp_path, upstream.url, **env)
    assert status == 1
    assert "no connection to the proxy" in output


@pytest.mark.parametrize("run_proxy", [http_proxy, squid_proxy])
def test_egress_refused_tunnel_is_named(
    vendor: Callable[..., Vendor], launch: Launch, tmp_path: Path, run_proxy: Callable[..., Any]
) -> None:
    """A proxy that allows no tunnel to the upstream's port is named, with its status."""
    upstream = vendor()
    words = "the proxy refused the connection to the upstream (403)"
    with run_proxy(tmp_path, ports=(443,)) as proxy:
        gate = launch(upstream.url, **settings(upstream, proxy=proxy.url))
        assert words in problem(gate)
        status, output = checked(tmp_path, upstream.url, **variables(upstream, proxy))
    assert (status, words in output) == (1, True)


def test_egress_stopped_proxy_is_named(
    simulator: Simulator, vendor: Callable[..., Vendor], launch: Launch, proxy: Proxy, tmp_path: Path
) -> None:
    """After a proxy has carried calls and has stopped, the problem says that it is not reached."""
    upstream = vendor()
    gate = launch(upstream.url, **settings(upstream, proxy=proxy.url))
    assert gate.get(simulator.task()).status_code == 200
    proxy.stop()
    assert "no connection to the proxy" in problem(gate)
    status, output = checked(tmp_path, upstream.url, **variables(upstream, proxy))
    assert (status, "no connection to the proxy" in output) == (1, True)


def test_egress_frozen_proxy_is_named(vendor: Callable[..., Vendor], proxy: Proxy, tmp_path: Path) -> None:
    """A proxy that accepts connections and does not reply is named, too, when the time is over."""
    upstream = vendor()
    words = "the proxy did not connect to the upstream in time"
    proxy.freeze()
    with gateway(upstream.url, **settings(upstream, proxy=proxy.url, attempt_timeout_seconds=0.3)) as gate:
        response = gate.get(fresh_id())
        assert response.status_code == 504
        assert words in response.json()["detail"]
    # With the default timeout: the first call of a process also imports the proxy's libraries.
    status, output = checked(tmp_path, upstream.url, **variables(upstream, proxy))
    assert (status, f"network: {words}; check" in output) == (1, True), output


def test_egress_upstream_that_refuses_connections_is_reported(
    launch: Launch, proxy: Proxy, tmp_path: Path
) -> None:
    """The proxy says that it does not reach the upstream; problem and `check` repeat its words."""
    upstream = f"https://127.0.0.1:{free_port()}"
    gate = launch(upstream, upstream={"proxy": proxy.url, "retries": 0})
    words = re.compile(r"the proxy could not connect to the upstream \((50[03]|Connection refused)\)")
    assert words.search(problem(gate))
    status, output = checked(tmp_path, upstream, SD_GATEWAY_UPSTREAM__PROXY=proxy.url)
    assert (status, bool(words.search(output.splitlines()[-1]))) == (1, True)


@pytest.mark.parametrize("status", ["500", "502 Bad Gateway", "503", "504 Gateway Timeout"])
def test_egress_proxy_without_a_way_to_the_upstream_is_named(
    launch: Launch, tmp_path: Path, status: str
) -> None:
    """Problem and `check` name each status by which a proxy says that it cannot reach the upstream."""

    def refuse(connection: socket.socket) -> None:
        received = b""
        while b"\r\n\r\n" not in received:
            received += connection.recv(65536)
        connection.sendall(f"HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n".encode())

    upstream, words = "https://vendor.example", f"the proxy could not connect to the upstream ({status[:3]})"
    with connections(refuse) as port:
        url = f"http://127.0.0.1:{port}"
        assert problem(launch(upstream, upstream={"proxy": url, "retries": 0})).endswith(words)
        ended, output = checked(tmp_path, upstream, SD_GATEWAY_UPSTREAM__PROXY=url)
    assert (ended, output.splitlines()[-1].endswith(words)) == (1, True)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"no HTTP\r\n\r\n", "the response is not valid HTTP"),
        (b"", "the connection was closed too early"),
    ],
)
def test_egress_proxy_that_is_none_is_named(launch: Launch, said: bytes, reason: str) -> None:
    """The cause names a server that is not a proxy: it does not speak HTTP, or closes the connection."""

    def speak(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(said)

    with connections(speak) as port:
        proxy = f"http://127.0.0.1:{port}"
        gate = launch("https://vendor.example", upstream={"proxy": proxy, "retries": 0})
        assert problem(gate).endswith(f": no valid response of the proxy: {reason}")


@contextmanager
def connections(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """Run a server that serves one connection after the other, and closes it; yield its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, suppress(OSError):
                        serve(connection)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join(PATIENCE_SECONDS)


def test_egress_proxy_with_tls_carries_calls(
    simulator: Simulator, vendor: Callable[..., Vendor], tmp_path: Path
) -> None:
    """A proxy with https:// in its URL is reached by TLS, and the upstream by TLS through its tunnel."""
    upstream = vendor()
    with squid_proxy(tmp_path, certificate=upstream.authority.issue_cert("127.0.0.1")) as proxy:
        with gateway(upstream.url, **settings(upstream, proxy=proxy.url)) as gate:
            for _ in range(2):
                assert gate.get(simulator.task()).status_code == 200
        until(lambda: proxy.tunnels == 1, "the proxy has logged one tunnel")
        with gateway(upstream.url, **settings(upstream, proxy=proxy.with_password(WRONG))) as gate:
            assert "user name and password" in problem(gate)
        status, output = checked(tmp_path, upstream.url, **variables(upstream, proxy))
        assert (status, "OK: key, signature and clock accepted" in output) == (0, True)
        assert f" through the proxy https://127.0.0.1:{proxy.port} (upstream.proxy)\n" in output
        # The plain upstream: the proxy receives whole URLs.
        with gateway(simulator.url, **settings(upstream, proxy=proxy.url)) as gate:
            assert gate.get(simulator.task()).status_code == 200


@pytest.mark.parametrize("endpoint", ["https", "http"])
@pytest.mark.parametrize(
    ("host", "trusted", "reason"),
    [
        ("127.0.0.1", False, "unable to get local issuer certificate"),
        ("proxy.example", True, "it is for another host name"),
    ],
    ids=["private-ca", "wrong-name"],
)
def test_egress_certificate_of_the_proxy_is_named(
    simulator: Simulator,
    vendor: Callable[..., Vendor],
    launch: Launch,
    tmp_path: Path,
    host: str,
    reason: str,
    endpoint: str,
    *,
    trusted: bool,
) -> None:
    """A proxy whose certificate is not valid gets nothing; problem, log, `/readyz` and `check` name it."""
    upstream = vendor()
    url = upstream.url if endpoint == "https" else simulator.url
    authority = upstream.authority if trusted else trustme.CA()
    cause = f"no connection to the proxy: the certificate could not be verified ({reason})"
    with squid_proxy(tmp_path, certificate=authority.issue_cert(host)) as proxy, capture_logs() as lines:
        gate = launch(url, **settings(upstream, proxy=proxy.url))
        assert problem(gate) == f"the upstream could not be reached: {cause}"
        assert gate.client.get("/readyz").json()["degraded"] == [f"upstream: upstream-unreachable: {cause}"]
        assert gate.metric("upstream_certificate_errors_total") == 1
        status, output = checked(tmp_path, url, **variables(upstream, proxy))
    assert [line["reason"] for line in lines if line["event"] == "upstream_unreachable"] == [cause]
    assert (status, output.splitlines()[-1].endswith(f": {cause}")) == (1, True)
    assert simulator.requests() == []


def test_egress_certificate_of_the_upstream_is_told_from_that_of_the_proxy(
    vendor: Callable[..., Vendor], launch: Launch, tmp_path: Path
) -> None:
    """If the proxy's certificate is valid and the upstream's is not, the words do not name the proxy."""
    upstream, authority = vendor(), trustme.CA()
    authority.cert_pem.write_to_path(upstream.ca_file)
    with squid_proxy(tmp_path, certificate=authority.issue_cert("127.0.0.1")) as proxy:
        gate = launch(upstream.url, **settings(upstream, proxy=proxy.url))
        assert problem(gate).startswith("the upstream could not be reached: the certificate could not be")


def test_egress_proxy_without_tls_is_named(vendor: Callable[..., Vendor], tmp_path: Path) -> None:
    """With https:// in the URL of a proxy that waits for plain HTTP, the words say what to change."""
    upstream = vendor()
    words = "the TLS handshake with the proxy took too long; a proxy without TLS has an http:// URL"
    with http_proxy(tmp_path) as proxy:
        url = proxy.url.replace("http:", "https:")
        with gateway(upstream.url, **settings(upstream, proxy=url, attempt_timeout_seconds=0.3)) as gate:
            assert gate.get(fresh_id()).json()["detail"] == words
            assert gate.client.get("/readyz").json()["degraded"] == [f"upstream: upstream-timeout: {words}"]
    with squid_proxy(tmp_path) as proxy:  # it refuses the handshake at once
        url = proxy.url.replace("http:", "https:")
        with gateway(upstream.url, **settings(upstream, proxy=url)) as gate:
            assert problem(gate).endswith(
                "no connection to the proxy: TLS handshake failed: the server does not speak TLS"
            )


def test_egress_untrusted_certificate_is_counted(
    simulator: Simulator, vendor: Callable[..., Vendor], launch: Launch, proxy: Proxy, tmp_path: Path
) -> None:
    """Behind a proxy, too, the upstream's certificate is verified before anything is sent."""
    upstream = vendor()
    gate = launch(upstream.url, upstream={"proxy": proxy.url, "retries": 0}, cache=FORGETFUL)
    problem(gate)
    assert gate.metric("upstream_certificate_errors_total") == 1
    status, output = checked(tmp_path, upstream.url, SD_GATEWAY_UPSTREAM__PROXY=proxy.url)
    assert status == 1
    assert "the certificate could not be verified" in output
    assert simulator.requests() == []


def test_egress_proxy_of_the_environment(vendor: Callable[..., Vendor], proxy: Proxy, tmp_path: Path) -> None:
    """`check` uses the proxy of the environment and names the variable. no_proxy and "direct" turn it off."""
    upstream = vendor()
    # A loopback address needs no proxy, hence a name.
    url = upstream.url.replace("127.0.0.1", "vendor.test")
    env = {"SSL_CERT_FILE": str(upstream.ca_file), "HTTPS_PROXY": proxy.url}
    _, output = checked(tmp_path, url, **env)
    assert f"through the proxy {proxy.scheme}://127.0.0.1:{proxy.port} (HTTPS_PROXY)" in output
    _, output = checked(tmp_path, url, **env, NO_PROXY=".test")
    assert "proxy" not in output
    _, output = checked(tmp_path, upstream.url, **env)
    assert "proxy" not in output
    assert "OK: key, signature and clock accepted" in output
    _, output = checked(tmp_path, url, **env, SD_GATEWAY_UPSTREAM__PROXY="direct")
    assert "proxy" not in output


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, None),
        ({"HTTPS_PROXY": "http://p:1"}, ("http://p:1", "HTTPS_PROXY")),
        ({"https_proxy": "p:1", "HTTPS_PROXY": "http://q:1"}, ("http://p:1", "https_proxy")),
        ({"HTTP_PROXY": "http://p:1"}, None),
        ({"ALL_PROXY": "socks5://p:1"}, ("socks5://p:1", "ALL_PROXY")),
        ({"ALL_PROXY": "http://a:1", "HTTPS_PROXY": " http://p:1 "}, ("http://p:1", "HTTPS_PROXY")),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "*"}, None),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "a.example, vendor.example"}, None),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": ".vendor.example"}, None),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "*.example"}, None),
        ({"HTTPS_PROXY": "http://p:1", "no_proxy": "VENDOR.example:443"}, None),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": ".vendor.example:443"}, None),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "vendor.example:8443"}, ("http://p:1", "HTTPS_PROXY")),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "dor.example"}, ("http://p:1", "HTTPS_PROXY")),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "10.0.0.0/8,::1"}, ("http://p:1", "HTTPS_PROXY")),
    ],
)
def test_egress_environment(environ: dict[str, str], found: tuple[str, str] | None) -> None:
    """The variables have the meaning that they have for curl."""
    proxy = find_proxy(Upstream(endpoint="https://api.vendor.example"), environ)
    if environ.get("no_proxy"):
        proxy = find_proxy(Upstream(endpoint="https://vendor.example"), environ)
    assert (None if proxy is None else (str(proxy.url), proxy.source)) == found


@pytest.mark.parametrize(
    ("endpoint", "excluded"),
    [
        ("https://10.1.2.3", True),
        ("https://11.1.2.3", False),
        ("https://[fd00::1]", True),
        ("https://[fe00::1]", True),
        ("https://[fe00::1]:8443", False),
        ("https://[fe00::2]", False),
        ("https://[fe00::3]:1", True),
        ("https://localhost", True),
        ("https://127.1.2.3", True),
    ],
)
def test_egress_addresses_without_a_proxy(endpoint: str, *, excluded: bool) -> None:
    """no_proxy may list networks; a loopback address never has a proxy."""
    environ = {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "10.0.0.0/8, fd00::/16, [fe00::1]:443, [fe00::3]"}
    assert (find_proxy(Upstream(endpoint=endpoint), environ) is None) is excluded


@pytest.mark.parametrize("proxy", ["ftp://p:1", "http://", "http://p:x", "socks4://p:1"])
def test_egress_invalid_proxy_is_named_without_its_password(proxy: str) -> None:
    """An invalid value stops the start; it is not repeated, because it may have a password."""
    with pytest.raises(SettingsError) as told:
        find_proxy(Upstream(), {"HTTPS_PROXY": proxy})
    assert str(told.value) == f"HTTPS_PROXY: must be {PROXY_FORMS}"


@pytest.mark.parametrize("password", [f"{start}{mark}word-1" for start in ("p", "12", "") for mark in "#/?"])
def test_egress_password_without_escapes_is_explained(password: str) -> None:
    """A password with special characters ends the URL's host early: the message says how to write it.

    What stands before such a character may look like a port.
    """
    with pytest.raises(SettingsError) as told:
        find_proxy(Upstream(), {"HTTPS_PROXY": f"http://user:{password}@proxy.example:3128"})
    assert str(told.value).endswith(
        'in its password, write "@" as %40, "/" as %2F, "#" as %23 and "?" as %3F'
    )
    assert "word-1" not in str(told.value)


@pytest.mark.parametrize("rest", ["", "/", "/word-1", "?token=word-1", "#word-1"])
def test_egress_shows_no_more_than_the_origin_of_a_proxy(rest: str) -> None:
    """The log and `check` show the scheme, host and port. Whatever else the URL has may be secret."""
    proxy = find_proxy(Upstream(), {"HTTPS_PROXY": f"http://user:word-2@proxy.example:3128{rest}"})
    assert proxy is not None
    assert proxy.shown == "http://proxy.example:3128"


def test_egress_client_certificate(
    simulator: Simulator, vendor: Callable[..., Vendor], launch: Launch, tmp_path: Path
) -> None:
    """An upstream that requires a client certificate gets it; without one, no call reaches it."""
    upstream = vendor(clients=True)
    issued = upstream.authority.issue_cert("gateway.example")
    cert, key = tmp_path / "client.pem", tmp_path / "client.key"
    issued.cert_chain_pems[0].write_to_path(cert)
    issued.private_key_pem.write_to_path(key)
    files = {"client_cert_file": str(cert), "client_key_file": str(key)}
    assert launch(upstream.url, **settings(upstream, **files)).get(simulator.task()).status_code == 200
    problem(launch(upstream.url, **settings(upstream)))
    certificate = {
        "SD_GATEWAY_UPSTREAM__CLIENT_CERT_FILE": str(cert),
        "SD_GATEWAY_UPSTREAM__CLIENT_KEY_FILE": str(key),
    }
    env = {"SD_GATEWAY_UPSTREAM__CA_FILE": str(upstream.ca_file), **certificate}
    status, output = checked(tmp_path, upstream.url, **env)
    assert (status, "OK: key, signature and clock accepted" in output) == (0, True)
    expired = upstream.authority.issue_cert("gateway.example", not_after=datetime(2020, 1, 1, tzinfo=UTC))
    expired.cert_chain_pems[0].write_to_path(cert)
    expired.private_key_pem.write_to_path(key)
    status, output = checked(tmp_path, upstream.url, **env)
    # asyncio's server closes the connection without an alert.
    assert (status, "; the upstream may reject upstream.client_cert_file: check the dates" in output) == (
        1,
        True,
    )
    status, output = checked(tmp_path, upstream.url, **env | dict.fromkeys(certificate, ""))
    assert (status, "requires a client certificate, set upstream.client_cert_file" in output) == (1, True)
    key.write_text("no key")
    status, output = checked(tmp_path, upstream.url, **env)
    assert (status, f'{key}": has no private key in PEM format' in output) == (2, True)


@pytest.mark.parametrize("kind", ["tinyproxy", "squid", "socks5", "https"])
def test_egress_client_certificate_through_a_proxy(
    simulator: Simulator, vendor: Callable[..., Vendor], launch: Launch, tmp_path: Path, kind: str
) -> None:
    """Through a proxy, too, the upstream gets the client certificate; `check` names a missing one."""
    upstream = vendor(clients=True)
    cert, key = tmp_path / "client.pem", tmp_path / "client.key"
    files = {"client_cert_file": str(cert), "client_key_file": str(key)}
    env = {f"SD_GATEWAY_UPSTREAM__{name.upper()}": value for name, value in files.items()}
    proxies: dict[str, Callable[..., AbstractContextManager[Proxy]]] = {
        "tinyproxy": http_proxy,
        "squid": squid_proxy,
        "socks5": socks_proxy,
        "https": partial(squid_proxy, certificate=upstream.authority.issue_cert("127.0.0.1")),
    }
    with proxies[kind](tmp_path) as proxy:
        for authority, status, words in (
            (trustme.CA(), 1, "; the upstream may reject upstream.client_cert_file: check the dates"),
            (upstream.authority, 0, "OK: key, signature and clock accepted"),
        ):
            issued = authority.issue_cert("gateway.example")
            issued.cert_chain_pems[0].write_to_path(cert)
            issued.private_key_pem.write_to_path(key)
            ended, output = checked(tmp_path, upstream.url, **variables(upstream, proxy), **env)
            assert (ended, words in output) == (status, True)
        ended, output = checked(tmp_path, upstream.url, **variables(upstream, proxy))
        assert (ended, "requires a client certificate, set upstream.client_cert_file" in output) == (1, True)
        gate = launch(upstream.url, **settings(upstream, proxy=proxy.url, **files))
        assert gate.get(simulator.task()).status_code == 200


@pytest.mark.parametrize("through_proxy", [False, True], ids=["direct", "proxy"])
def test_egress_follows_a_new_client_certificate(
    simulator: Simulator,
    vendor: Callable[..., Vendor],
    launch: Launch,
    tmp_path: Path,
    *,
    through_proxy: bool,
) -> None:
    """A renewed client certificate is used without a restart; half of a renewal changes nothing."""
    upstream = vendor(clients=True)
    cert, key = tmp_path / "client.pem", tmp_path / "client.key"

    def renew(file: Path, blob: trustme.Blob) -> None:
        replaced(file, blob.bytes())

    foreign, first, second = (
        authority.issue_cert("gateway.example")
        for authority in (trustme.CA(), upstream.authority, upstream.authority)
    )
    renew(cert, foreign.cert_chain_pems[0])
    renew(key, foreign.private_key_pem)
    files = {"client_cert_file": str(cert), "client_key_file": str(key)}
    with ExitStack() as stack:
        if through_proxy:
            files["proxy"] = stack.enter_context(http_proxy(tmp_path)).url
        gate = launch(upstream.url, **settings(upstream, **files, connection_max_age_seconds=0.001))
        problem(gate)  # the upstream knows only its own authority
        with capture_logs() as lines:
            renew(cert, first.cert_chain_pems[0])
            problem(gate)
            renew(key, first.private_key_pem)
            assert gate.get(simulator.task()).status_code == 200
            renew(key, second.private_key_pem)
            assert gate.get(simulator.task()).status_code == 200
            renew(cert, second.cert_chain_pems[0])
            assert gate.get(simulator.task()).status_code == 200
    events = [(line["event"], line.get("reason")) for line in lines if line["event"].startswith("tls")]
    unreadable = f"client_cert_file: {cert}: does not belong to the private key in {key}"
    assert events == [("tls_files_unreadable", unreadable), ("tls_files_loaded", None)] * 2


def test_egress_follows_a_new_authority(
    simulator: Simulator, vendor: Callable[..., Vendor], launch: Launch
) -> None:
    """The file of an authority is read again when it changes; an unusable one changes nothing."""
    upstream = vendor()
    right = upstream.ca_file.read_bytes()
    trustme.CA().cert_pem.write_to_path(upstream.ca_file)
    gate = launch(upstream.url, **settings(upstream, connection_max_age_seconds=0.001))
    problem(gate)
    replaced(upstream.ca_file, right)
    assert gate.get(simulator.task()).status_code == 200
    with capture_logs() as lines:
        replaced(upstream.ca_file, b"half a certifi")
        assert gate.get(simulator.task()).status_code == 200
    assert [line["event"] for line in lines if line["event"].startswith("tls")] == ["tls_files_unreadable"]


def test_egress_authorities_in_folders(
    simulator: Simulator, vendor: Callable[..., Vendor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SSL_CERT_DIR names folders that `openssl rehash` has prepared; `serve` and `check` trust them."""
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    upstream = vendor()
    folder, other = tmp_path / "authorities", tmp_path / "other"
    for path, content in ((folder, upstream.ca_file.read_bytes()), (other, trustme.CA().cert_pem.bytes())):
        path.mkdir()
        (path / "private.pem").write_bytes(content)
    missing = f"{tmp_path / 'missing'}"
    assert checked(tmp_path, upstream.url, SSL_CERT_DIR=missing) == (
        2,
        f'sd-gateway: SSL_CERT_DIR = "{missing}": No such file or directory',
    )
    said = '": has no certificate with a hashed name: run "openssl rehash" on it'
    assert checked(tmp_path, upstream.url, SSL_CERT_DIR=str(folder)) == (
        2,
        f'sd-gateway: SSL_CERT_DIR = "{folder}{said}',
    )
    rehash(folder)
    rehash(other)
    for folders in (f"{folder}", f"{other}:{folder}", f":{folder}:{missing}"):
        env = {"SSL_CERT_DIR": folders, "SD_GATEWAY_UPSTREAM__ENDPOINT": upstream.url}
        with serving(tmp_path, env) as (_, gate):
            assert gate.get(simulator.task()).status_code == 200
        status, output = checked(tmp_path, upstream.url, SSL_CERT_DIR=folders)
        assert (status, "OK: key, signature and clock accepted" in output) == (0, True)
    status, output = checked(tmp_path, upstream.url, SSL_CERT_DIR=str(other))
    assert (status, "unable to get local issuer certificate" in output) == (1, True)


def test_egress_follows_a_new_authority_in_a_folder(
    simulator: Simulator,
    vendor: Callable[..., Vendor],
    launch: Launch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A gateway trusts an authority that is added to any folder of SSL_CERT_DIR, without a restart."""
    upstream = vendor()
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        trustme.CA().cert_pem.write_to_path(folder / "ca.pem")
        rehash(folder)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv("SSL_CERT_DIR", os.pathsep.join(map(str, folders)))
    gate = launch(upstream.url, upstream={"ca_file": "", "retries": 0, "connection_max_age_seconds": 0.001})
    problem(gate)
    replaced(folders[1] / "ca.pem", upstream.ca_file.read_bytes())
    rehash(folders[1])
    assert gate.get(simulator.task()).status_code == 200


def rehash(folder: Path) -> None:
    """Link the certificates of a folder to the names by which OpenSSL finds them."""
    subprocess.run([required("openssl"), "rehash", folder], check=True)


def replaced(file: Path, content: bytes) -> None:
    """Replace a file atomically, as cert-manager and Kubernetes do."""
    new = file.with_suffix(".new")
    new.write_bytes(content)
    new.replace(file)


@pytest.mark.parametrize("name", ["ca_file", "client_cert_file"])
@pytest.mark.parametrize("content", [None, b"", b"nothing"])
def test_egress_unusable_file_stops_the_start(tmp_path: Path, name: str, content: bytes | None) -> None:
    """A certificate file that is missing or not PEM stops the start, with its name."""
    file = tmp_path / "file.pem"
    if content is not None:
        file.write_bytes(content)
    env = {f"SD_GATEWAY_UPSTREAM__{name.upper()}": str(file)}
    if name == "client_cert_file":
        env["SD_GATEWAY_UPSTREAM__CLIENT_KEY_FILE"] = str(file)
    status, output = checked(tmp_path, "https://vendor.example", **env)
    assert status == 2
    assert output.startswith(f'sd-gateway: SD_GATEWAY_UPSTREAM__{name.upper()}: upstream.{name} = "{file}": ')
