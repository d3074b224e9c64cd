"""What an exchange sends."""

from typing import Any
from unittest.mock import Mock

from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from gateway.api.server_extensions import ON_DISCONNECT
from gateway.server.exchange import Exchange
from gateway.server.framing import Head


async def test_response_has_the_date_of_its_beginning() -> None:
    """The first headers are those of the time of the response, which a long poll sends a minute later."""
    connection: Any = Mock(write_paused=False, server_state=ServerState())
    connection.server_state.default_headers = [(b"date", b"then")]
    head = Head(b"GET", b"/", "1.1", [], keep_alive=True, content_length=0)
    scope = {"method": "GET", "http_version": "1.1", "extensions": {ON_DISCONNECT: {}}}
    exchange = Exchange(connection, head, scope, has_body=False)

    async def respond(_scope: Scope, _receive: Receive, send: Send) -> None:
        connection.server_state.default_headers = [(b"date", b"now")]
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    await exchange.run(respond)
    [[[written], _]] = connection.write.call_args_list
    assert written.splitlines()[1] == b"date: now"
