"""Heartbeats on a clock that the test advances."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import pytest

from gateway.api.heartbeats import Heartbeats
from gateway.domain.task import Operation, TaskKey
from gateway.watch.subscriber import Subscriber
from tests.support.ticked import TickedLoop

SECONDS = 17.0  # one group per second, and one more second to wait for an event
BEAT = b"e\r\n: still here\n\n\r\n"

Open = Callable[[], "Stream"]


class RecordingTransport(asyncio.WriteTransport):
    """Records writes and their times; `waiting` is the size of its write buffer."""

    def __init__(self, loop: TickedLoop) -> None:
        super().__init__()
        self._loop = loop
        self.written: list[tuple[float, bytes]] = []
        self.waiting = 0

    def write(self, data: Any) -> None:
        self.written.append((self._loop.time(), data))

    def get_write_buffer_size(self) -> int:
        return self.waiting


class Stream:
    """An open stream that only awaits updates."""

    def __init__(self, loop: TickedLoop) -> None:
        self.subscriber = Subscriber([TaskKey(Operation.SD_GET_PROGRESS, "a")], b"")
        self.subscriber.client_transport = self.transport = RecordingTransport(loop)
        self.task: asyncio.Task[object] = loop.create_task(self.subscriber.next_updates())
        loop.settle()


@pytest.fixture
def loop() -> Iterator[TickedLoop]:
    """Provide a loop with a manual clock."""
    loop = TickedLoop()
    yield loop
    loop.close()
    assert loop.faults == []


@pytest.fixture
def enter(loop: TickedLoop) -> Iterator[Open]:
    """Provide a function that opens streams; at the end no timer may be left."""
    heartbeats = loop.within(lambda: Heartbeats(SECONDS))
    opened: list[Stream] = []
    with ExitStack() as stack:

        def enter() -> Stream:
            opened.append(Stream(loop))
            loop.within(lambda: stack.enter_context(heartbeats.sending_to(opened[-1].subscriber)))
            return opened[-1]

        yield enter
        for stream in opened:
            stream.task.cancel()
        loop.within(stack.close)
    assert loop.next_timer is None


def test_heartbeat_interval_is_bounded(loop: TickedLoop, enter: Open) -> None:
    """Each stream gets its first and every further heartbeat in time, whenever it was opened."""
    streams = []
    for _ in range(20):
        streams.append((loop.time(), enter()))
        loop.advance(1.7)
    loop.advance(100.0)
    for opened, stream in streams:
        times = [opened, *(at for at, data in stream.transport.written if data == BEAT), loop.time()]
        gaps = [later - earlier for earlier, later in pairwise(times)]
        assert len(times) >= 100 / SECONDS
        assert max(gaps) <= SECONDS + 1e-6
        assert min(gaps[1:-1]) >= SECONDS - 2, "not more often than configured"
        assert all(data == BEAT for _, data in stream.transport.written)


def test_heartbeat_sent_with_an_event_is_not_repeated(loop: TickedLoop, enter: Open) -> None:
    """After a due heartbeat was sent with an event, the next one is a whole rotation later."""
    stream = enter()
    while not stream.subscriber.heartbeat_due:
        loop.advance(0.5)
    stream.subscriber.heartbeat_due = False
    loop.advance(SECONDS - 2)
    assert stream.transport.written == []
    loop.advance(3)
    assert [data for _, data in stream.transport.written] == [BEAT]


def test_heartbeat_of_a_stream_without_chunks_is_plain(loop: TickedLoop, enter: Open) -> None:
    """A stream to an HTTP/1.0 client gets its heartbeats without the form of a chunk."""
    stream = enter()
    stream.subscriber.chunked = False
    loop.advance(2 * SECONDS)
    assert {data for _, data in stream.transport.written} == {b": still here\n\n"}


def test_heartbeat_is_left_to_a_lagging_stream(loop: TickedLoop, enter: Open) -> None:
    """With a non-empty write buffer nothing is written directly: the stream is woken to send it in order."""
    stream = enter()
    stream.transport.waiting = 1
    loop.advance(SECONDS + 1)
    assert stream.task.done()
    assert stream.subscriber.heartbeat_due
    assert stream.transport.written == []
