"""Splits a TOML document into statements, to find the lines of its keys: tomllib does not report them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

Keys = tuple[str, ...]

# A line break ends a statement, except within brackets or in a text with three quotes.
_TOKEN = re.compile(
    r"""
    \#[^\n]*
    | \"{3}(?:\\.|[^\\])*?\"{3,5} | '{3}.*?'{3,5} | "(?:\\.|[^"\\\n])*" | '[^'\n]*'
    | (?P<open>[\[{]) | (?P<close>[\]}]) | (?P<end>\n) | [^\#"'\[\]{}\n]+ | .
    """,
    re.VERBOSE | re.DOTALL,
)


class Statement(NamedTuple):
    """A header or a key with its value.

    `line` and `column` are its start. `keys` is the path of what it defines; empty if it is not TOML. `inner`
    has the paths of the keys in an inline table.
    """

    line: int
    column: int
    keys: Keys
    inner: list[Keys]


def split_statements(text: str) -> Iterator[Statement]:
    """Yield the statements of a document that ends with a line break."""
    table: Keys = ()
    begin, line, depth = 0, 1, 0
    for token in _TOKEN.finditer(text):
        depth += (token.lastgroup == "open") - (token.lastgroup == "close")
        if token.end() < len(text) and (token.lastgroup != "end" or depth > 0):
            continue
        source = text[begin : token.end()]
        content = source.lstrip()
        column = len(source) - len(content) + 1
        if content and not content.startswith("#"):
            keys, inner = _parse(content)
            if content.startswith("["):
                table = keys
            elif keys:
                keys, inner = (*table, *keys), [(*table, *path) for path in inner]
            yield Statement(line, column, keys, inner)
        begin, line, depth = token.end(), line + source.count("\n"), 0


def _parse(statement: str) -> tuple[Keys, list[Keys]]:
    values: Any = {}
    with suppress(ValueError, RecursionError):
        values = tomllib.loads(statement)
    keys: Keys = ()
    while isinstance(values, dict) and len(values) == 1:
        [(key, values)] = values.items()
        keys = (*keys, key)
    return keys, list(_inner(values, keys))


def _inner(value: Any, keys: Keys) -> Iterator[Keys]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*keys, key)
            yield from _inner(item, (*keys, key))
