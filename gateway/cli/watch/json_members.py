"""Reads the gateway's JSON, of which the vendor determines a part: a task's `state`, and a result.

Python's parser refuses some valid JSON, such as an integer of more than 4,300 digits. A member with such a
value is read as null, so that one member does not make the whole text unreadable.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from gateway.domain.snapshot import strict_json

T = TypeVar("T")


def read_members(text: bytes) -> dict[str, Any]:
    """Return the members of a JSON object. Raises: ValueError if the text is no JSON object."""
    return _values(_decode(text, _OBJECT))


def read_items(text: bytes, name: str) -> list[dict[str, Any]]:
    """Return the objects of an array that is a member of a JSON object.

    Raises: ValueError if there is no such array, or if an item of it is not an object.
    """
    array = _decode(text, _OBJECT).get(name, msgspec.Raw(b"null"))
    return [_values(item) for item in _decode(array, _OBJECTS)]


def _decode(text: bytes | msgspec.Raw, shape: msgspec.json.Decoder[T]) -> T:
    try:
        return shape.decode(text)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise ValueError("not JSON of the expected shape") from exc


def _values(members: dict[str, msgspec.Raw]) -> dict[str, Any]:
    return {name: _value(bytes(raw)) for name, raw in members.items()}


def _value(text: bytes) -> Any:
    try:
        return strict_json(text)
    except ValueError:
        return None


_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_OBJECTS = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])
