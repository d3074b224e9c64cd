"""What is read from a request, strictly: query parameters, headers and bounded bodies."""

from __future__ import annotations

import asyncio
import random
import re
from urllib.parse import parse_qsl

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from gateway.domain.errors import BodyTooLarge, InvalidParameter

Headers = list[tuple[bytes, bytes]]

# On every response. A browser must not guess another content type, nor embed it in another site's page.
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-site"),
)

_OWN_SITES = frozenset({"same-origin", "same-site", "none"})  # "none": the user asks, not a page
_SANE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
_MOST_PARAMETERS = 10_100
_WEIGHT = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")
_SHOWN = 64  # characters of a parameter's name that an error repeats: whole, or not at all


def route_path(scope: Scope) -> str:
    """Return the path below the root path, as Starlette routes: an ingress may have stripped it."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if not root or not path.startswith(root) or path[len(root) : len(root) + 1] not in {"", "/"}:
        return path
    return path[len(root) :]


def client_host(scope: Scope) -> str:
    """Return the address of the request's client, as trusted proxies tell it; empty where there is none."""
    client = scope.get("client")
    return client[0] if client else ""


def query_parameters(scope: Scope, *allowed: str, repeated: str = "") -> dict[str, list[str]]:
    """Return the query's parameters, each with its values; `repeated` may have more than one.

    Raises: InvalidParameter for an unknown parameter, or one that is given twice.
    """
    if not scope["query_string"]:
        return {}
    try:
        pairs = parse_qsl(
            scope["query_string"].decode("ascii"),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=_MOST_PARAMETERS,
        )
    except ValueError as exc:
        raise InvalidParameter("the query string cannot be read") from exc
    values: dict[str, list[str]] = {}
    for name, value in pairs:
        if name not in allowed and name != repeated:
            known = ", ".join(filter(None, (*allowed, repeated))) or "there are none here"
            shown = ascii(name) if len(name) <= _SHOWN else f"of {len(name)} characters"
            raise InvalidParameter(f"unknown query parameter {shown}; known: {known}")
        if name in values and name != repeated:
            raise InvalidParameter(f"query parameter {name!r} is given twice")
        values.setdefault(name, []).append(value)
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


def header(headers: Headers, name: bytes) -> str | None:
    """Return a header's value, repeated ones joined as RFC 9110 (5.3) has it, or None."""
    values = [value for key, value in headers if key == name]
    return b", ".join(values).decode("latin-1") if values else None


def accepts_gzip(headers: Headers) -> bool:
    """Tell whether Accept-Encoding allows gzip, and does not prefer the body as it is (RFC 9110, 12.5.3)."""
    weights: dict[str, float] = {}
    for part in (header(headers, b"accept-encoding") or "").split(","):
        coding, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weight = next((piece[2:].strip() for piece in parameters if piece.startswith("q=")), "1")
        # A weight that is none makes the coding unacceptable: the body as it is can always be read.
        weights[coding] = float(weight) if _WEIGHT.fullmatch(weight) else 0.0
    gzip = weights.get("gzip", weights.get("x-gzip", weights.get("*", 0.0)))
    return gzip > 0 and gzip >= weights.get("identity", 0.0)


def is_cross_site(headers: Headers) -> bool:
    """Tell whether a browser says that a page of another site asks (Fetch Metadata, Sec-Fetch-Site)."""
    site = header(headers, b"sec-fetch-site")
    return site is not None and site.lower() not in _OWN_SITES


def given_request_id(headers: Headers) -> bytes | None:
    """Return the caller's X-Request-Id, when it is sane."""
    for name, value in headers:
        if name == b"x-request-id" and _SANE_REQUEST_ID.fullmatch(value):
            return value
    return None


def new_request_id() -> bytes:
    """Return an id that no other request has; it is no secret."""
    return random.getrandbits(128).to_bytes(16).hex().encode()
