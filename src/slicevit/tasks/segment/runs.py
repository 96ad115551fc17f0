"""Folders of segmentation runs: starting, resuming, and what a finished run leaves in its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from rich.console import Console

from slicevit.checkpoint import SEGMENTATION
from slicevit.dense.saved import read_segmenter
from slicevit.files import write_text
from slicevit.tasks.segment.config import SegmentConfig, from_dict
from slicevit.tasks.segment.initial import resolved
from slicevit.tasks.segment.pictures import draw_predictions
from slicevit.tasks.segment.results import RESULTS, SegmentResult, read_segment_results, write_segment_results
from slicevit.tasks.segment.run import SegmentRun
from slicevit.training.initial import located, require_sources
from slicevit.training.methods import SEPARATE, part_folder
from slicevit.training.ranks import Ranks, join
from slicevit.training.runs import check_new
from slicevit.training.signals import Interrupted, StopRequest
from slicevit.widths import WidthGrid


def start(config: SegmentConfig, folder: Path, console: Console | None = None) -> list[SegmentResult]:
    """Train a new segmenter in `folder`, and write its results and a picture of its predictions.

    Raises ValueError when `folder` already holds a run, or for whatever in `config` cannot be had.
    """
    ranks = join(config.device)
    ranks.from_main(lambda: check_new(folder))
    return _train(located(resolved(config)), folder, console or Console(), ranks)


def resume(folder: Path, console: Console | None = None) -> list[SegmentResult]:
    """Go on with the run in `folder` as if it had never stopped.

    Raises ValueError when `folder` holds no segmentation run, or its files do not fit together.
    """
    here = (folder / "config.json").exists()  # not on every machine, where they share no disk
    ranks = join(read_config(folder).device if here else "auto")
    config = ranks.from_main(lambda: read_config(folder))
    ranks.from_main(lambda: require_sources(config, folder))
    return _train(config, folder, console or Console(), ranks)


def read_config(folder: Path) -> SegmentConfig:
    """The configuration of the run in `folder`. Raises ValueError when there is none."""
    try:
        return from_dict(read_segmenter(folder)["training"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} describes no segmentation run ({error!r})") from None


def _train(config: SegmentConfig, folder: Path, console: Console, ranks: Ranks) -> list[SegmentResult]:
    if config.method == SEPARATE and config.width is None:
        rows = _train_separately(config, folder, console, ranks)
    else:
        rows = _one(config, folder, console)
    with StopRequest(ranks.count > 1):  # a signal now would leave half of the results
        ranks.from_main(lambda: write_segment_results(folder, rows))
        ranks.from_main(lambda: draw_predictions(folder, config))
    return rows


def _one(config: SegmentConfig, folder: Path, console: Console) -> list[SegmentResult]:
    rows: Sequence[SegmentResult] = SegmentRun(config, folder, console).train()
    return [row if config.width is None else replace(row, width=config.width) for row in rows]


def _train_separately(config: SegmentConfig, folder: Path, console: Console, ranks: Ranks) -> list[SegmentResult]:
    """Each width cut out and trained alone, in a run of its own below `folder`/separate."""
    assert config.grid is not None
    ranks.from_main(lambda: _describe(config, folder))
    rows: list[SegmentResult] = []
    for width in WidthGrid.parse(config.grid):
        part = part_folder(folder, width)
        if not ranks.from_main((part / RESULTS).exists):
            alone = replace(config, width=str(width))
            try:
                part_rows = _one(alone, part, console)
            except Interrupted as stop:
                raise Interrupted(folder, stop.signum, SegmentRun.command) from None
            ranks.from_main(partial(write_segment_results, part, part_rows))
        rows += ranks.from_main(partial(read_segment_results, part))
    return rows


def _describe(config: SegmentConfig, folder: Path) -> None:
    described = {"slicevit": {"task": SEGMENTATION, "grid": config.grid, "training": asdict(config)}}
    write_text(folder / "config.json", json.dumps(described, indent=2) + "\n")
