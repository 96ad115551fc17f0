"""slicevit calibrate"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from slicevit.checkpoint import KINDS, SEGMENTATION, task_of
from slicevit.cli.options import parse
from slicevit.evaluation.calibrating import BATCH, IMAGES, Source, calibrate_saved, open_classifier
from slicevit.training.methods import is_separate
from slicevit.training.ranks import pick_device


@dataclass
class CalibrateArgs:
    """Give every width of a model with BatchNorm statistics of its own, from training images, and save them with it.

    Training does so at its end. The labels of the images are not used.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder, or any folder that slicevit saved."""
    data: str | None = None
    """Another data set than the run's own; as in train, segment or detect."""
    data_root: str | None = None
    """Where a timm dataset string finds its files."""
    width: str | None = None
    """One width, such as 1/2, also one that was not trained; by default all."""
    images: int = IMAGES
    """How many training images, drawn at random."""
    batch_size: int = BATCH
    """Images a step."""
    workers: int = 0
    """Processes that load images."""
    max_bad_share: float = 0.01
    """Share of unreadable images above which it stops."""
    device: str = "auto"
    """auto, cpu or cuda."""
    seed: int = 0
    """Of which images are drawn."""


def run(arguments: list[str]) -> None:
    args = parse(CalibrateArgs, arguments, "calibrate")
    if is_separate(args.run):
        raise ValueError(f"{args.run} trained each width alone: each has statistics of its own")
    source = _source(args)
    options = {
        name: value for name, value in vars(args).items() if name not in ("data", "data_root", "width", "device")
    }
    options |= {"widths": () if args.width is None else (args.width,), "device": pick_device(args.device)}
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("images", total=args.images)
        widths, seen = calibrate_saved(**options, source=source, progress=lambda done: bar.advance(task, done))
    named = ", ".join(map(str, widths))
    console.print(
        f"{args.run}: BatchNorm statistics of {named} from {seen} images; slicevit eval {args.run} measures them",
        highlight=False,
        soft_wrap=True,
    )


def _source(args: CalibrateArgs) -> Source:
    task = task_of(args.run)
    if task is None:
        return open_classifier(args.run, args.data, args.data_root)
    if args.data_root is not None:
        raise ValueError(f"--data-root is for classifiers: {args.run} is a {KINDS[task]}")
    from slicevit.tasks.calibrate import open_detector, open_segmenter

    return (open_segmenter if task == SEGMENTATION else open_detector)(args.run, args.data)
