"""Rewiring what a run begins with, before its first step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from slicevit.elastic import ElasticModel
from slicevit.rewiring import fold_norms, measure_importance, rewire
from slicevit.training.initial import brings_head
from slicevit.training.progress import TrainProgress
from slicevit.training.trainee import Trainee

_BATCH = 16  # images between two steps of the bar


def rewire_run(run: Trainee, progress: TrainProgress) -> None:
    """Rewire the run's model as its configuration says; every rank must call this, and has the same weights after.

    Importance is that of the first training images of the first epoch, as the run sees them. It is the logits' where
    the head came with the weights, else the pooled features'. A resumed run has rewired weights in its checkpoint.

    Raises ValueError naming --rewire when the model is not covered.
    """
    weights = run.ranks.from_main(lambda: _rewired(run, progress))
    run.model.load_state_dict(weights)
    if run.ema is not None:
        run.ema.module.load_state_dict(weights)


def _rewired(run: Trainee, progress: TrainProgress) -> dict[str, Tensor]:
    model, how = run.model, run.config.rewire
    assert how != "off"
    images_BCHW = torch.cat(list(_images(run)))
    batches = images_BCHW.split(_BATCH)
    trained_head = run.num_classes > 0 and brings_head(run.config, model)
    try:
        if how == "rotate":
            fold_norms(model)
        importance = measure_importance(
            model,
            progress.counted(batches, f"--rewire {how}"),
            rotate=how == "rotate",
            outputs=None if trained_head else partial(_features, model),
            seed=run.config.seed,
        )
        rewire(model, importance, how, images_BCHW[:2])
    except ValueError as error:
        raise ValueError(f"--rewire {how}: {error}") from None
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def _features(model: ElasticModel, images_BCHW: Tensor) -> Tensor:
    return model.forward_head(model.forward_features(images_BCHW), pre_logits=True)


def _images(run: Trainee) -> Iterator[Tensor]:
    """The first training images, `rewire_images` of them, in batches (B, C, H, W)."""
    wanted = run.config.rewire_images
    for images_BCHW, _ in run.loader.epoch(0):
        yield images_BCHW[:wanted].to(run.device)
        wanted -= len(images_BCHW)
        if wanted <= 0:
            return
