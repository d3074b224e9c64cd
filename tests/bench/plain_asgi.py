"""uvicorn with an application that sends one fixed response, as large as a hit of the gateway.

    python plain_asgi.py PORT

Its CPU time is the share of uvicorn in a hit of the gateway with `server.edge` off.
"""

from __future__ import annotations

import sys
from typing import Any

import uvicorn
from upstream import progress_json

_BODY = progress_json("0123456789abcdef01234-1")
_HEADERS = [
    (b"cache-control", b"max-age=1"),
    (b"age", b"0"),
    (b"cache-status", b"sd-gateway; hit; ttl=0"),
    (b"etag", b'"0123456789abcdef01234567.0123456789abc.0123456789ab"'),
    (b"content-type", b"application/json"),
    (b"content-length", str(len(_BODY)).encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-site"),
    (b"x-request-id", b"0123456789abcdef0123456789abcdef"),
]


async def application(_scope: Any, _receive: Any, send: Any) -> None:
    """Send the response."""
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
    await send({"type": "http.response.body", "body": _BODY})


if __name__ == "__main__":
    uvicorn.run(
        application,
        port=int(sys.argv[1]),
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )
