"""Heartbeats of event streams, which keep proxies and clients from closing a quiet connection.

    due -> sent with the next event, or alone if there is none in time

A heartbeat is a comment of the event-stream format, which clients ignore.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from gateway.api.server_extensions import chunk
from gateway.watch.subscriber import Subscriber

HEARTBEAT = b": still here\n\n"
_CHUNK = chunk(HEARTBEAT)
_GROUPS = 16


class Heartbeats:
    """Sends a heartbeat on every stream at least every `seconds` seconds.

    Streams are divided into groups that are served in rotation: thousands of simultaneous writes would delay
    other responses. A due heartbeat is sent with the next event. If there is no event within one step of the
    rotation, it is sent alone.
    """

    def __init__(self, seconds: float) -> None:
        self._pause = seconds / (_GROUPS + 1)  # due at one step of the rotation, sent by the next one
        self._groups: list[set[Subscriber]] = [set() for _ in range(_GROUPS)]
        self._current = 0
        self._timer: asyncio.TimerHandle | None = None

    @contextmanager
    def sending_to(self, subscriber: Subscriber) -> Iterator[None]:
        """Send heartbeats on this subscriber's stream while the context is open."""
        group = self._groups[self._current - 1]  # served last: its next step is a whole rotation away
        group.add(subscriber)
        if self._timer is None:
            self._schedule_next()
        try:
            yield
        finally:
            group.discard(subscriber)
            if self._timer is not None and not any(self._groups):
                self._timer.cancel()
                self._timer = None

    def _schedule_next(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._pause, self._step)

    def _step(self) -> None:
        for subscriber in self._groups[self._current - 1]:
            if subscriber.heartbeat_due:
                _send_heartbeat(subscriber)
        for subscriber in self._groups[self._current]:
            subscriber.heartbeat_due = True
        self._current = (self._current + 1) % _GROUPS
        self._schedule_next()


def _send_heartbeat(subscriber: Subscriber) -> None:
    client_transport = subscriber.transport_if_idle
    if client_transport is None or client_transport.get_write_buffer_size():
        subscriber.wake()  # its stream sends it when the reader has caught up
    else:
        subscriber.heartbeat_due = False
        client_transport.write(_CHUNK if subscriber.chunked else HEARTBEAT)
