"""`slicevit eval`: a saved model or run, measured at every width."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from slicevit.calibration import require_statistics
from slicevit.checkpoint import from_pretrained, read_config
from slicevit.data import StreamSet, eval_batches, eval_config, eval_transform, open_dataset
from slicevit.evaluation.results import WidthResult, write_results
from slicevit.evaluation.widths import asked_width, measure_accuracy, measure_widths_latency, result_rows
from slicevit.model_card import show_results
from slicevit.training.loop import LATENCY_SECONDS
from slicevit.training.methods import is_separate, part_folder
from slicevit.training.ranks import pick_device
from slicevit.training.runs import read_train_config
from slicevit.widths import WidthGrid, parse_fraction


def evaluate_run(
    run: Path,
    data: str | None = None,
    data_root: str | None = None,
    width: str | None = None,
    batch_size: int = 500,
    workers: int = 0,
    max_bad_share: float = 0.01,
    device: str = "auto",
    merged: int = 0,
) -> tuple[list[WidthResult], bool]:
    """Rows for every legal width, or for one, and whether they were written into the run's results.

    Only a whole evaluation on the run's own data, without merged tokens, is written. A `width` off the grid is
    evaluated and labelled as not trained. With `merged` so many pairs of tokens are merged in every block. Raises
    ValueError for a folder, data set or width that cannot be had.
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size must be above 0, got {batch_size}")
    if merged < 0:
        raise ValueError(f"--merged must not be negative, got {merged}")
    options = (data, data_root, batch_size, workers, max_bad_share, device, merged)
    if is_separate(run):
        rows = _separate_rows(run, width, *options)
    else:
        rows = _rows(run, width, *options)
    own = data is None and width is None and not merged
    if own:
        write_results(run, rows)
        show_results(run, rows)
    return rows, own


def _separate_rows(run: Path, width: str | None, *options: Any) -> list[WidthResult]:
    """The rows of a run whose widths were trained one by one."""
    names = [str(w) for w in WidthGrid.parse(read_train_config(run).grid)]
    if width is not None:
        asked = str(parse_fraction(width))
        if asked not in names:
            raise ValueError(f"--width {width}: {run} holds the widths {', '.join(names)}, each trained alone")
        names = [asked]
    return [replace(row, width=name) for name in names for row in _rows(part_folder(run, name), None, *options)]


def _rows(
    run: Path,
    width: str | None,
    data: str | None,
    data_root: str | None,
    batch_size: int,
    workers: int,
    max_bad_share: float,
    device: str,
    merged: int,
) -> list[WidthResult]:
    config, _ = read_config(run)
    training = config.get("slicevit", {}).get("training", {})
    model = from_pretrained(run)
    if not model.num_classes:
        raise ValueError(
            f"{run} has no classes to score: it learned from a teacher without labels; {run}/distillation.csv says how "
            f"well; slicevit probe {run} says what its features are worth, and slicevit train --init gives it classes"
        )
    trained = set(model.widths)
    widths = list(model.widths)
    if width is not None:
        widths = [asked_width(model, width)]
    require_statistics(model, run, None if width is None else widths)
    spec = data or training.get("data")
    if spec is None:
        raise ValueError(f"{run} does not say which data it was trained on: name one with --data")
    transform = eval_config(config)
    dataset = open_dataset(spec, "val", root=data_root or training.get("data_root"), in_chans=transform.in_chans)
    if dataset.num_classes and dataset.num_classes != model.num_classes:
        raise ValueError(f"--data {spec} has {dataset.num_classes} classes and the model in {run} {model.num_classes}")
    model.to(pick_device(device))
    batches = eval_batches(dataset, eval_transform(transform), batch_size, workers, max_bad_share)
    scores = measure_accuracy(model, widths, batches, merged=merged)
    if isinstance(dataset, StreamSet):
        dataset.check_complete(next(iter(scores.values())).images, max_bad_share)
    latency = measure_widths_latency(model, widths, LATENCY_SECONDS, merged)
    return result_rows(model, scores, latency, transform, training.get("method", "imported"), trained, merged)
