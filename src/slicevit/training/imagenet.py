"""Presets for ImageNet-1K: DeiT-S and DeiT-B, by the method `rotated`, as the paper has them, and without labels."""

from __future__ import annotations

from dataclasses import replace

from slicevit.training.config import TrainConfig
from slicevit.training.recipes import DEIT, X4, X7, X13, as_published, rotated


def _deit_small(grid: str = X13) -> TrainConfig:
    """DeiT-S on ImageNet-1K: DeiT's recipe as the paper changes it, 100 epochs."""
    return TrainConfig(
        data="imagenet",
        model="deit_small_distilled_patch16_224",
        grid=grid,
        teacher="deit_small_patch16_224",
        epochs=100,
        batch_size=1024,
        lr=4e-3,
        min_lr=1e-5,
        warmup_epochs=3,
        full_width_first=0.1,
        amp="bf16",
        compile=True,
        rand_augment="rand-m1-mstd0.5-inc1",
        color_jitter=0.3,
        **DEIT,
        eval_every=5,
        workers=8,
    )


def _deit_base(grid: str = X13) -> TrainConfig:
    """DeiT-B, 300 epochs."""
    return replace(
        _deit_small(grid),
        model="deit_base_distilled_patch16_224",
        teacher="deit_base_patch16_224",
        epochs=300,
        lr=2e-3,
        warmup_epochs=5,
        full_width_first=1 / 30,
        rand_augment="rand-m4-mstd0.5-inc1",
    )


def deit_small_imagenet() -> TrainConfig:
    """DeiT-S on ImageNet-1K by the method `rotated`: X = 13, 100 epochs of the full width, then 50 of all widths.

    torchrun --nproc-per-node=8 -m slicevit train --preset deit-small-imagenet --data /path/to/imagenet

    Not run here. By arithmetic (docs/guides/scale.md) 1.7 hours on 8 H100. There is no figure of this method at this
    scale: what the paper's reaches stands at the preset deit-small-imagenet-paper.
    """
    return rotated(_deit_small())


def deit_small_imagenet_x7() -> TrainConfig:
    """`deit-small-imagenet` with X = 7.

    torchrun --nproc-per-node=8 -m slicevit train --preset deit-small-imagenet-x7 --data /path/to/imagenet

    Not run here; as long as `deit-small-imagenet`, and no figure either.
    """
    return rotated(_deit_small(X7))


def deit_small_imagenet_x4() -> TrainConfig:
    """`deit-small-imagenet` with X = 4.

    torchrun --nproc-per-node=8 -m slicevit train --preset deit-small-imagenet-x4 --data /path/to/imagenet

    Not run here; as long as `deit-small-imagenet`, and no figure either.
    """
    return rotated(_deit_small(X4))


def deit_base_imagenet() -> TrainConfig:
    """DeiT-B on ImageNet-1K by the method `rotated`: X = 13, 300 epochs of the full width, then 150 of all widths.

    torchrun --nproc-per-node=8 -m slicevit train --preset deit-base-imagenet --data /path/to/imagenet

    Not run here. By arithmetic 13 to 15 hours on 8 H100. There is no figure of this method at this scale.
    """
    return rotated(_deit_base())


def deit_base_imagenet_x7() -> TrainConfig:
    """`deit-base-imagenet` with X = 7.

    torchrun --nproc-per-node=8 -m slicevit train --preset deit-base-imagenet-x7 --data /path/to/imagenet

    Not run here; as long as `deit-base-imagenet`, and no figure either.
    """
    return rotated(_deit_base(X7))


def deit_base_imagenet_x4() -> TrainConfig:
    """`deit-base-imagenet` with X = 4.

    torchrun --nproc-per-node=8 -m slicevit train --preset deit-base-imagenet-x4 --data /path/to/imagenet

    Not run here; as long as `deit-base-imagenet`, and no figure either.
    """
    return rotated(_deit_base(X4))


def deit_small_imagenet_paper() -> TrainConfig:
    """DeiT-S on ImageNet-1K as the paper's code trains it: the flat layout, its attention scale, each rank its widths.

    torchrun --nproc-per-node=8 -m slicevit train --preset deit-small-imagenet-paper --data /path/to/imagenet

    Not run here. By arithmetic 2 hours on 8 H100. The paper reports top-1 58.7 / 68.3 / 73.3 / 76.1 at widths
    1/4, 1/2, 3/4, 1, after 21 hours on 8 A100 (figure 1, table 1).
    """
    return as_published(_deit_small())


