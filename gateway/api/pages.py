"""The web pages: the files of `gateway/api/web`, read once at startup and served unchanged.

The pages use relative URLs, so that an ingress can serve them below a prefix. There is one exception: with
`server.root_path`, the index refers to its files by absolute paths. The ingress may remove the prefix, and
then the gateway cannot tell whether the browser's address ends with a slash. The pages load nothing from
other origins and contain no inline script or style, which allows a strict Content-Security-Policy.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import PurePosixPath

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.domain.entity_tag import matches
from gateway.domain.errors import PathNotFound

_CONTENT_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "Cache-Control": "no-cache",  # always revalidated: a page never runs with the script of another version
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",  # the page's URL contains task IDs
}


@dataclass(frozen=True, slots=True)
class _File:
    body: bytes
    content_type: str
    etag: str

    def response(self, request: Request) -> Response:
        headers = {**_HEADERS, "ETag": self.etag}
        if_none_match = request.headers.get("if-none-match")
        if if_none_match is not None and matches(if_none_match, self.etag):
            return Response(status_code=304, headers=headers)
        return Response(self.body, headers={**headers, "Content-Type": self.content_type})


def page_routes(*, root_path: str = "") -> list[Route]:
    """Return the routes of the pages; their files are read once, now."""
    served = _read_files(root_path)

    async def index(request: Request) -> Response:
        return served["index.html"].response(request)

    async def docs(request: Request) -> Response:
        return served["docs.html"].response(request)

    async def file(request: Request) -> Response:
        # The name is a key of the table and never a file path.
        known_file = served.get(request.path_params["file"])
        if known_file is None:
            raise PathNotFound("no such path; /openapi.json lists those that exist")
        return known_file.response(request)

    return [Route("/", index), Route("/docs", docs), Route("/web/{file}", file)]


def _read_files(root_path: str) -> dict[str, _File]:
    bodies = {
        item.name: item.read_bytes()
        for item in files("gateway.api").joinpath("web").iterdir()
        if PurePosixPath(item.name).suffix in _CONTENT_TYPES
    }
    if root_path:
        absolute = f'="{escape(root_path)}/web/'.encode()
        bodies["index.html"] = bodies["index.html"].replace(b'="web/', absolute)
    return {name: _read(body, _CONTENT_TYPES[PurePosixPath(name).suffix]) for name, body in bodies.items()}


def _read(body: bytes, content_type: str) -> _File:
    return _File(body, content_type, f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"')
