"""A listening Unix socket: it replaces the file of a dead process, and removes its own file at the end.

The file stays when a process is killed. `connect` tells whether a process still listens on it. A lock on the
directory covers this check and what follows from it. So two processes that start or stop at the same time
never remove each other's file.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Every local user may connect, as with a port on 127.0.0.1. The mode of the directory can restrict this.
_MODE = 0o666
_LOCK_SECONDS = 1.0
_CONNECT_SECONDS = 1.0


class UnixSocket:
    """A socket that listens on `path`.

    Raises: OSError, whose `strerror` says why the path cannot be used.
    """

    def __init__(self, path: str, *, backlog: int) -> None:
        self.path = Path(path).absolute()  # the working directory may change
        self.socket = socket.socket(socket.AF_UNIX)
        try:
            with _locked(self.path.parent):
                _remove_stale(self.path)
                self.socket.bind(str(self.path))
                self.path.chmod(_MODE)
                self.socket.listen(backlog)
                self._identity = _identity(self.path)
        except OSError:
            self.socket.close()
            raise

    def remove(self) -> None:
        """Remove the file, unless another process has replaced it. Call this before the socket is closed.

        While the socket is open, no other file can have the same inode.
        """
        with suppress(OSError), _locked(self.path.parent):
            if _identity(self.path) == self._identity:
                self.path.unlink()


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino


def _remove_stale(path: Path) -> None:
    """Remove the socket of a process that has ended. Raises: OSError if the path is in use."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise OSError(errno.EEXIST, "the file exists and is not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(_CONNECT_SECONDS)
        try:
            client.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except (TimeoutError, BlockingIOError):  # its queue of new connections is full
            pass
    raise OSError(errno.EADDRINUSE, "another process listens on this socket")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a directory against other gateways, if it can be read. Raises: OSError if it stays locked."""
    descriptor = None
    with suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if descriptor is not None:
            _lock(descriptor)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(descriptor: int) -> None:
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise OSError(errno.EAGAIN, "another process has locked the directory") from None
            time.sleep(0.01)
        else:
            return
