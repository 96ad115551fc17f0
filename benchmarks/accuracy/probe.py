"""Runs probed on classes and images that they were not trained on, every width beside models trained alone.

    python ../shared/data/unpack.py cifar10 data/cifar10
    python benchmarks/accuracy/probe.py --data data/cifar10 --work runs/probe --jobs 2

Two settings:
- `unseen classes`: trained on classes 0 to 4 of the data, probed on 5 to 9.
- `other images`: trained on --train-on (the bundled Fashion-MNIST by default, resized), probed on all of the data.
In each, a Scala model and a model of every one of the widths 1/4, 1/2, 3/4, 1 trained alone, of equal epochs and
learning rate. Each is probed with linear heads of its own at every width, with one sliceable head (Scala alone), and
with 20 nearest neighbours. Then Scala's run of `unseen classes` is fine-tuned to the classes that it was probed on, all
widths in one, beside a run of the same epochs from scratch. Runs and features that are there are not made again. Ends
with one JSON line, which --out also writes.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common_runs import ALONE, WIDTHS, Job, report, run_all, run_folder, show

from slicevit.evaluation.probe.job import run_probe
from slicevit.evaluation.probe.probed import Driver
from slicevit.evaluation.probe.results import SLICEABLE
from slicevit.evaluation.probe.settings import ProbeSettings
from slicevit.evaluation.results import read_results
from slicevit.training.config import TrainConfig
from slicevit.training.methods import part_folder
from slicevit.training.presets import preset
from slicevit.training.ranks import pick_device

METHODS: dict[str, dict[str, Any]] = {
    "scala": {"grid": "1/4:1:1/8"},
    "separate": ALONE,
}
IMAGES = {"img_size": 32, "in_chans": 3, "embed_dim": 128, "depth": 6, "num_heads": 4}


def config(args: argparse.Namespace, method: str, data: str) -> TrainConfig:
    """A run of `method` on `data`: the demo's recipe, on a ViT for images of 32 pixels in colour."""
    quiet = {"eval_every": 10_000, "threads": args.threads, "lr": args.lr, "epochs": args.epochs, "seed": 0}
    model_args = IMAGES | {"patch_size": args.patch_size}
    quick = {"in_memory": True, "cuda_graphs": True, "device": args.device, "model_args": model_args}
    return replace(preset("fashion-paper"), **(quiet | quick | METHODS[method] | {"data": data}))


def by_probe(
    args: argparse.Namespace, run: Path, data: str, out: Path, widths: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """probe -> width -> top-1 in per cent, of both probes of `run` with `args.steps` on `args.device`."""
    settings = ProbeSettings(str(run), data, out=out, widths=widths, steps=args.steps, device=args.device)
    driver = Driver(pick_device(args.device))
    found: dict[str, dict[str, float]] = {}
    for knn in (False, True):
        for row in run_probe(replace(settings, knn=knn), driver)[0]:
            found.setdefault(row.probe, {})[row.width] = round(row.top1, 2)
    return found


def table(args: argparse.Namespace, method: str, run: Path, data: str, out: Path) -> dict[str, dict[str, float]]:
    """The same of a run of `method`; networks of one width have no sliceable head."""
    if method != "separate":
        return by_probe(args, run, data, out / "all", WIDTHS)
    found: dict[str, dict[str, float]] = {}
    for width in WIDTHS:
        alone = by_probe(args, part_folder(run, width), data, out / width.replace("/", "-"), ("1",))
        for name in alone.keys() - {SLICEABLE}:
            found.setdefault(name, {})[width] = alone[name]["1"]
    return found


def fine_tuned(args: argparse.Namespace, start: Path, data: str) -> dict[str, dict[str, float]]:
    """How it began -> width -> top-1 in per cent, after --tune-epochs of all widths on `data`."""
    base = replace(config(args, "scala", data), epochs=args.tune_epochs)
    jobs = {
        name: Job(replace(base, init=init), run_folder(args.work, f"classes probed, {name}", args.lr, 0))
        for name, init in {"fine-tuned": str(start), "from scratch": "scratch"}.items()
    }
    if failed := run_all(jobs.values, args.jobs):
        sys.exit(f"failed: {', '.join(run.name for run in failed)}")
    return {
        name: {row.width: round(row.top1, 2) for row in read_results(job.folder) if row.width in WIDTHS}
        for name, job in jobs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder with train/ and val/ of ten class folders or more")
    parser.add_argument("--train-on", default="fashion-mnist", help="what the runs of `other images` are trained on")
    parser.add_argument("--work", type=Path, default=Path("runs/probe"))
    parser.add_argument("--jobs", type=int, default=2, help="runs trained at a time")
    parser.add_argument("--patch-size", type=int, default=4, help="8 takes a quarter of the time")
    parser.add_argument("--epochs", type=float, default=20.0)
    parser.add_argument("--tune-epochs", type=float, default=5.0, help="of fine-tuning")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=12_500, help="of each head; fewer, to try the script")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    settings = {
        "unseen classes": (f"{args.data}?classes=0:5", f"{args.data}?classes=5:10"),
        "other images": (args.train_on, args.data),
    }
    folders = {
        (setting, method): run_folder(args.work, f"{setting}, {method}", args.lr, 0)
        for setting in settings
        for method in METHODS
    }
    jobs = [Job(config(args, method, settings[setting][0]), folders[setting, method]) for setting, method in folders]
    if failed := run_all(lambda: jobs, args.jobs):
        sys.exit(f"failed: {', '.join(run.name for run in failed)}")
    torch.set_num_threads(args.threads)
    figures: dict[str, Any] = {}
    for (setting, method), folder in folders.items():
        figures.setdefault(setting, {})[method] = table(
            args, method, folder, settings[setting][1], args.work / "probes" / folder.name
        )
    unseen = "unseen classes"
    figures[unseen]["scala"] |= fine_tuned(args, folders[unseen, "scala"], settings[unseen][1])
    for setting, methods in figures.items():
        for method, rows in methods.items():
            for name, top1 in rows.items():
                show(f"{setting:15} {method:9} {name:12}", top1)
    names = ("data", "train_on", "patch_size", "epochs", "tune_epochs", "lr", "steps")
    options = {name: getattr(args, name) for name in names}
    report(args.out, "accuracy/probe", **options, settings=figures)


if __name__ == "__main__":
    main()
