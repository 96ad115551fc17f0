"""The table, the picture and the JSON line of `compare.py`, from whatever runs there are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from common_runs import WIDTHS, accuracies, correct, difference, stamp

from slicevit.evaluation.frontier import RunRecord, plot_frontier
from slicevit.evaluation.results import WidthResult, read_results
from slicevit.files import write_text
from slicevit.training.recipes import X7
from slicevit.widths import WidthGrid

if TYPE_CHECKING:
    from compare import Comparison

Hits = dict[int, np.ndarray]  # by seed: bool (4, N)


def write_table(comparison: Comparison, out: Path | None) -> None:
    """Print table and JSON line; write compare.json, .md and .png (the picture) below --work, and the same as `out`."""
    hits = {name: _hits(comparison, name) for name in comparison.rows}
    figures = {name: _figures(comparison, name, hits) for name in comparison.rows}
    unseen = _unseen(comparison, hits)
    line = json.dumps(
        {"benchmark": "accuracy/compare", **comparison.plan, **stamp(), "rows": figures, "unseen": unseen}
    )
    text = _markdown(comparison, figures, unseen)
    drawn = (*comparison.parts["main"].rows, "rotated")
    records = [_record(comparison, name, seeds) for name, seeds in hits.items() if seeds and name in drawn]
    places = [comparison.work / "compare.json"] + ([out] if out else [])
    for place in places:
        write_text(place, line + "\n")
        write_text(place.with_suffix(".md"), text)
        if records:
            plot_frontier(records, place.with_suffix(".png"))
    print(f"{text}\n{line}")


def _seeds(comparison: Comparison, name: str) -> dict[int, Path]:
    """The finished runs of a row at its learning rate, by seed."""
    rate = comparison.rate(name)
    if rate is None:
        return {}
    pattern = comparison.folder(name, rate, 0).name.removesuffix("0")
    found = {int(path.name.removeprefix(pattern)): path for path in comparison.work.glob(f"{pattern}*")}
    return {seed: found[seed] for seed in sorted(found) if (found[seed] / "results.json").exists()}


def _hits(comparison: Comparison, name: str) -> Hits:
    return {seed: correct(folder) for seed, folder in _seeds(comparison, name).items()}


def _figures(comparison: Comparison, name: str, hits: dict[str, Hits]) -> dict[str, Any]:
    """What the table says of a row; only the search so far where it is not trained."""
    own = {rate: top1 for rate, top1 in comparison.search(name).items() if top1 is not None}
    own = own if comparison.rows[name].rate_of is None or len(own) > 1 else {}
    search = {f"{rate:g}": round(top1, 2) if np.isfinite(top1) else "not finite" for rate, top1 in own.items()}
    figures: dict[str, Any] = {"title": comparison.rows[name].title, "search": search}
    if not hits[name]:
        return figures
    figures |= {"lr": comparison.rate(name), "seeds": list(hits[name])} | accuracies(np.stack([*hits[name].values()]))
    references = {other for part in comparison.parts.values() if name in part.rows for other in part.references}
    figures["minus"] = {
        other: _difference(hits[name], hits[other])
        for other in comparison.rows
        if other in references and other != name and hits[name].keys() & hits[other].keys()
    }
    return figures


def _difference(one: Hits, other: Hits) -> list[float]:
    """Mean, low and high of the paired interval, over the seeds that both have."""
    seeds = sorted(one.keys() & other.keys())
    return difference(np.stack([one[s] for s in seeds]), np.stack([other[s] for s in seeds]))


def _unseen(comparison: Comparison, hits: dict[str, Hits]) -> dict[str, dict[str, float]]:
    """Top-1 at the widths of X = 7, trained (X = 7) and not (X = 4), of the seeds that both have."""
    names = comparison.parts["unseen"].rows
    widths = [str(width) for width in WidthGrid.parse(X7)]
    seeds = set.intersection(*(set(hits[name]) for name in names))
    found: dict[str, dict[str, float]] = {}
    for name in names if seeds else ():
        folders = _seeds(comparison, name)
        means_W = np.mean([100 * correct(folders[seed], widths, X7).mean(axis=1) for seed in sorted(seeds)], axis=0)
        found[name] = dict(zip(widths, means_W.round(2).tolist(), strict=True))
    return found


def _record(comparison: Comparison, name: str, seeds: Hits) -> RunRecord:
    """A row as the picture takes it: every width of its runs, top-1 as the mean over the seeds."""
    folders = [folder for seed, folder in _seeds(comparison, name).items() if seed in seeds]
    by_width: dict[str, list[WidthResult]] = {}
    for folder in folders:
        for row in read_results(folder):
            by_width.setdefault(row.width, []).append(row)
    rows = [
        replace(same[0], top1=float(np.mean([row.top1 for row in same])), latency_ms=None) for same in by_width.values()
    ]
    return RunRecord(comparison.rows[name].title, folders[0], {}, rows, [])


def _markdown(comparison: Comparison, figures: dict[str, Any], unseen: dict[str, dict[str, float]]) -> str:
    plan, made = comparison.plan, stamp()
    text = [
        f"# Comparison, scale {plan['scale']}",
        f"{comparison.base.model} {comparison.base.model_args} on {Path(plan['data']).name}, {plan['epochs']:g} "
        f"epochs, learning rates {', '.join(f'{rate:g}' for rate in comparison.rates)}; commit {made['commit']}, "
        f"{made['date']}, torch {made['torch']}.",
        "Top-1 in per cent by width, ± its standard deviation over seeds; differences of the mean over the four widths "
        "with paired 95 % intervals (bootstrap over images and the seeds that both have). With one seed an interval "
        "speaks of the images alone. The search is on seed 0: mean top-1 by learning rate; without one, the rate is "
        "that of Scala on the same grid, or, of the method rotated, that of separate training.",
    ]
    for part in comparison.parts.values():
        minus = [f"− {comparison.rows[name].title}" for name in part.references]
        lines = [["method", *WIDTHS, "mean", *minus, "lr", "seeds", "search"]]
        lines += [_line(figures[name], part.references) for name in part.rows]
        text += [f"## {part.title}", _table(lines)]
        if part is comparison.parts["unseen"] and unseen:
            widths = list(next(iter(unseen.values())))
            lines = [["X = 4 was not trained at 3/8, 5/8, 7/8", *widths]]
            lines += [[figures[name]["title"], *(f"{v:.2f}" for v in top1.values())] for name, top1 in unseen.items()]
            text.append(_table(lines))
    return "\n\n".join(text) + "\n"


def _line(row: dict[str, Any], references: tuple[str, ...]) -> list[str]:
    search = ", ".join(f"{rate}: {top1}" for rate, top1 in row["search"].items())
    if "top1" not in row:
        return [row["title"], "not run", *[""] * (len(WIDTHS) + len(references) + 2), search]
    std = row.get("top1_std", {})
    cells = [f"{top1:.2f}" + (f" ± {std[width]:.2f}" if std else "") for width, top1 in row["top1"].items()]
    minus = [row["minus"].get(name) for name in references]
    intervals = [f"{m[0]:+.2f} [{m[1]:+.2f}, {m[2]:+.2f}]" if m else "" for m in minus]
    seeds = " ".join(map(str, row["seeds"]))
    return [row["title"], *cells, f"{row['mean']:.2f}", *intervals, f"{row['lr']:g}", seeds, search]


def _table(lines: list[list[str]]) -> str:
    head, *rest = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rest])
