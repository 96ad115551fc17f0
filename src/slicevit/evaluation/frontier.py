"""The accuracy/cost frontier: the runs, their axes and marks, and the picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from slicevit.checkpoint import require_classifier
from slicevit.evaluation.results import WidthResult, by_width, macs_unit, read_metrics, read_results
from slicevit.files import replacing


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells it.

    Attributes:
        name: of the run, to be shown.
        folder: where it was read from.
        config: config.json.
        results: a row per width.
        metrics: rows of metrics.csv, a row per epoch and width.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    results: list[WidthResult]
    metrics: list[dict[str, Any]]


def load_run(folder: Path | str) -> RunRecord:
    """Read config.json, results.json and, if there, metrics.csv; the folder's name is the run's.

    Raises:
        ValueError: a file is missing or broken, or the run is of no classifier.
    """
    folder = Path(folder)
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: is {folder} the folder of a run?") from error
    except ValueError as error:
        raise ValueError(f"{path} is broken ({error}): it must be JSON") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is broken: it must be a JSON object")
    require_classifier(folder)
    return RunRecord(folder.resolve().name, folder, config, read_results(folder), read_metrics(folder))


@dataclass(frozen=True)
class Mark:
    """How one line looks, in matplotlib's and in plotly's words; colours for light and dark pages."""

    light: str
    dark: str
    marker: str
    symbol: str
    dashes: tuple[float, ...]  # on, off, ... in line widths; empty is a solid line


_COLOURS = [
    ("#1f5fa8", "#7db4f0"),
    ("#c2491d", "#ff9d6b"),
    ("#1a7a58", "#5fd3a5"),
    ("#7b4ea3", "#c7a3f0"),
    ("#4a4a4a", "#d0d0d0"),
    ("#8f6400", "#e8c15a"),
    ("#b0245f", "#ff8fb8"),
    ("#0f7484", "#66d0de"),
]
_SHAPES = [
    ("o", "circle"),
    ("s", "square"),
    ("^", "triangle-up"),
    ("D", "diamond"),
    ("v", "triangle-down"),
    ("P", "cross"),
    ("*", "star"),
]
_DASHES: list[tuple[float, ...]] = [(), (5, 2), (1.5, 1.5), (7, 2, 1.5, 2), (9, 3), (4, 2, 1.5, 2, 1.5, 2)]


def mark(index: int) -> Mark:
    """The look of the index-th line; colour, marker and dashes repeat with different periods."""
    light, dark = _COLOURS[index % len(_COLOURS)]
    marker, symbol = _SHAPES[index % len(_SHAPES)]
    return Mark(light, dark, marker, symbol, _DASHES[index % len(_DASHES)])


@dataclass(frozen=True)
class CostAxis:
    """One horizontal axis of the frontier.

    Attributes:
        name: short, for a switch.
        label: with the unit.
        points: per run the widths whose cost is known, narrowest first, each with that cost.
        log: whether the scale is logarithmic (where costs differ by a factor of four or more).
        low, high: the ends, in the unit.
        ticks: where the logarithmic scale is labelled, in the unit.
    """

    name: str
    label: str
    points: list[list[tuple[WidthResult, float]]]
    log: bool
    low: float
    high: float
    ticks: list[float]

    def place(self, cost: float) -> float:
        """Where a cost lies between the ends, from 0 to 1."""
        if self.log:
            return math.log(cost / self.low) / math.log(self.high / self.low)
        return (cost - self.low) / (self.high - self.low)


def cost_axes(runs: Sequence[RunRecord]) -> list[CostAxis]:
    """The axes that the runs have values for: multiply-accumulates, latency, parameters."""
    unit, scale = macs_unit(row for run in runs for row in run.results)
    wanted: list[tuple[str, str, Callable[[WidthResult], float | None]]] = [
        (unit, f"Multiply-accumulates ({unit})", lambda row: row.gmacs * scale),
        ("Latency", "Latency (ms)", lambda row: row.latency_ms),
        ("Parameters", "Parameters (M)", lambda row: row.param_count),
    ]
    axes = []
    for name, label, cost in wanted:
        points = [[(row, value) for row in by_width(run.results) if (value := cost(row)) is not None] for run in runs]
        known = [value for line in points for _, value in line]
        if known:
            log, low, high = _span(known)
            axes.append(CostAxis(name, label, points, log, low, high, _log_ticks(low, high) if log else []))
    return axes


def _span(values: Sequence[float]) -> tuple[bool, float, float]:
    low, high = min(values), max(values)
    if low > 0 and high >= 4 * low:
        margin = (high / low) ** 0.07
        return True, low / margin, high * margin
    margin = 0.07 * (high - low) or 0.1 * high or 1.0
    return False, low - margin, high + margin


def _log_ticks(low: float, high: float) -> list[float]:
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [step * 10.0**power for power in range(-6, 7) for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    return ticks


def accuracy_span(runs: Sequence[RunRecord]) -> tuple[float, float]:
    """Ends of the top-1 axis, in per cent, with room for the markers.

    Widths that were not trained may be so bad that they would flatten the rest: those further below
    than the trained ones are apart do not count, and are drawn at the edge.
    """
    rows = [row for run in runs for row in run.results]
    trained = [row.top1 for row in rows if row.trained] or [row.top1 for row in rows]
    low, high = min(trained), max(trained)
    top1 = trained + [row.top1 for row in rows if row.top1 >= low - (high - low)]
    margin = 0.07 * (max(top1) - min(top1)) or 1.0
    return min(top1) - margin, max(top1) + margin


def edge_note(runs: Sequence[RunRecord]) -> str | None:
    """What hollow markers mean, if there are any."""
    untrained = [row.top1 for run in runs for row in run.results if not row.trained]
    if not untrained:
        return None
    off_scale = min(untrained) < accuracy_span(runs)[0]
    return "width not trained" + (" (at the lower edge: off the scale)" if off_scale else "")


def labelled_widths(axis: CostAxis, character: float) -> list[tuple[str, float, float]]:
    """Which widths of the first run can be named along `axis` without touching: (width, cost, top-1).

    The ends and the simplest fractions come first; `character` is the width of one letter as a part of
    the axis.
    """
    points = axis.points[0]
    ends = points[:1] + points[-1:]
    kept: list[tuple[WidthResult, float]] = []
    for row, cost in sorted(points, key=lambda p: (p not in ends, Fraction(p[0].width).denominator, p[1])):
        room = [(len(row.width) + len(other.width)) / 2 + 1 for other, _ in kept]
        gaps = [abs(axis.place(cost) - axis.place(other)) for _, other in kept]
        if all(gap >= letters * character for gap, letters in zip(gaps, room, strict=True)):
            kept.append((row, cost))
    return [(row.width, cost, row.top1) for row, cost in kept]


def plot_frontier(runs: Sequence[RunRecord], out: Path | str) -> None:
    """Draw top-1 against each cost as a PNG: a line per run, hollow markers for widths not trained.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not any(run.results for run in runs):
        raise ValueError("no run has results to draw: evaluate one first")
    axes = cost_axes(runs)
    figure = Figure(figsize=(4.1 * len(axes) + 0.5, 4.3), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    low, high = accuracy_span(runs)
    panels[0].set_ylabel("Top-1 accuracy (%)")
    panels[0].set_ylim(low, high)
    panels[0].yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    for panel, axis in zip(panels, axes, strict=True):
        _draw_panel(panel, axis, low, high)
    handles = [_line(mark(index), [], [], index) for index in range(len(runs))]
    names = [_plain(run.name) for run in runs]
    if note := edge_note(runs):
        handles.append(Line2D([], [], linestyle="", marker="o", color="#555", markerfacecolor="white"))
        names.append(note)
    inches = 0.9 + 0.085 * max(len(name) for name in names)
    columns = max(1, min(len(names), int(figure.get_figwidth() / inches)))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, handlelength=4)
    with replacing(Path(out)) as temporary:
        figure.savefig(temporary, format="png")


