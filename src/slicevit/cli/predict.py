"""slicevit predict"""

from __future__ import annotations

import re
import shlex
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import psutil
import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TextColumn

from slicevit.cli.options import parse
from slicevit.runtime.predict.cascade import FittedCascade
from slicevit.runtime.predict.job import Outcome, run_job
from slicevit.runtime.predict.parts import Tally
from slicevit.runtime.predict.settings import Job
from slicevit.runtime.predict.widths import Watch
from slicevit.training.signals import StopRequest

_SAY_SECONDS = 30.0  # between two lines where there is no terminal
_ADDRESS = re.compile(r"auto|local|(ray://)?[^/\\]+:\d+")


@dataclass
class PredictArgs(Job):
    """Predict the classes of all images of a folder, or of a data set, into one table.

    The same command goes on after Ctrl-C, SIGTERM or a failure.
    """

    run: Annotated[str, tyro.conf.Positional]
    """A run's folder, any folder that slicevit saved, or a Hub repository such as owner/name."""
    images: Annotated[str, tyro.conf.Positional]
    """A folder of images at any depth, or a data set as train's --data takes it."""


def run(arguments: list[str]) -> None:
    watch = Watch(spent=_loading(arguments))
    args = parse(PredictArgs, with_address(arguments), "predict", config=(tyro.conf.FlagCreatePairsOff,))
    console = Console()

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    with StopRequest() as stop, _Bar(console) as bar:
        try:
            outcome = run_job(args, watch, progress=bar.show, stopping=lambda: bool(stop.signum), say=say)
        except torch.OutOfMemoryError:
            raise ValueError(f"--batch-size {args.batch_size} does not fit the device's memory: lower it") from None
    if outcome.finished:
        for line in report(args.out, outcome, args.budget, watch.seconds()):
            say(line)
        return
    command = shlex.join(["slicevit", "predict", *arguments])
    done = f"{outcome.tally.done} of {outcome.total} images are done and kept"
    print(f"stopped; {done}; go on with: {command}", file=sys.stderr, flush=True)
    sys.exit(128 + stop.signum)


def _loading(arguments: list[str]) -> float:
    """Seconds since the process began, most of them to load libraries, if it is this command and nothing else."""
    return time.time() - psutil.Process().create_time() if sys.argv[1:] == ["predict", *arguments] else 0.0


def with_address(arguments: list[str]) -> list[str]:
    """The arguments with --ray auto for a --ray that no address follows."""
    given: list[str] = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        given += [argument, "auto"] if argument == "--ray" and not _ADDRESS.fullmatch(following) else [argument]
    return given


class _Bar:
    """Images done, a second, the width of the last ones and when it will end; lines where there is no terminal."""

    def __init__(self, console: Console):
        self._console = console
        self._before: Tally | None = None
        self._said = time.monotonic()
        self._bar = Progress(
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total} {task.fields[rest]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("predicting", total=None, rest="")

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def show(self, tally: Tally, total: int) -> None:
        """What is done of `total` images."""
        before, self._before = self._before, tally
        task = self._bar.tasks[self._task]
        if before is None:  # what earlier processes did is no speed of this one
            self._bar.reset(self._task, total=total, completed=tally.done)
            return
        used = [width for width in by_width(tally) if tally.widths[width] != before.widths.get(width)]
        self._bar.update(self._task, advance=tally.done - before.done)
        rest = " ".join([*_pace(task), *(["width " + "+".join(used)] if used else [])])
        self._bar.update(self._task, rest=rest)
        if not self._console.is_terminal and time.monotonic() - self._said > _SAY_SECONDS:
            self._said = time.monotonic()
            self._console.print(f"{tally.done}/{total} {rest}", highlight=False, soft_wrap=True)


def _pace(task: Task) -> list[str]:
    if not task.speed or task.remaining is None:
        return []
    end = datetime.now() + timedelta(seconds=task.remaining / task.speed)
    return [f"{task.speed:,.0f} images/s", f"ends {end:%H:%M:%S}"]


def by_width(tally: Tally) -> list[str]:
    """The widths that answered, narrowest first."""
    return sorted(tally.widths, key=Fraction)


def report(out: Path, outcome: Outcome, budget: float | None, seconds: float) -> list[str]:
    """What is said of a finished job; `seconds` of all its processes."""
    tally = outcome.tally
    speed = f"{outcome.images} of them in {outcome.seconds:.1f} s, {outcome.images / outcome.seconds:,.0f} images/s"
    lines = [f"{out}: {tally.done} images ({speed})"]
    if tally.bad:
        lines.append(f"{tally.bad} images have no answer: see the column error")
    lines.append("images per width: " + ", ".join(f"{width}: {tally.widths[width]}" for width in by_width(tally)))
    if budget is not None:
        kept = "kept" if seconds <= budget else "NOT kept"
        lines.append(f"budget {kept}: {seconds:.1f} s used of {budget:g} s")
    answered = sum(tally.widths.values())
    if outcome.cascade is not None and outcome.macs is not None:
        lines += _of_cascade(outcome.cascade, outcome.macs)
    elif outcome.estimate is not None:
        lines.append(f"estimated top-1, from the run's results: {outcome.estimate:.2f} %")
    if outcome.labelled and answered:
        lines.append(f"top-1 on these images: {100 * tally.correct / answered:.2f} % of {answered}")
    return lines


def _of_cascade(fitted: FittedCascade, macs: float) -> list[str]:
    cascade, score = fitted.cascade, fitted.score
    thresholds = ", ".join(f"{threshold:.3g}" for threshold in cascade.thresholds)
    shares = ", ".join(f"{width}: {share:.1%}" for width, share in zip(cascade.widths, score.shares, strict=True))
    return [
        f"cascade {', '.join(map(str, cascade.widths))}: thresholds {thresholds}, fitted on {fitted.fitted_on} "
        "validation images",
        f"on {fitted.scored_on} others: top-1 {score.top1:.2f} % at {score.macs:.3g} of the full width's "
        f"multiply-accumulates (it alone: {fitted.full_top1:.2f} %); answered by {shares}",
        f"here: {macs:.3g} of the full width's multiply-accumulates an image",
    ]
