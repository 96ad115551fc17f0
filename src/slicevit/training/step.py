"""One training step: every drawn width forward and backward on the same batch, then one optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

from slicevit.elastic import ElasticModel
from slicevit.training.graphs import Graphs
from slicevit.training.objectives import Objective, distillation_logits, join_lessons


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
    graphs: Graphs | None = None,
) -> dict[Fraction, Tensor]:
    """Add the gradients of all `widths` (widest first) to the model's parameters (paper algorithm 1).

    Each width's activations are freed by its own backward pass. `share` is these images' part of the step's, when it
    takes several calls. Returns the detached scalar loss of each width, which a later call overwrites if `graphs`
    replay the passes.
    A step whose widest width is narrower than another teacher has only labels to learn from.
    """
    losses: dict[Fraction, Tensor] = {}
    teacher_BK: Tensor | None = None
    weight = torch.full((), transfer_weight, dtype=torch.float64, device=images_BCHW.device)
    for width in widths:
        widest = teacher_BK is None
        loss_of: Callable[..., Tensor] = objective.full if widest else objective.narrow
        lessons = (targets, external_BK) if widest else (targets, teacher_BK, weight)
        call: Callable[..., tuple[Tensor, ...]] = partial(_pass, model, width, loss_of, share, autocast)
        if graphs is not None:
            call = partial(graphs, (width, widest, share), call)
        losses[width], logits_BK = call(images_BCHW, *(lesson for lesson in lessons if lesson is not None))
        if teacher_BK is None or objective.transfer == "next":
            teacher_BK = logits_BK
        elif objective.transfer == "larger":
            with autocast():  # whose softmax is in float32
                teacher_BK = join_lessons(teacher_BK, logits_BK, len(losses))
    return losses


def _pass(
    model: ElasticModel,
    width: Fraction,
    loss_of: Callable[..., Tensor],
    share: float,
    autocast: Callable[[], AbstractContextManager[object]],
    images_BCHW: Tensor,
    *lessons: Tensor,
) -> tuple[Tensor, ...]:
    """Add the gradients of `loss_of(output, *lessons)` at `width`; the loss, and the logits that teach."""
    with model.backward_at(width) as net:
        with autocast():
            output = net(images_BCHW)
            loss = loss_of(output, *lessons)
        (loss if share == 1.0 else loss * share).backward()
    return loss.detach(), distillation_logits(output)
