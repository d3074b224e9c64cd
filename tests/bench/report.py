"""Results as text for people and as JSON for the charts."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from measuring import Comparison, Figures

_HEADINGS = ("", "median", "min", "max", "ratio", "min", "max")
_NAME_WIDTH, _WIDTH = 36, 10


def text(comparison: Comparison) -> str:
    """Return a table of the figures of each server and their ratios to the baseline.

    Ratios are computed per round, from adjacent measurements; the table has their median and extremes.
    """
    samples = comparison.samples
    lines = [comparison.title, _line(*_HEADINGS)]
    for figure in dict.fromkeys(figure for rounds in samples.values() for figure in rounds[0]):
        lines.append(f"  {figure}")
        for name, rounds in samples.items():
            if figure in rounds[0]:
                cells = [_number(value) for value in _spread([row[figure] for row in rounds])]
                cells += (
                    _ratios(rounds, samples[comparison.baseline], figure)
                    if name != comparison.baseline
                    else ["1"]
                )
                lines.append(_line(f"    {name}", *cells))
    return "\n".join([*lines, *(f"  {note}" for note in comparison.notes), ""])


def document(
    comparisons: Sequence[Comparison], *, skipped: Mapping[str, str], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return all samples and a description of the machine, for JSON."""
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "options": options,
        "skipped": skipped,
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }


def _ratios(rounds: list[Figures], base: list[Figures], figure: str) -> list[str]:
    pairs = [(mine[figure], other.get(figure, 0.0)) for mine, other in zip(rounds, base, strict=True)]
    if any(other <= 0 for _, other in pairs):  # the baseline lacks the figure, or it is zero
        return []
    return [f"{ratio:.3f}" for ratio in _spread([mine / other for mine, other in pairs])]


def _spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"  # three significant digits


def _line(name: str, *cells: str) -> str:
    return f"{name:{_NAME_WIDTH}}" + "".join(f"{cell:>{_WIDTH}}" for cell in cells)
