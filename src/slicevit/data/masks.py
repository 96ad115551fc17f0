"""Images with a mask each, in the two layouts that segmentation sets come in, and what happens to both on the way.

Legend of axis names: C channels, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from slicevit.data.image_set import ImageSet
from slicevit.data.transforms import PairTransform, Transform
from slicevit.data.walk import image_paths

Layout: TypeAlias = Literal["masks", "ade20k"]

VOID = -100  # what cross-entropy leaves out, as torch has it
_VOID_BYTE = 255
_IMAGES, _MASKS = (".jpg", ".jpeg", ".png", ".webp", ".bmp"), (".png", ".bmp")


@dataclass(frozen=True)
class _Folders:
    """Where a layout keeps a split's images and masks, and which pixel value of a mask is class 0."""

    images: str
    masks: str
    first: int
    names: dict[str, str]  # split -> how the layout calls it


LAYOUTS: dict[str, _Folders] = {
    "masks": _Folders("{split}/images", "{split}/masks", 0, {}),
    "ade20k": _Folders("images/{split}", "annotations/{split}", 1, {"train": "training", "val": "validation"}),
}


def pair_folders(folder: str | Path, split: str, layout: Layout) -> tuple[Path, Path]:
    """Where `layout` keeps the images and the masks of a split below `folder`, whether they are there or not."""
    kept = LAYOUTS[layout]
    name = kept.names.get(split, split)
    return Path(folder, kept.images.format(split=name)), Path(folder, kept.masks.format(split=name))


class MaskSet(ImageSet):
    """Images and their masks: folders of both, with equal file names but for the ending.

    | layout | images | masks | class 0 is the pixel value |
    |---|---|---|---|
    | masks | SPLIT/images | SPLIT/masks | 0 |
    | ade20k | images/training, images/validation | annotations/… | 1 |

    Other pixel values than those of the `num_classes` classes are void: they neither teach nor count.
    `load` gives the image and the mask, in mode "L" with the classes by number and 255 for void.

    Raises ValueError when a folder is missing or empty, or an image has no mask.
    """

    def __init__(self, folder: str | Path, split: str, num_classes: int, layout: Layout = "masks", in_chans: int = 3):
        super().__init__(str(folder), split, in_chans, None, num_classes)
        if layout not in LAYOUTS:
            raise ValueError(f"--layout {layout} is unknown: give {' or '.join(LAYOUTS)}")
        if not 2 <= num_classes <= _VOID_BYTE:
            raise ValueError(f"--num-classes must lie between 2 and {_VOID_BYTE}, got {num_classes}")
        self._layout = LAYOUTS[layout]
        self._images, self._masks = pair_folders(folder, split, layout)
        for part in (self._images, self._masks):
            if not part.is_dir():
                raise ValueError(f"--data {folder}: {part} is no folder; the layout {layout} keeps {split} there")
        masks = {str(Path(path).with_suffix("")): path for path in image_paths(self._masks, _MASKS)}
        self._pairs = []
        for path in image_paths(self._images, _IMAGES):
            stem = str(Path(path).with_suffix(""))
            if stem not in masks:
                raise ValueError(f"--data {folder}: {self._images / path} has no mask {self._masks / stem}.png")
            self._pairs.append((path, masks[stem]))
        if not self._pairs:
            raise ValueError(f"--data {folder}: {self._images} holds no images")

    def __len__(self) -> int:
        return len(self._pairs)

    def name(self, index: int) -> str:
        return str(self._images / self._pairs[index][0])

    def _read(self, index: int) -> tuple[Image.Image, Any]:
        image_path, mask_path = self._pairs[index]
        with Image.open(self._images / image_path) as file:
            image = file.convert(self._mode)
        with Image.open(self._masks / mask_path) as file:
            if file.mode not in ("L", "P", "I", "I;16", "1"):
                raise ValueError(f"{mask_path} has the mode {file.mode}: a mask has one channel of class numbers")
            values_HW = np.asarray(file).astype(np.int64) - self._layout.first
        if values_HW.shape != (image.height, image.width):
            raise ValueError(f"its mask is {values_HW.shape[1]} x {values_HW.shape[0]} pixels")
        known_HW = (values_HW >= 0) & (values_HW < self.num_classes)
        return image, Image.fromarray(np.where(known_HW, values_HW, _VOID_BYTE).astype(np.uint8))


