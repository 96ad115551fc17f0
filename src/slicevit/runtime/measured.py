"""The profile of a run: latency and memory of every width on this machine, beside the run's accuracies.

Times are milliseconds, accuracies per cent, memory megabytes of a million bytes.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch

from slicevit.evaluation.figures import TOP1, Figure
from slicevit.evaluation.latency import time_in_turns
from slicevit.evaluation.results import read_figures
from slicevit.files import write_text
from slicevit.runtime.backends import Precision
from slicevit.runtime.energy import joules, joules_of
from slicevit.runtime.engine import Engine
from slicevit.runtime.peak import peak_growth
from slicevit.runtime.profile import Profile
from slicevit.version import versions
from slicevit.widths import FULL

Progress = Callable[[str, float], None]  # what is done, and the share of it from 0 to 1


def profile_path(run: str | Path, engine: str, device: str, precision: str = "float32") -> Path:
    """Where the profile of an engine lies in a run's folder."""
    return Path(run, "profiles", f"{engine}-{device}{'-bf16' if precision == 'bfloat16' else ''}.json")


def profile_run(
    run: str | Path,
    engine: str = "torch",
    device: str = "auto",
    batch: Sequence[int] = (1, 4, 16),
    precision: Precision = "float32",
    seconds: float = 1.0,
    threads: int = 0,
    progress: Progress = lambda what, share: None,
) -> dict[str, Any]:
    """Measure every width of the run in this folder; write the table to `profile_path` and give it.

    Args:
        engine: as of `Engine`, like device, precision and threads.
        device: see there.
        precision: see there.
        threads: see there.
        batch: the batch sizes, in images.
        seconds: spent on each width and batch size; the widths are called in turns, so that a drifting clock treats
            all alike.
        progress: is told how far it is.

    The table holds, in `rows` for every width: `top1` of results.json, or of a segmenter `miou` (`figure` says which);
    the median (`latency_ms`) and the 99th percentile (`p99_ms`) of `calls` calls of `Engine.run` at every batch size;
    `weights_mb`, the bytes of its weights as the engine holds them; `call_mb`, the most by which the first call at the
    largest batch size raised the memory in use (the process's resident set, or CUDA's allocated memory; None where the
    system does not tell); `memory_mb`, both together; `energy_j`, the joules of an image in calls of the largest batch
    size, by the machine's own counters (see `energy.joules`; None without them); `beaten_by`, a width that is at least
    as accurate and as fast at every batch size, and better in one of these.

    An earlier profile of the same engine, device and precision is replaced at the end, in one step. Raises ValueError
    when the run has no accuracy of a width, or for what `Engine` refuses.
    """
    table = measure_run(run, engine, device, batch, precision, seconds, threads, progress)
    write_table(run, table)
    return table


def measure_run(
    run: str | Path,
    engine: str = "torch",
    device: str = "auto",
    batch: Sequence[int] = (1, 4, 16),
    precision: Precision = "float32",
    seconds: float = 1.0,
    threads: int = 0,
    progress: Progress = lambda what, share: None,
) -> dict[str, Any]:
    """The table of `profile_run`, which is not written anywhere. Raises as that does."""
    sizes = _checked(batch, seconds)
    if not Path(run).is_dir():
        raise ValueError(f"{run} is no folder: a profile is written into a run's folder on this disk")
    with Engine(run, engine, device, precision, threads) as ready:
        scores = _scores(run, ready.widths, ready.figure)
        call_mb = _memory(ready, max(sizes), progress)
        timings = {size: _timings(ready, size, seconds, progress) for size in sizes}
        energy_j = _energy(ready, max(sizes), seconds, progress)
        rows = [_row(ready, width, scores[width], timings, call_mb[width], energy_j[width]) for width in ready.widths]
        table = _described(ready, seconds) | {"rows": rows}
        profile = _profile(table, "latency_ms")
        for row, measured in zip(rows, profile.rows, strict=True):
            better = profile.better_than(measured)
            row["beaten_by"] = None if better is None else str(better.width)
        return table


def write_table(run: str | Path, table: dict[str, Any]) -> None:
    """Write a table of `measure_run` to its `profile_path`, in one step."""
    written = profile_path(run, table["engine"], table["device"], table["precision"])
    write_text(written, json.dumps(table, indent=2) + "\n")


def profile_of(table: dict[str, Any], latency: Literal["latency_ms", "p99_ms"] = "latency_ms") -> Profile:
    """A table of `measure_run` as the policies read it; `latency` as of `read_profile`."""
    return _profile(table, latency)


def read_profile(
    run: str | Path,
    engine: str = "torch",
    device: str = "cpu",
    precision: str = "float32",
    latency: Literal["latency_ms", "p99_ms"] = "latency_ms",
) -> Profile:
    """The table that `slicevit profile` left in the run's folder, for the policies.

    Args:
        device: cpu or cuda.
        latency: what the policies count on: the median or the 99th percentile.

    Raises ValueError, naming the command that writes it, when there is none or it is broken.
    """
    return profile_of(read_table(run, engine, device, precision), latency)


