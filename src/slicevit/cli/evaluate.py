"""slicevit eval"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from slicevit.checkpoint import SEGMENTATION, task_of
from slicevit.cli.options import parse


@dataclass
class EvalArgs:
    """Accuracy, costs and latency at every legal width of a run, or at one; of a segmenter mIoU."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder, or any folder that slicevit saved."""
    data: str | None = None
    """Another data set than the run's own; as in train, or as in segment."""
    data_root: str | None = None
    """Where a timm dataset string finds its files."""
    width: str | None = None
    """One width, such as 1/2; a width that was not trained is evaluated and labelled so."""
    batch_size: int | None = None
    """Images a step, 500 unless told; a segmenter takes them one by one."""
    workers: int = 0
    """Processes that load images."""
    max_bad_share: float = 0.01
    """Share of unreadable images above which it stops."""
    device: str = "auto"
    """auto, cpu or cuda."""


def run(arguments: list[str]) -> None:
    args = parse(EvalArgs, arguments, "eval")
    console = Console()
    table, saved = (_segmenter if task_of(args.run) == SEGMENTATION else _classifier)(args)
    console.print(table)
    if saved:
        console.print(f"written to {args.run / 'results.csv'}", highlight=False, soft_wrap=True)


def _classifier(args: EvalArgs) -> tuple[Table, bool]:
    from slicevit.evaluation.results import results_table
    from slicevit.training.evaluate import evaluate_run

    given = {name: value for name, value in vars(args).items() if name != "batch_size" or value is not None}
    rows, saved = evaluate_run(**given)
    return results_table(rows, str(args.run)), saved


def _segmenter(args: EvalArgs) -> tuple[Table, bool]:
    from slicevit.dense.saved import read_segmenter
    from slicevit.tasks.segment.evaluate import evaluate_segmenter
    from slicevit.tasks.segment.results import segment_table
    from slicevit.widths import WidthGrid

    options = dict(vars(args))
    for name in ("data_root", "batch_size"):
        if options.pop(name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for classifiers: {args.run} is a segmenter")
    rows, saved = evaluate_segmenter(**options)
    trained = set(WidthGrid.parse(read_segmenter(args.run)["grid"]))
    return segment_table(rows, str(args.run), lambda row: args.width is None or Fraction(row.width) in trained), saved
