"""One training step: every drawn width forward and backward on the same batch, then one optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction

from torch import Tensor

from slicevit.elastic import ElasticModel
from slicevit.training.objectives import Objective, distillation_logits


def accumulate_gradients(
    model: ElasticModel,
    images_BCHW: Tensor,
    targets: Tensor,
    widths: tuple[Fraction, ...],
    objective: Objective,
    *,
    external_BK: Tensor | None = None,
    transfer_weight: float = 1.0,
    share: float = 1.0,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> dict[Fraction, Tensor]:
    """Add the gradients of all `widths` (widest first) to the model's parameters (paper algorithm 1).

    Each width's activations are freed by its own backward pass. `share` is these images' part of the step's, when it
    takes several calls. Returns the detached scalar loss of each width.
    A step whose widest width is narrower than another teacher has only labels to learn from.
    """
    losses: dict[Fraction, Tensor] = {}
    teacher_BK: Tensor | None = None
    for width in widths:
        with model.backward_at(width) as net:
            with autocast():
                output = net(images_BCHW)
                if teacher_BK is None:
                    loss = objective.full(output, targets, external_BK)
                else:
                    loss = objective.narrow(output, targets, teacher_BK, transfer_weight)
            (loss if share == 1.0 else loss * share).backward()
        losses[width] = loss.detach()
        if teacher_BK is None or objective.transfer == "next":
            teacher_BK = distillation_logits(output)
    return losses
