"""What a run is made of: data, model, teacher, optimizer and schedule, each from the configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from slicevit.checkpoint import from_pretrained
from slicevit.costs import model_input_size
from slicevit.data import ImageSet, StreamSet, TrainLoader, Transform, TransformConfig, open_dataset, train_transform
from slicevit.data.memory import MemoryLoader
from slicevit.data.transforms import PairTransform
from slicevit.elastic import ElasticModel, create_model
from slicevit.training.config import TrainConfig
from slicevit.training.initial import load_weights
from slicevit.training.ranks import Ranks, lost_ranks


def build_model(config: TrainConfig, num_classes: int) -> ElasticModel:
    """The elastic model, initialised from the seed, or from what `init` names.

    Raises ValueError for an unknown model, grid, width or `init`.
    """
    torch.manual_seed(config.seed)
    args = dict(config.model_args) | {"num_classes": num_classes}
    if config.drop_path:
        args["drop_path_rate"] = config.drop_path
    file = Path(config.init)
    if config.init in ("scratch", "pretrained") or file.is_file():
        pretrained = config.init == "pretrained"
        try:
            model = create_model(config.model, config.grid, pretrained, **config.slice_settings(), **args)
        except TypeError as error:
            raise ValueError(
                f"--model-args {config.model_args} do not go with --model {config.model}: {error}"
            ) from None
        except (OSError, RuntimeError) as error:
            if not pretrained:
                raise
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"--init pretrained: the weights of {config.model} cannot be had ({reason})") from None
        if file.is_file():
            load_weights(model, file)
    else:
        rates = {"drop_path_rate": config.drop_path} if config.drop_path else {}
        model = from_pretrained(config.init, grid=config.grid, **config.slice_settings(), **rates)
        model.label_names = None  # these are the data's to give
        if model.num_classes != num_classes:
            model.reset_classifier(num_classes)
    if hasattr(model._full, "set_distilled_training"):
        model.set_distilled_training(True)
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return model.train()


def transform_config(config: TrainConfig, model: ElasticModel) -> TransformConfig:
    """How images reach `model`: its own mean, std and interpolation, the configuration's augmentation."""
    cfg = model.pretrained_cfg
    channels, height, width = model_input_size(model)
    mean, std = tuple(cfg["mean"]), tuple(cfg["std"])
    if channels != len(mean):
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    return TransformConfig(
        img_size=(height, width),
        in_chans=channels,
        mean=mean,
        std=std,
        interpolation=cfg["interpolation"],
        crop_pct=1.0 if config.crop == "pad" else cfg["crop_pct"],
        crop=config.crop,
        scale=config.rrc_scale,
        hflip=config.hflip,
        rand_augment=config.rand_augment,
        color_jitter=config.color_jitter,
        random_erasing=config.random_erasing,
    )


def open_split(config: TrainConfig, split: str, in_chans: int) -> ImageSet | StreamSet:
    """The train or val images. Raises ValueError naming --data."""
    return open_dataset(config.data, split, root=config.data_root, in_chans=in_chans, labels=config.learns_labels)


def open_loader(
    config: TrainConfig, train_set: ImageSet | StreamSet, transform: TransformConfig, ranks: Ranks
) -> TrainLoader:
    """This rank's batches of the training images. Raises ValueError naming --batch-size, --data or --in-memory."""
    if config.in_memory:
        return MemoryLoader(train_set, transform, device=ranks.device, **_loading(config, ranks))
    return pair_loader(config, train_set, train_transform(transform), ranks)


def pair_loader(
    config: TrainConfig, train_set: ImageSet | StreamSet, transform: Transform | PairTransform, ranks: Ranks
) -> TrainLoader:
    """The same by any transform, of images with masks or boxes too."""
    return TrainLoader(train_set, transform, pin_memory=ranks.device.type == "cuda", **_loading(config, ranks))


def _loading(config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    return {
        "batch_size": config.rank_batch(ranks.count),
        "seed": config.seed,
        "workers": config.workers,
        "max_bad_share": config.max_bad_share,
        "repeats": config.repeats,
        "rank": ranks.index,
        "world_size": ranks.count,
    }


def class_count(config: TrainConfig, dataset: ImageSet | StreamSet) -> int:
    """Number of classes; 0 for a run without labels.

    Raises ValueError when neither the data set nor --num-classes says it.
    """
    if not config.learns_labels:
        return 0
    if dataset.num_classes and config.num_classes not in (None, dataset.num_classes):
        raise ValueError(f"--num-classes {config.num_classes}: --data {dataset.spec} has {dataset.num_classes}")
    if not dataset.num_classes and config.num_classes:
        return config.num_classes
    if not dataset.num_classes:
        raise ValueError(f"--data {dataset.spec} does not say how many classes it has: give --num-classes")
    return dataset.num_classes


def build_optimizer(
    config: TrainConfig, model: ElasticModel, ranks: Ranks, projections: nn.Module | None = None
) -> Optimizer:
    """timm's AdamW over the full parameters, with the model's own exemptions from weight decay, and the projections.

    Fused on a GPU. With `shard_optimizer` every rank keeps and updates its share of the state (ZeRO stage 1).
    """
    options: dict[str, Any] = {"fused": True} if ranks.device.type == "cuda" else {}
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=config.lr, weight_decay=config.weight_decay, layer_decay=config.layer_decay, **options
    )
    if projections is not None:
        for group in param_groups_weight_decay(projections, config.weight_decay):
            optimizer.add_param_group(group)
    if not config.shard_optimizer or ranks.count == 1:
        return optimizer
    groups = [{key: value for key, value in group.items() if key in _GROUP} for group in optimizer.param_groups]
    return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, lr=config.lr, **options)


_GROUP = ("params", "weight_decay", "lr", "lr_scale", "betas", "eps")


def optimizer_state(optimizer: Optimizer, ranks: Ranks) -> dict[str, Any]:
    """The whole state on the main rank, wherever its parts lie; every rank must call this."""
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        with lost_ranks():
            optimizer.consolidate_state_dict(to=0)
        return optimizer.state_dict() if ranks.is_main else {}
    return optimizer.state_dict()


def build_schedule(config: TrainConfig, optimizer: Optimizer, total_steps: int, epoch_steps: int) -> Scheduler:
    """timm's cosine over `total_steps`, a function of the step number alone."""
    warmup = min(round(config.warmup_epochs * epoch_steps), total_steps // 2)
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=total_steps,
        min_lr=config.min_lr,
        warmup_lr=min(1e-6, config.lr),
        warmup_epochs=warmup,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    assert schedule is not None
    return schedule


class Mixer:
    """timm's Mixup and CutMix, drawn from numpy's global generator, which the loop seeds for every step.

    A run without labels (`num_classes` 0) mixes images alone.
    """

    def __init__(self, config: TrainConfig, num_classes: int):
        self.mixup = None
        self.labels = num_classes > 0
        if config.mixup or config.cutmix:
            self.mixup = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                label_smoothing=config.smoothing,
                num_classes=max(1, num_classes),
            )

    def __call__(self, images_BCHW: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor]:
        """Images, and class indices (B,) or shares (B, K)."""
        if not self.labels:
            targets_B = torch.zeros_like(targets_B)
        return (images_BCHW, targets_B) if self.mixup is None else self.mixup(images_BCHW, targets_B)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed torch and numpy from (seed, step, rank): drop path, dropout and Mixup of a step depend on nothing else."""
    state = np.random.SeedSequence((seed, step, rank) if rank else (seed, step)).generate_state(2)
    torch.manual_seed(int(state[0]))
    np.random.seed(int(state[1]))
