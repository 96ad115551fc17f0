"""slicevit segment"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import tyro
from rich.console import Console

from slicevit.cli.options import gives, parse, speaks, take_model_args, take_option
from slicevit.tasks.segment.config import SegmentConfig
from slicevit.tasks.segment.presets import PRESETS, preset


def run(arguments: list[str]) -> None:
    from slicevit.tasks.segment import runs
    from slicevit.tasks.segment.results import segment_table
    from slicevit.training.ranks import join

    console = Console()
    resume, arguments = take_option(arguments, "--resume")
    if resume is not None:
        if arguments:
            raise ValueError(f"--resume takes the run's own configuration: leave out {' '.join(arguments)}")
        folder = Path(resume)
        rows = runs.resume(folder, console)
    else:
        name, arguments = take_option(arguments, "--preset")
        out, arguments = take_option(arguments, "--out")
        config = _parse(arguments, name)
        folder = Path(out) if out else join(config.device).from_main(lambda: _new_folder(config))
        rows = runs.start(config, folder, console)
    if speaks():
        console.print(segment_table(rows, f"{folder}"))
        console.print(f"predictions {folder / 'predictions.png'}", highlight=False, soft_wrap=True)


def _parse(arguments: list[str], name: str | None) -> SegmentConfig:
    model_args, arguments = take_model_args(arguments)
    default = replace(preset(name) if name else SegmentConfig(), model_args=model_args or {})
    init, _ = take_option(arguments, "--init")
    if gives(arguments, "--model") and init not in (None, "scratch", "pretrained"):
        raise ValueError(f"--model is for --init scratch or pretrained: {init} has its own")
    description = (
        "Train a segmenter whose width can be cut at run time, or each width alone (--method separate). Further flags: "
        f"--preset {{{','.join(PRESETS)}}}, --out FOLDER, --resume RUN, --model-args key=value ..."
    )
    config = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    return parse(SegmentConfig, arguments, "segment", default=default, description=description, config=config)


def _new_folder(config: SegmentConfig) -> Path:
    return Path("runs") / f"{Path(config.data).name}-{config.method}-{time.strftime('%Y%m%d-%H%M%S')}"
