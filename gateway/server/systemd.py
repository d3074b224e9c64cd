"""Tells systemd that the server is ready or stopping (sd_notify(3), for units with `Type=notify`)."""

from __future__ import annotations

import os
import socket

import structlog

_TIMEOUT_SECONDS = 1.0

log = structlog.get_logger(__name__)


def notify(state: str) -> None:
    """Send a state, such as `READY=1`, to the socket in NOTIFY_SOCKET. Without the variable, do nothing."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket, whose name begins with a zero byte
        address = f"\0{address[1:]}"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(_TIMEOUT_SECONDS)
            sender.sendto(state.encode(), address)
    except (OSError, ValueError) as exc:  # the latter for a name with a zero byte
        log.warning("systemd_not_notified", state=state, reason=str(exc))
