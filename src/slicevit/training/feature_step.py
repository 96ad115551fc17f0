"""The gradients of a training step that learns from a foundation teacher's tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction

from torch import Tensor

from slicevit.elastic import ElasticModel
from slicevit.training.distiller import Distiller, Tokens, distance
from slicevit.training.objectives import Objective


def accumulate_feature_gradients(
    model: ElasticModel,
    distiller: Distiller,
    images_BCHW: Tensor,
    masked_BM: Tensor,
    widths: tuple[Fraction, ...],
    objective: Objective,
    *,
    transfer_weight: float = 1.0,
    share: float = 1.0,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> dict[Fraction, Tensor]:
    """Add the gradients of all `widths` (widest first) to the parameters of the model and the projections.

    The widest learns from the teacher. A narrower one learns from the projected tokens of the next larger width (or
    of the widest, the mean of all larger ones, or none: the objective's `transfer`), and with its `calibration` from
    the teacher too, which stands where labels do elsewhere. `masked_BM` are the masked patches, `share` these images'
    part of the step's.
    Returns the detached scalar loss of each width.
    """
    with autocast():
        lessons = distiller.lessons(images_BCHW, masked_BM)
    losses: dict[Fraction, Tensor] = {}
    larger: list[Tokens] = [{} for _ in lessons]
    for width in widths:
        parts = []
        with model.backward_at(width) as net:
            for place, lesson in enumerate(lessons):
                with autocast():
                    answer = distiller.answer(net, width, lesson)
                loss = _loss(answer, lesson.wanted, larger[place], objective, transfer_weight)
                (loss if share == 1.0 else loss * share).backward()
                parts.append(loss.detach())
                if not larger[place] or objective.transfer == "next":
                    larger[place] = {name: tokens.detach() for name, tokens in answer.items()}
                elif objective.transfer == "larger":
                    for name, tokens in answer.items():
                        larger[place][name] = larger[place][name].lerp(tokens.detach(), 1 / (len(losses) + 1))
        losses[width] = sum(parts[1:], parts[0])
    return losses


def _loss(answer: Tokens, teacher: Tokens, larger: Tokens, objective: Objective, weight: float) -> Tensor:
    if not larger or objective.transfer == "off":
        return distance(answer, teacher)
    taught = weight * distance(answer, larger)
    return distance(answer, teacher) + taught if objective.calibration else taught
