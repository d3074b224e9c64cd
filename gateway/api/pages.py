"""The web pages: the files of `gateway/api/web`, read once at startup and served unchanged.

The pages use relative URLs, so that an ingress can serve them below a prefix. There is one exception: with
`server.root_path`, the index refers to its files by absolute paths. The ingress may remove the prefix, and
then the gateway cannot tell whether the browser's address ends with a slash. The pages contain no inline
script or style, and load nothing from other origins but the images of finished tasks: to show them, and to
save them. This allows a strict Content-Security-Policy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from ipaddress import ip_address
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from gateway.api.requests import header, route_path
from gateway.domain.entity_tag import matches
from gateway.domain.errors import PathNotFound

_CONTENT_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' https:{images}; "
    "connect-src 'self' https:{images}; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_API = ("/v1/", "/scc/")  # below these paths every error is for a program
_DEEPEST = 10  # slashes in the path of a page; a deeper one gets a problem document


@dataclass(frozen=True, slots=True)
class _File:
    body: bytes
    content_type: str
    etag: str
    headers: Mapping[str, str]

    def response(self, request: Request) -> Response:
        headers = {**self.headers, "ETag": self.etag}
        if_none_match = request.headers.get("if-none-match")
        if if_none_match is not None and matches(if_none_match, self.etag):
            return Response(status_code=304, headers=headers)
        return Response(self.body, headers={**headers, "Content-Type": self.content_type})


class Pages:
    """The pages; their files are read once, now.

    `image_origin` is an origin that may serve images without TLS, see `simulator_origin`.
    """

    def __init__(self, *, root_path: str = "", image_origin: str = "") -> None:
        self._root_path = root_path
        self._headers = {
            # Always revalidated: a page never runs with the script of another version.
            "Cache-Control": "no-cache",
            "Content-Security-Policy": _POLICY.format(images=f" {image_origin}" if image_origin else ""),
            "Referrer-Policy": "no-referrer",  # the page's URL contains task IDs
        }
        self._served = _read_files(root_path, self._headers)

    def routes(self) -> list[Route]:
        """Return the routes of the pages."""
        served = self._served

        async def index(request: Request) -> Response:
            return served["index.html"].response(request)

        async def docs(request: Request) -> Response:
            return served["docs.html"].response(request)

        async def icon(request: Request) -> Response:
            return served["favicon.ico"].response(request)

        async def file(request: Request) -> Response:
            # The name is a key of the table and never a file path.
            known_file = served.get(request.path_params["file"])
            if known_file is None:
                raise PathNotFound("no such path; /openapi.json lists those that exist")
            return known_file.response(request)

        return [
            Route("/", index),
            Route("/docs", docs),
            Route("/favicon.ico", icon),
            Route("/web/{file}", file),
        ]

    def not_found(self, scope: Scope) -> bytes | None:
        """Return the page for a path that does not exist, if a browser opened it; otherwise None."""
        path = route_path(scope)
        if scope["method"] not in {"GET", "HEAD"} or path.startswith(_API):
            return None
        depth = scope["raw_path"].count(b"/") - 1
        if depth > _DEEPEST or "text/html" not in (header(scope["headers"], b"accept") or ""):
            return None
        # The address may be at any depth, and an ingress may have removed a prefix from it.
        base = f"{escape(self._root_path)}/" if self._root_path else "../" * depth or "./"
        page = self._served["notfound.html"].body
        for target in (b"web/", b"docs", b"./"):
            page = page.replace(b'href="' + target, b'href="' + base.encode() + target.removeprefix(b"./"))
        return page

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers of every page."""
        return self._headers


def simulator_origin(endpoint: str) -> str:
    """Return the origin of an endpoint on this machine without TLS; otherwise "".

    Such an endpoint is a simulated upstream, which serves its images itself.
    """
    parts = urlsplit(endpoint)
    try:
        loopback = parts.hostname == "localhost" or ip_address(parts.hostname or "").is_loopback
    except ValueError:
        loopback = False
    return f"http://{parts.netloc.rpartition('@')[2]}" if parts.scheme == "http" and loopback else ""


def _read_files(root_path: str, headers: Mapping[str, str]) -> dict[str, _File]:
    bodies = {
        item.name: item.read_bytes()
        for item in files("gateway.api").joinpath("web").iterdir()
        if PurePosixPath(item.name).suffix in _CONTENT_TYPES
    }
    if root_path:
        absolute = f'="{escape(root_path)}/web/'.encode()
        bodies["index.html"] = bodies["index.html"].replace(b'="web/', absolute)
    return {
        name: _File(body, _CONTENT_TYPES[PurePosixPath(name).suffix], _etag(body), headers)
        for name, body in bodies.items()
    }


def _etag(body: bytes) -> str:
    return f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'
