"""The error of an address that cannot be used to listen on, and which setting to change."""

from __future__ import annotations

import errno
import os

from gateway.settings.model import Server
from gateway.settings.variables import variable_of

UNPRIVILEGED_PORT = "a port from 1024 on: lower ones need a privilege"


class CannotListen(Exception):
    """An address cannot be used to listen on; the message has the address and the reason.

    On a Unix socket, `host` is its path and `port` is None. `where` has the address as fields of a log line.
    """

    def __init__(self, url: str, host: str, port: int | None, error: Exception) -> None:
        self.url, self.host, self.port = url, host, port
        self.number = error.errno if isinstance(error, OSError) else None
        # Strings that cannot be host names are refused with a TypeError or a ValueError.
        self.reason = error.strerror or str(error) if isinstance(error, OSError) else "not an address"
        self.where: dict[str, str | int] = {"uds": host} if port is None else {"host": host, "port": port}
        super().__init__(f"cannot listen on {url}: {self.reason}")

    @property
    def port_is_taken(self) -> bool:
        """Whether another program listens on the port."""
        return self.number == errno.EADDRINUSE

    @property
    def is_forbidden(self) -> bool:
        """Whether the user of the process may not listen there."""
        return self.number in {errno.EACCES, errno.EPERM}


def settings_hint(error: CannotListen, server: Server) -> str:
    """Return which setting to change, so that the gateway can listen."""
    if error.port is None:
        folder = f" in a folder in which user {os.geteuid()} can create files" if error.is_forbidden else ""
        return f"set server.uds ({variable_of('server', 'uds')}) to another path{folder}"
    key = "metrics_port" if error.port == server.metrics_port else "port"
    special = "0 serves /metrics on server.port" if key == "metrics_port" else "0 uses any free port"
    if error.port_is_taken:
        advice = f"to another port; {special}"
    elif error.is_forbidden:
        advice = f"to {UNPRIVILEGED_PORT}"
    else:
        key, advice = "host", "to an address of this machine"
    return f"set server.{key} ({variable_of('server', key)}) {advice}"