def _draw_panel(panel: Axes, axis: CostAxis, low: float, high: float) -> None:
    panel.set_xscale("log" if axis.log else "linear")
    panel.set_xlim(axis.low, axis.high)
    panel.set_xlabel(axis.label)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#e3e3e3", linewidth=0.8)
    if axis.log:
        panel.set_xticks(axis.ticks, [f"{tick:g}" for tick in axis.ticks])
        panel.xaxis.set_minor_locator(NullLocator())
    for width, cost, top1 in labelled_widths(axis, character=0.018):
        panel.text(axis.place(cost), 1.015, width, transform=panel.transAxes, ha="center", fontsize=8, color="#444")
        panel.add_line(Line2D([cost, cost], [max(top1, low), high], color="#c4c4c4", linewidth=0.7, zorder=0))
    for index, points in enumerate(axis.points):
        trained = [(cost, row.top1) for row, cost in points if row.trained]
        untrained = [(cost, max(row.top1, low)) for row, cost in points if not row.trained]
        look = mark(index)
        panel.add_line(_line(look, [x for x, _ in trained], [y for _, y in trained], index))
        hollow = _line(look, [x for x, _ in untrained], [y for _, y in untrained], index)
        hollow.set(linestyle="", markerfacecolor="white", clip_on=False, in_layout=False)
        panel.add_line(hollow)


def _line(look: Mark, x: list[float], y: list[float], index: int) -> Line2D:
    return Line2D(
        x,
        y,
        color=look.light,
        linestyle=(0, look.dashes) if look.dashes else "-",
        linewidth=1.6,
        marker=look.marker,
        markersize=8 if look.marker in "P*" else 6,
        zorder=3 - index / 100,
    )


def _plain(name: str) -> str:
    """A name as matplotlib shows it: not too long, and no formula."""
    return (name if len(name) <= 40 else f"{name[:39]}…").replace("$", r"\$")
