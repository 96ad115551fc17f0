"""Networks with BatchNorm at every width, with each width's own statistics and without, beside widths trained alone.

    python benchmarks/accuracy/hybrids.py --work runs/hybrids --jobs 2

Small forms of UniFormer, TinyViT and MobileNetV2 on the bundled images, enlarged to 32 pixels. For each a Scala run of
four widths, which takes every width's statistics, and a network of each width trained alone, of equal epochs and
learning rate. `own` is Scala with each width's statistics, `full's` the same weights with the part of the full width's
that a narrow width would otherwise run on. Runs that are there are not made again, and one that was stopped goes on.
Differences come with paired 95 % intervals, over images alone where there is one seed. Ends with one JSON line, which
--out also writes.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common_runs import ALONE, WIDTHS, Job, accuracies, correct, difference, hits_of, report, run_all, run_folder, show

from slicevit import from_pretrained
from slicevit.training.config import TrainConfig
from slicevit.training.presets import preset

SMALL: dict[str, Any] = {"embed_dims": (16, 32, 64, 128), "depths": (1, 1, 2, 1)}
MODELS: dict[str, dict[str, Any]] = {
    "uniformer_small": SMALL | {"num_heads": (0, 0, 2, 4)},
    "tiny_vit_5m_224": SMALL | {"num_heads": (1, 2, 4, 8), "window_sizes": (4, 4, 2, 1)},
    "mobilenetv2_050": {},
}
METHODS: dict[str, dict[str, Any]] = {
    "scala": {"grid": "1/4:1:1/4"},
    "separate": ALONE,
}


def config(args: argparse.Namespace, model: str, method: str, seed: int) -> TrainConfig:
    """A run of `model` by `method`: the demo's recipe."""
    images = {"in_chans": 1, "pretrained_cfg_overlay": {"input_size": (1, 32, 32)}}
    given = {"model": model, "model_args": MODELS[model] | images, "epochs": args.epochs, "lr": args.lr}
    quiet = {"eval_every": 10_000, "threads": 1, "device": args.device, "seed": seed, "in_memory": True}
    return replace(preset("fashion-paper"), **(given | quiet | METHODS[method]))


def without_statistics(folder: Path) -> np.ndarray:
    """Bool (W, N): what Scala's run in `folder` gets right on parts of the full width's statistics."""
    model = from_pretrained(folder)
    model.forget_statistics()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no BatchNorm statistics of its own")
        return np.stack([hits_of(folder, model, width) for width in WIDTHS])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/hybrids"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--epochs", type=float, default=preset("fashion-paper").epochs)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    def folder(model: str, method: str, seed: int) -> Path:
        return run_folder(args.work, f"{model}, {method}", args.lr, seed)

    jobs = [
        Job(config(args, model, method, seed), folder(model, method, seed))
        for seed in args.seeds
        for model in args.only
        for method in METHODS
    ]
    if failed := run_all(lambda: jobs, args.jobs):
        sys.exit(f"failed: {', '.join(run.name for run in failed)}")
    rows: dict[str, dict[str, Any]] = {}
    for model in args.only:
        folders = [folder(model, "scala", seed) for seed in args.seeds]
        own, alone = (
            np.stack([correct(folder(model, method, seed)) for seed in args.seeds]) for method in ("scala", "separate")
        )
        parts = np.stack([without_statistics(run) for run in folders])
        rows[model] = {"own": accuracies(own), "full's": accuracies(parts), "separate": accuracies(alone)}
        rows[model] |= {"own minus separate": difference(own, alone)}
        for name in ("own", "full's", "separate"):
            show(f"{model:16} {name:9}", rows[model][name]["top1"])
    options = {name: getattr(args, name) for name in ("epochs", "lr", "seeds")}
    report(args.out, "accuracy/hybrids", **options, models=rows)


if __name__ == "__main__":
    main()
