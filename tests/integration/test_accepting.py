"""How the server accepts connections, with real sockets and the real event loop."""

import asyncio
import socket
from contextlib import ExitStack
from typing import Any

import pytest
import uvicorn
import uvloop

from gateway.server.run import _Server, handles_of, listen

CONNECTIONS = 64


async def nothing(_scope: object, _receive: object, _send: object) -> None:
    """Send no response."""


async def count_iterations() -> int:
    """Accept connections that wait in the kernel; return how many iterations of the event loop this takes."""
    accepted = []

    class Recorder(asyncio.Protocol):
        def __init__(self, **_: Any) -> None:
            """Accept the arguments of uvicorn."""

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            accepted.append(transport)

    config = uvicorn.Config(nothing, http=Recorder, lifespan="off", log_config=None)
    config.load()
    server = _Server(config)
    server.lifespan = config.lifespan_class(config)
    iterations = 0
    with ExitStack() as clients:
        listener = listen("127.0.0.1", 0, backlog=CONNECTIONS)
        address = listener.getsockname()
        for _ in range(CONNECTIONS):
            clients.enter_context(socket.create_connection(address))
        handles = handles_of(listener)
        await server.startup(handles)
        while len(accepted) < CONNECTIONS:
            iterations += 1
            await asyncio.sleep(0)
        for transport in accepted:
            transport.close()
        await server.shutdown(handles)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address).close()
    return iterations


def test_many_connections_are_accepted_in_one_iteration() -> None:
    """Otherwise a client that opens a thousand connections at once keeps all new ones waiting."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(count_iterations()) <= CONNECTIONS / 4
