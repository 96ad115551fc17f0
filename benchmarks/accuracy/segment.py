"""Segmentation at every width: each width cut out and trained alone, one slimmable segmenter, and separate networks.

    python ../shared/data/unpack.py tiny-imagenet-100 data/tiny
    python ../shared/data/unpack.py camvid data/camvid
    python benchmarks/accuracy/segment.py --pretrain-on data/tiny --data data/camvid --work runs/segment

Backbones are trained on the classes of --pretrain-on first: a Scala model, and a model of each of the widths 1/4, 1/2,
3/4, 1 alone, of equal epochs and learning rate. Then, for each seed, on --data:

| row | backbones | decoder | training |
|---|---|---|---|
| cut out | Scala's, cut at each width | whole | each width alone (the paper's way) |
| slimmable | Scala's | sliced | all widths in one run |
| separate | trained alone | whole | each width alone |

Every run has the same epochs, so that the rows of widths trained alone took one run for each width. Runs that are there
are not made again, and one that was stopped goes on. Ends with one JSON line, which --out also writes.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from common_runs import ALONE, WIDTHS, Job, run_all, run_folder, stamp

from slicevit.tasks.segment.config import SegmentConfig
from slicevit.tasks.segment.presets import preset as segment_preset
from slicevit.tasks.segment.results import read_segment_results
from slicevit.training.config import TrainConfig
from slicevit.training.presets import preset

BACKBONES: dict[str, dict[str, Any]] = {
    "scala": {"grid": "1/4:1:1/4"},
    "separate": ALONE,
}
ROWS = {"cut out": ("scala", "separate"), "slimmable": ("scala", "scala"), "separate": ("separate", "separate")}
VIT = {"img_size": 64, "in_chans": 3, "depth": 6, "num_heads": 4}


def backbone_config(args: argparse.Namespace, method: str) -> TrainConfig:
    """A classifier's run: the demo's recipe, on a ViT for images of 64 pixels in colour."""
    model_args = VIT | {"patch_size": args.patch_size, "embed_dim": args.embed_dim}
    given = {"data": args.pretrain_on, "model_args": model_args, "epochs": args.pretrain_epochs, "lr": args.pretrain_lr}
    quiet = {"eval_every": 10_000, "threads": args.threads, "device": args.device, "seed": 0}
    quick = {"in_memory": True, "cuda_graphs": True}
    return replace(preset("fashion-paper"), **(given | quiet | quick | BACKBONES[method]))


def segment_config(args: argparse.Namespace, backbone: Path, method: Any, seed: int) -> SegmentConfig:
    """A segmenter's run on CamVid's layout."""
    return replace(
        segment_preset("camvid"),
        data=args.data,
        init=str(backbone),
        method=method,
        epochs=args.epochs,
        warmup_epochs=args.epochs / 20,
        lr=args.lr,
        size=tuple(args.size),
        decoder_channels=args.decoder_channels,
        seed=seed,
        eval_every=10_000,
        threads=args.threads,
        workers=args.workers,
        device=args.device,
        cuda_graphs=True,
        log_with=(),
    )


def summary(figures: list[float]) -> dict[str, float]:
    """Mean over the seeds, and their deviation where there are several."""
    found = {"mean": round(mean(figures), 2)}
    return found | {"deviation": round(stdev(figures), 2)} if len(figures) > 1 else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrain-on", required=True, help="a folder with train/ and val/ of class folders")
    parser.add_argument("--data", required=True, help="a folder with {train,test}/{images,masks}, as CamVid's")
    parser.add_argument("--work", type=Path, default=Path("runs/segment"))
    parser.add_argument("--jobs", type=int, default=2, help="runs trained at a time")
    parser.add_argument("--embed-dim", type=int, default=192, help="of the backbone")
    parser.add_argument("--patch-size", type=int, default=8, help="of the backbone; 16 takes a quarter of the time")
    parser.add_argument("--decoder-channels", type=int, default=128)
    parser.add_argument("--pretrain-epochs", type=float, default=20.0)
    parser.add_argument("--pretrain-lr", type=float, default=2e-3)
    parser.add_argument("--epochs", type=float, default=60.0)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--size", type=int, nargs=2, default=(192, 256))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images, of each segmenter")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    backbones = {method: run_folder(args.work, f"backbone {method}", args.pretrain_lr, 0) for method in BACKBONES}
    jobs = [Job(backbone_config(args, method), folder) for method, folder in backbones.items()]
    if failed := run_all(lambda: jobs, args.jobs):
        sys.exit(f"failed: {', '.join(run.name for run in failed)}")
    segmenters = {
        (row, seed): Job(
            segment_config(args, backbones[backbone], method, seed),
            run_folder(args.work, f"segment {row}", args.lr, seed),
        )
        for seed in args.seeds
        for row, (backbone, method) in ROWS.items()
    }
    if failed := run_all(segmenters.values, args.jobs):
        sys.exit(f"failed: {', '.join(run.name for run in failed)}")
    found: dict[str, dict[str, list[float]]] = {row: {width: [] for width in WIDTHS} for row in ROWS}
    for (row, _), job in segmenters.items():
        for result in read_segment_results(job.folder):
            found[row][result.width].append(result.miou)
    miou = {row: {width: summary(figures) for width, figures in widths.items()} for row, widths in found.items()}
    sizes = ("embed_dim", "patch_size", "decoder_channels", "size")
    settings = {name: str(getattr(args, name)) for name in (*sizes, "pretrain_epochs", "epochs", "lr", "seeds")}
    line = json.dumps({"miou": miou, "settings": settings, **stamp()})
    if args.out:
        args.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
