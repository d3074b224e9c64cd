"""The settings in environment variables, and the variables with our prefix that are none."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import NamedTuple

from gateway.settings.errors import did_you_mean
from gateway.settings.known_settings import SECTIONS, is_known, similar_settings, similar_to_joined

PREFIX = "SD_GATEWAY_"
SPEEDPIX = {
    "SPEEDPIX_APP_KEY": ("credentials", "access_key"),
    "SPEEDPIX_APP_SECRET": ("credentials", "secret_key"),
    "SPEEDPIX_ENDPOINT": ("upstream", "endpoint"),
}
URL_VARIABLE = "SD_GATEWAY_URL"  # no setting: the gateway that `sd-gateway watch` queries

# In a namespace with a service named sd-gateway or sd-gateway-…, Kubernetes sets these variables in all pods:
# https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
# SD_GATEWAY_PORT is one of them only if its value is a URL, and otherwise a mistake of the user.
_OF_SERVICES = re.compile(
    r"""
    (\w+_)? (
        SERVICE_HOST=.* | SERVICE_PORT(_\w+)?=\d+
        | PORT=(tcp|udp|sctp)://.* | PORT_\d+_(TCP|UDP|SCTP)(_PROTO|_PORT|_ADDR)?=.*
    )
    """,
    re.VERBOSE,
)


class Variable(NamedTuple):
    """The value of a setting, and the variable that has it."""

    setting: tuple[str, str]
    value: str
    name: str


class Variables(NamedTuple):
    """The settings in environment variables.

    `layers` has those of the vendor's SDKs first and the gateway's own second, which take precedence.
    `mistakes` has a line for each variable that cannot be read; `ignored` has the variables that Kubernetes
    sets.
    """

    layers: tuple[list[Variable], list[Variable]]
    mistakes: list[str]
    ignored: list[str]


def read_variables(environ: Mapping[str, str]) -> Variables:
    """Find the settings in the environment."""
    sdk: list[Variable] = []
    own: dict[tuple[str, str], Variable] = {}
    mistakes: list[str] = []
    ignored: list[str] = []
    for name, value in sorted(environ.items()):
        if not name.startswith(PREFIX) and name not in SPEEDPIX:
            continue
        if not _is_utf8(name + value):
            mistakes.append(f"{name}: is not UTF-8")
        elif name in SPEEDPIX:
            if value:
                sdk.append(Variable(SPEEDPIX[name], value, name))
        elif is_known(*(setting := _setting_of(name))):
            if same := own.get(setting):
                mistakes.append(f"{name}: {'.'.join(setting)} is already set by {same.name}")
            own[setting] = Variable(setting, value, name)
        elif _is_of_a_service(name, value):
            ignored.append(name)
        elif name != URL_VARIABLE:
            mistakes.append(f"{name}: {_describe_unknown(name)}")
    return Variables((sdk, list(own.values())), mistakes, ignored)


def variable_of(section: str, key: str) -> str:
    """Return the name of the variable that sets a setting."""
    return f"{PREFIX}{section}__{key}".upper()


def _setting_of(name: str) -> tuple[str, str]:
    section, _, key = name.removeprefix(PREFIX).lower().partition("__")
    return section, key


def _is_of_a_service(name: str, value: str) -> bool:
    section, key = _setting_of(name)
    return not (key and section in SECTIONS) and bool(
        _OF_SERVICES.fullmatch(f"{name.removeprefix(PREFIX)}={value}")
    )


def _describe_unknown(name: str) -> str:
    section, key = _setting_of(name)
    similar = similar_settings(section, key) if key else similar_to_joined(section)
    if similar:
        return f"unknown setting; {did_you_mean([variable_of(*setting) for setting in similar])}"
    if difflib.get_close_matches(name.removeprefix(PREFIX), [URL_VARIABLE.removeprefix(PREFIX)]):
        return f"unknown setting; {did_you_mean([URL_VARIABLE])}"
    if section in SECTIONS:
        keys = ", ".join(SECTIONS[section]).upper()
        return f"unknown setting; known: {PREFIX}{section.upper()}__ and {keys}"
    return f"unknown setting; known: {', '.join(f'{PREFIX}{known.upper()}__…' for known in SECTIONS)}"


def _is_utf8(text: str) -> bool:
    # Python represents bytes that are not UTF-8 as lone surrogates, which cannot be encoded.
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
