"""What an exchange does when its client has left."""

import asyncio
from functools import partial
from typing import Any
from unittest.mock import Mock

from gateway.api.server_extensions import CONNECTION, DISCONNECTED, ON_DISCONNECT
from gateway.server.exchange import Exchange
from gateway.server.framing import parse_head
from gateway.server.paced_calls import PacedCalls


def exchange_with(listeners: dict[object, Any]) -> Exchange:
    """Return the exchange of a request with these listeners."""
    head = parse_head(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", max_fields=10)
    scope = {
        "method": "GET",
        "query_string": b"",
        "extensions": {ON_DISCONNECT: listeners, CONNECTION: Mock()},
    }
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
