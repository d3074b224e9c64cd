"""The filter that stops new connections to a listener before it is closed."""

import errno
import select
import socket
import sys

import pytest

from gateway.server.drop_new_connections import drop_new_connections

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux has the packet filter")


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_filter_stops_new_connections_only(family: socket.AddressFamily, host: str) -> None:
    """An existing connection carries data; a new one is refused once the listener is closed, not reset."""
    with socket.socket(family) as listener, socket.socket(family) as early, socket.socket(family) as late:
        listener.bind((host, 0))
        listener.listen()
        early.connect(listener.getsockname())
        assert drop_new_connections(listener)
        late.settimeout(0)
        late.connect_ex(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            early.sendall(b"request")
            assert accepted.recv(100) == b"request"
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()
        listener.close()
        select.select([], [late], [], 10)  # Linux repeats the request for a connection after a second
        assert late.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED


def test_filter_is_for_tcp() -> None:
    """A Unix socket has no segments."""
    with socket.socket(socket.AF_UNIX) as listener:
        assert not drop_new_connections(listener)