@dataclass(frozen=True)
class MaskTransformConfig:
    """How images with masks reach a segmenter.

    Attributes:
        size: (height, width) of training's crops, in pixels.
        in_chans: channels of the tensors.
        mean, std: of each channel, on a scale where black is 0 and white is 1.
        scale: smallest and largest factor of the short side, before the crop, in training; at 1 it is the shorter side
            of `size`.
        hflip: probability of a mirror image.
        color_jitter: strength of the jitter of brightness, contrast and saturation.
    """

    size: tuple[int, int]
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: tuple[float, float] = (0.5, 2.0)
    hflip: float = 0.5
    color_jitter: float = 0.0


def train_pair_transform(cfg: MaskTransformConfig) -> PairTransform:
    """From an image and its mask to a crop of both: float32 (C, H, W) and int64 (H, W), void as `VOID`.

    It draws from the global generators. Beyond the image's edge it is black, and void.
    """
    side = min(cfg.size)
    shortest = [max(1, round(factor * side)) for factor in cfg.scale]
    steps: list[v2.Transform] = [
        v2.RandomResize(shortest[0], shortest[1] + 1),  # its end is left out
        v2.RandomCrop(
            cfg.size, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: _VOID_BYTE, "others": 0}
        ),
        v2.RandomHorizontalFlip(cfg.hflip),
    ]
    if cfg.color_jitter:
        steps.append(v2.ColorJitter(*(cfg.color_jitter,) * 3))
    return _TrainPairs(cfg, v2.Compose(steps))


def eval_pair_transform(cfg: MaskTransformConfig) -> PairTransform:
    """From an image and its mask to float32 (C, h, w), with the shorter side of `size`, and the whole mask (H, W)."""
    return _EvalPairs(_EvalImages(cfg, v2.Resize(min(cfg.size))))


def eval_image_transform(cfg: MaskTransformConfig) -> Transform:
    """The same of an image without a mask."""
    return _EvalImages(cfg, v2.Resize(min(cfg.size)))


@dataclass(frozen=True)
class _TrainPairs:
    """A class, not a function within one, so that it can be pickled into worker processes; the others too."""

    cfg: MaskTransformConfig
    steps: v2.Transform

    def __call__(self, image: Image.Image, mask: Image.Image) -> tuple[Tensor, Tensor]:
        image_CHW, mask_1HW = self.steps(tv_tensors.Image(image), _mask(mask))
        return _pixels(self.cfg, image_CHW), _classes(mask_1HW)


@dataclass(frozen=True)
class _EvalImages:
    cfg: MaskTransformConfig
    resize: v2.Transform

    def __call__(self, image: Image.Image) -> Tensor:
        return _pixels(self.cfg, self.resize(tv_tensors.Image(image)))


@dataclass(frozen=True)
class _EvalPairs:
    images: _EvalImages

    def __call__(self, image: Image.Image, mask: Image.Image) -> tuple[Tensor, Tensor]:
        return self.images(image), _classes(_mask(mask))


def _mask(mask: Image.Image) -> tv_tensors.Mask:
    return tv_tensors.Mask(np.array(mask)[None])


def _pixels(cfg: MaskTransformConfig, image_CHW: Tensor) -> Tensor:
    floats_CHW = v2.functional.to_dtype(image_CHW.as_subclass(Tensor), torch.float32, scale=True)
    return v2.functional.normalize(floats_CHW, list(cfg.mean), list(cfg.std))


def _classes(mask_1HW: Tensor) -> Tensor:
    mask_HW = mask_1HW.as_subclass(Tensor)[0].long()
    return mask_HW.where(mask_HW < _VOID_BYTE, VOID)
