"""Recognizes other gateways, so that a gateway does not call itself or another gateway as its upstream.

    User-Agent of a call               sd-progress-gateway/VERSION    the receiver refuses the call
    X-Gateway of a response to /scc/…  sd-progress-gateway            the caller refuses the response

Without the first, a gateway whose `upstream.endpoint` is its own address would wait for itself until the
deadline. The second works even if a proxy in between replaces the User-Agent. CDNs detect loops in a similar
way (RFC 8586). `Via` is not used: proxies add their own, and only the last field of a name is kept.
"""

from __future__ import annotations

from collections.abc import Mapping

from gateway import __version__
from gateway.domain.errors import UpstreamIsGateway

_NAME = "sd-progress-gateway"
USER_AGENT = f"{_NAME}/{__version__}"
RESPONSE_HEADER = ("X-Gateway", _NAME)
MESSAGE = "upstream.endpoint is the address of an sd-progress-gateway, not of the vendor"


def is_gateway(user_agent: str | None) -> bool:
    """Tell whether a request comes from a gateway. The vendor's SDKs may send any other User-Agent."""
    return user_agent is not None and user_agent.startswith(f"{_NAME}/")


def refuse_gateway_response(headers: Mapping[str, str]) -> None:
    """Refuse the headers of a response that comes from another gateway. Raises: UpstreamIsGateway."""
    if headers.get("x-gateway") == _NAME:
        raise UpstreamIsGateway(MESSAGE, cause=MESSAGE)
