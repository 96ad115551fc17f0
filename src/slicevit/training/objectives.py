"""What each width of a step learns from.

B: images, K: classes. A distilled model gives a pair in train mode: class-token and distillation-token logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from slicevit.training.methods import Transfer

Distillation: TypeAlias = Literal["hard", "soft"]
TeacherObjective: TypeAlias = Literal["logits", "features"]
FeatureName: TypeAlias = Literal["class", "feature", "patch"]
Output: TypeAlias = Tensor | tuple[Tensor, Tensor]


def heads(output: Output) -> tuple[Tensor, Tensor]:
    """(class logits, distillation logits), both (B, K); a model with one head uses it for both."""
    return output if isinstance(output, tuple) else (output, output)


def label_loss(logits_BK: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with class indices (B,), smoothed, or with the class shares (B, K) that Mixup made."""
    return F.cross_entropy(logits_BK, targets, label_smoothing=smoothing if targets.ndim == 1 else 0.0)


def transfer_loss(student_BK: Tensor, teacher_BK: Tensor) -> Tensor:
    """KL(teacher || student) at temperature 1, mean over images; the teacher is detached (paper equation 4)."""
    return F.kl_div(
        F.log_softmax(student_BK, dim=-1),
        F.log_softmax(teacher_BK.detach(), dim=-1),
        reduction="batchmean",
        log_target=True,
    )


def join_lessons(joint_BK: Tensor, logits_BK: Tensor, count: int) -> Tensor:
    """Logits of the mean distribution of `count` teachers, of which `joint_BK` are the same of all but the last."""
    log_p_BK, log_q_BK = joint_BK.log_softmax(dim=1), logits_BK.log_softmax(dim=1)
    return torch.logaddexp(log_p_BK + math.log((count - 1) / count), log_q_BK - math.log(count))


@dataclass(frozen=True)
class Objective:
    """The loss of every width of a step (paper section 3.4; the full width's is DeiT's).

    transfer: the teacher of a narrower width: the "next" larger one (PKT), the "full" one, all "larger" ones of the
        step in the mean, or "off".
    calibration: labels too for narrower widths (NC).
    smoothing: label smoothing, where targets are class indices.
    distillation: how an external teacher teaches: its best class ("hard") or its distribution ("soft").
    teacher_share: share of the external teacher in the loss (DeiT: one half).
    """

    transfer: Transfer = "next"
    calibration: bool = True
    smoothing: float = 0.0
    distillation: Distillation = "hard"
    teacher_share: float = 0.5

    def full(self, output: Output, targets: Tensor, external_BK: Tensor | None = None) -> Tensor:
        """Loss of the widest width: labels on the class head, the external teacher (else labels) on the other."""
        class_BK, distilled_BK = heads(output)
        labels = label_loss(class_BK, targets, self.smoothing)
        if external_BK is None:
            if distilled_BK is class_BK:
                return labels
            return (labels + label_loss(distilled_BK, targets, self.smoothing)) / 2
        if self.distillation == "hard":
            taught = F.cross_entropy(distilled_BK, external_BK.argmax(dim=-1))
        else:
            taught = transfer_loss(distilled_BK, external_BK)
        return (1 - self.teacher_share) * labels + self.teacher_share * taught

    def narrow(self, output: Output, targets: Tensor, teacher_BK: Tensor, weight: float | Tensor) -> Tensor:
        """Loss of a narrower width: CE(class head, labels) + weight * KL(teacher || distillation head)."""
        class_BK, distilled_BK = heads(output)
        if self.transfer == "off":
            return label_loss(class_BK, targets, self.smoothing)
        taught = weight * transfer_loss(distilled_BK, teacher_BK)
        if not self.calibration:
            return taught
        return label_loss(class_BK, targets, self.smoothing) + taught


def distillation_logits(output: Output) -> Tensor:
    """The logits (B, K) that teach narrower widths, detached."""
    return heads(output)[1].detach()
