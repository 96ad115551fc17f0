"""slicevit profile"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from slicevit.cli.options import parse

_QUIET = 2.0  # an idle machine stays below it


@dataclass
class ProfileArgs:
    """Latency and memory of every width of a run on this machine, written into RUN/profiles."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder, or any folder that slicevit saved and evaluated."""
    engine: Literal["torch", "torch-compile", "onnxruntime", "openvino"] = "torch"
    """What runs the widths."""
    device: str = "auto"
    """auto, cpu or cuda; the engines that are not torch's run on the CPU alone."""
    batch: tuple[int, ...] = (1, 4, 16)
    """Batch sizes, in images: 1 4 16, or 1,4,16."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the arithmetic; bfloat16 for torch and openvino."""
    seconds: float = 1.0
    """Spent on each width and batch size."""
    threads: int = 0
    """Of one call; 0 is the library's own choice."""


def run(arguments: list[str]) -> None:
    from slicevit.runtime.measured import profile_path, profile_run

    args = parse(ProfileArgs, [part for argument in arguments for part in _numbers(argument)], "profile")
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("the run is loaded", total=1.0)
        profile = profile_run(
            **vars(args), progress=lambda what, share: bar.update(task, description=what, completed=share)
        )
    console.print(profile_table(profile, str(args.run)))
    written = profile_path(args.run, args.engine, profile["device"], args.precision)
    console.print(f"written to {written}", highlight=False, soft_wrap=True)
    if (spread := unrest(profile)) > _QUIET:
        said = f"the 99th percentile is {spread:.1f} times the median: other programs use this machine; measure again"
        console.print(f"{said} when they do not", highlight=False, soft_wrap=True)


def unrest(profile: dict[str, Any]) -> float:
    """The 99th percentile over the median, of the usual width and batch size."""
    rows = profile["rows"]
    return median(row["p99_ms"][size] / took for row in rows for size, took in row["latency_ms"].items())


def _numbers(argument: str) -> list[str]:
    """1,4,16 as 1 4 16; anything else as it is."""
    return argument.split(",") if re.fullmatch(r"\d+(,\d+)+", argument) else [argument]


def profile_table(profile: dict[str, Any], title: str) -> Table:
    """The profile for a terminal, narrowest width first; widths that another one beats are dim."""
    from slicevit.evaluation.figures import FIGURES, TOP1
    from slicevit.evaluation.results import short

    figure = FIGURES[profile.get("figure", TOP1.column)]
    sizes = list(profile["rows"][0]["latency_ms"])
    title = f"{title}: {profile['engine']} on {profile['device']}, {profile['precision']}; median (99th percentile)"
    table = Table(title=Text(title), title_justify="left")
    table.add_column("Width", no_wrap=True)
    with_energy = any(row["energy_j"] is not None for row in profile["rows"])
    energy = ("Energy\nmJ/image",) if with_energy else ()
    for heading in (f"{figure.heading}\n%", *(f"Batch {size}\nms" for size in sizes), "Memory\nMB", *energy):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("Beaten\nby", no_wrap=True)
    for row in profile["rows"]:
        table.add_row(
            row["width"],
            f"{row[figure.column]:.2f}",
            *(f"{short(row['latency_ms'][size])} ({short(row['p99_ms'][size])})" for size in sizes),
            _known(row["memory_mb"]),
            *([_known(row["energy_j"] and 1000 * row["energy_j"])] if with_energy else []),
            row["beaten_by"] or "",
            style="dim" if row["beaten_by"] else None,
        )
    return table


def _known(value: float | None) -> str:
    from slicevit.evaluation.results import short

    return "–" if value is None else short(value)
