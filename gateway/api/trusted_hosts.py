"""The allowed Host values (RFC 9110, 7.2); case, a final dot and the port are ignored."""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv6Address, ip_address

from gateway.api.requests import Headers

# RFC 3986, 3.2.2: an IP literal in brackets, or a registered name, which includes IPv4. The port is optional.
_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::([0-9]{0,5}))?")
_LAST_PORT = 65_535
_MAX_CACHED_BYTES = 255  # longer values are not cached
_MAX_CACHED = 256


class TrustedHosts:
    """The allowed Host values. `*` allows any, `*.example.com` all subdomains."""

    def __init__(self, trusted_hosts: Iterable[str]) -> None:
        hosts = [_normalized(host) for host in trusted_hosts if _is_well_formed(host)]
        self._any = "*" in hosts
        self._exact = frozenset(hosts)
        self._suffixes = tuple(host[1:] for host in hosts if host.startswith("*."))
        self._cache: dict[bytes, bool] = {}

    def trust(self, headers: Headers) -> bool:
        """Tell whether the Host header is allowed; a malformed one is not."""
        for name, value in headers:
            if name == b"host":
                trusted = self._cache.get(value)
                return self._check(value) if trusted is None else trusted
        return self._any

    def _check(self, value: bytes) -> bool:
        trusted = self._is_trusted(value)
        if len(value) <= _MAX_CACHED_BYTES and len(self._cache) < _MAX_CACHED:  # clients repeat a few values
            self._cache[value] = trusted
        return trusted

    def _is_trusted(self, value: bytes) -> bool:
        match = _HOST.fullmatch(value)
        if match is None or int(match[2] or 0) > _LAST_PORT:
            return False
        try:
            name = _normalized(match[1].decode())
        except ValueError:  # brackets without an IPv6 address
            return False
        return self._any or name in self._exact or name.endswith(self._suffixes)


def _is_well_formed(host: str) -> bool:
    try:
        _normalized(host)
    except ValueError:
        return False
    return True


def _normalized(host: str) -> str:
    """Return a host in the normalized form for comparison. Raises: ValueError if it is malformed."""
    if host.startswith("["):
        return str(IPv6Address(host[1:-1]))
    try:
        return str(ip_address(host))
    except ValueError:
        return host.lower().removesuffix(".")
