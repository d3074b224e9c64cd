"""`GET /images/NAME.png?Expires=…`: the images of finished tasks.

Each name has its own color gradient. Like the vendor's, a URL expires. Scripts of any origin may read the
images (CORS), so that the page can save them. The settings of the vendor's storage are not known.
"""

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from gateway.simulator.tasks import IMAGES

_SIDE = 192  # pixels
_SIGNATURE = b"\x89PNG\r\n\x1a\n"  # PNG specification, 5.2
_RGB8 = struct.pack(">IIBBBBB", _SIDE, _SIDE, 8, 2, 0, 0, 0)  # 11.2.2: 8 bits per channel, no interlace


def image_route(clock: Callable[[], float]) -> Route:
    """Return the route of the images; `clock` returns Unix seconds."""

    async def image(request: Request) -> Response:
        expires = request.query_params.get("Expires", "")
        if not (expires.isascii() and expires.isdigit() and clock() < int(expires[:20])):
            return PlainTextResponse("the URL has expired", 403)
        readable = {"Access-Control-Allow-Origin": "*"}
        return Response(_png(request.path_params["name"]), headers=readable, media_type="image/png")

    return Route(f"{IMAGES}/{{name}}.png", image, methods=["GET"])


@lru_cache(maxsize=64)
def _png(name: str) -> bytes:
    color = hashlib.blake2b(name.encode(errors="replace"), digest_size=6).digest()
    start, end = color[:3], color[3:]
    rows = b"".join(b"\0" + bytes(_row(start, end, y)) for y in range(_SIDE))  # filter type 0
    chunks = ((b"IHDR", _RGB8), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return _SIGNATURE + b"".join(_chunk(kind, content) for kind, content in chunks)


def _row(start: bytes, end: bytes, y: int) -> Iterator[int]:
    for x in range(_SIDE):
        part = (x + y) / (2 * _SIDE)
        yield from (int(a + (b - a) * part) for a, b in zip(start, end, strict=True))


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
