"""The HEALTHCHECK of the image: requests /healthz of the gateway in this container.

The image has no curl and no shell. The settings name the port or socket. They are loaded as by `sd-gateway
serve` without `--config`: from config/gateway.toml in the working directory, overridden by the environment.
"""

from __future__ import annotations

import http.client
import os
import socket
import sys

from gateway.domain.printable import printable
from gateway.settings.errors import SettingsError
from gateway.settings.loading import load

TIMEOUT_SECONDS = 3.0

# A server that listens on all addresses is reached on loopback.
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # compared with, not bound


class _UnixConnection(http.client.HTTPConnection):
    """A connection over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_SECONDS)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT_SECONDS)
        self.sock.connect(self._path)


def main() -> int:
    """Request /healthz once; return the exit status: 0 healthy, 1 unhealthy."""
    try:
        server = load(None, os.environ).server
        connection = (
            _UnixConnection(server.uds)
            if server.uds
            else http.client.HTTPConnection(
                _LOOPBACK.get(server.host, server.host), server.port, timeout=TIMEOUT_SECONDS
            )
        )
        connection.request("GET", "/healthz")
        status = connection.getresponse().status
    except (OSError, SettingsError, http.client.HTTPException) as exc:
        sys.stderr.write(f"unhealthy: {printable(str(exc))}\n")
        return 1
    if status != http.client.OK:
        sys.stderr.write(f"unhealthy: status {status}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
