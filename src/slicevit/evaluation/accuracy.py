"""Accuracy of named predictors over one pass of the data.

Shape legend: B batch, K classes, k = min(5, K), N images.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import Metric

Predictor = Callable[[Tensor], Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]

_NO_IMAGES = "batches holds no images to evaluate: check the data split and its size"


@dataclass(frozen=True)
class Accuracy:
    """What one predictor scored.

    Attributes:
        top1: images whose best class is the label, in per cent.
        top5: images whose label is among the best five classes (all of them where K < 5), in per cent.
        loss: mean cross-entropy, in nats.
        images: how many images were seen.
    """

    top1: float
    top5: float
    loss: float
    images: int


class _Totals(Metric):
    """Sums kept on the device; torchmetrics adds them up over the processes at `compute`."""

    top1: Tensor
    top5: Tensor
    loss: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("top1", "top5", "images"):
            self.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("loss", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, logits_BK: Tensor, targets_B: Tensor) -> None:
        best_Bk = logits_BK.topk(min(5, logits_BK.shape[1])).indices
        hits_Bk = best_Bk == targets_B[:, None]
        self.top1 += hits_Bk[:, 0].sum()
        self.top5 += hits_Bk.sum()
        self.loss += cross_entropy(logits_BK.float(), targets_B, reduction="sum")
        self.images += len(targets_B)

    def compute(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.top1, self.top5, self.loss, self.images


@torch.inference_mode()
def evaluate(
    predictors: Mapping[str, Predictor],
    batches: Batches,
    device: torch.device | str,
    num_classes: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Accuracy]:
    """Score every predictor on every batch, in one pass over the data.

    Nothing waits for the device before the end. In a process group every rank must call this with
    its own share of the images, and each gets the scores over all of them.

    Args:
        predictors: name -> function from images (B, C, H, W) to logits (B, K).
        batches: pairs of images (B, C, H, W) and class indices (B,).
        device: where images and targets are moved to.
        num_classes: K.
        progress: called after each batch with the number of images in it.

    Raises:
        ValueError: no images, or a predictor whose answer is not (B, K).
    """
    totals = {name: _Totals().to(device) for name in predictors}
    seen = 0
    for images_BCHW, targets_B in batches:
        images_BCHW = images_BCHW.to(device, non_blocking=True)
        targets_B = targets_B.to(device, non_blocking=True)
        for name, predictor in predictors.items():
            logits_BK = predictor(images_BCHW)
            if logits_BK.shape != (len(targets_B), num_classes):
                raise ValueError(
                    f"predictor {name!r} answered {tuple(logits_BK.shape)} for {len(targets_B)} images, but "
                    f"num_classes is {num_classes}: give the number of classes that the model has"
                )
            totals[name].update(logits_BK, targets_B)
        if progress is not None:
            progress(len(targets_B))
        seen += len(targets_B)
    if not seen:  # this rank's share is empty, or there is nothing at all
        for total in totals.values():
            total.update(torch.empty(0, num_classes, device=device), torch.empty(0, dtype=torch.long, device=device))
    return {name: _accuracy(*total.compute()) for name, total in totals.items()}


def _accuracy(top1: Tensor, top5: Tensor, loss: Tensor, images: Tensor) -> Accuracy:
    count = int(images)
    if count == 0:
        raise ValueError(_NO_IMAGES)
    return Accuracy(100 * int(top1) / count, 100 * int(top5) / count, float(loss) / count, count)


@torch.inference_mode()
def correct_per_image(predictor: Predictor, batches: Batches, device: torch.device | str) -> Tensor:
    """Whether each image's best class is its label, for paired statistics.

    Args:
        predictor: function from images (B, C, H, W) to logits (B, K).
        batches: pairs of images (B, C, H, W) and class indices (B,), in a fixed order.
        device: where images and targets are moved to.

    Returns:
        Bool (N,) on the CPU, in the order of the data.

    Raises:
        ValueError: no images.
    """
    correct = []
    for images_BCHW, targets_B in batches:
        best_B = predictor(images_BCHW.to(device, non_blocking=True)).argmax(1)
        correct.append(best_B == targets_B.to(device, non_blocking=True))
    if not correct:
        raise ValueError(_NO_IMAGES)
    return torch.cat(correct).cpu()
