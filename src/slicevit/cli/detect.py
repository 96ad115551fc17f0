"""slicevit detect"""

from __future__ import annotations

from dataclasses import replace

import tyro
from rich.console import Console

from slicevit.cli.launch import launch
from slicevit.cli.options import parse, speaks, take_backbone
from slicevit.tasks.detect.config import DetectConfig
from slicevit.tasks.detect.presets import PRESETS, preset


def run(arguments: list[str]) -> None:
    from slicevit.tasks.detect import runs
    from slicevit.tasks.detect.results import detect_table

    console = Console()
    rows, folder = launch(arguments, runs, _parse, console)
    if speaks():
        console.print(detect_table(rows, f"{folder}"))


def _parse(arguments: list[str], name: str | None) -> DetectConfig:
    model_args, arguments = take_backbone(arguments)
    default = replace(preset(name) if name else DetectConfig(), model_args=model_args)
    description = (
        "Train a detector whose width can be cut at run time. Further flags: "
        f"--preset {{{','.join(PRESETS)}}}, --out FOLDER, --resume RUN, --model-args key=value ..."
    )
    config = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    return parse(DetectConfig, arguments, "detect", default=default, description=description, config=config)
