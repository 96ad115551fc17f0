"""`slicevit eval`: a saved model or run, measured at every width."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

from slicevit.checkpoint import from_pretrained, read_config
from slicevit.data import TransformConfig, eval_batches, eval_transform, open_dataset
from slicevit.elastic import ElasticModel
from slicevit.evaluation.results import WidthResult, write_results
from slicevit.evaluation.widths import measure_accuracy, measure_widths_latency, result_rows
from slicevit.training.loop import LATENCY_SECONDS
from slicevit.training.runs import SEPARATE
from slicevit.training.setup import pick_device
from slicevit.widths import FULL, WidthGrid, parse_fraction


def evaluate_run(
    run: Path,
    data: str | None,
    data_root: str | None,
    width: str | None,
    batch_size: int,
    workers: int,
    device: str,
) -> tuple[list[WidthResult], bool]:
    """Rows for every legal width, or for one, and whether they were written into the run's results.

    Only a whole evaluation on the run's own data is written. A `width` off the grid is evaluated and labelled
    as not trained. Raises ValueError for a folder, data set or width that cannot be had.
    """
    if (run / SEPARATE).is_dir():
        raise ValueError(f"{run} holds separately trained widths: evaluate one of the folders in {run / SEPARATE}")
    config, _ = read_config(run)
    described: dict[str, Any] = config.get("slicevit", {})
    training = described.get("training", {})
    model = from_pretrained(run)
    trained = set(model.widths)
    widths = list(model.widths)
    if width is not None:
        asked = parse_fraction(width)
        if asked not in model.grid:
            model.set_grid(_grid_through(model, asked, width))
        widths = [model.width(asked)]
    spec = data or training.get("data")
    if spec is None:
        raise ValueError(f"{run} does not say which data it was trained on: name one with --data")
    transform = eval_config(config)
    dataset = open_dataset(spec, "val", root=data_root or training.get("data_root"), in_chans=transform.in_chans)
    if dataset.num_classes and dataset.num_classes != model.num_classes:
        raise ValueError(f"--data {spec} has {dataset.num_classes} classes and the model in {run} {model.num_classes}")
    model.to(pick_device(device))
    scores = measure_accuracy(model, widths, eval_batches(dataset, eval_transform(transform), batch_size, workers))
    latency = measure_widths_latency(model, widths, LATENCY_SECONDS)
    rows = result_rows(model, scores, latency, transform, training.get("method", "imported"), trained)
    own = data is None and width is None
    if own:
        write_results(run, rows)
    return rows, own


def eval_config(config: dict[str, Any]) -> TransformConfig:
    """The evaluation transform that config.json describes."""
    cfg = config["pretrained_cfg"]
    channels, height, width = cfg["input_size"]
    crop = config.get("slicevit", {}).get("training", {}).get("crop", "rrc")
    return TransformConfig(
        img_size=(height, width),
        in_chans=channels,
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        interpolation=cfg["interpolation"],
        crop_pct=cfg["crop_pct"],
        crop=crop,
    )


def _grid_through(model: ElasticModel, asked: Fraction, text: str) -> WidthGrid:
    """The finest grid with the model's smallest width that also holds `asked`."""
    smallest = model.grid.smallest
    if not smallest < asked < FULL:
        raise ValueError(f"--width {text}: widths of this run lie between {smallest} and 1")
    for refined in range(2, 257):
        step = model.grid.step / refined
        if (asked - smallest) % step == 0:
            return _sparse(smallest, asked, step)
    raise ValueError(f"--width {text}: no refinement of the grid {model.grid} holds it")


def _sparse(smallest: Fraction, asked: Fraction, step: Fraction) -> WidthGrid:
    for multiple in range(int((FULL - smallest) / step), 0, -1):
        grid_step = step * multiple
        if (FULL - smallest) % grid_step == 0 and (asked - smallest) % grid_step == 0:
            return WidthGrid(smallest, FULL, grid_step)
    return WidthGrid(smallest, FULL, step)
