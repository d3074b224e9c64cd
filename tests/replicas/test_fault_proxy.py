"""The fault-injecting proxy itself: what it adds, and what it leaves alone."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.support.fault_proxy import FaultProxy
from tests.support.harness import until


@pytest.fixture
def proxy() -> Iterator[FaultProxy]:
    """Return a proxy in front of an echo server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def echo(connection: socket.socket) -> None:
            with connection, suppress(OSError):
                while data := connection.recv(65536):
                    connection.sendall(data)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    threading.Thread(target=echo, args=(listener.accept()[0],), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        with FaultProxy(listener.getsockname()[1]) as proxy:
            yield proxy
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def connect(proxy: FaultProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=10)


def echo_seconds(connection: socket.socket) -> float:
    """Return the seconds until a byte comes back."""
    began = time.monotonic()
    connection.sendall(b"x")
    assert connection.recv(1) == b"x"
    return time.monotonic() - began


def silent(connection: socket.socket, seconds: float = 0.2) -> bool:
    """Return whether nothing arrives for a while."""
    connection.settimeout(seconds)
    try:
        return not connection.recv(1) and False
    except TimeoutError:
        return True
    finally:
        connection.settimeout(10)


def test_proxy_counts_and_delays(proxy: FaultProxy) -> None:
    """A delay adds to the round trip, and ends; bytes are counted in each direction."""
    with connect(proxy) as connection:
        echo_seconds(connection)
        assert proxy.counts() == (1, 1, 1, 2)
        proxy.delay(to_server=0.1, to_client=0.05)
        assert echo_seconds(connection) >= 0.15
        proxy.heal()
        until(lambda: echo_seconds(connection) < 0.1, "the delay ends")


def test_proxy_delay_keeps_throughput_and_order(proxy: FaultProxy) -> None:
    """Chunks in flight do not wait for each other: 50 of them, 2 ms apart, take one delay more."""
    proxy.delay(round_trip=0.3)
    with connect(proxy) as connection:
        began = time.monotonic()
        for number in range(50):
            connection.sendall(b"%02d" % number)
            time.sleep(0.002)
        received = b""
        while len(received) < 100:
            part = connection.recv(100)
            assert part, "the connection ended"
            received += part
    assert received == b"".join(b"%02d" % number for number in range(50))
    assert 0.3 <= time.monotonic() - began < 2


def test_proxy_delay_keeps_bandwidth(proxy: FaultProxy) -> None:
    """8 MiB over a link with a delay of 0.2 s need less than a second more than the delay."""
    size = 8 << 20
    proxy.delay(round_trip=0.2)
    with connect(proxy) as connection:
        began, received = time.monotonic(), 0
        sender = threading.Thread(target=connection.sendall, args=(bytes(size),))
        sender.start()
        while received < size:
            part = connection.recv(1 << 20)
            assert part, "the connection ended"
            received += len(part)
        sender.join()
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("direction", ["to_server", "to_client"])
def test_proxy_stalls_a_direction(proxy: FaultProxy, direction: str) -> None:
    """A stalled direction holds its bytes; the other still flows."""
    with connect(proxy) as connection:
        echo_seconds(connection)
        proxy.stall(**{direction: True})
        connection.sendall(b"x")
        assert silent(connection)
        assert proxy.counts().to_server == (1 if direction == "to_server" else 2)
        proxy.heal()
        assert connection.recv(1) == b"x"


def test_proxy_half_open(proxy: FaultProxy) -> None:
    """A half-open link accepts connections and is silent; then everything held arrives."""
    with connect(proxy) as old:
        echo_seconds(old)
        proxy.half_open()
        with connect(proxy) as new:
            for connection in (old, new):
                connection.sendall(b"x")
                assert silent(connection)
            proxy.heal()
            for connection in (old, new):
                assert connection.recv(1) == b"x"


def test_proxy_drops_and_refuses(proxy: FaultProxy) -> None:
    """Dropped connections end; refused ones never begin; later the same port accepts again."""
    with connect(proxy) as connection:
        echo_seconds(connection)
        proxy.refuse()
        assert echo_seconds(connection) < 5
        with pytest.raises(ConnectionRefusedError):
            connect(proxy)
        proxy.drop()
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    until(lambda: proxy.counts().open == 0, "both connections are closed")
    proxy.heal()
    with connect(proxy) as connection:
        echo_seconds(connection)


def test_proxy_limits(proxy: FaultProxy) -> None:
    """A limit stretches chunks: five of 1000 bytes at 10,000 bytes per second take 0.4 s."""
    proxy.limit(10_000)
    with connect(proxy) as connection:
        began, received = time.monotonic(), 0
        for _ in range(5):
            connection.sendall(bytes(1000))
            time.sleep(0.01)
        while received < 5000:
            part = connection.recv(5000)
            assert part, "the connection ended"
            received += len(part)
    assert time.monotonic() - began >= 0.35


def test_proxy_without_its_server() -> None:
    """When the server is not there, the client's connection is accepted and closed."""
    with FaultProxy(1) as other, connect(other) as connection:
        assert connection.recv(1) == b""
