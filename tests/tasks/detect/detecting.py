"""What the tests of detectors share: coloured rectangles on noise in COCO's layout, and the flags of a short run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (64, 64)
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60)}
WIDTHS = ("1/2", "1")
MODEL_ARGS = {"embed_dims": (32, 32, 64, 64), "num_heads": (1, 2, 2, 4), "depths": (1, 1, 1, 1)}
_GIVEN = (f"{key}={value}".replace(" ", "") for key, value in MODEL_ARGS.items())
MODEL_FLAGS = ["--model", "pvt_v2_b0", "--model-args", *_GIVEN]
FLAGS = [
    *("--grid", "1/2:1:1/2", "--size", *map(str, SIZE), "--channels", "32", "--convolutions", "1"),
    *("--epochs", "8", "--batch-size", "8", "--lr", "4e-3", "--warmup-epochs", "1", "--eval-every", "100"),
    *("--device", "cpu", "--log-with"),
]


def draw_image(draw: np.random.Generator) -> tuple[Image.Image, list[tuple[int, list[int]]]]:
    """One or two rectangles side by side, and (category, COCO's box) of each."""
    pixels = draw.integers(90, 160, (*SIZE, 3))
    boxes = []
    for left in range(0, 64, 32)[: draw.integers(1, 3)]:
        width, height = draw.integers(14, 28, 2)
        x, y = left + draw.integers(0, 32 - width), draw.integers(0, 64 - height)
        kind = int(draw.integers(2))
        pixels[y : y + height, x : x + width] = list(COLOURS.values())[kind]
        boxes.append((7 + 2 * kind, [int(x), int(y), int(width), int(height)]))
    return Image.fromarray(pixels.astype(np.uint8)), boxes


def write_coco(folder: Path, splits: dict[str, int]) -> Path:
    """Folders SPLIT and annotations/instances_SPLIT.json with so many images each; categories 7 and 9."""
    draw = np.random.default_rng(0)
    (folder / "annotations").mkdir(parents=True)
    for split, count in splits.items():
        (folder / split).mkdir()
        found: dict[str, list[dict[str, object]]] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 9, "name": "green"}, {"id": 7, "name": "red"}],
        }
        for number in range(count):
            image, boxes = draw_image(draw)
            image.save(folder / split / f"{number}.png")
            found["images"].append({"id": 100 + number, "file_name": f"{number}.png"})
            for kind, box in boxes:
                found["annotations"].append(
                    {"id": len(found["annotations"]), "image_id": 100 + number, "category_id": kind, "bbox": box}
                )
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(found))
    return folder
