"""Draws the README's benchmark charts: bars of medians, with lines from the minimum to the maximum.

    python plots.py RESULTS.json FOLDER

draws FOLDER/bench-light.svg and bench-dark.svg. RESULTS is the output of `run.py --json`. Charts without
results are left out.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure


class Chart(NamedTuple):
    """One figure of the comparisons whose titles start with `comparison`."""

    comparison: str
    figure: str
    title: str
    better: str  # "higher" or "lower"


class Theme(NamedTuple):
    """Colours of the text, of the gateway's bars and of the other bars."""

    ink: str
    ours: str
    others: str


CHARTS = (
    Chart("hits: one hot task", "hits per CPU-second", "Hits per CPU-second, one hot task", "higher"),
    Chart("hits: 1,000", "hits per CPU-second", "Hits per CPU-second, 1,000 tasks", "higher"),
    Chart("herd", "age, p99, s", "200 pollers: age of responses, p99, s", "lower"),
    Chart("herd", "upstream calls", "200 pollers: upstream calls", "lower"),
    Chart("rush", "late, p99, ms", "5,000 requests a second: delay, p99, ms", "lower"),
    Chart("misses", "signed upstream calls per CPU-second", "Signed upstream calls per CPU-second", "higher"),
    Chart("watchers", "server CPU per 1,000 changes, s", "5,000 clients: CPU s per 1,000 changes", "lower"),
    Chart("watchers", "late, p99, ms", "5,000 clients: delay, p99, ms", "lower"),
    Chart("curve: by cached tasks", "CPU time of a hit, µs", "CPU µs per hit, by cached tasks", "lower"),
    Chart("curve: by connections", "CPU time of a hit, µs", "CPU µs per hit, by connections", "lower"),
)
THEMES = {"light": Theme("#24292f", "#0969da", "#afb8c1"), "dark": Theme("#e6edf3", "#4493f8", "#57606a")}
_WHOLE = 100  # larger numbers have no decimals
_COLUMNS = 2
_INCHES = (11.0, 1.9)  # width of the figure, height of a row
# Text is stored as text, and equal results give equal files.
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "bench", "font.size": 9}


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw the charts that have results, once per theme; return the files."""
    found = [(chart, samples) for chart in CHARTS if (samples := _samples(results, chart))]
    if not found:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, theme in THEMES.items():
        colours = dict.fromkeys(("text.color", "xtick.color", "ytick.color"), theme.ink)
        with mpl.rc_context(_STYLE | colours):
            files.append(folder / f"bench-{name}.svg")
            _draw(found, theme, files[-1])
    return files


def _samples(results: Mapping[str, Any], chart: Chart) -> dict[str, list[float]]:
    """Return the figure's samples of each contestant."""
    return {
        name: [figures[chart.figure] for figures in rounds]
        for comparison in results["comparisons"]
        if comparison["title"].startswith(chart.comparison)
        for name, rounds in comparison["samples"].items()
        if chart.figure in rounds[0]
    }


def _draw(charts: Sequence[tuple[Chart, dict[str, list[float]]]], theme: Theme, file: Path) -> None:
    rows = -(-len(charts) // _COLUMNS)
    figure = Figure(figsize=(_INCHES[0], _INCHES[1] * rows), layout="constrained")
    grid = figure.subplots(rows, _COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (chart, samples) in zip(grid.flat, charts, strict=False):
        axes.set_axis_on()
        _bars(axes, chart, samples, theme)
    figure.savefig(file, transparent=True, metadata={"Date": None, "Creator": None})


def _bars(axes: Any, chart: Chart, samples: Mapping[str, Sequence[float]], theme: Theme) -> None:
    names = list(samples)
    medians = [statistics.median(values) for values in samples.values()]
    spread = [
        [median - min(values) for median, values in zip(medians, samples.values(), strict=True)],
        [max(values) - median for median, values in zip(medians, samples.values(), strict=True)],
    ]
    ours = [name.startswith("gateway") or "tasks" in name for name in names]
    bars = axes.barh(
        names,
        medians,
        xerr=spread,
        color=[theme.ours if own else theme.others for own in ours],
        error_kw={"ecolor": theme.ink, "elinewidth": 0.8},
    )
    axes.bar_label(bars, labels=[f"  {_number(median)}" for median in medians], color=theme.ink)
    axes.invert_yaxis()
    axes.set_title(f"{chart.title} ({chart.better} is better)", loc="left", fontsize=10)
    axes.set_xticks([])
    axes.margins(x=0.2)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= _WHOLE else f"{value:.3g}"


if __name__ == "__main__":
    for drawn in draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])):
        sys.stdout.write(f"{drawn}\n")
