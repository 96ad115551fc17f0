"""The demo by the paper's method against its baselines: one learning-rate search for all, three seeds.

    python benchmarks/accuracy/demo.py --work runs/demo --jobs 2

Every run is a folder below --work: a run that is there is not trained again, one that was stopped goes on. The
search trains seed 0 at every learning rate and keeps the best mean top-1 over 1/4, 1/2, 3/4, 1; seeds 1 and 2 train
at that rate. Differences come with paired 95 % intervals from a bootstrap over images and seeds.
Ends with one JSON line, which --out also writes to a file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common_runs import ALONE, Job, accuracies, correct, difference, mean_top1, run_all, run_folder, stamp

from slicevit.training.config import TrainConfig
from slicevit.training.loop import Run
from slicevit.training.presets import preset

RATES = (2e-3, 4e-3, 8e-3)
SEEDS = (0, 1, 2)


def variants(share: float, epochs: float) -> dict[str, dict[str, Any]]:
    """What each method changes in the demo's configuration; `share` is the equal-time share of its epochs."""
    demo = replace(preset("fashion-paper"), epochs=epochs)
    separate = ALONE | {"epochs": epochs}
    return {
        "scala": {"epochs": epochs},
        "usnet": {"epochs": epochs, "method": "usnet"},
        "published": {"epochs": epochs, "layout": "flat", "attn_scale": "full"},
        "separate": separate,
        "separate, equal time": separate | {"epochs": demo.epochs * share, "warmup_epochs": demo.warmup_epochs * share},
    }


def config(changes: dict[str, Any], rate: float, seed: int) -> TrainConfig:
    """The demo with `changes`, evaluated at the end only, on one thread."""
    quiet = {"eval_every": 10_000, "threads": 1, "lr": rate, "seed": seed}
    return replace(preset("fashion-paper"), **(quiet | changes))


def equal_time_share(rounds: int = 12) -> float:
    """Seconds of the demo's step over those of one step of every legal width alone, taken in turns, medians."""
    torch.set_num_threads(1)
    demo = config({}, 2e-3, 0)
    elastic = Run(demo, Path("/nonexistent"))
    alone = []
    for width in elastic.model.widths:
        args = demo.model_args | elastic.model.arguments(width)
        alone.append(Run(replace(demo, method="separate", grid="1:1:1", model_args=args), Path("/nonexistent")))
    images, targets = next(iter(elastic.loader.epoch(0)))
    seconds: dict[int, list[float]] = {}
    for round_ in range(rounds):
        for index, run in enumerate([elastic, *alone]):
            run.step = max(run.step, run.full_width_steps + 1)
            start = time.perf_counter()
            run.train_step(images, targets)
            if round_ > 1:
                seconds.setdefault(index, []).append(time.perf_counter() - start)
    medians = [float(np.median(seconds[index])) for index in sorted(seconds)]
    return medians[0] / sum(medians[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/demo"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--epochs", type=float, default=preset("fashion-paper").epochs, help="fewer, to try the script")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    shared = args.work / "equal-time.json"
    if not shared.exists():
        shared.write_text(json.dumps({"share": equal_time_share()}))
    share = json.loads(shared.read_text())["share"]
    methods = variants(share, args.epochs)

    def folder(name: str, rate: float, seed: int) -> Path:
        return run_folder(args.work, name, rate, seed)

    def train(wanted: list[tuple[str, float, int]]) -> None:
        jobs = [Job(config(methods[name], rate, seed), folder(name, rate, seed)) for name, rate, seed in wanted]
        if failed := run_all(lambda: jobs, args.jobs):
            sys.exit(f"failed: {', '.join(run.name for run in failed)}")

    train([(name, rate, 0) for rate in RATES for name in methods])
    best = {name: max(RATES, key=lambda rate: mean_top1(folder(name, rate, 0))) for name in methods}
    print("best learning rates:", best, flush=True)
    train([(name, best[name], seed) for seed in SEEDS[1:] for name in methods])
    right = {name: np.stack([correct(folder(name, best[name], seed)) for seed in SEEDS]) for name in methods}
    report(args, right, best, share, folder)


def report(
    args: argparse.Namespace, right: dict[str, np.ndarray], best: dict[str, float], share: float, folder: Any
) -> None:
    """Print the table and the JSON line; `right` is bool (seeds, 4, N) by method."""
    figures: dict[str, Any] = {}
    for name, hits in right.items():
        versus = difference(right["scala"], hits) if name != "scala" else None
        figures[name] = {
            "lr": best[name],
            **accuracies(hits),
            "scala_minus_this": versus,
            "search": {f"{rate:g}": round(mean_top1(folder(name, rate, 0)), 2) for rate in RATES},
        }
        print(f"{name:22} lr {best[name]:g}  " + "  ".join(f"{v:.2f}" for v in figures[name]["top1"].values()), versus)
    line = json.dumps(
        {
            "benchmark": "accuracy/demo",
            **stamp(),
            "seeds": len(SEEDS),
            "epochs": args.epochs,
            "equal_time_share": round(share, 3),
            "methods": figures,
        }
    )
    if args.out:
        args.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
