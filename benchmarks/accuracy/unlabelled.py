"""Every width learned from a teacher's tokens without labels, probed beside the teacher and a run with labels.

    python benchmarks/accuracy/unlabelled.py --work runs/unlabelled --jobs 2

The teacher is the demo's network on the bundled images, trained at full width alone. `features` has its tokens alone
to learn from, `labels` the labels alone; both are Scala runs of the demo's recipe, of equal epochs and learning rate.
All three are probed on the same images with linear heads and with 20 nearest neighbours, the teacher at full width.
Runs and features that are there are not made again. Ends with one JSON line, which --out also writes.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common_runs import WIDTHS, Job, report, run_all, run_folder, show
from probe import by_probe

from slicevit.training.presets import preset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/unlabelled"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--epochs", type=float, default=preset("fashion-paper").epochs, help="of each run")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=12_500, help="of each head; fewer, to try the script")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    demo = replace(
        preset("fashion-paper"), epochs=args.epochs, lr=args.lr, eval_every=10_000, threads=1, device=args.device
    )
    folders = {name: run_folder(args.work, name, args.lr, 0) for name in ("teacher", "features", "labels")}
    teacher = Job(replace(demo, sampling="full", isolation="off"), folders["teacher"])
    taught = replace(demo, teacher=str(folders["teacher"]), teacher_objective="features")
    students = [Job(taught, folders["features"]), Job(demo, folders["labels"])]
    for jobs in ([teacher], students):
        if failed := run_all(lambda jobs=jobs: jobs, args.jobs):  # type: ignore[misc]
            sys.exit(f"failed: {', '.join(run.name for run in failed)}")
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    for name, folder in folders.items():
        widths = ("1",) if name == "teacher" else WIDTHS
        figures[name] = by_probe(args, folder, demo.data, args.work / "probes" / name, widths)
        for probe, top1 in figures[name].items():
            show(f"{name:9} {probe:10}", top1)
    options = {name: getattr(args, name) for name in ("epochs", "lr", "steps")}
    report(args.out, "accuracy/unlabelled", **options, runs=figures)


if __name__ == "__main__":
    main()
