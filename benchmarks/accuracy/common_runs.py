"""What the accuracy scripts share: run folders, training several at a time, and which test images each gets right.

Legend of axis names: S seeds, W widths, N images.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console

from slicevit import ElasticModel, from_pretrained
from slicevit.checkpoint import read_config
from slicevit.data import eval_batches, eval_config, eval_transform, open_dataset
from slicevit.evaluation.accuracy import correct_per_image
from slicevit.evaluation.results import read_results
from slicevit.evaluation.statistics import paired_bootstrap
from slicevit.files import replacing, write_text
from slicevit.tasks.detect import runs as detect_runs
from slicevit.tasks.detect.config import DetectConfig
from slicevit.tasks.segment import runs as segment_runs
from slicevit.tasks.segment.config import SegmentConfig
from slicevit.training import loop, runs
from slicevit.training.config import TrainConfig
from slicevit.training.keeper import NotFinite
from slicevit.training.methods import is_separate, part_folder
from slicevit.training.ranks import pick_device
from slicevit.training.signals import Interrupted, StopRequest

WIDTHS = ("1/4", "1/2", "3/4", "1")
NOT_FINITE = "not-finite.txt"
ALONE: dict[str, Any] = {"method": "separate", "grid": "1/4:1:1/4"}
_KINDS = {TrainConfig: runs, SegmentConfig: segment_runs, DetectConfig: detect_runs}


class Job(NamedTuple):
    """A run to be made, or gone on with, in `folder`: of `slicevit train`, `segment` or `detect`, by its config."""

    config: TrainConfig | SegmentConfig | DetectConfig
    folder: Path


def run_folder(work: Path, name: str, rate: float, seed: int) -> Path:
    """The folder of a run below `work`."""
    return work / f"{name.replace(', ', '-').replace(' ', '-')}-lr{rate:g}-seed{seed}"


def done(folder: Path) -> bool:
    """Whether the run has its results, or cannot have any because a loss was not finite."""
    ends = ("results.json", "distillation.json", NOT_FINITE)  # the second of a run that no labels teach
    return any((folder / name).exists() for name in ends)


def mean_top1(folder: Path) -> float:
    """Mean top-1 over the four widths, in per cent; minus infinity where a loss was not finite."""
    if (folder / NOT_FINITE).exists():
        return -np.inf
    return float(np.mean([row.top1 for row in read_results(folder) if row.width in WIDTHS]))


def run_all(ready: Callable[[], Iterable[Job]], workers: int) -> list[Path]:
    """Train what `ready` names, `workers` runs at a time, until it names nothing new; returns the runs that failed.

    `ready` is asked whenever a worker is free, so that a run may depend on the results of others. Each run is a
    process of its own. SIGINT or SIGTERM ends them with their state saved, and then this process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["slicevit.training.runs"])
    started: set[Path] = set()
    failed: list[Path] = []
    running: dict[int, tuple[Any, Path]] = {}
    told = False
    with StopRequest() as stop:
        while True:
            if len(running) < workers and not stop.signum:
                new = [job for job in ready() if job.folder not in started and not done(job.folder)]
                for job in new[: workers - len(running)]:
                    process = context.Process(target=_child, args=job)
                    process.start()
                    running[process.sentinel] = process, job.folder
                    started.add(job.folder)
            if not running:
                break
            for sentinel in wait(list(running), timeout=1):
                process, folder = running.pop(sentinel)
                process.join()
                if process.exitcode == 0:
                    print(f"{folder.name} done", flush=True)
                elif not stop.signum:
                    failed.append(folder)
                    print(f"{folder.name} failed", file=sys.stderr, flush=True)
            if stop.signum and not told:
                told = True
                for process, _ in running.values():
                    process.terminate()
    if stop.signum:
        sys.exit(128 + stop.signum)
    return failed


