"""File descriptors: how many there may be, and what happens when there are none left."""

from __future__ import annotations

import errno
import os
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import structlog

_OTHERS = 100  # listeners, files, the store's connections, and some to spare
_LOG_SECONDS = 60.0

log = structlog.get_logger(__name__)


class Limit(NamedTuple):
    """The limit of open files, before it was raised and now."""

    before: int
    now: int

    def connections(self, wanted: int, *, outgoing: int) -> int:
        """Return how many client connections fit into the limit, `wanted` at most.

        `outgoing`: connections to the upstream. At most half of the limit is kept back for everything else.
        """
        if self.now == resource.RLIM_INFINITY:
            return wanted
        return min(wanted, max(self.now - min(outgoing + _OTHERS, self.now // 2), 1))


def raise_limit() -> Limit:
    """Raise the soft limit of open files to the hard one, as far as the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS names a hard limit that it does not accept
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return Limit(soft, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


class Exhaustion:
    """Logs once a minute that there is no descriptor left: libuv then drops new connections silently."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._silent_until = -float("inf")

    def look(self) -> bool:
        """Return whether a descriptor can be had; log it when none can."""
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError as exc:
            if exc.errno not in {errno.EMFILE, errno.ENFILE}:
                return True
            if self._clock() >= self._silent_until:
                self._silent_until = self._clock() + _LOG_SECONDS
                reason = exc.strerror
                log.error("no file descriptor left: new connections are dropped", reason=reason)  # noqa: TRY400
            return False
        return True
