"""The limit of open file descriptors, and a check whether a descriptor is left."""

from __future__ import annotations

import errno
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import structlog

_OTHER_DESCRIPTORS = 100  # for listeners, files, store connections, and a reserve
_LOG_SECONDS = 60.0

log = structlog.get_logger(__name__)


class OpenFileLimit(NamedTuple):
    """The limit of open files, before and after it was raised."""

    before: int
    now: int

    def max_client_connections(self, wanted: int, *, outgoing: int) -> int:
        """Return how many client connections fit into the limit, at most `wanted`.

        `outgoing`: number of connections to the upstream. For these and all other descriptors, at most half
        of the limit is reserved.
        """
        return min(wanted, max(self.now - min(outgoing + _OTHER_DESCRIPTORS, self.now // 2), 1))


def raise_limit() -> OpenFileLimit:
    """Raise the soft limit of open files to the hard limit, as far as the system allows."""
    before, hard = soft_limit(), resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(OSError, ValueError):  # macOS reports a hard limit that it does not accept
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return OpenFileLimit(before, soft_limit())


def soft_limit() -> int:
    """Return how many files the process may open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


class DescriptorCheck:
    """Logs that no descriptor is left, at most once a minute. libuv would drop new connections silently."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._silent_until = -float("inf")

    def check(self) -> bool:
        """Tell whether a descriptor is available; log an error if none is."""
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError as exc:
            if exc.errno not in {errno.EMFILE, errno.ENFILE}:
                return True
            if self._clock() >= self._silent_until:
                self._silent_until = self._clock() + _LOG_SECONDS
                log.error("file_descriptors_exhausted", reason=exc.strerror)  # noqa: TRY400
            return False
        return True
