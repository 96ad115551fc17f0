"""Detection at every width: one slimmable detector, which labels alone teach, beside a detector of each width alone.

    python benchmarks/accuracy/detect.py --init SCALA-RUN --separate SEPARATE-RUN --work runs/detect --jobs 2

The images are made here: one to four of the bundled images, enlarged or shrunk, on a noisy ground. Backbones are a
Scala run and a run of the method `separate`, of images in colour and equal epochs, such as those of `other images` that
`probe.py` leaves behind. Every detector has the same epochs. Runs that are there are not made again, and one that was
stopped goes on. Ends with one JSON line, which --out also writes.
"""

from __future__ import annotations

import argparse
import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from common_runs import WIDTHS, Job, report, run_all, run_folder, show
from PIL import Image

from slicevit.data import ImageSet, open_dataset
from slicevit.tasks.detect.config import DetectConfig
from slicevit.training.methods import part_folder

SIDE = 96
COUNTS = {"train": 800, "val": 200}


def write_scenes(folder: Path) -> None:
    """Images and boxes in COCO's layout."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split, count in COUNTS.items():
        items, draw = open_dataset("fashion-mnist", split), np.random.default_rng(count)
        (folder / split).mkdir(exist_ok=True)
        images: list[dict[str, Any]] = []
        boxes: list[dict[str, Any]] = []
        for number in range(count):
            scene, found = make_scene(items, draw)
            scene.save(folder / split / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png"})
            boxes += [{"image_id": number, "category_id": kind, "bbox": box} for kind, box in found]
        kinds = [{"id": number, "name": name} for number, name in enumerate(items.classes or ())]
        annotations = [{"id": number} | box for number, box in enumerate(boxes)]
        told = {"images": images, "annotations": annotations, "categories": kinds}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(told))


def make_scene(items: ImageSet, draw: np.random.Generator) -> tuple[Image.Image, list[tuple[int, list[int]]]]:
    """One image, and (class, COCO's box) of what is on it; a thing that finds no free place is left out."""
    ground = np.full((SIDE, SIDE, 3), draw.integers(0, 90, 3)) + draw.integers(0, 60, (SIDE, SIDE, 1))
    taken = np.zeros((SIDE, SIDE), bool)
    found = []
    for _ in range(draw.integers(1, 5)):
        item, kind = items.load(int(draw.integers(len(items))))
        side = int(draw.integers(20, 45))
        pixels = np.asarray(item.convert("RGB").resize((side, side), Image.Resampling.BILINEAR))
        x, y = draw.integers(0, SIDE - side, 2).tolist()
        rows, columns = (np.flatnonzero((pixels[..., 0] > 40).any(axis)) for axis in (1, 0))
        place = np.s_[y : y + side, x : x + side]
        if taken[place].any() or not len(rows):
            continue
        taken[place] = True
        ground[place] = np.maximum(ground[place], pixels)
        left, top, right, bottom = (int(v) for v in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
        found.append((kind, [x + left, y + top, right - left, bottom - top]))
    return Image.fromarray(ground.astype(np.uint8)), found


def config(args: argparse.Namespace, init: Path, share: Fraction, **changes: Any) -> DetectConfig:
    """A detector over the backbone `init`, with a `share` of the pyramid's channels."""
    return DetectConfig(
        data=str(args.work / "scenes"),
        init=str(init),
        size=(SIDE, SIDE),
        channels=int(args.channels * share),
        convolutions=2,
        epochs=args.epochs,
        lr=args.lr,
        eval_every=10_000,
        threads=1,
        device=args.device,
        log_with=(),
        **changes,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", type=Path, required=True, help="a Scala run of images in colour")
    parser.add_argument("--separate", type=Path, required=True, help="a run of each width alone, of the same")
    parser.add_argument("--work", type=Path, default=Path("runs/detect"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--channels", type=int, default=64, help="of the feature pyramid")
    parser.add_argument("--epochs", type=float, default=12.0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not (args.work / "scenes" / "annotations" / "instances_val.json").exists():
        write_scenes(args.work / "scenes")
    together = Job(config(args, args.init, Fraction(1)), run_folder(args.work, "slimmable", args.lr, 0))
    alone = {
        width: Job(
            config(args, part_folder(args.separate, width), Fraction(width), grid="1:1:1", sampling="full"),
            run_folder(args.work, f"alone {width.replace('/', '-')}", args.lr, 0),
        )
        for width in WIDTHS
    }
    if failed := run_all(lambda: [together, *alone.values()], args.jobs):
        sys.exit(f"failed: {', '.join(run.name for run in failed)}")

    def rows(job: Job) -> dict[str, dict[str, Any]]:
        return {row["width"]: row for row in json.loads((job.folder / "results.json").read_text())}

    figures: dict[str, dict[str, dict[str, float]]] = {}
    for score in ("map", "map50"):
        one = {width: round(rows(together)[width][score], 2) for width in WIDTHS}
        each = {width: round(rows(job)["1"][score], 2) for width, job in alone.items()}
        figures[score] = {"slimmable": one, "separate": each}
        for name, by_width in figures[score].items():
            show(f"{score:6} {name:9}", by_width)
    options = {name: getattr(args, name) for name in ("channels", "epochs", "lr")} | COUNTS
    report(args.out, "accuracy/detect", **options, **figures)


if __name__ == "__main__":
    main()
