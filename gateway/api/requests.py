"""Strict reading of requests: query parameters, headers and bodies of bounded size."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Iterator
from urllib.parse import parse_qsl

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from gateway.domain.errors import BodyTooLarge, InvalidParameter

Headers = list[tuple[bytes, bytes]]

# On every response: a browser must not guess another content type or embed it in another site's page.
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-site"),
)

# Keys in the scope's state.
LONG_POLL = "long_poll"  # the request waits for a change
FAILURE = "failure"  # the exception with which the request has failed; the endpoint only raises it
WAITED_SECONDS = "waited_seconds"  # how long the request has waited before the application was called

_OWN_SITES = frozenset({"same-origin", "same-site", "none"})  # "none": a user action, not a page
_VALID_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
_MAX_PARAMETERS = 10_100
_WEIGHT = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")
_MAX_RANGES = 32  # further ranges of Accept and codings of Accept-Encoding are ignored
_MAX_RANGE_PARAMETERS = 8
_NEEDED_AT_END = frozenset({b"origin", b"traceparent"})  # for CORS and the request log
_LONGEST_KEPT_VALUE = 256  # bytes
MAX_SHOWN_CHARS = 64  # a longer name or value of a parameter is not repeated in the error


def route_path(scope: Scope) -> str:
    """Return the path below the root path, as Starlette routes it; an ingress may have stripped the root."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if not root or not path.startswith(root) or path[len(root) : len(root) + 1] not in {"", "/"}:
        return path
    return path[len(root) :]


def client_host(scope: Scope) -> str:
    """Return the address of the request's client, as reported by trusted proxies; empty if unknown."""
    client = scope.get("client")
    return client[0] if client else ""


def query_parameters(scope: Scope, *allowed: str, repeated: str = "") -> dict[str, list[str]]:
    """Return the values of each query parameter; only `repeated` may have more than one value.

    Raises: InvalidParameter for an unknown or repeated parameter.
    """
    if not scope["query_string"]:
        return {}
    try:
        pairs = parse_qsl(
            scope["query_string"].decode("ascii"),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=_MAX_PARAMETERS,
        )
    except ValueError as exc:
        raise InvalidParameter("the query string cannot be read") from exc
    values: dict[str, list[str]] = {}
    for name, value in pairs:
        if name not in allowed and name != repeated:
            known = ", ".join(filter(None, (*allowed, repeated))) or "none on this path"
            shown = ascii(name) if len(name) <= MAX_SHOWN_CHARS else f"of {len(name)} characters"
            raise InvalidParameter(f"unknown query parameter {shown}; known: {known}")
        if name in values and name != repeated:
            raise InvalidParameter(f"query parameter {name!r} is given twice")
        values.setdefault(name, []).append(value)
    return values


async def read_body(scope: Scope, receive: Receive, *, limit: int, seconds: float) -> bytes:
    """Return the request's body.

    Raises: BodyTooLarge over `limit` bytes, InvalidParameter when it takes longer than `seconds`,
    ClientDisconnect when the client has disconnected.
    """
    for name, value in scope["headers"]:
        if name == b"content-length" and int(value) > limit:  # the server has validated the number
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
    """Return a header's value or None; the values of repeated headers are joined (RFC 9110, 5.3)."""
    values = [value for key, value in headers if key == name]
    return b", ".join(values).decode("latin-1") if values else None


def free_headers(scope: Scope) -> None:
    """Free the headers that the end of the request does not need: a stream may stay open for days."""
    headers = scope["headers"]
    kept = [
        (name, value)
        for name, value in headers
        if name in _NEEDED_AT_END and len(value) <= _LONGEST_KEPT_VALUE
    ]
    if any(name == b"cookie" for name, _ in headers):
        kept.append((b"cookie", b""))  # only its presence counts, for CORS
    if isinstance(headers, list):
        headers[:] = kept  # server and middleware refer to the same list
    scope["headers"] = kept
    scope["query_string"] = b""


def accepts_gzip(headers: Headers) -> bool:
    """Tell whether Accept-Encoding allows gzip, and does not prefer identity (RFC 9110, 12.5.3)."""
    weights = {coding: weight for coding, _, weight in accepted_ranges(headers, b"accept-encoding")}
    gzip = weights.get("gzip", weights.get("x-gzip", weights.get("*", 0.0)))
    return gzip > 0 and gzip >= weights.get("identity", 0.0)


def accepted_ranges(headers: Headers, name: bytes) -> Iterator[tuple[str, dict[str, str], float]]:
    """Yield each range of Accept or Accept-Encoding in lower case, with its parameters and its weight.

    An invalid weight counts as 0, which means "not acceptable" (RFC 9110, 12.4.2).
    """
    for part in (header(headers, name) or "").lower().split(",", _MAX_RANGES)[:_MAX_RANGES]:
        accepted, *pieces = part.split(";", _MAX_RANGE_PARAMETERS)
        pairs = (piece.partition("=") for piece in pieces)
        parameters = {key.strip(): value.strip() for key, _, value in pairs}
        weight = parameters.pop("q", "1")
        yield accepted.strip(), parameters, float(weight) if _WEIGHT.fullmatch(weight) else 0.0


def is_cross_site(headers: Headers) -> bool:
    """Tell whether a browser sent the request for a page of another site (Fetch Metadata, Sec-Fetch-Site)."""
    site = header(headers, b"sec-fetch-site")
    return site is not None and site.lower() not in _OWN_SITES


def client_request_id(headers: Headers) -> bytes | None:
    """Return the client's X-Request-Id, if it is valid."""
    for name, value in headers:
        if name == b"x-request-id" and _VALID_REQUEST_ID.fullmatch(value):
            return value
    return None


def new_request_id() -> bytes:
    """Return a unique request ID. It is not a secret."""
    return random.getrandbits(128).to_bytes(16).hex().encode()
