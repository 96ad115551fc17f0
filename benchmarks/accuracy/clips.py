"""The frame-averaged probe of clips at every width, of eight frames beside one.

    python benchmarks/accuracy/clips.py RUN --data FOLDER --work runs/clips

Clips are made from the images of --data: a window of three quarters of their side that moves over the image, from a
corner and in a direction by chance, --per-class of them for training and a quarter as many for testing. RUN is frozen;
linear heads learn from the mean features of 8 frames of a clip, and of the one in its middle. Clips and features that
are there are not made again. Ends with one JSON line, which --out also writes.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from common_runs import WIDTHS, report, show
from PIL import Image
from probe import by_probe

from slicevit.data import open_dataset

FRAMES = 16


def in_motion(image: Image.Image, draw: np.random.Generator) -> list[Image.Image]:
    """`FRAMES` windows along a straight way over the image."""
    side = image.width * 3 // 4
    ends_22 = draw.uniform(0, image.width - side, (2, 2))
    ways_F2 = np.linspace(*ends_22, num=FRAMES).round().astype(int)
    return [image.crop((x, y, x + side, y + side)) for x, y in ways_F2.tolist()]


def write_clips(data: str, folder: Path, per_class: int) -> None:
    """The clips of both splits, without loss, as folder/SPLIT/CLASS/NUMBER.mkv."""
    for split, count in (("train", per_class), ("val", per_class // 4)):
        images = open_dataset(data, split)
        made: Counter[int] = Counter()
        for index, kind in enumerate(images.targets().tolist()):
            if made[kind] == count:
                continue
            made[kind] += 1
            path = folder / split / images.classes[kind] / f"{index}.mkv"
            path.parent.mkdir(parents=True, exist_ok=True)
            frames = in_motion(images.load(index)[0], np.random.default_rng(index))
            with av.open(str(path), "w") as container:
                stream = container.add_stream("ffv1", rate=8)
                stream.width, stream.height = frames[0].size
                stream.pix_fmt = "bgr0"
                for frame in frames:
                    container.mux(stream.encode(av.VideoFrame.from_image(frame)))
                container.mux(stream.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run of images in colour")
    parser.add_argument("--data", required=True, help="a folder with train/ and val/ of class folders")
    parser.add_argument("--work", type=Path, default=Path("runs/clips"))
    parser.add_argument("--per-class", type=int, default=400, help="clips of a class for training")
    parser.add_argument("--steps", type=int, default=12_500, help="of each head; fewer, to try the script")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clips = args.work / f"clips-{args.per_class}"
    done = clips / "done"
    if not done.exists():
        write_clips(args.data, clips, args.per_class)
        done.touch()
    figures: dict[str, Any] = {}
    for frames in (8, 1):
        found = by_probe(args, args.run, f"clips:{clips}?frames={frames}", args.work / f"frames-{frames}", WIDTHS)
        for probe, top1 in found.items():
            show(f"{frames} frames {probe:10}", top1)
        figures[str(frames)] = found
    options = {"run": str(args.run), "data": args.data, "per_class": args.per_class, "steps": args.steps}
    report(args.out, "accuracy/clips", **options, frames=figures)


if __name__ == "__main__":
    main()
