"""What is read from a request, strictly: query parameters and bounded bodies."""

from __future__ import annotations

import asyncio
from urllib.parse import parse_qsl

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from gateway.exceptions import BodyTooLarge, InvalidParameter

_MOST_PARAMETERS = 1000
_SHOWN = 64  # characters of a caller's own text that an error repeats


def query_parameters(scope: Scope, *allowed: str) -> dict[str, str]:
    """Return the query's parameters. Raises: InvalidParameter for an unknown or repeated one."""
    try:
        pairs = parse_qsl(
            scope["query_string"].decode("ascii"),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=_MOST_PARAMETERS,
        )
    except ValueError as exc:
        raise InvalidParameter("the query string cannot be read") from exc
    values: dict[str, str] = {}
    for name, value in pairs:
        if name not in allowed:
            known = f"known: {', '.join(allowed)}" if allowed else "there are none here"
            raise InvalidParameter(f"unknown query parameter {name[:_SHOWN]!r}; {known}")
        if name in values:
            raise InvalidParameter(f"query parameter {name!r} is given twice")
        values[name] = value
    return values


async def read_body(scope: Scope, receive: Receive, *, limit: int, seconds: float) -> bytes:
    """Return the request's body.

    Raises: BodyTooLarge over `limit` bytes, InvalidParameter when it takes longer than `seconds`,
    ClientDisconnect when the caller is gone.
    """
    for name, value in scope["headers"]:
        if name == b"content-length" and int(value) > limit:  # the server has checked that it is a number
            raise BodyTooLarge(f"the body is larger than {limit} bytes")
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                body += message.get("body", b"")
                if len(body) > limit:
                    raise BodyTooLarge(f"the body is larger than {limit} bytes")
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise InvalidParameter(f"the body did not arrive within {seconds:g} seconds") from None