def deit_small_imagenet_x7_paper() -> TrainConfig:
    """`deit-small-imagenet-paper` with X = 7.

    torchrun --nproc-per-node=8 -m slicevit train --preset deit-small-imagenet-x7-paper --data /path/to/imagenet

    Not run here. By arithmetic 2 hours on 8 H100. The paper reports top-1 59.8 / 70.3 / 74.2 / 76.5 at widths
    1/4, 1/2, 3/4, 1.
    """
    return as_published(_deit_small(X7))


def deit_small_imagenet_x4_paper() -> TrainConfig:
    """`deit-small-imagenet-paper` with X = 4.

    torchrun --nproc-per-node=8 -m slicevit train --preset deit-small-imagenet-x4-paper --data /path/to/imagenet

    Not run here. By arithmetic 2 hours on 8 H100. The paper reports top-1 59.8 / 72.0 / 75.6 / 76.7 at widths
    1/4, 1/2, 3/4, 1.
    """
    return as_published(_deit_small(X4))


def deit_base_imagenet_paper() -> TrainConfig:
    """DeiT-B on ImageNet-1K as the paper's code trains it.

    torchrun --nproc-per-node=8 -m slicevit train --preset deit-base-imagenet-paper --data /path/to/imagenet

    Not run here. By arithmetic 14 hours on 8 H100. The paper reports top-1 75.3 / 79.3 / 81.2 / 82.0 at widths
    1/4, 1/2, 3/4, 1 (table 2).
    """
    return as_published(_deit_base())


def deit_base_imagenet_x7_paper() -> TrainConfig:
    """`deit-base-imagenet-paper` with X = 7.

    torchrun --nproc-per-node=8 -m slicevit train --preset deit-base-imagenet-x7-paper --data /path/to/imagenet

    Not run here. By arithmetic 14 hours on 8 H100. The paper reports top-1 75.3 / 79.7 / 81.4 / 82.0 at widths
    1/4, 1/2, 3/4, 1.
    """
    return as_published(_deit_base(X7))


def deit_base_imagenet_x4_paper() -> TrainConfig:
    """`deit-base-imagenet-paper` with X = 4.

    torchrun --nproc-per-node=8 -m slicevit train --preset deit-base-imagenet-x4-paper --data /path/to/imagenet

    Not run here. By arithmetic 14 hours on 8 H100. The paper reports top-1 75.6 / 80.9 / 81.9 / 82.2 at widths
    1/4, 1/2, 3/4, 1.
    """
    return as_published(_deit_base(X4))


def deit_small_imagenet_dinov2() -> TrainConfig:
    """A DeiT-S with patches of 14 that learns DINOv2-B's tokens on ImageNet's images, without labels: X = 13.

    torchrun --nproc-per-node=8 -m slicevit train --preset deit-small-imagenet-dinov2 --data /path/to/images

    Not run here. By arithmetic (docs/guides/foundation-teachers.md) 3 hours on 8 H100. No figure of this size is
    published: the paper's teacher experiment has a student of size B. `slicevit train` ends with the distillation loss
    of every width, not with an accuracy.
    """
    return replace(
        _deit_small(),
        model="deit_small_patch16_224",
        model_args={"patch_size": 14},
        teacher="vit_base_patch14_dinov2.lvd142m",
        teacher_size=224,
        teacher_objective="features",
        lr=1e-3,
        mixup=0.0,
        cutmix=0.0,
        smoothing=0.0,
    )


def deit_base_imagenet_dinov2() -> TrainConfig:
    """A DeiT-B with patches of 14 that learns DINOv2-B's tokens on ImageNet's images, without labels: X = 13.

    torchrun --nproc-per-node=8 -m slicevit train --preset deit-base-imagenet-dinov2 --data /path/to/images

    Not run here. By arithmetic (docs/guides/foundation-teachers.md) 21 hours on 8 H100. The paper reports, by linear
    probes, a mean accuracy over 12 fine-grained sets of 84.2 / 80.6 / 76.8 at widths 1, 1/2, 1/4, where separate
    DeiT-B, -S and -Ti have 77.0 / 74.5 / 70.6. Its patch size, learning rate and X are not known here.
    """
    return replace(
        deit_small_imagenet_dinov2(),
        model="deit_base_patch16_224",
        epochs=300,
        warmup_epochs=5,
        full_width_first=1 / 30,
    )
