"""Which egress proxy carries the calls: that of the settings, or that of the environment.

The environment variables are those of curl: `https_proxy` or `http_proxy`, by the scheme of the endpoint,
then `all_proxy`; and `no_proxy`, a list of hosts without a proxy. Upper case counts too. As in Go, a
loopback address needs no proxy.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from ipaddress import ip_address, ip_network
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx

from gateway.settings.errors import SettingsError, UnusableSetting
from gateway.settings.extras import describe_missing
from gateway.settings.model import DIRECT, PROXY_FORMS, Upstream, explain_proxy_url, is_loopback, is_proxy_url

_PORTS = {"http": 80, "https": 443}


class EgressProxy(NamedTuple):
    """A proxy, and the setting or variable that names it."""

    url: httpx.URL
    source: str

    @property
    def shown(self) -> str:
        """Scheme, host and port. The rest may have a secret."""
        return str(self.url.copy_with(username=None, password=None, raw_path=b"", fragment=None)).rstrip("/")


def find_proxy(settings: Upstream, environ: Mapping[str, str]) -> EgressProxy | None:
    """Return the proxy for calls to the endpoint, or None.

    Raises: SettingsError if the proxy is not valid, or a package is missing.
    """
    proxy = settings.proxy.get_secret_value()
    if proxy == DIRECT:
        return None
    if proxy:
        try:
            return _checked(proxy, "upstream.proxy")
        except ValueError as exc:
            raise UnusableSetting("upstream", "proxy", str(exc)) from exc
    endpoint = urlsplit(settings.endpoint)
    host, port = endpoint.hostname or "", endpoint.port or _PORTS[endpoint.scheme]
    if is_loopback(host) or _is_excluded(host, port, _variable(environ, "no_proxy")[1]):
        return None
    for name in (f"{endpoint.scheme}_proxy", "all_proxy"):
        variable, proxy = _variable(environ, name)
        if proxy:
            try:
                return _checked(proxy if "://" in proxy else f"http://{proxy}", variable)
            except ValueError as exc:  # the value is not repeated, because it may have a password
                raise SettingsError([f"{variable}: {exc}"]) from exc
    return None


def _variable(environ: Mapping[str, str], name: str) -> tuple[str, str]:
    """Return the name and the value of a variable; lower case is preferred, as curl does."""
    for variable in (name, name.upper()):
        if value := environ.get(variable, "").strip():
            return variable, value
    return name, ""


def _is_excluded(host: str, port: int, no_proxy: str) -> bool:
    """Tell whether `no_proxy` lists a host: by its name, a domain, an address or a network."""
    for entry in no_proxy.lower().replace(",", " ").split():
        # An IPv6 address with a port has brackets; one without a port may have them.
        has_port = entry.count(":") == 1 or "]:" in entry
        name, _, number = entry.rpartition(":") if has_port else (entry, "", "")
        if number and number != str(port):
            continue
        domain = name.removeprefix("*").lstrip(".")
        if name == "*" or host == domain or (domain and host.endswith(f".{domain}")):
            return True
        try:
            if ip_address(host) in ip_network(name.strip("[]"), strict=False):
                return True
        except ValueError:  # one of them is a name
            continue
    return False


def _checked(proxy: str, source: str) -> EgressProxy:
    try:
        url = httpx.URL(proxy if is_proxy_url(proxy) else "")
    except httpx.InvalidURL:
        url = httpx.URL("")
    if not url.host:
        raise ValueError(f"must be {PROXY_FORMS}{explain_proxy_url(proxy)}")
    if url.scheme.startswith("socks5") and find_spec("socksio") is None:
        raise ValueError(describe_missing("socksio", extra="socks"))
    return EgressProxy(url, source)
