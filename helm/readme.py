"""Write the table of values in the chart's README from the comments in values.yaml: python helm/readme.py.

A value's comment stands above it, or behind it and below that, in the same column. What a blank line parts
from the next value is about none. Values that the schema leaves to the user (labels, resources) are one row.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "sd-progress-gateway"
BEGIN, END = "<!-- values: make chart -->\n", "<!-- end of values -->\n"

_THE_USERS = {"settings", "resources"}  # though the schema knows their keys

_KEY = re.compile(
    r"^(?P<indent> *)(?P<key>[A-Za-z]\w*):(?P<value>(?: +[^#\s][^#]*| *))(?:# ?(?P<comment>.*))?$"
)
_COMMENT = re.compile(r"^(?P<indent> *)# ?(?P<comment>.*)$")


def comments(text: str) -> dict[str, str]:
    """Return the comment of each value in values.yaml, by its dotted path."""
    found: dict[str, list[str]] = {}
    path: list[tuple[int, str]] = []  # the keys that the line is below, with their columns
    above: list[str] = []
    behind = (0, "")  # the column of the comment behind the last value, and that value
    for line in text.splitlines():
        if comment := _COMMENT.match(line):
            column = len(comment["indent"])
            if behind[1] and column == behind[0]:
                found[behind[1]].append(comment["comment"])
            else:
                above.append(comment["comment"])
            continue
        if key := _KEY.match(line):
            column = len(key["indent"])
            path = [(at, name) for at, name in path if at < column] + [(column, key["key"])]
            dotted = ".".join(name for _, name in path)
            found[dotted] = above + ([key["comment"]] if key["comment"] else [])
            behind = (key.start("comment") - 2, dotted) if key["comment"] else (0, "")
        above = []
    return {dotted: " ".join(lines) for dotted, lines in found.items()}


def rows(values: dict[str, Any], schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Tell every value by its dotted path, with its default; None for one that only holds others."""
    for name, value in values.items():
        inner = schema["properties"][name]
        if inner.get("additionalProperties") is False and path + name not in _THE_USERS:
            yield path + name, None
            yield from rows(value, inner, f"{path}{name}.")
        else:
            yield path + name, value


def table() -> str:
    """Return the table of all values."""
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    said = comments(text)
    lines = ["| value | default | meaning |", "| --- | --- | --- |"]
    for path, value in rows(yaml.safe_load(text), schema):
        default = "" if value is None else f"`{json.dumps(value)}`"
        lines.append(f"| `{path}` | {default} | {said.get(path, '')} |")
    return "\n".join(lines) + "\n"


def renewed(readme: str) -> str:
    """Return the README with the table as it should be."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


if __name__ == "__main__":
    file = CHART / "README.md"
    file.write_text(renewed(file.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"wrote {file}\n")
