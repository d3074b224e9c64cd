"""Writes log lines in a thread of its own, so that a log reader that stops does not stop the gateway.

    write, in any thread -> queue with a limit -> writer thread: writes all queued lines at once

A write to standard error waits while its reader does not read, for example a pipe to a log shipper. Here only
the writer thread waits. When the queue is full, further lines are dropped and counted.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

MAX_QUEUED_BYTES = 1_048_576
CLOSE_SECONDS = 1.0
_MAX_WRITE_BYTES = 65_536  # the usual size of a pipe
_POLL_MILLISECONDS = 100


class LogWriter:
    """Writes lines to a file descriptor.

    Lines are lost when the queue is full, or when the descriptor refuses them, as a full disk does. When
    lines can be written again, the writer adds the line that `describe_loss` returns for their number.

    Attributes:
        lost: The number of lines that were lost so far.
    """

    def __init__(
        self,
        descriptor: int,
        *,
        describe_loss: Callable[[int], bytes],
        max_queued_bytes: int = MAX_QUEUED_BYTES,
    ) -> None:
        self.lost = 0
        self._descriptor = descriptor
        self._describe_loss = describe_loss
        self._max_queued_bytes = max_queued_bytes
        self._queue: SimpleQueue[bytes | None] = SimpleQueue()
        # Two numbers that only grow: one changes under the lock, the other in the writer thread.
        self._queued_bytes = 0
        self._finished_bytes = 0  # written or refused
        self._described = 0  # lost lines that were reported
        self._lock = threading.RLock()  # a signal handler that logs may interrupt `write`
        # A daemon: at exit, the interpreter does not wait for a write that the reader does not let end.
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        """Queue a line, with its line break. Never waits for the reader."""
        with self._lock:
            if self._queued_bytes - self._finished_bytes + len(line) > self._max_queued_bytes:
                self.lost += 1
            else:
                self._queued_bytes += len(line)
                self._queue.put(line)

    def flush(self, seconds: float) -> bool:
        """Wait until all lines are written or refused; return whether that took at most `seconds`."""
        goal, until = self._queued_bytes, time.monotonic() + seconds
        while self._finished_bytes < goal:
            if time.monotonic() > until:
                return False
            time.sleep(0.001)
        return True

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Write the queued lines, for at most `seconds`, and end the thread."""
        self._queue.put(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        closed = False
        while not closed:
            lines = [self._queue.get()]
            with suppress(Empty):
                while True:
                    lines.append(self._queue.get_nowait())
            closed = None in lines
            self._write_lines(b"".join(line for line in lines if line is not None))

    def _write_lines(self, data: bytes) -> None:
        written = self._write_all(data)
        self._finished_bytes += len(data)
        if written < len(data):
            with self._lock:
                self.lost += data.count(b"\n", written)
        elif (lost := self.lost - self._described) and data:
            self._described += lost
            self._write_all(self._describe_loss(lost))

    def _write_all(self, data: bytes) -> int:
        """Return how many bytes were written before the first error."""
        written = 0
        while written < len(data):
            try:
                written += os.write(self._descriptor, data[written : written + _MAX_WRITE_BYTES])
            except BlockingIOError:  # another process has made the descriptor non-blocking
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll(_POLL_MILLISECONDS)
            except OSError:
                break
        return written
