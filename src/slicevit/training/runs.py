"""Run folders: starting, resuming, and what a finished run leaves in its folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from slicevit.checkpoint import COMMANDS
from slicevit.elastic import ElasticModel
from slicevit.evaluation.frontier import load_run, plot_frontier
from slicevit.evaluation.report import write_report
from slicevit.evaluation.results import MetricsLog, WidthResult, read_metrics, read_results, write_results
from slicevit.files import write_text
from slicevit.model_card import show_results
from slicevit.training.config import TrainConfig, from_dict
from slicevit.training.fits import FITS, FitResult, Rows, are_fits, read_fits, write_fits
from slicevit.training.initial import image_channels, located, require_sources
from slicevit.training.loop import Run
from slicevit.training.methods import SEPARATE, part_folder
from slicevit.training.ranks import Ranks, join
from slicevit.training.setup import build_model, class_count, open_split
from slicevit.training.signals import Interrupted, StopRequest
from slicevit.widths import WidthGrid


def start(config: TrainConfig, folder: Path, console: Console | None = None) -> Rows:
    """Train a new run in `folder` and write its results, picture and page.

    Raises ValueError when `folder` already holds a run, or for whatever in `config` cannot be had.
    """
    ranks = join(config.device)
    ranks.from_main(lambda: check_new(folder))
    return _train(located(config), folder, console or Console(), ranks)


def check_new(folder: Path) -> None:
    """Raises ValueError when `folder` cannot take a new run."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file: name a folder")
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} already holds a run: go on with --resume {folder}, or name another with --out")


def resume(folder: Path, console: Console | None = None) -> Rows:
    """Go on with the run in `folder` as if it had never stopped.

    Raises ValueError when `folder` holds no run, or its files do not fit together.
    """
    here = (folder / "config.json").exists()  # not on every machine, where they share no disk
    ranks = join(read_train_config(folder).device if here else "auto")
    config = ranks.from_main(lambda: read_train_config(folder))
    ranks.from_main(lambda: require_sources(config, folder))
    return _train(config, folder, console or Console(), ranks)


def read_train_config(folder: Path) -> TrainConfig:
    """The configuration of the run in `folder`. Raises ValueError when there is none."""
    path = folder / "config.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["slicevit"]
        if task := entries.get("task"):
            raise ValueError(f"{folder} is a run of slicevit {COMMANDS.get(task, task)}, not of slicevit train")
        return from_dict(entries["training"])
    except FileNotFoundError:
        raise ValueError(f"{folder} is no run's folder: it has no config.json") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} describes no training run ({error!r})") from None


def _train(config: TrainConfig, folder: Path, console: Console, ranks: Ranks) -> Rows:
    if config.method == SEPARATE and len(WidthGrid.parse(config.grid)) > 1:
        rows = _train_separately(config, folder, console, ranks)
    else:
        rows = Run(config, folder, console).train()
    with StopRequest(ranks.count > 1):  # a signal now would leave half of the results
        ranks.from_main(lambda: _write(folder, rows))
    return rows


def _write(folder: Path, rows: Rows) -> None:
    _write_rows(folder, rows)
    if not are_fits(rows):  # which have no accuracy to draw
        write_pictures([folder])
    show_results(folder, rows)


def _write_rows(folder: Path, rows: Rows) -> None:
    if are_fits(rows):
        write_fits(folder, rows)
    else:
        write_results(folder, [row for row in rows if isinstance(row, WidthResult)])


def _train_separately(config: TrainConfig, folder: Path, console: Console, ranks: Ranks) -> Rows:
    """Each width alone, as a stock model of that width, in a run of its own below `folder`/separate."""
    widths = list(WidthGrid.parse(config.grid))
    read: Callable[[Path], Rows] = read_results if config.learns_labels else read_fits
    results = "results.json" if config.learns_labels else FITS
    metrics: list[dict[str, Any]] = []
    rows: list[WidthResult | FitResult] = []
    model = ranks.together(
        lambda: build_model(config, class_count(config, open_split(config, "train", image_channels(config))))
    )
    ranks.from_main(lambda: _describe(config, folder))
    for width in widths:
        part = part_folder(folder, width)
        if not ranks.from_main((part / results).exists):
            try:
                part_rows = Run(_alone(config, model, width), part, console).train()
            except Interrupted as stop:
                raise Interrupted(folder, stop.signum) from None
            ranks.from_main(partial(_write_rows, part, part_rows))
        rows += [replace(row, width=str(width)) for row in ranks.from_main(partial(read, part))]
        metrics += [
            row | {"width": str(width)} for row in ranks.from_main(partial(read_metrics, part)) if row["width"] == "1"
        ]
    ranks.from_main(lambda: _write_metrics(folder, metrics))
    return rows


def _write_metrics(folder: Path, metrics: list[dict[str, Any]]) -> None:
    log = MetricsLog(folder)
    log.truncate(-1)
    log.append(sorted(metrics, key=lambda row: (row["epoch"], Fraction(row["width"]))))


def _alone(config: TrainConfig, model: ElasticModel, width: Fraction) -> TrainConfig:
    return replace(config, model_args=config.model_args | model.factory_arguments(width), grid="1:1:1")


def _describe(config: TrainConfig, folder: Path) -> None:
    described = {"slicevit": {"grid": config.grid, "training": asdict(config.resolved())}}
    write_text(folder / "config.json", json.dumps(described, indent=2) + "\n")


def write_pictures(folders: Sequence[Path], out: Path | None = None) -> tuple[Path, Path]:
    """frontier.png and report.html of the first run, compared with the others; returns their paths.

    Raises ValueError when a folder holds no results.
    """
    records = [load_run(folder) for folder in folders]
    target = out or folders[0]
    target.mkdir(parents=True, exist_ok=True)
    picture, page = target / "frontier.png", target / "report.html"
    plot_frontier(records, picture)
    write_report(records, page)
    return picture, page