def read_table(run: str | Path, engine: str, device: str, precision: str = "float32") -> dict[str, Any]:
    """All that the file holds; see `profile_run`. Raises ValueError as `read_profile` does."""
    path = profile_path(run, engine, device, precision)
    command = f"slicevit profile {run} --engine {engine} --device {device}"
    command += f" --precision {precision}" if precision != "float32" else ""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        for latency in ("latency_ms", "p99_ms"):
            _profile(table, latency)
    except FileNotFoundError:
        raise ValueError(f"{run} has no profile of engine {engine} on the {device}: run `{command}`") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is broken ({error}): run `{command}` again") from None
    return dict(table)


def _profile(table: dict[str, Any], latency: str) -> Profile:
    rows = table["rows"]
    figure = table.get("figure", TOP1.column)  # tables that older versions wrote are of classifiers
    return Profile.parse(
        {name: row.get(name) for name in ("memory_mb", "energy_j")}
        | {"width": row["width"], "top1": row[figure], "latency_ms": row[latency]}
        for row in rows
    )


def _checked(batch: Sequence[int], seconds: float) -> list[int]:
    if not batch or min(batch) < 1:
        raise ValueError(f"--batch {' '.join(map(str, batch))}: give one or more batch sizes of 1 or more")
    if not 0 < seconds < float("inf"):
        raise ValueError(f"--seconds {seconds}: give the seconds for each width and batch size, above 0")
    return sorted(set(batch))


def _scores(run: str | Path, widths: Sequence[Fraction], figure: Figure) -> dict[Fraction, float]:
    if not Path(run, "results.json").exists():
        raise ValueError(f"{run} has no results: its widths have no accuracy yet; run `slicevit eval {run}` first")
    scores = read_figures(run, figure.column)
    if list(widths) == [FULL] and len(scores) == 1:  # cut out and trained alone: its row has the width it was cut at
        scores = {FULL: next(iter(scores.values()))}
    missing = [width for width in widths if width not in scores]
    if missing:
        raise ValueError(f"{run} has no accuracy of width {missing[0]} in its results: run `slicevit eval {run}` again")
    return scores


def _memory(engine: Engine, batch: int, progress: Progress) -> dict[Fraction, float | None]:
    """Megabytes that the first call of `batch` images adds, at every width; makes every width ready."""
    images_BCHW = torch.zeros(batch, *engine.input_size)
    found: dict[Fraction, float | None] = {}
    for index, width in enumerate(engine.widths):
        progress(f"width {width} is made ready", index / len(engine.widths))
        engine.ready(width)
        engine.run(images_BCHW[:1], width)  # what a library keeps from its very first call is not this call's
        grown = peak_growth(partial(engine.run, images_BCHW, width), engine.device)
        found[width] = None if grown is None else grown / 1e6
    progress("all widths are ready", 1.0)
    return found


def _timings(engine: Engine, batch: int, seconds: float, progress: Progress) -> dict[str, list[float]]:
    images_BCHW = torch.zeros(batch, *engine.input_size)
    calls = {str(width): partial(engine.run, images_BCHW, width) for width in engine.widths}
    return time_in_turns(calls, seconds, progress=partial(progress, f"batch {batch} is timed"))


def _energy(engine: Engine, batch: int, seconds: float, progress: Progress) -> dict[Fraction, float | None]:
    """Joules of an image at every width; of a counter that did not move in so many seconds None."""
    counter = joules(engine.device)
    if counter is None:
        return dict.fromkeys(engine.widths)
    images_BCHW = torch.zeros(batch, *engine.input_size)
    found: dict[Fraction, float | None] = {}
    for index, width in enumerate(engine.widths):
        progress(f"energy of width {width}", index / len(engine.widths))
        found[width] = joules_of(partial(engine.run, images_BCHW, width), counter, seconds) / batch or None
    return found


def _row(
    engine: Engine,
    width: Fraction,
    score: float,
    timings: dict[int, dict[str, list[float]]],
    call_mb: float | None,
    energy_j: float | None,
) -> dict[str, Any]:
    times = {str(size): of_widths[str(width)] for size, of_widths in timings.items()}
    weights_mb = engine.held[width] / 1e6
    return {
        "width": str(width),
        engine.figure.column: score,
        "latency_ms": {size: median(values) for size, values in times.items()},
        "p99_ms": {size: float(np.percentile(values, 99)) for size, values in times.items()},
        "calls": {size: len(values) for size, values in times.items()},
        "weights_mb": weights_mb,
        "call_mb": call_mb,
        "memory_mb": None if call_mb is None else weights_mb + call_mb,
        "energy_j": energy_j,
    }


def _described(engine: Engine, seconds: float) -> dict[str, Any]:
    """What was measured where; `threads` 0 is the library's own choice."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return {
        "figure": engine.figure.column,
        "engine": engine.name,
        "device": engine.device,
        "precision": engine.precision,
        "threads": engine.threads,
        "seconds": seconds,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "hardware": {
            "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if engine.device == "cuda" else None,
            "os": platform.platform(terse=True),
        },
        "versions": versions(engine.packages),
    }
