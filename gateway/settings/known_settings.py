"""The names of all settings, and the known names that are similar to an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pydantic import BaseModel

from gateway.settings.model import Settings

# How similar a name must be to be suggested: 1 is equal. Names of another section must be more similar.
_SIMILAR, _VERY_SIMILAR = 0.6, 0.8


def section_model(section: str) -> type[BaseModel]:
    """Return the model of a section, which must exist."""
    return type(getattr(Settings(), section))


SECTIONS: dict[str, list[str]] = {
    section: list(section_model(section).model_fields) for section in Settings.model_fields
}
ALL = [(section, key) for section, keys in SECTIONS.items() for key in keys]


def is_known(section: str, key: str) -> bool:
    """Whether the setting exists."""
    return key in SECTIONS.get(section, ())


def similar_settings(section: str, key: str) -> list[tuple[str, str]]:
    """Return the settings that an unknown key of a section may stand for.

    There are several if other sections have the same key.
    """
    key = _normalized(key)
    section = similar_section(section) or section
    if is_known(section, key):
        return [(section, key)]
    if elsewhere := [known for known in ALL if known[1] == key]:
        return elsewhere
    if close := _closest(key, SECTIONS.get(section, ()), _SIMILAR):
        return [(section, close)]
    close = _closest(key, (name for _, name in ALL), _VERY_SIMILAR)
    return [known for known in ALL if known[1] == close]


def similar_section(section: str) -> str | None:
    """Return the section that an unknown name may stand for."""
    return _closest(_normalized(section), SECTIONS, _SIMILAR)


def similar_to_joined(name: str) -> list[tuple[str, str]]:
    """Return the settings that section and key without a separator may stand for, such as "server_port"."""
    name = _normalized(name)
    joined = {f"{section}_{key}": (section, key) for section, key in ALL}
    if name in joined:
        return [joined[name]]
    if same_key := [known for known in ALL if known[1] == name]:
        return same_key
    close = _closest(name, joined, _VERY_SIMILAR)
    return [joined[close]] if close else []


def _normalized(name: str) -> str:
    return name.lower().replace("-", "_")


def _closest(name: str, known: Iterable[str], cutoff: float) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)
