"""slicevit train"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from slicevit.cli.launch import launch
from slicevit.cli.options import gives, parse, speaks, take_model_args, take_option
from slicevit.training.config import TrainConfig
from slicevit.training.initial import require_same_model, with_slicing_of
from slicevit.training.methods import METHODS
from slicevit.training.presets import PRESETS, preset


def run(arguments: list[str]) -> None:
    from slicevit.training import runs

    console = Console()
    rows, folder = launch(arguments, runs, _parse_train, console)
    if speaks():
        _print_results(console, rows, folder)


def _parse_train(arguments: list[str], name: str | None) -> TrainConfig:
    arguments = _rewire_alone(arguments)
    model_args, arguments = take_model_args(arguments)
    if name is None:
        name = "own-data" if gives(arguments, "--data") or gives(arguments, "--model") else "fashion"
    default = preset(name)
    if (method := take_option(arguments, "--method")[0]) in METHODS:
        chosen: dict[str, Any] = {"method": method}
        default = replace(default, **chosen)  # before anything of it is looked at
    own = {} if gives(arguments, "--model") else default.model_args  # a preset's arguments are its model's
    default = replace(default, model_args=own | (model_args or {}))
    init, _ = take_option(arguments, "--init")
    if init not in (None, "scratch", "pretrained") and not Path(init).is_file():
        require_same_model(init, take_option(arguments, "--model")[0], model_args or {})
        default = with_slicing_of(default, init, own_method=method is not None)
    description = (
        "Train one network whose width can be cut at run time. Further flags: --preset "
        f"{{{','.join(PRESETS)}}}, --out FOLDER, --resume RUN, --model-args key=value ..."
    )
    config = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    return parse(TrainConfig, arguments, "train", default=default, description=description, config=config)


def _rewire_alone(arguments: list[str]) -> list[str]:
    """`--rewire` without a value is `--rewire permute`."""
    full = []
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue="--"):
        full += [argument, "permute"] if argument == "--rewire" and following.startswith("--") else [argument]
    return full


def _print_results(console: Console, rows: Sequence[Any], folder: Path) -> None:
    from slicevit.evaluation.results import results_table
    from slicevit.training.fits import are_fits, fits_table

    if are_fits(rows):
        console.print(fits_table(rows, f"{folder}"))
        return
    console.print(results_table(rows, f"{folder}"))
    console.print(f"picture {folder / 'frontier.png'}, page {folder / 'report.html'}", highlight=False, soft_wrap=True)
