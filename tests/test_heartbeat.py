"""The heartbeat by itself, in time that stands until it is turned."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import pytest

from gateway.api.heartbeats import Heartbeats
from gateway.domain.snapshot import Operation, TaskKey
from gateway.watch.subscriber import Subscriber
from tests.ticked import TickedLoop

SECONDS = 17.0  # a turn each second, and one to wait for an event
BEAT = b"e\r\n: still here\n\n\r\n"

Open = Callable[[], "Stream"]


class Paper(asyncio.WriteTransport):
    """What is written, and when; `waiting` bytes were not read yet."""

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
    """An open stream that does nothing but wait in `take`."""

    def __init__(self, loop: TickedLoop) -> None:
        self.subscriber = Subscriber([TaskKey(Operation.SD_GET_PROGRESS, "a")], b"")
        self.subscriber.direct_transport = self.paper = Paper(loop)
        self.taking: asyncio.Task[object] = loop.create_task(self.subscriber.next_updates())
        loop.settle()


@pytest.fixture
def loop() -> Iterator[TickedLoop]:
    """Provide a loop whose clock stands."""
    loop = TickedLoop()
    yield loop
    loop.close()
    assert loop.faults == []


@pytest.fixture
def enter(loop: TickedLoop) -> Iterator[Open]:
    """Provide a way to open streams of one heartbeats; in the end it must have no timer left."""
    heartbeats = loop.within(lambda: Heartbeats(SECONDS))
    opened: list[Stream] = []
    with ExitStack() as stack:

        def enter() -> Stream:
            opened.append(Stream(loop))
            loop.within(lambda: stack.enter_context(heartbeats.sending_to(opened[-1].subscriber)))
            return opened[-1]

        yield enter
        for stream in opened:
            stream.taking.cancel()
        loop.within(stack.close)
    assert loop.next_timer is None


def test_heartbeat_leaves_no_silence_longer_than_promised(loop: TickedLoop, enter: Open) -> None:
    """Each stream, whenever it was opened, has its first and every further heartbeat in time, alone."""
    streams = []
    for _ in range(20):
        streams.append((loop.time(), enter()))
        loop.advance(1.7)
    loop.advance(100.0)
    for opened, stream in streams:
        times = [opened, *(at for at, data in stream.paper.written if data == BEAT), loop.time()]
        gaps = [later - earlier for earlier, later in pairwise(times)]
        assert len(times) >= 100 / SECONDS
        assert max(gaps) <= SECONDS + 1e-6
        assert min(gaps[1:-1]) >= SECONDS - 2, "nor are there more than promised"
        assert all(data == BEAT for _, data in stream.paper.written)


def test_heartbeat_that_went_with_an_event_does_not_go_alone(loop: TickedLoop, enter: Open) -> None:
    """Who took the heartbeat that was due has had it: the next one is a whole round later."""
    stream = enter()
    while not stream.subscriber.heartbeat_due:
        loop.advance(0.5)
    stream.subscriber.heartbeat_due = False
    loop.advance(SECONDS - 2)
    assert stream.paper.written == []
    loop.advance(3)
    assert [data for _, data in stream.paper.written] == [BEAT]


def test_heartbeat_is_left_to_a_stream_that_lags(loop: TickedLoop, enter: Open) -> None:
    """Behind what its reader has not read yet nothing is written: the stream is woken, to do it in turn."""
    stream = enter()
    stream.paper.waiting = 1
    loop.advance(SECONDS + 1)
    assert stream.taking.done()
    assert stream.subscriber.heartbeat_due
    assert stream.paper.written == []
