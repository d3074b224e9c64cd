"""The fast path on one connection: which request it remembers, and for how long it keeps the connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from copy import copy
from functools import partial
from itertools import pairwise
from typing import Any, Self, cast

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from gateway.server.connection_limits import ConnectionLimits
from gateway.server.fast_path import FastPathConnection
from gateway.server.protocol_class import make_protocol_class
from tests.support.hitting import Bench

KEEP_ALIVE_SECONDS = 75
STALL_SECONDS = 60
HIT = b"GET /v1/progress/abc HTTP/1.1\r\nHost: x\r\n\r\n"
OTHER = b"GET /v1/progress/another HTTP/1.1\r\nHost: x\r\n\r\n"


class Loop:
    """A loop with a simulated clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.tasks = 0
        self._soon: list[Callable[[], None]] = []
        self._timers: list[Timer] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        self._timers.append(Timer(when, callback))
        return self._timers[-1]

    def call_soon(self, callback: Callable[..., None], *arguments: object) -> None:
        self._soon.append(partial(callback, *arguments))

    def iterate(self) -> None:
        """Run one iteration: the callbacks that were scheduled before it."""
        soon, self._soon = self._soon, []
        for callback in soon:
            callback()

    def create_task(self, coroutine: Any, **_: object) -> asyncio.Future[None]:
        """Count the tasks for the application, and run none."""
        coroutine.close()
        self.tasks += 1
        return cast("asyncio.Future[None]", Timer(0, lambda: None))

    def turn(self, now: float) -> None:
        while due := [timer for timer in self._timers if timer.when() <= now]:
            first = min(due, key=Timer.when)
            self._timers.remove(first)
            self.now = max(self.now, first.when())
            if not first.cancelled:
                first.callback()
        self.now = now


class Timer:
    """A cancellable timer."""

    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self._when = when
        self.callback = callback
        self.cancelled = False

    def when(self) -> float:
        return self._when

    def cancel(self) -> None:
        self.cancelled = True

    def add_done_callback(self, _: object) -> None:
        pass


