"""What each width of a step learns from where a class belongs to every pixel.

Legend of axis names: B images, K classes, H height, W width, P pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from slicevit.data.masks import VOID
from slicevit.training.objectives import Objective, Output, heads, transfer_loss


@dataclass(frozen=True)
class PixelObjective(Objective):
    """`Objective` over the pixels of logits (B, K, H, W): the same terms, each the mean over pixels.

    Pixels of the class `VOID` have no label term. The next larger width teaches them too: it says there what it says
    anywhere, and where masks leave edges out that is where a narrow width errs. Images that are all void give a label
    term of zero. An external teacher is not known here: it answers for an image, not for its pixels.
    """

    def full(self, output: Output, targets: Tensor, external_BK: Tensor | None = None) -> Tensor:
        """Loss of the widest width, from targets (B, H, W); a scalar."""
        if external_BK is not None:
            raise ValueError("an external teacher of classes has no answers for pixels")
        return pixel_loss(heads(output)[0], targets, self.smoothing)

    def narrow(self, output: Output, targets: Tensor, teacher_BK: Tensor, weight: float | Tensor) -> Tensor:
        """Loss of a narrower width, from targets (B, H, W) and the teacher's logits (B, K, H, W); a scalar."""
        logits_BKHW = heads(output)[0]
        if self.transfer == "off":
            return pixel_loss(logits_BKHW, targets, self.smoothing)
        taught = weight * transfer_loss(by_pixel(logits_BKHW), by_pixel(teacher_BK))
        return pixel_loss(logits_BKHW, targets, self.smoothing) + taught if self.calibration else taught


def by_pixel(logits_BKHW: Tensor) -> Tensor:
    """(P, K), P being the pixels of all images."""
    return logits_BKHW.permute(0, 2, 3, 1).flatten(0, 2)


def pixel_loss(logits_BKHW: Tensor, targets_BHW: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over the pixels that are not void; zero where all are."""
    total = F.cross_entropy(logits_BKHW, targets_BHW, label_smoothing=smoothing, reduction="sum", ignore_index=VOID)
    return total / (targets_BHW != VOID).sum().clamp(min=1)
