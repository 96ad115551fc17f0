"""The images that artefacts are checked and calibrated on.

Legend of axis names: B images of a batch, N all images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets
from torch import Tensor

from slicevit.data import (
    BUNDLED,
    ImageSet,
    StreamSet,
    Transform,
    TransformConfig,
    eval_batches,
    eval_transform,
    open_dataset,
)
from slicevit.data.image_set import IMAGE_MODES
from slicevit.data.transforms import PairTransform
from slicevit.export.check import BATCH

CHECKED = 64
CALIBRATING = 256


@dataclass(frozen=True)
class Images:
    """Some images of a data set, spread evenly over it (of a stream the first), as the model takes them.

    Attributes:
        name: what the data set was opened by.
        count: how many there are.
        dataset: all of them.
        transform: from an image to the model's input (C, H, W).
    """

    name: str
    count: int
    dataset: ImageSet | StreamSet
    transform: Transform | PairTransform

    def batches(self, size: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, C, H, W) and classes (B,), or masks (B, H, W), `size` at a time."""
        stride = max(1, len(self.dataset) // self.count)
        left = self.count
        for images_BCHW, targets_B in eval_batches(self.dataset, self.transform, size, world_size=stride):
            yield images_BCHW[:left], targets_B[:left]
            left -= len(targets_B)
            if left <= 0:
                return


@dataclass(frozen=True)
class Calibration:
    """Images (N, C, H, W) that int8 takes its ranges from, and the name of what they are of."""

    name: str
    images_NCHW: Tensor


def own_data(config: dict[str, Any]) -> tuple[str | None, str | None]:
    """The data set of the run that config.json describes and its root folder, where it names them."""
    training = config.get("slicevit", {}).get("training", {})
    return training.get("data"), training.get("data_root")


def check_images(
    spec: str | None, root: str | None, transform: TransformConfig, count: int | None, must: bool = False
) -> Images:
    """64 (or `count`) validation images of `spec`, for a check that needs no classes.

    The bundled ones where it is None, or cannot be opened here, or has less than two.
    Raises ValueError when it cannot be opened and `must` be.
    """
    count = count or CHECKED
    if spec and must:
        return _images(spec, "val", root, transform, count)
    if spec:
        try:
            images = _images(spec, "val", root, transform, count)
            if len(next(images.batches())[1]) > 1:
                return images
        except (OSError, ValueError, StopIteration):
            pass
    return _images(BUNDLED, "val", None, transform, count)


def labelled_images(
    spec: str | None, root: str | None, transform: TransformConfig, count: int | None, num_classes: int
) -> Images:
    """All validation images of `spec`, or `count` of them.

    Raises ValueError when it is None, cannot be opened or has not `num_classes` classes.
    """
    if spec is None:
        raise ValueError("what --quantize loses is measured on labelled images, and the run names none: give --data")
    images = _images(spec, "val", root, transform, count)
    if images.dataset.num_classes not in (0, num_classes):
        raise ValueError(f"--data {spec} has {images.dataset.num_classes} classes and the model {num_classes}")
    return images


def calibration_images(spec: str, root: str | None, transform: TransformConfig) -> Calibration:
    """Up to 256 images, spread evenly over `spec`, as the model takes them in evaluation.

    Args:
        spec: a data set, whose training images are taken, or a folder of images without train/.

    Raises ValueError when it cannot be opened, holds no images, or one of the images cannot be read.
    """
    folder = Path(spec).expanduser()
    if folder.is_dir() and not (folder / "train").is_dir():
        return Calibration(spec, folder_images(spec, eval_transform(transform), transform.in_chans))
    try:
        images = _images(spec, "train", root, transform, CALIBRATING)
    except ValueError as error:
        raise ValueError(str(error).replace("--data", "--calibrate", 1)) from None
    return Calibration(spec, torch.cat([images_BCHW for images_BCHW, _ in images.batches()]))


def _images(spec: str, split: str, root: str | None, transform: TransformConfig, count: int | None) -> Images:
    dataset = open_dataset(spec, split, root=root, in_chans=transform.in_chans)
    return Images(spec, min(count or len(dataset), len(dataset)), dataset, eval_transform(transform))


def folder_images(spec: str, convert: Transform, in_chans: int) -> Tensor:
    """Up to 256 images (N, C, H, W), spread evenly over a folder, as `convert` makes them.

    Raises ValueError when it holds none, or one of them cannot be read.
    """
    folder = Path(spec).expanduser()
    if not folder.is_dir():
        raise ValueError(f"--calibrate {spec}: there is no such folder")
    found, _ = find_images_and_targets(str(folder))
    if not found:
        raise ValueError(f"--calibrate {spec} holds no images")
    mode = IMAGE_MODES[in_chans]
    images = []
    for path, _ in found[:: max(1, len(found) // CALIBRATING)][:CALIBRATING]:
        try:
            with Image.open(path) as image:
                images.append(convert(image.convert(mode)))
        except Exception as error:  # each decoder raises its own
            raise ValueError(f"--calibrate {spec}: {path} cannot be read ({error})") from None
    return torch.stack(images)
