"""The report: one HTML page that holds everything it shows and loads nothing."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from fractions import Fraction
from importlib import resources
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import Any

from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs

from slicevit.evaluation.charts import frontier_views, main_widths, metric_widths, training_views, width_mark
from slicevit.evaluation.frontier import Mark, RunRecord, edge_note, mark
from slicevit.evaluation.results import WidthResult, by_width, macs_unit, short
from slicevit.files import write_text

_SAMPLES = {  # the markers of `Mark.symbol` around (0, 0), as SVG
    "circle": '<circle r="4"/>',
    "square": '<rect x="-4" y="-4" width="8" height="8"/>',
    "triangle-up": '<path d="M0-5 5 4H-5z"/>',
    "diamond": '<path d="M0-5 5 0 0 5-5 0z"/>',
    "triangle-down": '<path d="M0 5 5-4H-5z"/>',
    "cross": '<path d="M-2-5h4v3h3v4H2v3h-4V2h-3v-4h3z"/>',
    "star": '<path d="M0-6 1.5-2 6-1.8 2.4 1 3.6 5 0 2.6-3.6 5-2.4 1-6-1.8-1.5-2z"/>',
}


def write_report(runs: Sequence[RunRecord], out: Path | str) -> None:
    """Write the page of the first run, compared with the others, as one file without any network.

    Raises:
        ValueError: the first run has no results.
    """
    if not runs or not runs[0].results:
        raise ValueError("the report needs a run with results: evaluate it first")
    charts: dict[str, list[dict[str, Any]]] = {"frontier": frontier_views(runs)}
    sections = [_frontier_section(runs, charts["frontier"])]
    if len(runs) > 1:
        sections.append(_comparison_section(runs))
    for index, run in enumerate(runs):
        views = training_views(run)
        charts |= {f"training-{index}-{number}": [view] for number, view in enumerate(views)}
        sections.append(_run_section(run, index, views, alone=len(runs) == 1))
    template = resources.files("slicevit.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    page = Template(template).substitute(
        title=html.escape(runs[0].name),
        heading=_heading(runs),
        sections="\n".join(sections),
        charts=to_json_plotly(charts),  # plotly writes < as \u003c: no text can end the script
        plotly=get_plotlyjs(),
    )
    write_text(Path(out), page)


def _heading(runs: Sequence[RunRecord]) -> str:
    run = runs[0]
    parts = [f"<h1>{html.escape(run.name)}</h1>"]
    if len(runs) > 1:
        parts.append(f"<p>compared with {html.escape(', '.join(other.name for other in runs[1:]))}</p>")
    return "\n".join([*parts, _facts(run), f'<p class="lead">{html.escape(_summary(run))}</p>'])


def _summary(run: RunRecord) -> str:
    rows = [row for row in by_width(run.results) if row.trained] or by_width(run.results)
    unit, scale = macs_unit(run.results)
    ends = [
        f"{row.top1:.1f}\u00a0% top-1 at width\u00a0{row.width} ({short(row.gmacs * scale)}\u00a0{unit})"
        for row in rows
    ]
    if len(rows) == 1:
        return f"One checkpoint, one width: {ends[0]}."
    return f"One checkpoint, {len(rows)} widths: from {ends[0]} to {ends[-1]}."


def _facts(run: RunRecord) -> str:
    """What was run, as a definition list."""
    facts = {"Method": "–", "Model": "–", "Grid": _grid(run.results), "Data": _data(run.config) or "–"}
    if run.results:
        row = run.results[0]
        facts |= {"Method": row.method, "Model": row.model}
        facts["Input"] = f"{row.img_size} px, crop {row.crop_pct:g}, {row.interpolation}"
        facts["Test images"] = f"{row.images:,}"
    pairs = (f"<div><dt>{key}</dt><dd>{html.escape(value)}</dd></div>" for key, value in facts.items())
    return f"<dl>{''.join(pairs)}</dl>"


def _grid(rows: Iterable[WidthResult]) -> str:
    """The trained widths in words: "1/4 to 1 in steps of 1/8"."""
    widths = [Fraction(row.width) for row in by_width(rows) if row.trained]
    steps = {right - left for left, right in pairwise(widths)}
    if len(widths) > 2 and len(steps) == 1:
        return f"{widths[0]} to {widths[-1]} in steps of {steps.pop()}"
    return ", ".join(str(width) for width in widths) or "–"


def _data(config: dict[str, Any]) -> str | None:
    """The first text under "data" or "dataset" (of a section there, its "name"), at any depth."""
    for key in ("data", "dataset"):
        value = config.get(key)
        name = value.get("name") if isinstance(value, dict) else value
        if isinstance(name, str):
            return name
    sections = (value for value in config.values() if isinstance(value, dict))
    return next((name for section in sections if (name := _data(section))), None)


def _frontier_section(runs: Sequence[RunRecord], views: list[dict[str, Any]]) -> str:
    choices = "".join(
        f'<label><input type="radio" name="cost" value="{index}"{" checked" if index == 0 else ""}>'
        f"<span>{view['name']}</span></label>"
        for index, view in enumerate(views)
    )
    hollow = edge_note(runs)
    note = f" Hollow marker: {hollow}." if hollow else ""
    return (
        '<section class="card"><h2>Accuracy against cost</h2>'
        f'<fieldset class="switch"><legend>Cost</legend>{choices}</fieldset>'
        '<div class="chart" data-chart="frontier" role="img" '
        'aria-label="Top-1 accuracy against cost; the tables below hold the same values"></div>'
        + _legend(
            "frontier",
            [(run.name, mark(index)) for index, run in enumerate(runs)],
            {run.name for run in runs},
        )
        + f'<p class="note">The fractions along the top are the widths of {html.escape(runs[0].name)}.'
        f"{note}</p></section>"
    )


def _run_section(run: RunRecord, index: int, views: list[dict[str, Any]], alone: bool) -> str:
    name = html.escape(run.name)
    parts = [f'<section class="card"><h2>{"Results" if alone else name}</h2>']
    if index > 0:
        parts.append(_facts(run))
    parts.append(_results_table(run.results) if run.results else "<p>Not evaluated yet.</p>")
    if views:
        figures = "".join(
            f'<figure><figcaption>{view["name"]}</figcaption><div class="chart" role="img" '
            f'data-chart="training-{index}-{number}" '
            f'aria-label="{view["name"]} over the epochs, a line per width"></div></figure>'
            for number, view in enumerate(views)
        )
        widths = metric_widths(run)
        looks = [(width, width_mark(place, len(widths))) for place, width in enumerate(widths)]
        parts.append(f'<h3>Training, by width</h3><div class="pair">{figures}</div>')
        parts.append(_legend(f"training-{index}", looks, main_widths(widths)))
    config = html.escape(json.dumps(run.config, indent=2, ensure_ascii=False))
    parts.append(f"<details><summary>Configuration</summary><pre>{config}</pre></details></section>")
    return "\n".join(parts)


def _legend(group: str, lines: list[tuple[str, Mark]], shown: set[str]) -> str:
    """Buttons that show and hide the lines of a group of charts; those in `shown` start out shown."""
    buttons = (
        f'<button type="button" aria-pressed="{str(name in shown).lower()}" '
        f'data-group="{group}" data-line="{index}">'
        f"{_sample(look)}<span>{html.escape(name)}</span></button>"
        for index, (name, look) in enumerate(lines)
    )
    return f'<div class="legend">{"".join(buttons)}</div>'


def _sample(look: Mark) -> str:
    dashes = " ".join(f"{2 * length:g}" for length in look.dashes)
    return (
        f'<svg viewBox="-22 -7 44 14" aria-hidden="true" style="--light:{look.light};--dark:{look.dark}">'
        f'<path d="M-22 0H22" class="dash" stroke-dasharray="{dashes}"/>{_SAMPLES[look.symbol]}</svg>'
    )


def _results_table(rows: Sequence[WidthResult]) -> str:
    unit, scale = macs_unit(rows)
    head = [
        "Width",
        "Channels",
        "Params (M)",
        unit,
        "Top&#8209;1 (%)",
        "Top&#8209;5 (%)",
        "Loss",
        "Latency (ms)",
    ]
    body = [
        [
            row.width if row.trained else f"{row.width} (not trained)",
            str(row.channels),
            short(row.param_count),
            short(row.gmacs * scale),
            f"{row.top1:.2f}",
            f"{row.top5:.2f}",
            f"{row.loss:.3f}",
            "–" if row.latency_ms is None else short(row.latency_ms),
        ]
        for row in by_width(rows)
    ]
    return _table(head, body)


def _comparison_section(runs: Sequence[RunRecord]) -> str:
    """Top-1 of every run at every width, with the difference to the first run; the best is bold."""
    scores = [{Fraction(row.width): row for row in run.results} for run in runs]
    body = []
    for width in sorted(set().union(*scores)):
        rows = [score.get(width) for score in scores]
        best = max(row.top1 for row in rows if row is not None)
        cells = [_compared(row, rows[0] if index else None, best) for index, row in enumerate(rows)]
        body.append([str(width), *cells])
    names = [html.escape(run.name) for run in runs]
    note = f"Top-1 in per cent, and its difference to {names[0]} in points; the best is bold."
    return (
        f'<section class="card"><h2>Comparison</h2>{_table(["Width", *names], body)}'
        f'<p class="note">{note}</p></section>'
    )


def _compared(row: WidthResult | None, first: WidthResult | None, best: float) -> str:
    if row is None:
        return "–"
    text = f"<b>{row.top1:.2f}</b>" if row.top1 == best else f"{row.top1:.2f}"
    notes = [] if first is None else [f"{row.top1 - first.top1:+.2f}".replace("-", "−")]
    notes += [] if row.trained else ["not trained"]
    return f'{text} <span class="delta">{", ".join(notes)}</span>'


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """An HTML table of cells that are HTML already; the first column names the row."""
    titles = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    rows = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in body
    )
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table></div>'
    )
