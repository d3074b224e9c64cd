"""Finds the address of the client behind trusted proxies.

A proxy appends the address of its peer to `X-Forwarded-For` or `Forwarded` (RFC 7239), or writes it into
`X-Real-IP`. The values before it come from its peer, which may have invented them. So the lists are read from
the end: the client is the last peer that is not a trusted proxy itself.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import lru_cache
from ipaddress import IPv6Address

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.api.requests import Headers

# An element of `Forwarded`: pairs separated by semicolons. Some proxies do not quote values with brackets or
# colons; these are accepted, too. The possessive quantifiers never go back: otherwise the time triples with
# each semicolon between spaces.
_PAIR = r"""[!#$%&'*+.^_`|~0-9A-Za-z-]++=(?:"(?:[^"\\]|\\.)*+"|[^",;\s]*+)"""
_ELEMENT = re.compile(rf"[ \t]*+(?:{_PAIR})?+(?:[ \t]*+;[ \t]*+(?:{_PAIR})?+)*+[ \t]*+")
_FOR = re.compile(r"""(?:^|;)[ \t]*+for=(?:"((?:[^"\\]|\\.)*+)"|([^",;\s]*+))""", re.IGNORECASE)
_MAX_ELEMENT = 512  # characters; the search for the start of a longer element would take quadratic time
_MAX_SEARCHES = 100  # of starts of elements in one value; each takes microseconds
_LONGEST_ADDRESS = 64  # characters; an IPv6 address with a port has up to 53
_UNKNOWN = "unknown"  # an element without an address (RFC 7239, 6.2)
_HOST_AND_PORT = re.compile(r"(?:\[([^\]]*)\]|([^:]*))(?::(\d{1,5}))?")
_SCHEMES = {"http", "https"}

Hops = Callable[[list[str]], Iterator[str]]


class TrustedProxies:
    """The addresses and networks of `server.trusted_proxies`; `*` stands for every address.

    An IPv4-mapped IPv6 address, as seen by a listener on `::`, counts as IPv4 (RFC 4291, 2.5.5.2).
    """

    def __init__(self, trusted_proxies: Sequence[str]) -> None:
        self._any = "*" in trusted_proxies
        self._networks = [] if self._any else [ipaddress.ip_network(text) for text in trusted_proxies]
        self._contains = lru_cache(maxsize=4096)(self._compute)

    def __contains__(self, host: str) -> bool:
        return self._any or self._contains(host)

    def _compute(self, host: str) -> bool:
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        return any(address in network for network in self._networks)


class ClientAddress:
    """Middleware that sets the scope's client, and its scheme, from the headers of a trusted proxy.

    `headers` are the names in `server.client_address_headers`: the first one that a request has is used. A
    peer without an address has connected through a Unix socket; it is a trusted proxy.
    """

    def __init__(self, app: ASGIApp, *, trusted_proxies: Sequence[str], headers: Sequence[str]) -> None:
        self._app = app
        self._proxies = TrustedProxies(trusted_proxies)
        self._headers = [(name.lower().encode(), _HOPS[name.lower()]) for name in headers]

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass the request on."""
        if scope["type"] == "http":
            self.set_client(scope)
        return self._app(scope, receive, send)

    def set_client(self, scope: Scope) -> None:
        """Set the client and the scheme of an HTTP request, if its peer is a trusted proxy."""
        peer = scope.get("client")
        if peer is not None and peer[0] not in self._proxies:
            return
        headers = scope["headers"]
        for name, hops in self._headers:
            if values := _values(headers, name):
                client = self._last_untrusted(hops(values))
                if client is not None:
                    scope["client"] = client
                break
        proto = _values(headers, b"x-forwarded-proto")
        if proto and proto[-1] in _SCHEMES:
            scope["scheme"] = proto[-1]

    def _last_untrusted(self, hops: Iterator[str]) -> tuple[str, int] | None:
        """Return the last hop that is not a trusted proxy, or else the first hop; None if there is none."""
        host_and_port = None
        for hop in hops:
            # Clients may have invented it. It is logged, and kept in caches.
            host_and_port = _host_and_port(hop[:_LONGEST_ADDRESS])
            if host_and_port[0] not in self._proxies:
                break
        return host_and_port


def _values(headers: Headers, name: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for key, value in headers if key == name]


def _forwarded_for(values: list[str]) -> Iterator[str]:
    """Yield the values of X-Forwarded-For, the last one first. An empty header has none."""
    joined = ",".join(values)
    if joined:
        yield from (part.strip() for part in reversed(joined.split(",")))


def _forwarded(values: list[str]) -> Iterator[str]:
    """Yield the addresses in Forwarded, the last one first, up to the first element that is malformed.

    A quotation mark that the client sends must not hide the element that the proxy appends. So an element is
    the shortest text at the end, after a comma, that is well formed.
    """
    for value in reversed(values):
        rest = value
        searches = 0
        while rest:
            comma = len(rest)
            while True:
                comma = rest.rfind(",", 0, comma)
                element = rest[comma + 1 :]
                searches += 1
                if len(element) > _MAX_ELEMENT or searches > _MAX_SEARCHES:
                    return
                if _ELEMENT.fullmatch(element):
                    break
                if comma < 0:
                    return
            if element.strip():
                found = _FOR.search(element)
                yield (found[1] or found[2] or _UNKNOWN) if found is not None else _UNKNOWN
            rest = rest[: max(comma, 0)]


def _real_ip(values: list[str]) -> Iterator[str]:
    """Yield the value of X-Real-IP, a single address."""
    if values[-1]:
        yield values[-1]


_HOPS: dict[str, Hops] = {"x-forwarded-for": _forwarded_for, "forwarded": _forwarded, "x-real-ip": _real_ip}


def _host_and_port(text: str) -> tuple[str, int]:
    """Split an address and an optional port. IPv6 addresses with a port are in brackets."""
    match = _HOST_AND_PORT.fullmatch(text)
    if match is None:  # an IPv6 address without brackets, or no address
        return text, 0
    return match[1] or match[2] or "", int(match[3] or 0)
