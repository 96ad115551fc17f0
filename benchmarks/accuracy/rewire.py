"""An ordinary network fine-tuned to every width: as it is, rewired, and against training from scratch.

    python benchmarks/accuracy/rewire.py --work runs/rewire --jobs 2

The ordinary network is the demo's, on the bundled images, trained at full width alone, one for each seed. Every row
fine-tunes it by the demo's method for the same epochs: as it is, with its channels permuted, with its stream and heads
rotated, each with the smallest width isolated and not; `scratch` begins from random weights. Each row takes its best
mean top-1 over 1/4, 1/2, 3/4, 1 of the same rates with seed 0; the other seeds train at that rate. Every run is a
folder below --work: one that is there is not trained again, one that was stopped goes on. Differences come with paired
95 % intervals from a bootstrap over images and seeds. `begins` is each row's top-1 before any fine-tuning, of seed 0.
Ends with one JSON line, which --out also writes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common_runs import (
    Job,
    accuracies,
    by_width,
    correct,
    difference,
    done,
    mean_top1,
    run_all,
    run_folder,
    stamp,
)

from slicevit.files import write_text
from slicevit.training.presets import preset

BASE = "ordinary"
ROWS: dict[str, dict[str, Any]] = {
    "scratch": {"init": "scratch"},
    "as it is": {},
    "permuted": {"rewire": "permute"},
    "rotated": {"rewire": "rotate"},
    "as it is, not isolated": {"isolation": "off"},
    "permuted, not isolated": {"rewire": "permute", "isolation": "off"},
    "rotated, not isolated": {"rewire": "rotate", "isolation": "off"},
}


class Comparison:
    """The runs below `args.work`, by row, learning rate and seed."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        quick = {"eval_every": 10_000, "threads": 1, "device": args.device, "in_memory": True, "cuda_graphs": True}
        self.demo = replace(preset("fashion-paper"), **quick)

    def base(self, seed: int) -> Job:
        """The full width trained alone; the narrower ones are evaluated as they come out."""
        config = replace(self.demo, sampling="full", epochs=self.args.base_epochs, lr=self.args.base_lr, seed=seed)
        return Job(config, run_folder(self.args.work, BASE, config.lr, seed))

    def job(self, name: str, rate: float, seed: int) -> Job:
        """A run of a row."""
        start = {"init": str(self.base(seed).folder), "epochs": self.args.epochs, "lr": rate, "seed": seed}
        return Job(replace(self.demo, **(start | ROWS[name])), run_folder(self.args.work, name, rate, seed))

    def rate(self, name: str) -> float | None:
        """The best learning rate of a row; None while its search is not done."""
        folders = {rate: self.job(name, rate, 0).folder for rate in self.args.rates}
        if not all(map(done, folders.values())):
            return None
        return max(folders, key=lambda rate: mean_top1(folders[rate]))

    def start(self, name: str) -> Job:
        """A row's run of seed 0 whose first step changes nothing, for what it begins with."""
        job = self.job(name, self.args.rates[0], 0)
        still = {"epochs": 1e-6, "lr": 1e-12, "min_lr": 0.0, "weight_decay": 0.0}
        return Job(replace(job.config, **still), run_folder(self.args.work, f"{name}, before", self.args.rates[0], 0))

    def ready(self) -> Iterator[Job]:
        """The runs that can be made now: the ordinary networks first, then every row's search, then its seeds."""
        yield from (self.base(seed) for seed in self.args.seeds)
        for name in self.args.only:
            if done(self.base(0).folder):
                yield self.start(name)
                yield from (self.job(name, rate, 0) for rate in self.args.rates)
            rate = self.rate(name)
            if rate is not None:
                yield from (self.job(name, rate, seed) for seed in self.args.seeds if done(self.base(seed).folder))

    def hits(self, name: str) -> np.ndarray:
        """Bool (seeds, widths, images): which test images a row gets right, at its best rate."""
        rate = self.rate(name)
        assert rate is not None
        return np.stack([correct(self.job(name, rate, seed).folder) for seed in self.args.seeds])


def figures(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """A line of the table for every row that is done."""
    right = {name: comparison.hits(name) for name in comparison.args.only}
    table: dict[str, dict[str, Any]] = {}
    for name, hits in right.items():
        begins = by_width(100 * correct(comparison.start(name).folder).mean(axis=1))
        table[name] = {"lr": comparison.rate(name), **accuracies(hits), "begins": begins}
        for other in ("scratch", "as it is"):
            if other in right and other != name:
                table[name][f"minus {other}"] = difference(hits, right[other])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/rewire"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument(
        "--base-epochs", type=float, default=preset("fashion-paper").epochs, help="of the ordinary network"
    )
    parser.add_argument("--base-lr", type=float, default=preset("fashion-paper").lr)
    parser.add_argument("--epochs", type=float, default=preset("fashion-paper").epochs, help="of every row")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="0 is among them, for the search")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if 0 not in args.seeds:
        sys.exit(f"--seeds {args.seeds}: the search of the learning rate needs seed 0")
    args.work.mkdir(parents=True, exist_ok=True)
    options = {name: getattr(args, name) for name in ("base_epochs", "base_lr", "epochs")}
    plan = args.work / "rewire.json"
    if plan.exists() and json.loads(plan.read_text()) != options:
        sys.exit(f"{args.work} holds runs with {plan.read_text().strip()}: give the same, or name another --work")
    write_text(plan, json.dumps(options) + "\n")
    comparison = Comparison(args)
    if failed := run_all(comparison.ready, args.jobs):
        sys.exit(f"failed: {', '.join(run.name for run in failed)}")
    rows = figures(comparison)
    for name, row in rows.items():
        print(f"{name:24} lr {row['lr']:g}  " + "  ".join(f"{value:.2f}" for value in row["top1"].values()), flush=True)
    ordinary = accuracies(np.stack([correct(comparison.base(seed).folder) for seed in args.seeds]))
    line = json.dumps(
        {
            "benchmark": "accuracy/rewire",
            **stamp(),
            **options,
            "seeds": len(args.seeds),
            "ordinary": ordinary,
            "rows": rows,
        }
    )
    if args.out:
        args.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
