"""What is wrong with settings, in words: a line for each mistake, with key, value and what is allowed.

pydantic finds the mistakes and has words for most. A key that does not exist is told with the one that was
meant, and a value that may be a secret is not told at all.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

# In the place of pydantic's words, which tell of classes and parsers.
_WORDS: Mapping[str, str] = {
    "model_type": "must be a section",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
}


def describe_errors(error: ErrorDetails, settings: type[BaseModel], *, of_all: str) -> str:
    """Return one mistake in these settings as a line; `of_all` names what has no name of its own."""
    path = [str(part) for part in error["loc"]]
    message = _WORDS.get(error["type"], error["msg"].removeprefix("Value error, "))
    value = error["input"]
    if error["type"] == "value_error" and len(path) == 1:  # a check of several keys names the one at fault
        key, _, message = message.partition(": ")
        path.append(key)
        value = value.get(key)
    name = ".".join(filter(None, path))  # SD_GATEWAY_SERVER alone has a section and no key
    if error["type"] == "extra_forbidden":
        return f"{name or of_all}: unknown setting; {_meant(path, settings)}"
    # Whatever is wrong with [credentials], or stands before an @, may be a secret.
    shown = "(hidden)" if path[:1] == ["credentials"] or "@" in str(value) else repr(value)
    return f"{name} = {shown}: {message[0].lower()}{message[1:]}"


def _meant(path: list[str], settings: type[BaseModel]) -> str:
    model: Any = settings
    for part in path[:-1]:
        model = model.model_fields[part].annotation
    known = list(model.model_fields)
    close = difflib.get_close_matches(path[-1], known, n=1)
    return f"did you mean {'.'.join([*path[:-1], close[0]])}?" if close else f"known: {', '.join(known)}"
