"""What every training command does: go on with a run, or begin a new one in its folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console

from slicevit.cli.options import take_option


def launch(
    arguments: list[str],
    runs: ModuleType,
    parse: Callable[[list[str], str | None], Any],
    console: Console,
) -> tuple[Any, Path]:
    """
    The results of a run, and its folder.

    Args:
        arguments: all that follow the command's name.
        runs: has `start(config, folder, console)` and `resume(folder, console)`.
        parse: the configuration, of the arguments that are left and the value of --preset.
        console: where progress is shown.

    Raises:
        ValueError: --resume beside another flag, or what `parse` and `runs` raise.
    """
    from slicevit.training.ranks import join

    resume, arguments = take_option(arguments, "--resume")
    if resume is not None:
        if arguments:
            raise ValueError(f"--resume takes the run's own configuration: leave out {' '.join(arguments)}")
        return runs.resume(Path(resume), console), Path(resume)
    name, arguments = take_option(arguments, "--preset")
    out, arguments = take_option(arguments, "--out")
    config = parse(arguments, name)
    folder = Path(out) if out else join(config.device).from_main(lambda: _new_folder(config))
    return runs.start(config, folder, console), folder


def _new_folder(config: Any) -> Path:
    data = Path(config.data.split("?")[0]).name
    return Path("runs") / f"{data}-{config.method}-{time.strftime('%Y%m%d-%H%M%S')}"
