"""Mean intersection over union of named segmenters over one pass of images with masks.

Legend of axis names: B images, C channels, H height, W width, K classes; h, w of a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_confusion_matrix

from slicevit.data.masks import VOID

Predictor = Callable[[Tensor], Tensor]
OVERLAP = Fraction(1, 3)  # of neighbouring windows


@dataclass(frozen=True)
class SegmentationScore:
    """What one segmenter scored, over all pixels of all images together; void pixels do not count.

    Attributes:
        miou: mean over the classes of intersection over union, in per cent; classes that are neither in the masks nor
            predicted are left out.
        pixel_accuracy: pixels of the right class, in per cent.
        loss: mean cross-entropy of a pixel, in nats.
        ious: of each class, in per cent; None where it is left out.
        images: how many images were seen.
    """

    miou: float
    pixel_accuracy: float
    loss: float
    ious: tuple[float | None, ...]
    images: int


class _Totals(Metric):
    """Sums kept on the device; torchmetrics adds them up over the processes at `compute`."""

    table_KK: Tensor
    loss: Tensor
    images: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("table_KK", torch.zeros(num_classes, num_classes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("loss", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits_BKHW: Tensor, masks_BHW: Tensor) -> None:
        best_BHW = logits_BKHW.argmax(1)
        self.table_KK += multiclass_confusion_matrix(
            best_BHW, masks_BHW, self.num_classes, ignore_index=VOID, validate_args=False
        )
        self.loss += F.cross_entropy(logits_BKHW, masks_BHW, ignore_index=VOID, reduction="sum")
        self.images += len(masks_BHW)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.table_KK, self.loss, self.images


@torch.inference_mode()
def evaluate_masks(
    predictors: Mapping[str, Predictor],
    batches: Iterable[tuple[Tensor, Tensor]],
    window: tuple[int, int],
    device: torch.device | str,
    num_classes: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, SegmentationScore]:
    """Score every predictor on every image at the size of its mask, in one pass over the data.

    In a process group every rank must call this with its own share of the images.

    Args:
        predictors: name -> function from windows (B, C, h, w) to logits (B, K, h, w).
        batches: pairs of images (B, C, H', W') and masks (B, H, W), void as `VOID`.
        window: (h, w).
        device: where both are moved to.
        num_classes: K.
        progress: called after each batch with the number of images in it.

    Raises ValueError when there are no images, or all pixels are void.
    """
    totals = {name: _Totals(num_classes).to(device) for name in predictors}
    for images_BCHW, masks_BHW in batches:
        images_BCHW, masks_BHW = images_BCHW.to(device, non_blocking=True), masks_BHW.to(device, non_blocking=True)
        for name, predictor in predictors.items():
            logits_BKHW = whole_logits(predictor, images_BCHW, window, (masks_BHW.shape[1], masks_BHW.shape[2]))
            totals[name].update(logits_BKHW, masks_BHW)
        if progress is not None:
            progress(len(masks_BHW))
    for total in totals.values():
        if not total.update_called:  # this rank's share is empty
            total.update(torch.empty(0, num_classes, 1, 1, device=device), torch.empty(0, 1, 1, device=device).long())
    return {name: _score(*total.compute()) for name, total in totals.items()}


def _score(table_KK: Tensor, loss: Tensor, images: Tensor) -> SegmentationScore:
    right_K, pixels = table_KK.diagonal(), int(table_KK.sum())
    if not pixels:
        raise ValueError("--data has no pixel with a class to evaluate on: look at its masks and --num-classes")
    union_K = table_KK.sum(0) + table_KK.sum(1) - right_K
    pairs = zip(right_K.tolist(), union_K.tolist(), strict=True)
    ious = tuple(100 * right / union if union else None for right, union in pairs)
    known = [iou for iou in ious if iou is not None]
    accuracy = 100 * int(right_K.sum()) / pixels
    return SegmentationScore(sum(known) / len(known), accuracy, float(loss) / pixels, ious, int(images))


def whole_logits(predictor: Predictor, images_BCHW: Tensor, window: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Logits (B, K, *size) of images of any size, from windows that overlap by a third and are averaged.

    An image that is smaller than the window is padded with zeros, which is the mean colour.
    """
    logits = (predictor(window_BChw) for window_BChw in cut_windows(images_BCHW, window))
    mean_BKHW = joined(logits, (images_BCHW.shape[2], images_BCHW.shape[3]), window)
    if mean_BKHW.shape[2:] == size:
        return mean_BKHW
    return F.interpolate(mean_BKHW, size=size, mode="bilinear", align_corners=False)


def class_map(logits_BKHW: Tensor, size: tuple[int, int]) -> Tensor:
    """The class (B, *size) of the largest logit once these are resized to `size`; class by class, to save memory."""
    best_BHW: Tensor | None = None
    classes_BHW = torch.zeros(len(logits_BKHW), *size, dtype=torch.long, device=logits_BKHW.device)
    for index, logits_B1HW in enumerate(logits_BKHW.split(1, dim=1)):
        resized_BHW = F.interpolate(logits_B1HW, size=size, mode="bilinear", align_corners=False)[:, 0]
        if best_BHW is None:
            best_BHW = resized_BHW
            continue
        larger_BHW = resized_BHW > best_BHW
        classes_BHW[larger_BHW] = index
        best_BHW = torch.maximum(best_BHW, resized_BHW)
    return classes_BHW


def cut_windows(images_BCHW: Tensor, window: tuple[int, int]) -> list[Tensor]:
    """The windows (B, C, h, w) that cover images of any size, row by row; views, unless an image had to be padded."""
    height, width = images_BCHW.shape[2:]
    padded = F.pad(images_BCHW, (0, max(0, window[1] - width), 0, max(0, window[0] - height)))
    return [padded[place] for place in _places((height, width), window)]


def joined(logits: Iterable[Tensor], size: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """Logits (B, K, *size), the mean over the windows (B, K, h, w), which come in the order of `cut_windows`."""
    padded = [max(sides) for sides in zip(size, window, strict=True)]
    total = counts = torch.zeros(())
    for place, logits_BKhw in zip(_places(size, window), logits, strict=True):
        if not total.ndim:
            total = logits_BKhw.new_zeros(*logits_BKhw.shape[:2], *padded, dtype=torch.float32)
            counts = total.new_zeros(1, 1, *padded)
        total[place] += logits_BKhw.float()
        counts[place] += 1
    return (total / counts)[..., : size[0], : size[1]]


def _places(size: tuple[int, int], window: tuple[int, int]) -> list[tuple[Any, slice, slice]]:
    """Where the windows of an image of this size lie, row by row."""
    tops, lefts = (_starts(max(sides), sides[1]) for sides in zip(size, window, strict=True))
    return [(..., slice(top, top + window[0]), slice(left, left + window[1])) for top in tops for left in lefts]


def _starts(side: int, window: int) -> list[int]:
    """Where windows begin along a side: evenly, the first at the start, the last at the end."""
    if side == window:
        return [0]
    count = math.ceil((side - window) / (window * (1 - OVERLAP))) + 1
    return [round(index * (side - window) / (count - 1)) for index in range(count)]
