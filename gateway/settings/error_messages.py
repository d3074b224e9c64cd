"""Formats configuration errors: one line each, with the setting, its value and the allowed values.

Most texts are pydantic's. For an unknown setting the line suggests a similar one. A value that may be a
secret is not shown.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

# These replace pydantic's texts, which mention Python classes and parsers.
_MESSAGES: Mapping[str, str] = {
    "model_type": "must be a section",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
}


def describe_error(error: ErrorDetails, settings: type[BaseModel], *, unnamed: str) -> str:
    """Return one line for an error in these settings; `unnamed` stands for an empty name."""
    path = [str(part) for part in error["loc"]]
    message = _MESSAGES.get(error["type"], error["msg"].removeprefix("Value error, "))
    value = error["input"]
    if error["type"] == "value_error" and len(path) == 1:  # validators of a whole section name the key first
        key, _, message = message.partition(": ")
        path.append(key)
        value = value.get(key)
    name = ".".join(filter(None, path))  # the variable SD_GATEWAY_SERVER has a section and no key
    if error["type"] == "extra_forbidden":
        return f"{name or unnamed}: unknown setting; {_suggestion(path, settings)}"
    # Values in [credentials] may be secrets, and so may user information before an @ in a URL.
    shown = "(hidden)" if path[:1] == ["credentials"] or "@" in str(value) else repr(value)
    return f"{name} = {shown}: {message[0].lower()}{message[1:]}"


def _suggestion(path: list[str], settings: type[BaseModel]) -> str:
    model: Any = settings
    for part in path[:-1]:
        model = model.model_fields[part].annotation
    known = list(model.model_fields)
    close = difflib.get_close_matches(path[-1], known, n=1)
    return f"did you mean {'.'.join([*path[:-1], close[0]])}?" if close else f"known: {', '.join(known)}"
