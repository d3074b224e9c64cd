"""`make docs`: writes the generated parts of the documents, between their markers.

<!-- made by `make docs`: NAME -->
…
<!-- end of NAME -->
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from pydantic import SecretStr

from gateway.api.problems import PROBLEMS
from gateway.domain.errors import GatewayError, UpstreamRejected
from gateway.settings.model import Settings
from gateway.telemetry.counters import CallbackCounter, FastCounters, FastHistograms
from gateway.telemetry.metrics import Metrics
from tests.docs.markdown import ROOT, Document, documents
from tests.support import yaml_files
from tests.support.promql import label_names

CONFIG = ROOT / "config" / "gateway.toml"
RULES = ROOT / "helm" / "sd-progress-gateway" / "rules" / "gateway.yaml"

_MARKED = re.compile(
    r"(?P<begin><!-- made by `make docs`: (?P<name>[\w-]+) -->\n).*?(?P<end><!-- end of (?P=name) -->)",
    re.DOTALL,
)
_SETTING = re.compile(r"# (?P<name>\w+) = .*?(?:\s+# (?P<meaning>.*))?")
_RETRY = {429: "yes, after", 500: "no: tell the operators", 502: "yes", 503: "yes, after", 504: "yes"}

Rows = Iterator[tuple[str, ...]]


def table(heads: tuple[str, ...], rows: Rows) -> str:
    """Return a Markdown table."""
    lines = [heads, tuple("---" for _ in heads), *rows]
    return (
        "\n"
        + "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)
        + "\n"
    )


# --- settings ---------------------------------------------------------------------------------------------


def settings() -> str:
    """Return the table of settings: the model, with the meanings from config/gateway.toml."""

    def rows() -> Rows:
        descriptions = meanings()
        for section, field in Settings.model_fields.items():
            properties = field.annotation.model_json_schema()["properties"]  # type: ignore[union-attr]
            defaults = getattr(Settings(), section)
            for name, schema in properties.items():
                yield (
                    f"`{section}.{name}`",
                    _default(getattr(defaults, name)),
                    _allowed(schema),
                    descriptions[section, name],
                )

    return table(("setting", "default", "allowed", "meaning"), rows())


def meanings() -> dict[tuple[str, str], str]:
    """Return the comment of each setting in config/gateway.toml, by section and name."""
    found: dict[tuple[str, str], str] = {}
    section, name = "", ""
    for line in CONFIG.read_text(encoding="utf-8").splitlines():
        if header := re.match(r"\[(\w+)\]", line):
            section = header[1]
        elif section and (setting := _SETTING.fullmatch(line)):
            name = setting["name"]
            found[section, name] = setting["meaning"] or ""
        elif section and (more := re.fullmatch(r"#\s{10,}# (.*)", line)):
            found[section, name] += f" {more[1]}"
    return found


def _default(value: Any) -> str:
    if value is None or value in ("", []) or isinstance(value, SecretStr):
        return ""
    if isinstance(value, list):
        return ", ".join(f"`{item}`" for item in value)
    if isinstance(value, float):
        return f"{value:g}"
    return f"`{str(value).lower()}`" if isinstance(value, bool | str) else str(value)


def _allowed(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:  # an optional path
        return "a file"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    match schema.get("type"):
        case "boolean":
            return "`true`, `false`"
        case "array":
            return "a list"
        case "integer" | "number":
            least = (
                f"{schema['minimum']:,}" if "minimum" in schema else f"above {schema['exclusiveMinimum']:,}"
            )
            return f"{least} to {schema['maximum']:,}".replace(".0", "")
    return "text"


# --- problems ---------------------------------------------------------------------------------------------


def problems() -> str:
    """Return the table of problem codes, and whether a client should retry."""

    def rows() -> Rows:
        for kind, (status, title) in PROBLEMS.items():
            retry = "for a while" if kind is UpstreamRejected else _RETRY.get(status, "no")
            words = (
                f"{title}: a bug." if kind is GatewayError else re.split(r"(?<=\.)\s", str(kind.__doc__))[0]
            )
            yield f"`{kind.code}`", str(status), retry, words

    return table(("code", "HTTP", "ask again?", "what it is"), rows())


# --- metrics and alerts -----------------------------------------------------------------------------------


def metrics() -> str:
    """Return the table of metrics."""

    def rows() -> Rows:
        for metric in vars(Metrics(CollectorRegistry(), gateway_version="")).values():
            if isinstance(metric, MetricWrapperBase | CallbackCounter | FastCounters | FastHistograms):
                family = next(iter(metric.describe()))
                name = family.name + ("_total" if family.type == "counter" else "")
                labels = " ".join(f"`{label}`" for label in label_names(metric))
                yield f"`{name}`", family.type, labels, family.documentation

    return table(("metric", "type", "labels", "meaning"), rows())


def alerts() -> str:
    """Return the alerts, each with its runbook."""
    sections = []
    for group in yaml_files.load(RULES.read_text(encoding="utf-8"))["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                texts = rule["annotations"]
                when = (
                    f"{rule['labels']['severity']}, {'after ' + rule['for'] if 'for' in rule else 'at once'}"
                )
                summary = re.sub(r"\{\{ \$labels\.(\w+) \}\}", r"*\1*", texts["summary"])
                sections.append(f"#### {rule['alert']}\n\n{summary} ({when})\n\n{_code(texts['runbook'])}\n")
    return "\n" + "\n".join(sections) + "\n"


def _code(words: str) -> str:
    # Puts names of metrics, settings and codes into backticks, unless they already are.
    parts = words.split("`")
    name = r"(?<![\w`])((?:sd_gateway_|process_)\w+|(?:upstream|cache|store|server|watch)\.[a-z_]+\b(?!\.))"
    parts[::2] = [re.sub(name, r"`\1`", part) for part in parts[::2]]
    return "`".join(parts)


# --- writing ----------------------------------------------------------------------------------------------

TABLES: Mapping[str, Callable[[], str]] = {
    "settings": settings,
    "problems": problems,
    "metrics": metrics,
    "alerts": alerts,
}


def current(document: Document) -> str:
    """Return the document's text with its generated parts updated."""
    return _MARKED.sub(lambda part: part["begin"] + TABLES[part["name"]]() + part["end"], document.text)


def generated(document: Document) -> list[str]:
    """Return the names of a document's generated parts."""
    return [part["name"] for part in _MARKED.finditer(document.text)]


def main() -> None:
    """Update every document."""
    for document in documents():
        document.path.write_text(current(document), encoding="utf-8")


if __name__ == "__main__":
    main()
