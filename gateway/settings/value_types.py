"""The types of the values of settings: how they are parsed, and what is allowed.

A description completes the sentence "must be …" in an error message. Without one, the message is derived from
the bounds.
"""

from __future__ import annotations

import ipaddress
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

_ADDRESS_FIRST = re.compile(r"\[[0-9a-fA-F.]*:")  # a list that begins with an IPv6 address in brackets


def _split(value: Any) -> Any:
    # Environment variables have lists as comma-separated text or as a JSON array.
    if not isinstance(value, str):
        return value
    text = value.strip()
    if not text.startswith("[") or _ADDRESS_FIRST.match(text):
        return [part.strip() for part in text.split(",") if part.strip()]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError('must be comma-separated, or a JSON array such as ["a", "b"]') from None


def _networks(value: list[str]) -> list[str]:
    for entry in value:
        if value == ["*"]:
            continue
        try:
            ipaddress.ip_network(entry)
        except ValueError:
            raise ValueError(_explain_network(entry)) from None
    return value


def _explain_network(entry: str) -> str:
    if entry == "*":
        return '"*" must be the only item'
    try:
        network = ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return f'"{entry}" is not an address or a network such as 10.0.0.0/8'
    return f'"{entry}" is an address within a network; did you mean {network}?'


Positive = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
# A shorter time makes no sense: no call could succeed in it, or heartbeats would use up the processor.
AtLeastTenth = Annotated[float, Field(ge=0.1, le=86_400, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=86_400 * 30, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Port = Annotated[int, Field(ge=0, le=65_535)]
Networks = Annotated[list[str], BeforeValidator(_split), AfterValidator(_networks)]
Separated = BeforeValidator(_split)  # of a list
# An empty text means no file; as a path it would be the current directory.
File = Annotated[Path | None, BeforeValidator(lambda value: value or None)]
# A host without a port; an origin as browsers send it. A value in another form would never match a request.
Host = Annotated[
    str,
    Field(
        pattern=r"^(\*|(\*\.)?[^\s/?#@:*]+|\[[0-9a-fA-F:.]+\])$",
        description='a host without scheme and port: "a.example.com", "*.example.com", "[::1]" or "*"',
    ),
]
Origin = Annotated[
    str,
    Field(
        pattern=r"^(\*|null|[a-z][a-z0-9+.-]*://(\*\.)?[^\s/?#@*A-Z]+(:\*)?)$",
        description='an origin in lower case: "https://a.example.com", "http://localhost:8080" or "*"',
    ),
]
HeaderName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}$", description="the name of a header")
]
AddressHeader = Literal["X-Forwarded-For", "Forwarded", "X-Real-IP"]
