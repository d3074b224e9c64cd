"""The main loop of the server, on a simulated clock. The connections are tested elsewhere."""

import signal
from collections.abc import Iterator

import pytest
import uvicorn

from gateway.server.run import _Server
from tests.support.ticked import TickedLoop


async def nothing(_scope: object, _receive: object, _send: object) -> None:
    """Send no response."""


@pytest.fixture
def loop() -> Iterator[TickedLoop]:
    """Return a loop with a simulated clock."""
    loop = TickedLoop()
    yield loop
    loop.close()
    assert loop.faults == []


@pytest.fixture
def server() -> _Server:
    config = uvicorn.Config(nothing, lifespan="off", log_config=None)
    config.load()
    return _Server(config)


def test_server_updates_its_headers_each_second(loop: TickedLoop, server: _Server) -> None:
    """The Date header is at most a second old, and nothing wakes the process in between."""
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
def test_server_stops_immediately_on_a_signal(loop: TickedLoop, server: _Server, number: int) -> None:
    """A signal ends the main loop immediately."""
    running = loop.create_task(server.main_loop())
    loop.settle()
    assert not running.done()
    server.handle_exit(number, None)
    loop.settle()
    assert running.done()


def test_server_stops_on_a_signal_during_startup(loop: TickedLoop, server: _Server) -> None:
    """A signal that arrives before the main loop starts is not lost."""
    server.handle_exit(signal.SIGTERM, None)
    running = loop.create_task(server.main_loop())
    loop.settle()
    assert running.done()
