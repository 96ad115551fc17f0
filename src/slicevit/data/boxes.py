"""Images with boxes, in COCO's layout, and what happens to both on the way.

Legend of axis names: C channels, H height, W width, N boxes.
"""

from __future__ import annotations

import json
from collections import defaultdict
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
from slicevit.data.transforms import PairTransform

Layout: TypeAlias = Literal["coco", "coco2017"]

LAYOUTS = {"coco": "", "coco2017": "2017"}  # what follows a split's name
NOTHING = -1  # the class of a row that fills up an image's targets
_LEAST = 1.0  # pixels of a side; smaller boxes teach nothing


@dataclass(frozen=True)
class Boxes:
    """The boxes of an image.

    Attributes:
        corners_N4: left, top, right and bottom, in pixels.
        classes_N: by number.
        crowd_N: whether it is a crowd, which neither teaches nor counts as missed.
        size: how many rows the targets of an image have.
    """

    corners_N4: Tensor
    classes_N: Tensor
    crowd_N: Tensor
    size: int


class BoxSet(ImageSet):
    """Images and their boxes in COCO's layout: SPLIT/… and annotations/instances_SPLIT.json.

    Of the layout coco2017 SPLIT is train2017 or val2017. Boxes are COCO's (left, top, width, height); classes are
    numbered from 0 in the order of their ids, and named.
    `load` gives the image and its `Boxes`.

    Raises ValueError when a folder or file is missing or broken, or says of no image what is in it.
    """

    def __init__(self, folder: str | Path, split: str, layout: Layout = "coco", in_chans: int = 3):
        if layout not in LAYOUTS:
            raise ValueError(f"--folders {layout} is unknown: give {' or '.join(LAYOUTS)}")
        name = split + LAYOUTS[layout]
        self._images, path = Path(folder, name), Path(folder, "annotations", f"instances_{name}.json")
        if not self._images.is_dir():
            raise ValueError(f"--data {folder}: {self._images} is no folder; the layout {layout} keeps {split} there")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            images = {image["id"] for image in found["images"]}
            ids = sorted((int(kind["id"]), str(kind["name"])) for kind in found["categories"])
            numbers = {kind: number for number, (kind, _) in enumerate(ids)}
            boxes: dict[Any, list[tuple[float, ...]]] = defaultdict(list)
            for one in found["annotations"]:
                left, top, width, height = map(float, one["bbox"])
                for key, known in (("image_id", images), ("category_id", numbers)):
                    if one[key] not in known:
                        raise ValueError(f"{key} {one[key]!r} of annotation {one.get('id')!r} is not in its lists")
                label, crowd = numbers[one["category_id"]], bool(one.get("iscrowd", 0))
                boxes[one["image_id"]].append((label, left, top, left + width, top + height, crowd))
            self._files = [str(image["file_name"]) for image in found["images"]]
            self._boxes = [np.array(boxes[image["id"]], np.float32).reshape(-1, 6) for image in found["images"]]
        except FileNotFoundError:
            raise ValueError(f"--data {folder}: there is no {path}, which says where the boxes are") from None
        except (KeyError, TypeError) as error:
            raise ValueError(f"--data {folder}: {path} is not as COCO's ({error!r})") from None
        except ValueError as error:
            raise ValueError(f"--data {folder}: {path} is not as COCO's: {error}") from None
        if not self._files:
            raise ValueError(f"--data {folder}: {path} names no images")
        if not any(map(len, self._boxes)):
            raise ValueError(f"--data {folder}: {path} has no boxes")
        super().__init__(str(folder), split, in_chans, [kind for _, kind in ids], len(ids))
        self._most = max(1, *map(len, self._boxes))

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return str(self._images / self._files[index])

    def _read(self, index: int) -> tuple[Image.Image, Any]:
        with Image.open(self._images / self._files[index]) as file:
            image = file.convert(self._mode)
        found_N6 = torch.from_numpy(self._boxes[index])
        return image, Boxes(found_N6[:, 1:5], found_N6[:, 0].long(), found_N6[:, 5] > 0, self._most)


@dataclass(frozen=True)
class BoxTransformConfig:
    """How images with boxes reach a detector in training; see `SegmentConfig` of the same names.

    Attributes:
        size: (height, width) that images are resized to, whatever their shape.
        hflip: probability of a mirror image.
        color_jitter: strength of the jitter of brightness, contrast and saturation.
    """

    size: tuple[int, int]
    hflip: float = 0.0
    color_jitter: float = 0.0


def train_box_transform(cfg: BoxTransformConfig) -> PairTransform:
    """From an image and its `Boxes` to float32 (C, *size) in 0…1 and float32 targets (size, 6).

    A target is class, left, top, right, bottom, crowd; rows of the class `NOTHING` fill up. It draws from the global
    generators. Boxes of less than a pixel are left out.
    """
    steps: list[v2.Transform] = [v2.Resize(cfg.size), v2.RandomHorizontalFlip(cfg.hflip)]
    if cfg.color_jitter:
        steps.append(v2.ColorJitter(*(cfg.color_jitter,) * 3))
    return _BoxTransform(v2.Compose(steps))


def eval_box_transform() -> PairTransform:
    """The same at the image's own size, which a detector resizes by itself."""
    return _BoxTransform(v2.Identity())


@dataclass(frozen=True)
class _BoxTransform:
    """A class, not a function within one, so that it can be pickled into worker processes."""

    steps: v2.Transform

    def __call__(self, image: Image.Image, boxes: Boxes) -> tuple[Tensor, Tensor]:
        corners = tv_tensors.BoundingBoxes(boxes.corners_N4, format="XYXY", canvas_size=(image.height, image.width))
        image_CHW, moved_N4 = self.steps(tv_tensors.Image(image), corners)
        pixels_CHW = v2.functional.to_dtype(image_CHW.as_subclass(Tensor), torch.float32, scale=True)
        corners_N4 = moved_N4.as_subclass(Tensor)
        large_N = (corners_N4[:, 2:] - corners_N4[:, :2]).amin(1) >= _LEAST
        targets = torch.full((boxes.size, 6), float(NOTHING))
        columns = [boxes.classes_N[:, None], corners_N4, boxes.crowd_N[:, None]]
        targets[: int(large_N.sum())] = torch.cat([column.float() for column in columns], 1)[large_N]
        return pixels_CHW, targets


def targets_of(targets_BN6: Tensor, crowds: bool = False) -> list[dict[str, Tensor]]:
    """A batch's targets as torchvision and torchmetrics take them: boxes (N, 4), labels (N,) and iscrowd (N,).

    Without `crowds` these are left out.
    """
    found = []
    for targets_N6 in targets_BN6:
        known_N6 = targets_N6[targets_N6[:, 0] != NOTHING]
        if not crowds:
            known_N6 = known_N6[known_N6[:, 5] == 0]
        found.append({"boxes": known_N6[:, 1:5], "labels": known_N6[:, 0].long(), "iscrowd": known_N6[:, 5].long()})
    return found
