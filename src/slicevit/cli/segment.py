"""slicevit segment"""

from __future__ import annotations

from dataclasses import replace

import tyro
from rich.console import Console

from slicevit.cli.launch import launch
from slicevit.cli.options import parse, speaks, take_backbone
from slicevit.tasks.segment.config import SegmentConfig
from slicevit.tasks.segment.presets import PRESETS, preset


def run(arguments: list[str]) -> None:
    from slicevit.tasks.segment import runs
    from slicevit.tasks.segment.results import segment_table

    console = Console()
    rows, folder = launch(arguments, runs, _parse, console)
    if speaks():
        console.print(segment_table(rows, f"{folder}"))
        console.print(f"predictions {folder / 'predictions.png'}", highlight=False, soft_wrap=True)


def _parse(arguments: list[str], name: str | None) -> SegmentConfig:
    model_args, arguments = take_backbone(arguments)
    default = replace(preset(name) if name else SegmentConfig(), model_args=model_args)
    description = (
        "Train a segmenter whose width can be cut at run time, or each width alone (--method separate). Further flags: "
        f"--preset {{{','.join(PRESETS)}}}, --out FOLDER, --resume RUN, --model-args key=value ..."
    )
    config = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    return parse(SegmentConfig, arguments, "segment", default=default, description=description, config=config)
