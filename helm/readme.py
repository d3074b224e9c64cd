"""Generate the table of values in the chart's README from the comments in values.yaml: python helm/readme.py.

The comment of a value is above it, or behind it with continuation lines in the same column. A comment
followed by a blank line belongs to no value. Values with a free structure (labels, resources) are one row.
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

_FREE_FORM = {"settings", "resources"}  # one row, although the schema lists their keys

_KEY = re.compile(
    r"^(?P<indent> *)(?P<key>[A-Za-z]\w*):(?P<value>(?: +[^#\s][^#]*| *))(?:# ?(?P<comment>.*))?$"
)
_COMMENT = re.compile(r"^(?P<indent> *)# ?(?P<comment>.*)$")


def comments(text: str) -> dict[str, str]:
    """Return the comment of each value in values.yaml, by its dotted path."""
    found: dict[str, list[str]] = {}
    path: list[tuple[int, str]] = []  # enclosing keys with their columns
    above: list[str] = []
    behind = (0, "")  # column of the comment behind the last value, and the path of that value
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
    """Yield the dotted path and the default of each value; the default of a section is None."""
    for name, value in values.items():
        inner = schema["properties"][name]
        if inner.get("additionalProperties") is False and path + name not in _FREE_FORM:
            yield path + name, None
            yield from rows(value, inner, f"{path}{name}.")
        else:
            yield path + name, value


def table() -> str:
    """Return the table of all values."""
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    meanings = comments(text)
    lines = ["| value | default | meaning |", "| --- | --- | --- |"]
    for path, value in rows(yaml.safe_load(text), schema):
        default = "" if value is None else f"`{json.dumps(value)}`"
        lines.append(f"| `{path}` | {default} | {meanings.get(path, '')} |")
    return "\n".join(lines) + "\n"


def updated(readme: str) -> str:
    """Return the README with the current table."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


if __name__ == "__main__":
    file = CHART / "README.md"
    file.write_text(updated(file.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"wrote {file}\n")