def _child(config: TrainConfig | SegmentConfig | DetectConfig, folder: Path) -> None:
    """The run, and which images a classifier gets right, in a process that stops with its parent."""
    os.setsid()  # Ctrl-C reaches the parent alone, which passes it on once
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    loop.LATENCY_SECONDS = 0.02  # which nobody reads here
    try:
        with open(os.devnull, "w") as quiet:
            console = Console(file=quiet)
            made: Any = _KINDS[type(config)]
            if (folder / "config.json").exists():
                made.resume(folder, console)
            else:
                made.start(config, folder, console)
        if isinstance(config, TrainConfig) and config.learns_labels:
            correct(folder)
    except Interrupted as stop:
        sys.exit(stop.exit_status)
    except NotFinite as error:
        write_text(folder / NOT_FINITE, f"{error}\n")
    except ValueError as error:
        sys.exit(f"{folder.name}: {error}")


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def correct(folder: Path, widths: Sequence[str] = WIDTHS, grid: str | None = None) -> np.ndarray:
    """Bool (W, N): whether each test image is right at each of `widths`; kept in the run's folder.

    `grid` names one that holds the widths, where the run's own does not.
    """
    return np.stack([_correct(folder, width, grid) for width in widths])


def _correct(folder: Path, width: str, grid: str | None) -> np.ndarray:
    name = width.replace("/", "-")
    kept = folder / f"correct-{name}.npy"
    if kept.exists():
        return np.load(kept)
    separate = is_separate(folder)
    source = part_folder(folder, width) if separate else folder
    model = from_pretrained(source, **({"grid": grid} if grid and not separate else {}))
    hits_N = hits_of(source, model, "1" if separate else width)
    with replacing(kept) as temporary, open(temporary, "wb") as file:
        np.save(file, hits_N)
    return hits_N


def hits_of(folder: Path, model: ElasticModel, width: str) -> np.ndarray:
    """Bool (N,): which test images of the run in `folder` its `model` gets right at a width."""
    training = runs.read_train_config(folder)
    transform = eval_config(read_config(folder)[0])
    images = open_dataset(training.data, "val", root=training.data_root, in_chans=transform.in_chans)
    batches = eval_batches(images, eval_transform(transform), training.eval_batch_size, training.workers)
    device = pick_device(training.device)
    return correct_per_image(model.to(device).subnet(width), batches, device).numpy()


def show(name: str, by_width: Mapping[str, float]) -> None:
    """A line of figures by width on the terminal."""
    print(f"{name}  " + "  ".join(f"{width} {value:.2f}" for width, value in by_width.items()), flush=True)


def by_width(values_W: np.ndarray) -> dict[str, float]:
    """Figures of the four widths, rounded."""
    return dict(zip(WIDTHS, values_W.round(2).tolist(), strict=True))


def accuracies(hits_SWN: np.ndarray) -> dict[str, Any]:
    """Top-1 in per cent by width and its mean, over seeds; with several seeds their standard deviation too."""
    top1_SW = 100 * hits_SWN.mean(axis=2)
    figures: dict[str, Any] = {"top1": by_width(top1_SW.mean(axis=0)), "mean": round(float(top1_SW.mean()), 2)}
    return figures | ({"top1_std": by_width(top1_SW.std(axis=0, ddof=1))} if len(top1_SW) > 1 else {})


def difference(one_SWN: np.ndarray, other_SWN: np.ndarray) -> list[float]:
    """Mean, low and high of the paired 95 % interval over images and seeds, in points."""
    interval = paired_bootstrap(one_SWN, other_SWN)
    return [round(value, 2) for value in (interval.mean, interval.low, interval.high)]


def report(out: Path | None, benchmark: str, **figures: Any) -> None:
    """Print the JSON line that a script ends with, and write it to `out`."""
    line = json.dumps({"benchmark": benchmark, **stamp(), **figures})
    if out:
        out.write_text(line + "\n")
    print(line)


def stamp() -> dict[str, str]:
    """What a result was made with; GIT_COMMIT of the environment names the commit where git cannot."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    commit = os.environ.get("GIT_COMMIT", git)
    return {"commit": commit, "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "device": device}
