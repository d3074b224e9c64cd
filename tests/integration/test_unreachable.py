"""An upstream that cannot be reached: problem, `/readyz` and log say why, in the same words."""

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
import trustme
from structlog.testing import capture_logs

from tests.support.egress import PASSWORD, Proxy, http_proxy, socks_proxy, squid_proxy
from tests.support.harness import Gateway, Json, free_port, fresh_id

Launch = Callable[..., Gateway]
NOW = datetime.now(UTC)
EXPIRED = {"not_before": NOW - timedelta(days=9), "not_after": NOW - timedelta(days=1)}
NOT_YET_VALID = {"not_before": NOW + timedelta(days=1), "not_after": NOW + timedelta(days=9)}
REFUSED = "connection refused, or blocked by a firewall"
REJECTED = "the server rejects the client certificate of upstream.client_cert_file"


@contextmanager
def tls_server(context: ssl.SSLContext) -> Iterator[str]:
    """Run a server that makes TLS handshakes, and sends the alert if one fails, as OpenSSL's servers do."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.settimeout(5)
            secure = context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
            with suppress(OSError), secure:
                try:
                    secure.do_handshake()
                    secure.recv(1)
                except ssl.SSLError:
                    # With unread bytes of the request, the close would be a reset, which overtakes the alert.
                    secure.shutdown(socket.SHUT_WR)
                    while secure.recv(4096):
                        pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"https://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def assert_named(gate: Gateway, cause: str) -> None:
    """Assert that three queries get the cause, that `/readyz` has it, and that the log has it once."""
    with capture_logs() as lines:
        problems = [gate.get(fresh_id()) for _ in range(3)]
        degraded = gate.client.get("/readyz").json()["degraded"]
    for problem in problems:
        assert problem.json()["code"] == "upstream-unreachable"
        assert problem.json()["detail"] == f"the upstream could not be reached: {cause}"
    assert degraded == [f"upstream: upstream-unreachable: {cause}"]
    [line] = [line for line in lines if line["event"] == "upstream_unreachable"]
    assert (line["log_level"], line["reason"]) == ("warning", cause)
    assert PASSWORD not in f"{degraded}{lines}"


def launched(launch: Launch, url: str, **upstream: Json) -> Gateway:
    """Start a gateway that makes one call per query."""
    return launch(url, upstream={"retries": 0, **upstream}, cache={"error_seconds": 0})


def test_unreachable_without_a_connection(launch: Launch) -> None:
    """The host name has no address, or the host refuses the connection."""
    assert_named(launched(launch, "https://unknown.invalid"), "host name not found")
    assert_named(launched(launch, f"https://127.0.0.1:{free_port()}"), REFUSED)


@pytest.mark.parametrize(
    ("host", "dates", "trusted", "cause"),
    [
        ("127.0.0.1", {}, False, "unable to get local issuer certificate"),
        ("127.0.0.1", EXPIRED, True, "certificate has expired"),
        ("127.0.0.1", NOT_YET_VALID, True, "certificate is not yet valid"),
        ("vendor.example", {}, True, "it is for another host name"),
    ],
    ids=["private-ca", "expired", "not-yet-valid", "wrong-name"],
)
def test_unreachable_with_an_invalid_certificate(
    launch: Launch, tmp_path: Path, host: str, dates: dict[str, datetime], *, trusted: bool, cause: str
) -> None:
    """Each fault of the upstream's certificate has its own words."""
    authority = trustme.CA()
    file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(file)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(host, **dates).configure_cert(context)
    with tls_server(context) as url:
        gate = launched(launch, url, **({"ca_file": str(file)} if trusted else {}))
        assert_named(gate, f"the certificate could not be verified ({cause})")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
@pytest.mark.parametrize(
    ("dates", "cause"),
    [
        (EXPIRED, f"{REJECTED}: it has expired"),
        (NOT_YET_VALID, f"{REJECTED}: check its dates"),
        (None, "set upstream.client_cert_file"),
    ],
    ids=["expired", "not-yet-valid", "missing"],
)
def test_unreachable_with_a_rejected_client_certificate(
    launch: Launch,
    tmp_path: Path,
    version: ssl.TLSVersion,
    dates: dict[str, datetime] | None,
    cause: str,
) -> None:
    """The alert of a server that rejects the client certificate is reported, with the setting."""
    authority = trustme.CA()
    files = client_files(authority, tmp_path, dates)
    with tls_server(asking_for_certificates(authority, version)) as url:
        gate = launched(launch, url, **files)
        detail = gate.get(fresh_id()).json()["detail"]
    assert detail.endswith(cause)


