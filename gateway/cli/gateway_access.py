"""How `sd-gateway watch` reaches a gateway: headers of the user, a CA file, the proxy of the environment."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NamedTuple

import httpx

from gateway import __version__
from gateway.cli.watch.events import StreamRefused

DEFAULT_GATEWAY = "http://127.0.0.1:8080"
Header = tuple[str, str]

_HEADERS = {
    "accept": "text/event-stream",
    "accept-encoding": "identity",  # a compressing proxy would delay events
    "cache-control": "no-store",
    "user-agent": f"sd-gateway-watch/{__version__}",
}
# The proxy of the environment is not used for loopback.
_NO_PROXY = dict.fromkeys(("all://localhost", "all://127.0.0.1", "all://[::1]"))
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class Access(NamedTuple):
    """What the user gives besides the URL: headers, for example for a login at a proxy, and a CA file.

    The headers are for the gateway only: they are never sent to another host.
    """

    headers: tuple[Header, ...] = ()
    ca_file: Path | None = None


ANYONE = Access()


def check_ca_file(file: Path) -> None:
    """Read a CA file. Raises: ValueError with the reason if that is not possible."""
    try:
        ssl.create_default_context(cafile=file)
    except ssl.SSLError:
        raise ValueError(f"{file}: has no certificate in PEM format") from None
    except OSError as exc:
        raise ValueError(f"{file}: cannot be read: {exc.strerror}") from None


def open_client(gateway: httpx.URL, access: Access, *, timeout: httpx.Timeout) -> httpx.Client:
    """Return a client for a gateway. Raises: StreamRefused if the environment has invalid settings for it."""
    given: dict[str, str] = {}
    for name, value in access.headers:  # httpx would send only the last one of a name
        key = name.lower()
        given[key] = f"{given[key]}{'; ' if key == 'cookie' else ', '}{value}" if key in given else value
    return _open(gateway, headers=_HEADERS | given, ca_file=access.ca_file, timeout=timeout)


def open_image_client(url: httpx.URL, ca_file: Path | None, *, timeout: httpx.Timeout) -> httpx.Client:
    """Return a client for the hosts of images, which accepts public authorities and those of the file."""
    headers = {name: _HEADERS[name] for name in ("user-agent", "accept-encoding")}
    return _open(url, headers=headers, ca_file=ca_file, timeout=timeout, public=True)


def _open(
    url: httpx.URL,
    *,
    headers: dict[str, str],
    ca_file: Path | None,
    timeout: httpx.Timeout,
    public: bool = False,
) -> httpx.Client:
    # A server on loopback without TLS needs no proxy and no certificates from the environment.
    is_here = url.scheme == "http" and url.host in _LOOPBACK
    try:
        verify: ssl.SSLContext | bool = True
        if ca_file is not None:
            verify = httpx.create_ssl_context() if public else ssl.create_default_context(cafile=ca_file)
            verify.load_verify_locations(cafile=ca_file)
        return httpx.Client(
            headers=headers, timeout=timeout, mounts=_NO_PROXY, verify=verify, trust_env=not is_here
        )
    except ImportError as exc:
        raise StreamRefused("the environment's SOCKS proxy requires: pip install 'httpx[socks]'") from exc
    except (ValueError, OSError, httpx.InvalidURL) as exc:  # also an invalid SSL_CERT_FILE
        raise StreamRefused("the proxy or the certificates of the environment are invalid") from exc