class Wire:
    """The transport of a connection, which records what is written."""

    def __init__(self, host: str) -> None:
        self.written = b""
        self.closed = False
        self.reading = True
        self._host = host

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, name: str, default: object = None) -> object:
        return (self._host, 1) if name in {"sockname", "peername"} else default

    def set_write_buffer_limits(self, **_: int) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def write_eof(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def answers(self) -> int:
        """Return the number of responses."""
        return self.written.count(b"HTTP/1.1 200 OK")


class Connection:
    """A connection with the fast path and one cached task. `another` is one more of the same server."""

    def __init__(self, *, max_header_bytes: int = 1024) -> None:
        async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
            pass

        bench = Bench()
        bench.keep()
        policy = ConnectionLimits(
            header_seconds=10,
            keep_alive_seconds=KEEP_ALIVE_SECONDS,
            max_header_bytes=max_header_bytes,
            max_header_count=100,
            max_connections=2000,
        )
        kind = make_protocol_class(policy, hits=bench.hits)
        config = uvicorn.Config(app, http=kind, log_config=None, access_log=False, lifespan="off")
        config.load()
        self.loop = Loop()
        self._make = partial(kind, config, ServerState(), {}, cast("asyncio.AbstractEventLoop", self.loop))
        self._connect("127.0.0.1")

    def another(self, host: str = "127.0.0.1") -> Self:
        """Open another connection, from this address."""
        opened = copy(self)
        opened._connect(host)
        return opened

    def _connect(self, host: str) -> None:
        self.wire = Wire(host)
        made = self._make()
        assert isinstance(made, FastPathConnection)
        self.protocol = made
        self.protocol.connection_made(cast("asyncio.Transport", self.wire))

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.protocol.data_received(piece)


@pytest.fixture
async def connection() -> Connection:
    """Return a connection."""
    return Connection()


@pytest.mark.parametrize("pieces", [[HIT], [HIT[:30], HIT[30:]], [HIT * 2], [HIT, HIT, HIT]])
async def test_answering_needs_no_task(connection: Connection, pieces: list[bytes]) -> None:
    """Hits are answered immediately, in any segmentation, without calling the application."""
    connection.send(*pieces)
    assert connection.wire.answers() == b"".join(pieces).count(HIT)
    assert connection.loop.tasks == 0


async def test_answering_remembers_no_long_request() -> None:
    """A request of kilobytes is answered like any other, but not remembered."""
    connection = Connection(max_header_bytes=65536)
    long = HIT.replace(b"1.1\r\n", b"1.1\r\nX-Long: %b\r\n" % (b"x" * 10_000))
    connection.send(HIT, long, long)
    assert connection.wire.answers() == 3
    # Private: whether a request is remembered changes the time and the memory, and not the responses.
    assert connection.protocol._last is None
    connection.send(HIT)
    assert connection.protocol._last is not None


@pytest.mark.parametrize(
    "other",
    [
        OTHER,
        HIT.replace(b"GET ", b"PUT "),
        HIT.replace(b"GET ", b"HEAD "),
        HIT.replace(b"HTTP/1.1", b"HTTP/1.0"),
        HIT.replace(b"1.1\r\n", b"1.0\r\nConnection: keep-alive\r\n"),
        HIT.replace(b"1.1\r\n", b"1.1\r\nConnection: close\r\n"),
        HIT.replace(b"1.1\r\n", b"1.1\r\nConnection: upgrade\r\nUpgrade: h2c\r\n"),
        HIT.replace(b"1.1\r\n", b"1.1\r\nContent-Length: 0\r\n"),
        HIT.replace(b"1.1\r\n", b"1.1\r\nContent-Length: 2\r\n") + b"{}",
        HIT.replace(b"1.1\r\n", b"1.1\r\nTransfer-Encoding: chunked\r\n") + b"0\r\n\r\n",
        HIT.replace(b"1.1\r\n", b"1.1\r\nExpect: 100-continue\r\n"),
        HIT.replace(b"1.1\r\n", b"1.1\r\nPrefer: wait=1\r\n"),
    ],
)
@pytest.mark.parametrize("before", [0, 2])
async def test_answering_passes_other_requests_to_the_application(
    connection: Connection, other: bytes, before: int
) -> None:
    """A request that is no plain hit goes to the application, also after a hit."""
    connection.send(*[HIT] * before, other)
    assert (connection.wire.answers(), connection.loop.tasks) == (before, 1)


async def test_answering_keeps_the_order_of_requests(connection: Connection) -> None:
    """A hit behind a pending request is not answered before it."""
    connection.send(HIT, OTHER, HIT, HIT, HIT + OTHER)
    assert (connection.wire.answers(), connection.loop.tasks) == (1, 1)


@pytest.mark.parametrize("rest", [b"", HIT[:9]])
async def test_answering_takes_turns(connection: Connection, rest: bytes) -> None:
    """Of many hits that arrive together, each iteration serves 8 or 9, so that others do not wait."""
    connection.send(HIT * 20 + rest)
    answers = []
    for _ in range(4):
        answers.append((connection.wire.answers(), connection.wire.reading))
        connection.loop.iterate()
    assert answers == [(8, False), (17, False), (20, True), (20, True)]
    connection.send(HIT[len(rest) :])
    assert connection.wire.answers() == 21


@pytest.mark.parametrize("sent", [HIT, HIT * 9], ids=["one-each", "pipelined"])
async def test_answering_serves_a_limited_number_per_iteration(connection: Connection, sent: bytes) -> None:
    """A thousand busy connections do not make others wait: each iteration serves a few hundred requests."""
    crowd = [connection.another() for _ in range(1000)]
    for each in crowd:
        each.send(HIT)  # the first one is parsed, and remembered
    while any(not each.wire.answers() for each in crowd):
        connection.loop.iterate()
    for each in crowd:
        each.send(sent)
    other = connection.another("127.0.0.2")
    served = [1000]
    while other.wire.answers() == 0:
        if len(served) == 2:
            other.send(HIT)
        connection.loop.iterate()
        served.append(sum(each.wire.answers() for each in crowd))
    assert len(served) <= 4, "the other client waits for an iteration or two"
    assert all(later - earlier <= 400 for earlier, later in pairwise(served))
    while any(each.wire.answers() < 1 + sent.count(HIT) for each in crowd):
        connection.loop.iterate()
    assert not any(each.wire.closed for each in crowd)


async def test_answering_serves_clients_in_turn(connection: Connection) -> None:
    """A client with hundreds of connections does not delay a client with one."""
    crowd = [connection.another() for _ in range(700)]
    for each in crowd:
        each.send(HIT)
    one = connection.another("127.0.0.2")
    one.send(HIT)
    assert one.wire.answers() == 0
    connection.loop.iterate()
    assert one.wire.answers() == 1
    assert any(not each.wire.answers() for each in crowd)


async def test_answering_charges_long_requests_more() -> None:
    """A request with kilobytes of headers takes longer, and counts as several."""
    connection = Connection(max_header_bytes=65536)
    long = HIT.replace(b"1.1\r\n", b"1.1\r\nX-Long: %b\r\n" % (b"x" * 30_000))
    crowd = [connection.another() for _ in range(100)]
    for each in crowd:
        each.send(long)
    assert 10 < sum(each.wire.answers() for each in crowd) < 20
    while any(not each.wire.answers() for each in crowd):
        before = sum(each.wire.answers() for each in crowd)
        connection.loop.iterate()
        assert sum(each.wire.answers() for each in crowd) < before + 30


async def test_answering_serves_a_waiting_hit_of_a_client_that_closes(connection: Connection) -> None:
    """A hit that waits for its turn is served before a half-closed connection is closed."""
    crowd = [connection.another() for _ in range(200)]
    for each in crowd:
        each.send(HIT)
    connection.send(HIT)
    assert connection.wire.answers() == 0
    connection.protocol.eof_received()
    assert (connection.wire.answers(), connection.wire.closed) == (1, True)
    connection.loop.iterate()
    assert connection.wire.answers() == 1


async def test_answering_keeps_hits_that_wait_beyond_an_older_deadline(connection: Connection) -> None:
    """The deadline of the state before, here for the first request, does not drop hits that wait."""
    connection.loop.turn(9.5)
    connection.send(HIT * 20)
    connection.loop.turn(10.5)
    for _ in range(3):
        connection.loop.iterate()
    assert connection.wire.answers() == 20
    assert not connection.wire.closed


async def test_answering_takes_no_turn_after_the_connection_is_lost(connection: Connection) -> None:
    """Hits that wait for their turn are dropped with the connection."""
    connection.send(HIT * 20)
    connection.protocol.connection_lost(None)
    connection.loop.iterate()
    assert connection.wire.answers() == 8


async def test_answering_uses_the_current_default_headers(connection: Connection) -> None:
    """The default headers in a response are the current ones."""
    for moment in (b"now", b"now", b"then"):
        connection.protocol.server_state.default_headers = [(b"date", moment)]
        connection.send(HIT)
    assert connection.wire.written.count(b"date: now\r\n") == 2
    assert connection.wire.written.count(b"date: then\r\n") == 1


@pytest.mark.parametrize(
    "other",
    [
        HIT[:-2] + b"X: y\r\n\r\n",
        HIT.replace(b"abc", b"abc HTTP/1.1\r\nX: y\r\nGET /v1/progress/abc"),
        HIT.replace(b"GET ", b"HEAD "),
        HIT.replace(b"HTTP/1.1", b"HTTP/1.0"),
        HIT[:-1],
        HIT + b"\r\n",
        HIT + HIT[:10],
        b"\r\n" + HIT,
    ],
)
async def test_answering_does_not_depend_on_the_remembered_hit(other: bytes) -> None:
    """A remembered hit does not affect requests that differ in more than the target."""
    connections = [Connection(), Connection()]
    connections[0].send(HIT)
    written = [len(connection.wire.written) for connection in connections]
    outcomes = []
    for connection, before in zip(connections, written, strict=True):
        connection.send(other)
        answered = connection.wire.written[before:].count(b"HTTP/1.1 ")
        outcomes.append((answered, connection.loop.tasks, connection.wire.closed))
    assert outcomes[0] == outcomes[1]


async def test_answering_applies_backpressure(connection: Connection) -> None:
    """Backpressure: while the client does not read, further requests wait."""
    connection.send(HIT)
    connection.protocol.pause_writing()
    connection.send(HIT, HIT)
    assert (connection.wire.answers(), connection.loop.tasks) == (1, 0)
    connection.protocol.resume_writing()
    assert (connection.wire.answers(), connection.loop.tasks) == (3, 0)


async def test_answering_keeps_the_deadline_of_a_client_that_does_not_read(connection: Connection) -> None:
    """A client whose buffer is full after a hit is disconnected after the stall timeout, which is shorter."""
    connection.send(HIT)
    write = connection.wire.write

    def write_last(data: bytes) -> None:
        write(data)
        connection.protocol.pause_writing()

    connection.wire.write = write_last  # type: ignore[method-assign]
    connection.send(HIT)
    connection.loop.turn(STALL_SECONDS - 0.5)
    assert not connection.wire.closed
    connection.loop.turn(STALL_SECONDS)
    assert connection.wire.closed


async def test_answering_keeps_a_connection_alive(connection: Connection) -> None:
    """An idle connection is closed after the keep-alive timeout, counted from its last hit."""
    for moment in range(0, 4 * KEEP_ALIVE_SECONDS, KEEP_ALIVE_SECONDS - 1):
        connection.loop.turn(moment)
        connection.send(HIT)
        last = moment
    assert connection.wire.answers() == 5
    connection.loop.turn(last + KEEP_ALIVE_SECONDS - 0.5)
    assert not connection.wire.closed
    connection.loop.turn(last + KEEP_ALIVE_SECONDS)
    assert connection.wire.closed


async def test_answering_times_out_heads_after_hits(connection: Connection) -> None:
    """A connection with an incomplete request after a hit is closed."""
    connection.send(HIT, HIT + HIT[:20])
    connection.loop.turn(9.5)
    assert not connection.wire.closed
    connection.loop.turn(10)
    assert connection.wire.closed
    assert connection.wire.answers() == 2
