"""Shows values of settings as they are written in TOML, without secrets."""

from __future__ import annotations

import json
import re
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import SecretStr

HIDDEN = "(hidden)"
_MAX_LENGTH = 100
_AT = re.compile("@|%40")  # between a login and a host
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_NO_SECRETS = {"direct"}  # of upstream.proxy


def rejected_value(path: list[str], value: Any) -> str:
    """Return an invalid value for an error message, shortened. It may be of any type.

    Values in [credentials] may be secrets, and so may the text before an "@" in a URL, which may be escaped.
    """
    if path[:1] == ["credentials"] or _AT.search(str(value)):
        return HIDDEN
    text = toml_value(value)
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}…"


def effective_value(section: str, value: Any) -> str:
    """Return a validated value of a section in TOML. A secret is hidden, and so is the login in a URL."""
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
        scheme = _SCHEME.match(value)
        if value and (section == "credentials" or not (scheme or value in _NO_SECRETS)):
            return toml_value(HIDDEN)
        if scheme and _AT.search(value):
            value = f"{scheme[0]}{HIDDEN}@{_AT.split(value)[-1]}"
    return toml_value(value)


def toml_value(value: Any) -> str:
    """Return a value as it is written in TOML. A path that is not set is an empty text."""
    text = str(value)  # a number, a date or a time
    match value:
        case bool():
            text = text.lower()
        case Enum():
            text = toml_value(value.value)
        case None:
            text = '""'
        case str() | Path():
            text = json.dumps(text, ensure_ascii=False)
        case list():
            text = f"[{', '.join(map(toml_value, value))}]"
        case dict():
            text = f"{{{', '.join(f'{key} = {toml_value(item)}' for key, item in value.items())}}}"
    return text
