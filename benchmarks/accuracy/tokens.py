"""Width, tokens and both: accuracy against multiply-accumulates of a run at every width, with tokens merged or not.

    python benchmarks/accuracy/tokens.py RUN --merged 0 2 4 6 8 --out benchmarks/results/tokens.json

Every width of the run is evaluated on its own test images, without training, with so many pairs of patches merged in
every block (`slicevit.MergedTokens`). The picture shows each number of pairs as a line over the widths, and which
points no other one beats. Ends with one JSON line; --out also writes it, and the picture beside it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from common_runs import stamp

import slicevit
from slicevit.checkpoint import read_config
from slicevit.data import eval_batches, eval_config, eval_transform, open_dataset
from slicevit.evaluation.accuracy import evaluate
from slicevit.evaluation.widths import merged_macs
from slicevit.files import write_text
from slicevit.training.runs import read_train_config

Point = dict[str, Any]


def measure(run: Path, merged: list[int], batch_size: int) -> list[Point]:
    """A point for every width and number of pairs, in one pass over the images."""
    model = slicevit.from_pretrained(run)
    training, transform = read_train_config(run), eval_config(read_config(run)[0])
    dataset = open_dataset(training.data, "val", root=training.data_root, in_chans=transform.in_chans)
    batches = eval_batches(dataset, eval_transform(transform), batch_size)
    settings = {(width, pairs): model.subnet(width) for width in map(str, model.grid) for pairs in merged}
    predictors = {
        f"{width} {pairs}": slicevit.MergedTokens(subnet, pairs) for (width, pairs), subnet in settings.items()
    }
    with torch.inference_mode():
        scores = evaluate(predictors, batches, "cpu", model.num_classes)
    points = []
    for (width, pairs), name in zip(settings, predictors, strict=True):
        gmacs = merged_macs(model, width, pairs) / 1e9
        points.append({"width": width, "merged": pairs, "gmacs": gmacs, "top1": scores[name].top1})
    return points


def frontier(points: list[Point]) -> list[Point]:
    """Those that no other one beats, cheapest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point["gmacs"], -point["top1"])):
        if not best or point["top1"] > best[-1]["top1"]:
            best.append(point)
    return best


def draw(points: list[Point], path: Path) -> None:
    """A line over the widths for each number of pairs, and the frontier of all behind them."""
    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    best = frontier(points)
    axes.plot(
        [point["gmacs"] * 1000 for point in best],
        [point["top1"] for point in best],
        color="0.85",
        linewidth=9,
        solid_capstyle="round",
        label="no other point is better and cheaper",
    )
    for pairs in sorted({point["merged"] for point in points}):
        line = [point for point in points if point["merged"] == pairs]
        what = "width alone" if pairs == 0 else f"width, {pairs} pair{'s' * (pairs > 1)} a block merged"
        axes.plot([p["gmacs"] * 1000 for p in line], [p["top1"] for p in line], "o-", markersize=4, label=what)
    axes.set(xscale="log", xlabel="million multiply-accumulates an image", ylabel="top-1, %")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small", loc="lower right")
    figure.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder; its images are looked for where they were")
    parser.add_argument("--merged", type=int, nargs="+", default=[0, 2, 4, 6, 8], help="pairs a block")
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--out", type=Path, help="also write the JSON line there, and the picture beside it")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    points = measure(args.run, args.merged, args.batch_size)
    for point in points:
        print(f"{point['width']:>6} {point['merged']:3} {1000 * point['gmacs']:9.1f} MMACs {point['top1']:6.2f} %")
    line = json.dumps(stamp() | {"points": points, "frontier": frontier(points)})
    if args.out:
        write_text(args.out, line + "\n")
        draw(points, args.out.with_suffix(".png"))
    print(line)


if __name__ == "__main__":
    main()
