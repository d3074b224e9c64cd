"""The bounds that all connections of a server share, and how many there are."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field

from gateway.api.operator_endpoints import PROBES
from gateway.settings.model import Server
from gateway.telemetry.metrics import Metrics

RESERVED_CONNECTIONS = 16  # beyond the limit, each for a probe that may come
_STALL_SECONDS = 60.0
_RECEIVE_BUFFER = 16_384  # bytes; Linux doubles both for its own bookkeeping
_SEND_BUFFER = 65_536
_PROBE_SECONDS = 1.0  # for the head of a probe, beyond the limit


def bound_buffers(connection: socket.socket) -> None:
    """Bound the kernel's buffers of a connection; of a listener, of all that it accepts from their start."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)


@dataclass(slots=True)
class ConnectionLimits:
    """Bounds in seconds, bytes and counts. `probes` are the paths served beyond `max_connections`."""

    header_seconds: float
    keep_alive_seconds: float
    max_header_bytes: int
    max_header_count: int
    max_connections: int
    probes: frozenset[str] = PROBES
    count_refused_connection: Callable[[], None] = lambda: None
    count_refused_request: Callable[[int], None] = lambda _: None
    draining: bool = field(default=False, init=False)  # every response is its connection's last one
    connections: int = field(default=0, init=False)
    _reserved: dict[object, Callable[[], None]] = field(default_factory=dict, init=False)

    def bound_socket(self, connection: socket.socket | None) -> None:
        """Bound what the kernel holds for a connection, and for how long.

        What a client has sent, or does not read, takes the kernel's memory, which counts against the
        container's limit: left alone, the buffers grow to some 6 MB each. A client that takes nothing at all
        is given up by the kernel, which alone knows it while the buffer is not full.
        """
        if connection is None or connection.family == socket.AF_UNIX:
            return
        bound_buffers(connection)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            milliseconds = max(int(self.stall_seconds * 1000), 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

    def opened(self) -> bool:
        """Count a new connection; tell whether it is within the limit."""
        self.connections += 1
        return self.connections <= self.max_connections

    def reserve(self, connection: object, refuse: Callable[[], None]) -> None:
        """Let a connection beyond the limit make one probe.

        The oldest one makes room: a probe comes at once and is answered at once. `refuse` is called for that.
        """
        self._reserved[connection] = refuse
        if len(self._reserved) > RESERVED_CONNECTIONS:
            self._reserved.pop(next(iter(self._reserved)))()

    def release(self, connection: object) -> None:
        """Note that a connection of the reserve is gone."""
        self._reserved.pop(connection, None)

    def drain(self) -> None:
        """Close each connection with its next response: clients reconnect, and reach another replica."""
        self.draining = True

    def closed(self) -> None:
        """Count a connection that is gone."""
        self.connections -= 1

    @property
    def stall_seconds(self) -> float:
        """How long a client may read nothing that is written for it: no longer than an idle one may wait."""
        return min(_STALL_SECONDS, self.keep_alive_seconds)

    def head_seconds(self, *, over_limit: bool) -> float:
        """Return for how long the head of a request may take."""
        return min(_PROBE_SECONDS, self.header_seconds) if over_limit else self.header_seconds


def connection_limits(
    settings: Server, metrics: Metrics, *, max_connections: int | None = None
) -> ConnectionLimits:
    """Return the policy that the settings ask for; `max_connections` replaces theirs if it is given."""
    policy = ConnectionLimits(
        header_seconds=settings.header_seconds,
        keep_alive_seconds=settings.keep_alive_seconds,
        max_header_bytes=settings.max_header_bytes,
        max_header_count=settings.max_header_count,
        max_connections=settings.max_connections if max_connections is None else max_connections,
        probes=PROBES | {settings.root_path + path for path in PROBES},
        count_refused_connection=metrics.http_connections_refused.inc,
        count_refused_request=lambda status: metrics.http_requests.labels("other", "other", status).inc(),
    )
    metrics.http_connections.set_function(lambda: policy.connections)
    return policy
