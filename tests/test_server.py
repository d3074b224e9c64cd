"""The server's own loop, in time that stands until it is turned; what it serves is tested elsewhere."""

import signal
from collections.abc import Iterator

import pytest
import uvicorn

from gateway.server.run import _Server
from tests.ticked import TickedLoop


async def nothing(_scope: object, _receive: object, _send: object) -> None:
    """Answer nobody."""


@pytest.fixture
def loop() -> Iterator[TickedLoop]:
    """Provide a loop whose clock stands."""
    loop = TickedLoop()
    yield loop
    loop.close()
    assert loop.faults == []


@pytest.fixture
def server() -> _Server:
    config = uvicorn.Config(nothing, lifespan="off", log_config=None)
    config.load()
    return _Server(config)


def test_server_makes_its_headers_anew_each_second(loop: TickedLoop, server: _Server) -> None:
    """The Date header is no older than a second, and in between nothing wakes the process."""
    running = loop.create_task(server.main_loop())
    made = []
    for _ in range(4):
        loop.settle()
        made.append(server.server_state.default_headers)
        assert loop.next_timer == pytest.approx(loop.time() + 1.0)
        loop.advance(1.0)
    assert all(headers[0][0] == b"date" for headers in made)
    assert len({id(headers) for headers in made}) == len(made)
    server.handle_exit(signal.SIGTERM, None)
    loop.settle()
    assert running.done()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_server_stops_the_moment_it_is_told(loop: TickedLoop, server: _Server, number: int) -> None:
    """A signal ends the loop without any time passing."""
    running = loop.create_task(server.main_loop())
    loop.settle()
    assert not running.done()
    server.handle_exit(number, None)
    loop.settle()
    assert running.done()


def test_server_that_was_told_while_it_started_does_not_begin(loop: TickedLoop, server: _Server) -> None:
    """A signal that came before the loop is not forgotten."""
    server.handle_exit(signal.SIGTERM, None)
    running = loop.create_task(server.main_loop())
    loop.settle()
    assert running.done()
