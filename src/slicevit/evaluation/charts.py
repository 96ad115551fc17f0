"""The report's charts as plotly figures: plain data which report.html colours for light or dark pages."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import matplotlib
import plotly.graph_objects as go
from matplotlib.colors import to_hex

from slicevit.evaluation.frontier import (
    CostAxis,
    Mark,
    RunRecord,
    accuracy_span,
    cost_axes,
    labelled_widths,
    mark,
)
from slicevit.evaluation.results import WidthResult, macs_unit, short

_MARGIN = {"l": 56, "r": 12, "t": 30, "b": 48}


def frontier_views(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """A view per cost: {"name", "data", "layout"}, with a line and a set of hollow markers per run."""
    macs = macs_unit(row for run in runs for row in run.results)
    low, high = accuracy_span(runs)
    views = []
    for axis in cost_axes(runs):
        labels = labelled_widths(axis, character=0.022)
        traces = [_leaders(labels, low, high)]
        for index, run in enumerate(runs):
            for trained in (True, False):
                points = [(row, cost) for row, cost in axis.points[index] if row.trained is trained]
                if points:
                    traces.append(_frontier_line(run, index, points, macs, low))
        layout = {
            "xaxis": _cost_axis(axis),
            "yaxis": {"title": "Top-1 accuracy (%)", "range": [low, high]},
            "annotations": [_width_label(width, axis, cost) for width, cost, _ in labels],
        }
        views.append(_view(axis.name, traces, layout))
    return views


def _frontier_line(
    run: RunRecord,
    index: int,
    points: list[tuple[WidthResult, float]],
    macs: tuple[str, float],
    low: float,
) -> go.Scatter:
    look, trained = mark(index), points[0][0].trained
    return go.Scatter(
        x=[cost for _, cost in points],
        y=[max(row.top1, low) for row, _ in points],
        cliponaxis=False,
        text=[_hover(run, row, macs) for row, _ in points],
        hovertemplate="%{text}<extra></extra>",
        mode="lines+markers" if trained else "markers",
        legendgroup=str(index),
        line={"dash": _dash(look), "width": 2},
        marker={"symbol": look.symbol, "size": 9, "line": {"width": 2}},
        meta={"light": look.light, "dark": look.dark, "hollow": not trained},
    )


def _hover(run: RunRecord, row: WidthResult, macs: tuple[str, float]) -> str:
    unit, scale = macs
    latency = "" if row.latency_ms is None else f", {short(row.latency_ms)} ms"
    return (
        f"<b>{_escaped(run.name)}</b><br>width {row.width}, {row.channels} channels"
        f"{'' if row.trained else ', not trained'}<br>top-1 {row.top1:.2f} %, top-5 {row.top5:.2f} %<br>"
        f"{short(row.gmacs * scale)} {unit}, {short(row.param_count)} M parameters{latency}"
    )


def _leaders(labels: list[tuple[str, float, float]], low: float, high: float) -> go.Scatter:
    """Thin lines from the first run's markers up to the names of their widths."""
    return go.Scatter(
        x=[x for _, cost, _ in labels for x in (cost, cost, None)],
        y=[y for _, _, top1 in labels for y in (max(top1, low), high, None)],
        mode="lines",
        hoverinfo="skip",
        legendgroup="0",
        line={"width": 1},
        meta={"light": "#c4c4c4", "dark": "#4a4f57", "hollow": False},
    )


def _width_label(width: str, axis: CostAxis, cost: float) -> dict[str, Any]:
    return {
        "text": width,
        "x": math.log10(cost) if axis.log else cost,
        "xanchor": "center",
        "y": 1,
        "yref": "paper",
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"size": 11},
    }


def _cost_axis(axis: CostAxis) -> dict[str, Any]:
    if not axis.log:
        return {"title": axis.label, "range": [axis.low, axis.high], "nticks": 7}
    return {
        "title": axis.label,
        "type": "log",
        "range": [math.log10(axis.low), math.log10(axis.high)],
        "tickvals": axis.ticks,
        "ticktext": [f"{tick:g}" for tick in axis.ticks],
    }


def training_views(run: RunRecord) -> list[dict[str, Any]]:
    """Top-1 and training loss over the epochs, a line per width; a curve nobody logged is left out."""
    widths = metric_widths(run)
    views = []
    for column, title in (("top1", "Top-1 accuracy (%)"), ("train_loss", "Training loss")):
        traces = []
        for index, width in enumerate(widths):
            rows = [row for row in run.metrics if row["width"] == width and row[column] is not None]
            if rows:
                traces.append(_training_line(width, width_mark(index, len(widths)), index, rows, column))
        if traces:
            epochs = {"title": "Epoch", "nticks": 8}
            views.append(_view(title, traces, {"xaxis": epochs, "yaxis": {}}))
    return views


def _training_line(width: str, look: Mark, index: int, rows: list[dict[str, Any]], column: str) -> go.Scatter:
    return go.Scatter(
        x=[row["epoch"] + 1 for row in rows],  # the first is 1, as on the terminal
        y=[row[column] for row in rows],
        name=f"width {_escaped(width)}",
        hovertemplate="%{fullData.name}<br>epoch %{x}: %{y:.4g}<extra></extra>",
        mode="lines+markers",
        legendgroup=str(index),
        line={"dash": _dash(look), "width": 1.8},
        marker={"symbol": look.symbol, "size": 7, "maxdisplayed": 12},
        meta={"light": look.light, "dark": look.dark, "hollow": False},
    )


def metric_widths(run: RunRecord) -> list[str]:
    """The widths in the run's metrics, narrowest first."""
    return sorted({row["width"] for row in run.metrics}, key=Fraction)


def main_widths(widths: Sequence[str]) -> set[str]:
    """The widths that a chart starts with: of those given, narrowest first, the nine simplest at most."""
    shown = {*widths[:1], *widths[-1:]}
    for denominator in sorted({Fraction(width).denominator for width in widths}):
        more = shown | {width for width in widths if Fraction(width).denominator == denominator}
        if len(more) > 9:
            break
        shown = more
    return shown


def width_mark(index: int, count: int) -> Mark:
    """The look of the index-th of `count` widths: wider is darker on a light page, lighter on a dark one."""
    look, part = mark(index), index / max(1, count - 1)
    plasma = matplotlib.colormaps["plasma"]
    light, dark = to_hex(plasma(0.62 * (1 - part))), to_hex(plasma(0.42 + 0.53 * part))
    return Mark(light, dark, look.marker, look.symbol, look.dashes)


def _view(name: str, traces: list[go.Scatter], layout: dict[str, Any]) -> dict[str, Any]:
    axes = {"zeroline": False, "ticks": ""}
    layout["xaxis"] = axes | layout["xaxis"] | {"showgrid": False, "showline": True}
    layout["yaxis"] = axes | layout["yaxis"] | {"showgrid": True, "showline": False}
    figure = go.Figure(traces, {"showlegend": False, "margin": _MARGIN, "hovermode": "closest", **layout})
    view = figure.to_plotly_json()
    del view["layout"]["template"]
    return {"name": name, **view}


def _dash(look: Mark) -> str:
    return ",".join(f"{2 * length:g}px" for length in look.dashes) or "solid"


def _escaped(text: str) -> str:
    """Text that plotly shows as it is: plotly reads <, > and & as a little HTML."""
    return html.escape(text, quote=False)
