"""slicevit eval"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from slicevit.checkpoint import DETECTION, KINDS, SEGMENTATION, task_of
from slicevit.cli.options import parse

if TYPE_CHECKING:
    from slicevit.evaluation.results import Measured


@dataclass
class EvalArgs:
    """Accuracy, costs and latency at every legal width of a run, or at one; of a segmenter mIoU, of a detector mAP."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder, or any folder that slicevit saved."""
    data: str | None = None
    """Another data set than the run's own; as in train, segment or detect."""
    data_root: str | None = None
    """Where a timm dataset string finds its files."""
    width: str | None = None
    """One width, such as 1/2; a width that was not trained is evaluated and labelled so."""
    merged: int = 0
    """Merge so many pairs of tokens in every block: less work, no training (ViTs). Its results are not written."""
    batch_size: int | None = None
    """Images a step, 500 unless told; segmenters and detectors take them one by one."""
    workers: int = 0
    """Processes that load images."""
    max_bad_share: float = 0.01
    """Share of unreadable images above which it stops."""
    device: str = "auto"
    """auto, cpu or cuda."""


def run(arguments: list[str]) -> None:
    args = parse(EvalArgs, arguments, "eval")
    console = Console()
    table, saved = {SEGMENTATION: _segmenter, DETECTION: _detector}.get(task_of(args.run) or "", _classifier)(args)
    console.print(table)
    if saved:
        console.print(f"written to {args.run / 'results.csv'}", highlight=False, soft_wrap=True)


def _classifier(args: EvalArgs) -> tuple[Table, bool]:
    from slicevit.evaluation.results import results_table
    from slicevit.training.evaluate import evaluate_run

    given = {name: value for name, value in vars(args).items() if name != "batch_size" or value is not None}
    rows, saved = evaluate_run(**given)
    pairs = f"{args.merged} pair{'s' * (args.merged > 1)} of tokens"
    title = f"{args.run}, {pairs} merged in every block" if args.merged else str(args.run)
    return results_table(rows, title), saved


def _segmenter(args: EvalArgs) -> tuple[Table, bool]:
    from slicevit.tasks.segment.evaluate import evaluate_segmenter
    from slicevit.tasks.segment.results import segment_table

    rows, saved = evaluate_segmenter(**_shared(args))
    return segment_table(rows, str(args.run), _trained(args)), saved


def _detector(args: EvalArgs) -> tuple[Table, bool]:
    from slicevit.tasks.detect.evaluate import evaluate_detector
    from slicevit.tasks.detect.results import detect_table

    rows, saved = evaluate_detector(**_shared(args))
    return detect_table(rows, str(args.run), _trained(args)), saved


def _shared(args: EvalArgs) -> dict[str, Any]:
    """The options that models of every task have. Raises ValueError when another is given."""
    options = dict(vars(args))
    for name in ("data_root", "batch_size", "merged"):
        if options.pop(name) != getattr(EvalArgs, name):
            kind = KINDS[task_of(args.run) or ""]
            raise ValueError(f"--{name.replace('_', '-')} is for classifiers: {args.run} is a {kind}")
    return options


def _trained(args: EvalArgs) -> Callable[[Measured], bool]:
    """Whether training visited the width of a row."""
    from slicevit.dense.saved import read_entries
    from slicevit.widths import WidthGrid

    legal = set(WidthGrid.parse(read_entries(args.run, task_of(args.run) or "")["grid"]))
    return lambda row: args.width is None or Fraction(row.width) in legal
