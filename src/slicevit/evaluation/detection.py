"""Mean average precision of named detectors over one pass of images with boxes.

Legend of axis names: B images, C channels, H height, W width, N boxes.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slicevit.data.boxes import targets_of

Detect = Callable[[Tensor], list[dict[str, Tensor]]]  # images (B, C, H, W) to boxes, labels and scores of each


@dataclass(frozen=True)
class DetectionScore:
    """What one detector scored.

    Attributes:
        map: COCO's mean average precision, over overlaps from 0.5 to 0.95, in per cent.
        map50: that at an overlap of 0.5, in per cent.
        images: how many images were seen.
    """

    map: float
    map50: float
    images: int


def require_coco() -> None:
    """Raises ValueError, naming what to install, when mAP cannot be computed."""
    if importlib.util.find_spec("pycocotools") is None:
        raise ValueError('mAP needs pycocotools, not installed here: pip install "slicevit[detect]"')


@torch.inference_mode()
def evaluate_boxes(
    detectors: Mapping[str, Detect],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str,
    progress: Callable[[int], None] | None = None,
) -> dict[str, DetectionScore]:
    """Score every detector on every image, in one pass over the data.

    In a process group every rank must call this with its own share of the images.

    Args:
        detectors: name -> function from images (B, C, H, W) to torchvision's detections.
        batches: pairs of images (B, C, H, W) in 0…1 and targets (B, N, 6) of `slicevit.data.boxes`.
        device: where both are moved to.
        progress: called after each batch with the number of images in it.

    Raises ValueError when pycocotools is missing, there are no images, or none has a box.
    """
    require_coco()
    from torchmetrics import SumMetric
    from torchmetrics.detection import MeanAveragePrecision

    metrics = {name: MeanAveragePrecision() for name in detectors}
    seen, boxes = (SumMetric().to(device) for _ in range(2))
    for metric in metrics.values():
        metric.warn_on_many_detections = False
    for images_BCHW, targets_BN6 in batches:
        images_BCHW = images_BCHW.to(device, non_blocking=True)
        truth = targets_of(targets_BN6.to(device, non_blocking=True), crowds=True)
        for name, detect in detectors.items():
            metrics[name].update(detect(images_BCHW), truth)
        seen.update(len(images_BCHW))
        boxes.update(sum(len(each["labels"]) for each in truth))
        if progress is not None:
            progress(len(images_BCHW))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a rank whose share is empty
        images, count = int(seen.compute()), int(boxes.compute())
        if not count:
            raise ValueError("--data has no image with a box to evaluate on: look at its annotations")
        scores = {name: metric.compute() for name, metric in metrics.items()}
    return {
        name: DetectionScore(100 * float(score["map"]), 100 * float(score["map_50"]), images)
        for name, score in scores.items()
    }
