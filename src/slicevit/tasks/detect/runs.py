"""Folders of detection runs: starting, resuming, and what a finished run leaves in its folder."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from slicevit.checkpoint import DETECTION
from slicevit.dense.saved import read_entries
from slicevit.evaluation.results import write_rows
from slicevit.tasks.detect.config import DetectConfig, from_dict
from slicevit.tasks.detect.results import DetectResult
from slicevit.tasks.detect.run import DetectRun, resolved
from slicevit.training.initial import located, require_sources
from slicevit.training.ranks import Ranks, join
from slicevit.training.runs import check_new
from slicevit.training.signals import StopRequest


def start(config: DetectConfig, folder: Path, console: Console | None = None) -> list[DetectResult]:
    """Train a new detector in `folder`, and write its results.

    Raises ValueError when `folder` already holds a run, or for whatever in `config` cannot be had.
    """
    ranks = join(config.device)
    ranks.from_main(lambda: check_new(folder))
    return _train(located(resolved(config)), folder, console, ranks)


def resume(folder: Path, console: Console | None = None) -> list[DetectResult]:
    """Go on with the run in `folder` as if it had never stopped.

    Raises ValueError when `folder` holds no detection run, or its files do not fit together.
    """
    here = (folder / "config.json").exists()  # not on every machine, where they share no disk
    ranks = join(read_config(folder).device if here else "auto")
    config = ranks.from_main(lambda: read_config(folder))
    ranks.from_main(lambda: require_sources(config, folder))
    return _train(config, folder, console, ranks)


def read_config(folder: Path) -> DetectConfig:
    """The configuration of the run in `folder`. Raises ValueError when there is none."""
    try:
        return from_dict(read_entries(folder, DETECTION)["training"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} describes no detection run ({error!r})") from None


def _train(config: DetectConfig, folder: Path, console: Console | None, ranks: Ranks) -> list[DetectResult]:
    rows = [row for row in DetectRun(config, folder, console).train() if isinstance(row, DetectResult)]
    with StopRequest(ranks.count > 1):  # a signal now would leave half of the results
        ranks.from_main(lambda: write_rows(folder, rows))
    return rows
