"""What an exchange does when its client has left."""

import asyncio
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
from starlette.requests import ClientDisconnect

from gateway.api.server_extensions import CONNECTION, DISCONNECTED, ON_DISCONNECT, WEIGHT, take_turn
from gateway.server.exchange import Exchange
from gateway.server.framing import parse_head
from gateway.server.paced_calls import PacedCalls


def exchange_with(listeners: dict[object, Any]) -> Exchange:
    """Return the exchange of a request with these listeners."""
    head = parse_head(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", max_fields=10)
    scope = {"method": "GET", "extensions": {ON_DISCONNECT: listeners, CONNECTION: Mock()}}
    return Exchange(Mock(), head, scope, has_body=False, headers=[])


async def test_disconnects_are_handled_a_few_per_iteration() -> None:
    """When many clients leave at once, the listeners of two are called in each iteration."""
    loop, pace, left = asyncio.get_running_loop(), PacedCalls(), []
    for number in range(5):
        exchange_with({"listener": partial(left.append, number)}).disconnect(loop, pace)
    counts = [len(left)]
    for _ in range(3):
        await asyncio.sleep(0)
        counts.append(len(left))
    assert counts == [2, 4, 5, 5]
    assert left == list(range(5))


async def test_disconnect_calls_no_listener_that_has_gone() -> None:
    """A listener may remove itself before its turn, and one that comes later looks for `DISCONNECTED`."""
    loop, pace, calls = asyncio.get_running_loop(), PacedCalls(), Mock()
    pace.add(loop, calls.other, weight=100)
    listeners = {name: getattr(calls, name) for name in ("first", "second")}
    exchange = exchange_with(listeners)
    exchange.disconnect(loop, pace)
    assert DISCONNECTED in listeners
    assert CONNECTION not in exchange.scope["extensions"]
    del listeners["first"]
    listeners["third"] = calls.third
    await asyncio.sleep(0)
    assert [call[0] for call in calls.mock_calls] == ["other", "second"]


async def test_disconnect_of_a_request_for_many_tasks_has_an_iteration_for_itself() -> None:
    """The departure weighs as much as the work for the request."""
    loop, pace, left = asyncio.get_running_loop(), PacedCalls(), []
    for number in range(3):
        exchange = exchange_with({"listener": partial(left.append, number)})
        exchange.scope["extensions"][WEIGHT] = 13
        exchange.disconnect(loop, pace)
    counts = [len(left)]
    for _ in range(2):
        await asyncio.sleep(0)
        counts.append(len(left))
    assert counts == [1, 2, 3]


async def test_client_that_leaves_before_its_turn_is_dropped() -> None:
    """The work for its request does not begin."""
    loop, pace = asyncio.get_running_loop(), PacedCalls()
    exchange = exchange_with({})
    connection = exchange.scope["extensions"][CONNECTION]
    connection.pace, connection.client_has_left.return_value = pace, False
    for _ in range(2):  # of this iteration, and of the next one
        pace.add(loop, Mock(), weight=100)
    turn = asyncio.create_task(take_turn(exchange.scope, tasks=100))
    await asyncio.sleep(0)
    exchange.disconnect(loop, pace)
    with pytest.raises(ClientDisconnect):
        await turn
