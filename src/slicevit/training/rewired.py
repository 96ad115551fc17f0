"""Rewiring the full width of a run before narrower ones are trained: before its first step, or in the middle."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from slicevit.elastic import ElasticModel
from slicevit.rewiring import fold_norms, measure_importance, rewire
from slicevit.training.initial import brings_head
from slicevit.training.progress import TrainProgress
from slicevit.training.trainee import Trainee

_BATCH = 16  # images between two steps of the bar


def rewire_when_due(run: Trainee, progress: TrainProgress) -> bool:
    """Rewire the run's model as its configuration says, where narrower widths are trained from this step on.

    Every rank must call this, and has the same weights after. The optimizer and the learning rate begin anew, for the
    channels are others. Importance is that of the first training images of the first epoch, as the run sees them. It
    is the logits' where the head is trained, else the pooled features'. Where there is an average of the weights, it is
    what is rewired. Returns whether it was due.

    Raises ValueError naming the flag when the model is not covered.
    """
    if not is_due(run):
        return False
    if run.ema is not None:
        run.model.load_state_dict(run.ema.module.state_dict())
    images_BCHW = _first_images(run, run.config.rewire_images)
    weights = run.ranks.from_main(lambda: _rewired(run, images_BCHW, progress))
    run.model.load_state_dict(weights)
    if run.ema is not None:
        run.ema.module.load_state_dict(weights)
    run.rewired = True
    run.begin_stage()
    return True


def is_due(run: Trainee) -> bool:
    """Whether the next step trains narrower widths, and rewiring comes before."""
    return not run.rewired and run.step >= run.full_width_steps


def prove_rewiring(run: Trainee) -> None:
    """Rewire the model on two random images and put it back, where it is due later: what is not covered fails at once.

    Every rank must call this. Raises ValueError naming the flag.
    """
    if not run.rewired and not is_due(run):
        kept = {name: tensor.detach().clone() for name, tensor in run.model.state_dict().items()}
        size = (2, run.transform.in_chans, *run.transform.img_size)
        generator = torch.Generator().manual_seed(run.config.seed)
        images_BCHW = torch.randn(size, generator=generator).to(run.device)
        _shift_norms(run.model, generator)
        run.ranks.from_main(lambda: _rewire(run, images_BCHW))
        run.model.load_state_dict(kept)


def _shift_norms(model: nn.Module, generator: torch.Generator) -> None:
    """Give every norm a bias that is not zero, as training will."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and module.bias is not None:
            module.bias.data.copy_(0.1 * torch.randn(module.bias.shape, generator=generator))


def _rewired(run: Trainee, images_BCHW: Tensor, progress: TrainProgress) -> dict[str, Tensor]:
    """The rewired weights, for the other ranks too."""
    _rewire(run, images_BCHW, progress)
    return {name: tensor.detach().cpu() for name, tensor in run.model.state_dict().items()}


def _rewire(run: Trainee, images_BCHW: Tensor, progress: TrainProgress | None = None) -> None:
    model, how = run.model, run.config.rewire
    assert how is not None
    assert how != "off"
    batches = images_BCHW.split(_BATCH)
    trained_head = run.num_classes > 0 and (run.full_width_steps > 0 or brings_head(run.config, model))
    try:
        if how == "rotate":
            fold_norms(model)
        importance = measure_importance(
            model,
            progress.counted(batches, f"--rewire {how}") if progress else batches,
            rotate=how == "rotate",
            outputs=None if trained_head else partial(_features, model),
            seed=run.config.seed,
        )
        rewire(model, importance, how, images_BCHW[:2])
    except ValueError as error:
        flag, instead = run.config.rewire_flag()
        raise ValueError(f"{flag}: {error}; or {instead}") from None


def _features(model: ElasticModel, images_BCHW: Tensor) -> Tensor:
    return model.forward_head(model.forward_features(images_BCHW), pre_logits=True)


def _first_images(run: Trainee, wanted: int) -> Tensor:
    """The first `wanted` training images (B, C, H, W), on every rank, whatever the number of ranks."""
    share = math.ceil(wanted / run.ranks.count)
    own_BCHW = run.ranks.together(lambda: torch.cat(list(_own_images(run, share))).cpu())
    parts = run.ranks.gather(own_BCHW)  # each rank's are every so many-th of all
    return torch.stack(parts, dim=1).flatten(0, 1)[:wanted].to(run.device)


def _own_images(run: Trainee, wanted: int) -> Iterator[Tensor]:
    for images_BCHW, _ in run.loader.epoch(0):
        yield images_BCHW[:wanted]
        wanted -= len(images_BCHW)
        if wanted <= 0:
            return