@pytest.mark.parametrize("kind", ["http", "socks5", "https"])
def test_unreachable_with_a_rejected_client_certificate_through_a_proxy(
    launch: Launch, tmp_path: Path, kind: str
) -> None:
    """Through a tunnel, too, the upstream's alert is reported, and is not taken for one of the proxy.

    With TLS 1.3, the proxy may close the connection while the request is sent, which overtakes the alert.
    """
    authority = trustme.CA()
    files = client_files(authority, tmp_path, EXPIRED)
    proxies: dict[str, Callable[[Path], AbstractContextManager[Proxy]]] = {
        "http": http_proxy,
        "socks5": socks_proxy,
        "https": partial(squid_proxy, certificate=authority.issue_cert("127.0.0.1")),
    }
    context = asking_for_certificates(authority, ssl.TLSVersion.TLSv1_2)
    with proxies[kind](tmp_path) as proxy, tls_server(context) as url:
        gate = launched(launch, url, **files, proxy=proxy.url)
        assert_named(gate, f"{REJECTED}: it has expired")


def client_files(authority: trustme.CA, folder: Path, dates: dict[str, datetime] | None) -> dict[str, str]:
    """Write the authority, and a client certificate if it has dates; return the settings for both."""
    authority.cert_pem.write_to_path(folder / "ca.pem")
    files = {"ca_file": str(folder / "ca.pem")}
    if dates is not None:
        issued = authority.issue_cert("gateway.example", **dates)
        issued.cert_chain_pems[0].write_to_path(folder / "client.pem")
        issued.private_key_pem.write_to_path(folder / "client.key")
        files |= {"client_cert_file": str(folder / "client.pem")}
        files |= {"client_key_file": str(folder / "client.key")}
    return files


def asking_for_certificates(authority: trustme.CA, version: ssl.TLSVersion) -> ssl.SSLContext:
    """Return the context of a server that requires client certificates of the authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = version
    context.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(context)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


def test_unreachable_through_a_proxy(launch: Launch, tmp_path: Path) -> None:
    """A proxy that does not listen, refuses the password or the tunnel is named, without the password."""
    upstream = f"https://127.0.0.1:{free_port()}"
    stopped = f"http://gate:{PASSWORD}@127.0.0.1:{free_port()}"
    assert_named(launched(launch, upstream, proxy=stopped), f"no connection to the proxy: {REFUSED}")
    with http_proxy(tmp_path, ports=(443,)) as proxy:
        wrong = proxy.with_password(f"{PASSWORD}-x")
        cause = "the proxy requires a valid user name and password"
        assert_named(launched(launch, upstream, proxy=wrong), cause)
        cause = "the proxy refused the connection to the upstream (403)"
        assert_named(launched(launch, upstream, proxy=proxy.url), cause)


def test_unreachable_through_a_socks_proxy_with_another_login(launch: Launch, tmp_path: Path) -> None:
    """The URL has no password, a wrong one, or one that the proxy does not use."""
    upstream = f"https://127.0.0.1:{free_port()}"
    with socks_proxy(tmp_path) as proxy:
        cause = "the proxy requires a valid user name and password"
        assert_named(launched(launch, upstream, proxy=f"socks5://127.0.0.1:{proxy.port}"), cause)
        assert_named(launched(launch, upstream, proxy=proxy.with_password(f"{PASSWORD}-x")), cause)
    with socks_proxy(tmp_path, login=False) as proxy:
        cause = "the proxy does not accept a user name and password"
        assert_named(launched(launch, upstream, proxy=proxy.url), cause)


@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["closed", "http"])
def test_unreachable_through_a_proxy_that_does_not_speak_socks(launch: Launch, reply: bytes) -> None:
    """It closes the connection, or it is an HTTP proxy."""
    upstream = f"https://127.0.0.1:{free_port()}"
    with replying(reply) as port:
        proxy = f"socks5://gate:{PASSWORD}@127.0.0.1:{port}"
        cause = "no valid SOCKS5 response of the proxy"
        assert_named(launched(launch, upstream, proxy=proxy), cause)


@contextmanager
def replying(reply: bytes) -> Iterator[int]:
    """Run a server that reads once from each connection, replies and closes it; yield its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    with client:
                        client.recv(4096)
                        client.sendall(reply)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(5)


def test_unreachable_in_time_is_told_from_a_silent_upstream(launch: Launch) -> None:
    """A host that drops packets is a cause of its own; the code stays that of a timeout."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        address = full.getsockname()
        waiting = [socket.socket() for _ in range(2)]
        for client in waiting:  # the queue of the listener is full: later connections get no reply
            client.settimeout(0)
            client.connect_ex(address)
        gate = launched(launch, f"http://127.0.0.1:{address[1]}", attempt_timeout_seconds=0.3)
        problem = gate.get(fresh_id()).json()
        cause = "no connection to the upstream in time"
        assert (problem["code"], problem["detail"]) == ("upstream-timeout", cause)
        assert gate.client.get("/readyz").json()["degraded"] == [f"upstream: upstream-timeout: {cause}"]
        for client in waiting:
            client.close()
