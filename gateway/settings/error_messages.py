"""Words the errors that pydantic finds in the settings: the key, its value, and what is allowed.

pydantic's own texts are not used, because they mention Python classes, parsers and regular expressions. What
is allowed follows from the JSON schema of the model, or is the text of one of the model's own validators. For
an unknown setting, the message suggests a similar one. A value that may be a secret is not shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import ErrorDetails

from gateway.settings.errors import did_you_mean
from gateway.settings.known_settings import SECTIONS, section_model, similar_section, similar_settings
from gateway.settings.secret_text import InvalidSecret
from gateway.settings.value_text import HIDDEN, rejected_value

Schema = Mapping[str, Any]
Path = tuple[str | int, ...]


def locate_error(error: ErrorDetails) -> Path:
    """Return the path of the setting with the error: section, key, and position in a list."""
    path = error["loc"]
    # A validator of a whole section names the key first.
    return (*path, _text(error).partition(": ")[0]) if _is_of_section(error) else path


def describe_error(error: ErrorDetails) -> str:
    """Return one line for an error, without its source."""
    path, value = locate_error(error), error["input"]
    name = _name(path)
    if error["type"] == "extra_forbidden":
        return f"{name}: {_unknown([str(part) for part in path], value)}"
    if _is_of_section(error):
        value = value.get(path[1])
        message = _text(error).partition(": ")[2]
    elif error["type"] == "value_error":
        message = _text(error)
    else:
        message = f"must be {allowed_values(path)}"
    is_secret = isinstance(error.get("ctx", {}).get("error"), InvalidSecret)
    shown = HIDDEN if is_secret else rejected_value([str(part) for part in path], value)
    return f"{name} = {shown}: {message}"


def allowed_values(path: Path) -> str:
    """Return what is allowed for a setting, or for an item of its list: "a whole number from 0 to 65535"."""
    section, *rest = path
    if not rest:
        return f"a section: [{section}]"
    schema: Schema = section_model(str(section)).model_json_schema()
    definitions: Mapping[str, Schema] = schema.get("$defs", {})
    schema = schema["properties"][rest[0]]
    for _ in rest[1:]:
        schema = schema["items"]
    return _allowed(definitions[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema)


def _is_of_section(error: ErrorDetails) -> bool:
    return error["type"] == "value_error" and len(error["loc"]) == 1


def _text(error: ErrorDetails) -> str:
    return error["msg"].removeprefix("Value error, ")


def _name(path: Path) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _unknown(path: list[str], value: Any) -> str:
    section, *rest = path
    if rest:
        if similar := similar_settings(section, rest[0]):
            return f"unknown setting; {did_you_mean(['.'.join(known) for known in similar])}"
        return f"unknown setting; known: {', '.join(SECTIONS[section])}"
    if not isinstance(value, dict | list) and (similar := similar_settings("", section)):
        return f"unknown setting; {did_you_mean(['.'.join(known) for known in similar])}"
    if close := similar_section(section):
        return f"unknown section; {did_you_mean([f'[{close}]'])}"
    return f"unknown section; known: {', '.join(SECTIONS)}"


def _allowed(schema: Schema) -> str:
    text = "text"
    match schema:
        case {"enum": [*others, last]}:
            text = f"{', '.join(others)} or {last}"
        case {"description": description}:
            text = description
        case {"anyOf": _}:  # an optional path
            text = "a file name"
        case {"type": "boolean"}:
            text = "true or false"
        case {"type": "integer"}:
            text = f"a whole number {_range(schema)}"
        case {"type": "number"}:
            text = f"a number {_range(schema)}"
        case {"type": "array"}:
            text = "a list" if "minItems" not in schema else "a list that is not empty"
    return text


def _range(schema: Schema) -> str:
    most = f"{schema['maximum']:.15g}"
    if "exclusiveMinimum" in schema:
        return f"above {schema['exclusiveMinimum']:.15g} and at most {most}"
    return f"from {schema['minimum']:.15g} to {most}"
