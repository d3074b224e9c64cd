"""Heartbeats: a line in every event stream, so that nobody on the way takes it for dead and hangs up.

    due -> goes with the next event -> or alone, when none comes in time

The lines are comments of the event-stream format: readers pass over them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from gateway.api.server_extensions import chunk
from gateway.watch.subscriber import Subscriber

HEARTBEAT = b": still here\n\n"
_CHUNK = chunk(HEARTBEAT)
_TURNS = 16


class Heartbeats:
    """Sees to it that no stream goes without a heartbeat for longer than so many seconds.

    The streams take turns: thousands that wrote at one moment would hold up everybody else's answer. A
    heartbeat that is due goes with the next event; only if none comes until the next turn it goes alone.
    """

    def __init__(self, seconds: float) -> None:
        self._pause = seconds / (_TURNS + 1)  # due in every turn of its own, sent by the next one
        self._turns: list[set[Subscriber]] = [set() for _ in range(_TURNS)]
        self._turn = 0
        self._timer: asyncio.TimerHandle | None = None

    @contextmanager
    def pacing(self, subscriber: Subscriber) -> Iterator[None]:
        """Keep the heartbeat of this watcher's stream while the context is open."""
        turn = self._turns[self._turn - 1]  # the one just past: its next is a whole round away
        turn.add(subscriber)
        if self._timer is None:
            self._wait()
        try:
            yield
        finally:
            turn.discard(subscriber)
            if self._timer is not None and not any(self._turns):
                self._timer.cancel()
                self._timer = None

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._pause, self._beat)

    def _beat(self) -> None:
        for subscriber in self._turns[self._turn - 1]:
            if subscriber.heartbeat_due:
                _send_heartbeat(subscriber)
        for subscriber in self._turns[self._turn]:
            subscriber.heartbeat_due = True
        self._turn = (self._turn + 1) % _TURNS
        self._wait()


def _send_heartbeat(subscriber: Subscriber) -> None:
    direct_transport = subscriber.idle_transport
    if direct_transport is None or direct_transport.get_write_buffer_size():
        subscriber.ring()  # its stream does, when it can
    else:
        subscriber.heartbeat_due = False
        direct_transport.write(_CHUNK)
