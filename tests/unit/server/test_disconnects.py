"""What an exchange does when its client has left."""

import asyncio
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import pytest
from starlette.requests import ClientDisconnect

from gateway.api.server_extensions import (
    CONNECTION,
    DISCONNECTED,
    ON_DISCONNECT,
    DisconnectListener,
    all_while_connected,
    take_turn,
)
from gateway.domain.paced_callbacks import PacedCallbacks
from gateway.server.exchange import Exchange
from gateway.server.framing import parse_head


def exchange_with(listeners: dict[object, Any]) -> Exchange:
    """Return the exchange of a request with these listeners."""
    head = parse_head(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", max_fields=10)
    scope = {"method": "GET", "extensions": {ON_DISCONNECT: listeners, CONNECTION: Mock()}}
    return Exchange(Mock(), head, scope, has_body=False)


async def test_disconnect_calls_the_listeners_at_once() -> None:
    """A listener that comes later looks for `DISCONNECTED`."""
    listeners: dict[object, Any] = {"listener": Mock()}
    called = listeners["listener"]
    exchange = exchange_with(listeners)
    exchange.disconnect()
    called.assert_called_once_with()
    assert DISCONNECTED in listeners
    assert CONNECTION not in exchange.scope["extensions"]


async def test_work_of_clients_that_have_left_ends_in_turn() -> None:
    """When clients with many tasks leave at once, the work of one ends in each iteration."""
    pace, ended, called = PacedCallbacks(), [], []

    async def serve(number: int, exchange: Exchange) -> None:
        waiter = asyncio.Event()
        async with DisconnectListener(exchange.scope, Mock(), waiter.set, tasks=100):
            await waiter.wait()
            called.append(number)
        ended.append(number)

    exchanges = [exchange_with({}) for _ in range(4)]
    for exchange in exchanges:
        exchange.scope["extensions"][CONNECTION].heavy_work = pace
    tasks = [asyncio.create_task(serve(number, each)) for number, each in enumerate(exchanges)]
    await asyncio.sleep(0)
    for exchange in exchanges:
        exchange.disconnect()
    counts = []
    while len(ended) < len(tasks):
        await asyncio.sleep(0)
        counts.append(len(ended))
    assert called == ended == list(range(4))
    assert {after - before for before, after in pairwise([0, *counts])} <= {0, 1}


async def test_work_for_many_tasks_is_cancelled_when_the_client_leaves() -> None:
    """The results of a batch are not awaited any more, and their work ends."""
    exchange = exchange_with({})
    exchange.scope["extensions"][CONNECTION].heavy_work = PacedCallbacks()
    works = [asyncio.create_task(asyncio.sleep(60)) for _ in range(3)]
    reading = asyncio.create_task(
        all_while_connected(exchange.scope, Mock(), asyncio.gather(*works), tasks=3)
    )
    await asyncio.sleep(0)
    exchange.disconnect()
    with pytest.raises(ClientDisconnect):
        await reading
    await asyncio.wait(works)
    assert all(work.cancelled() for work in works)


async def test_client_that_leaves_before_its_turn_is_dropped() -> None:
    """The work for its request does not begin."""
    loop, pace = asyncio.get_running_loop(), PacedCallbacks()
    exchange = exchange_with({})
    connection = exchange.scope["extensions"][CONNECTION]
    connection.heavy_work, connection.client_has_left.return_value = pace, False
    for _ in range(2):  # of this iteration, and of the next one
        pace.add(loop, Mock(), weight=100, client=b"")
    turn = asyncio.create_task(take_turn(exchange.scope, tasks=100))
    await asyncio.sleep(0)
    exchange.disconnect()
    with pytest.raises(ClientDisconnect):
        await turn
