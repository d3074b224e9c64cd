"""Which values of Host are served (RFC 9110, 7.2): names without regard to case, final dot and port."""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv6Address, ip_address

from gateway.api.requests import Headers

# RFC 3986, 3.2.2: an IP literal in brackets, or a registered name, which takes in IPv4. Then, maybe, a port.
_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::([0-9]{0,5}))?")
_LAST_PORT = 65_535
_LONGEST = 255  # bytes of a value that is remembered, and
_MOST = 256  # how many are


class TrustedHosts:
    """Knows which values of Host are ours; `*` is any, `*.example.com` all below it."""

    def __init__(self, trusted_hosts: Iterable[str]) -> None:
        hosts = [_plain(host) for host in trusted_hosts if _is_well_formed(host)]
        self._any = "*" in hosts
        self._exact = frozenset(hosts)
        self._suffixes = tuple(host[1:] for host in hosts if host.startswith("*."))
        self._judged: dict[bytes, bool] = {}

    def trust(self, headers: Headers) -> bool:
        """Tell whether a request with these headers is for one of ours; one that is malformed is for none."""
        for name, value in headers:
            if name == b"host":
                judged = self._judged.get(value)
                return self._judge(value) if judged is None else judged
        return self._any

    def _judge(self, value: bytes) -> bool:
        judged = self._is_ours(value)
        if len(value) <= _LONGEST and len(self._judged) < _MOST:  # callers send a few, over and over
            self._judged[value] = judged
        return judged

    def _is_ours(self, value: bytes) -> bool:
        match = _HOST.fullmatch(value)
        if match is None or int(match[2] or 0) > _LAST_PORT:
            return False
        try:
            name = _plain(match[1].decode())
        except ValueError:  # brackets around what is no IPv6 address
            return False
        return self._any or name in self._exact or name.endswith(self._suffixes)


def _is_well_formed(host: str) -> bool:
    try:
        _plain(host)
    except ValueError:
        return False
    return True


def _plain(host: str) -> str:
    """Return a host in the one form in which it is compared. Raises: ValueError when it is malformed."""
    if host.startswith("["):
        return str(IPv6Address(host[1:-1]))
    try:
        return str(ip_address(host))
    except ValueError:
        return host.lower().removesuffix(".")
