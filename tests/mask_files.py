"""Tiny images with masks, and saved segmenters with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from slicevit.checkpoint import save_weights
from slicevit.dense.saved import Recipe, build
from slicevit.tasks.segment.config import SegmentConfig
from slicevit.tasks.segment.initial import describe

SIZE, CLASSES, WIDTHS = (64, 64), 3, ("1/2", "1")


def draw_pair(draw: np.random.Generator, height: int = 32, width: int = 48) -> tuple[Image.Image, Image.Image]:
    """A picture of three bands of brightness at chance heights, and its mask; a column of void at the left."""
    edges = sorted(int(edge) for edge in draw.integers(4, height - 4, 2))
    mask = np.zeros((height, width), np.uint8)
    mask[edges[0] :], mask[edges[1] :] = 1, 2
    pixels = 40 + 85 * mask[..., None].astype(int) + draw.integers(-20, 20, (height, width, 3))
    mask[:, :3] = 11
    return Image.fromarray(pixels.astype(np.uint8)), Image.fromarray(mask)


def write_pairs(folder: Path, splits: dict[str, int]) -> Path:
    """Folders SPLIT/images and SPLIT/masks with so many pairs each."""
    draw = np.random.default_rng(0)
    for split, count in splits.items():
        for part in ("images", "masks"):
            (folder / split / part).mkdir(parents=True)
        for number in range(count):
            image, mask = draw_pair(draw)
            image.save(folder / split / "images" / f"{number}.jpg")
            mask.save(folder / split / "masks" / f"{number}.png")
    return folder


def save_segmenter(folder: Path, data: Path, **fields: Any) -> Path:
    """A ViT of two blocks under Semantic FPN, on the widths 1/2 and 1; `fields` are those of the recipe."""
    torch.manual_seed(0)
    small = {"img_size": SIZE, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}
    settings = {"layout": "per_head", "isolation": "smallest", "attn_scale": "narrow", "norm_eps": None}
    given = {"backbone": "vit_tiny_patch16_224", "backbone_args": small} | fields
    recipe = Recipe(
        **given, cut=None, size=SIZE, channels=16, num_classes=CLASSES, grid="1/2:1:1/2",
        settings=settings | {"heads": "fixed", "scope": "all"}, in_chans=3, mean=(0.5,) * 3, std=(0.25,) * 3,
        class_names=("sky", "sea", "land"),
    )  # fmt: skip
    folder.mkdir(parents=True)
    save_weights(build(recipe), folder)
    describe(folder, recipe, SegmentConfig(data=str(data), num_classes=CLASSES, size=SIZE, eval_split="test"))
    return folder
