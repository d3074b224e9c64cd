"""The limits that all connections of a server share, and the number of open connections.

`connection.py` enforces the limits for one connection.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from gateway.api.middleware.telemetry import CLIENT_CLOSED_REQUEST
from gateway.api.operator_endpoints import PROBES
from gateway.settings.model import Server
from gateway.telemetry.metrics import Metrics

RESERVED_CONNECTIONS = 16  # beyond the limit, for probes
_STALL_SECONDS = 60.0
_RECEIVE_BUFFER = 16_384  # bytes; Linux doubles both values for its own bookkeeping
_SEND_BUFFER = 65_536
_PROBE_SECONDS = 1.0  # timeout for the head of a probe on a connection beyond the limit


def bound_buffers(connection: socket.socket) -> None:
    """Limit the kernel's buffers of a connection. Accepted connections inherit them from the listener."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)


@dataclass(slots=True)
class ConnectionLimits:
    """Limits in seconds, bytes and counts. Connections beyond `max_connections` may request only `probes`."""

    header_seconds: float
    keep_alive_seconds: float
    max_header_bytes: int
    max_header_count: int
    max_connections: int
    probes: frozenset[str] = PROBES
    count_refused_connection: Callable[[], None] = lambda: None
    count_refused_request: Callable[[int], None] = lambda _: None
    count_dropped_request: Callable[[], None] = lambda: None  # its client has left before it started
    draining: bool = field(default=False, init=False)  # each connection closes after its next response
    open_connections: int = field(default=0, init=False)
    _reserved: dict[object, Callable[[], None]] = field(default_factory=dict, init=False)

    def bound_socket(self, connection: socket.socket | None) -> None:
        """Limit the kernel memory of a connection, and the time for which sent data may stay unacknowledged.

        Socket buffers count against the container's memory limit, and grow to about 6 MB each by default.
        TCP_USER_TIMEOUT ends connections whose peer acknowledges nothing. Only the kernel can notice this
        while the send buffer is not full.
        """
        if connection is None or connection.family == socket.AF_UNIX:
            return
        bound_buffers(connection)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            milliseconds = max(int(self.stall_seconds * 1000), 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

    def on_connection_opened(self) -> bool:
        """Count a new connection; tell whether it is within the limit."""
        self.open_connections += 1
        return self.open_connections <= self.max_connections

    def reserve(self, connection: object, refuse: Callable[[], None]) -> None:
        """Let a connection beyond the limit send one probe. It stays in the reserve until `release`.

        When the reserve is full, its oldest connection is closed through its `refuse` callback. Probes are
        not affected, because they are sent and answered immediately.
        """
        self._reserved[connection] = refuse
        if len(self._reserved) > RESERVED_CONNECTIONS:
            self._reserved.pop(next(iter(self._reserved)))()

    def start_draining(self) -> None:
        """Close each connection after its next response, so that clients reconnect to another replica."""
        self.draining = True

    def on_connection_closed(self, connection: object) -> None:
        """Count a closed connection, and remove it from the reserve."""
        self.open_connections -= 1
        self._reserved.pop(connection, None)

    @property
    def stall_seconds(self) -> float:
        """Timeout for a client that does not read: at most the keep-alive timeout."""
        return min(_STALL_SECONDS, self.keep_alive_seconds)

    def head_seconds(self, *, over_limit: bool) -> float:
        """Return the timeout for the head of a request."""
        return min(_PROBE_SECONDS, self.header_seconds) if over_limit else self.header_seconds


def make_connection_limits(
    settings: Server, metrics: Metrics, *, max_connections: int | None = None
) -> ConnectionLimits:
    """Return limits with the values of the settings. `max_connections`, if given, overrides the setting."""

    def count_request(status: int) -> None:
        metrics.http_requests.labels("other", "other", status).inc()

    limits = ConnectionLimits(
        header_seconds=settings.header_seconds,
        keep_alive_seconds=settings.keep_alive_seconds,
        max_header_bytes=settings.max_header_bytes,
        max_header_count=settings.max_header_count,
        max_connections=settings.max_connections if max_connections is None else max_connections,
        probes=PROBES | {settings.root_path + path for path in PROBES},
        count_refused_connection=metrics.http_connections_refused.inc,
        count_refused_request=count_request,
        count_dropped_request=partial(count_request, CLIENT_CLOSED_REQUEST),
    )
    metrics.http_connections.set_function(lambda: limits.open_connections)
    metrics.http_connections_limit.set(limits.max_connections)
    return limits
