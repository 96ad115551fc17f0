"""Whole configurations by name. A docstring says the command, its time and what to expect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from slicevit.training.config import TrainConfig

PUBLISHED: dict[str, Any] = {"layout": "flat", "attn_scale": "full", "isolation": "mirror", "norm_eps": 1e-5}
DEIT: dict[str, Any] = {"drop_path": 0.1, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "random_erasing": 0.25}


def fashion() -> TrainConfig:
    """The default: a small ViT on the bundled Fashion-MNIST images, 7 widths.

    slicevit train

    7 minutes on 2 cores of a Xeon (1,560 steps). Top-1, mean of three seeds: 79.3 / 82.2 / 82.5 / 82.6 at widths
    1/4, 1/2, 3/4, 1.
    """
    return TrainConfig(
        data="fashion-mnist",
        model="vit_tiny_patch16_224",
        model_args={
            "img_size": 28,
            "patch_size": 7,
            "in_chans": 1,
            "embed_dim": 96,
            "depth": 6,
            "num_heads": 4,
        },
        grid="1/4:1:1/8",
        epochs=10,
        lr=4e-3,
        crop="pad",
        eval_every=2,
    )


def own_data() -> TrainConfig:
    """What `slicevit train` takes when --data or --model is given and no preset: DeiT's recipe, shorter.

    slicevit train --data FOLDER --model vit_small_patch16_224 --init pretrained
    """
    return TrainConfig(
        model="vit_small_patch16_224",
        grid="1/4:1:1/16",
        epochs=30,
        lr=5e-4,
        warmup_epochs=3,
        rand_augment="rand-m9-mstd0.5-inc1",
        **DEIT,
        workers=2,
    )


def deit_small_imagenet(grid: str = "1/4:1:1/16") -> TrainConfig:
    """DeiT-S on ImageNet-1K: DeiT's recipe as the paper changes it, X = 13, 100 epochs.

    torchrun --nproc-per-node=8 -m slicevit train --preset deit-small-imagenet --data /path/to/imagenet

    Not run here; docs/guides/scale.md estimates its time. The paper reports top-1 58.7 / 68.3 / 73.3 / 76.1 at widths
    1/4, 1/2, 3/4, 1, after 21 hours on 8 A100 (figure 1, table 1).
    """
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
        full_width_epochs=10,
        amp="bf16",
        compile=True,
        rand_augment="rand-m1-mstd0.5-inc1",
        color_jitter=0.3,
        **DEIT,
        eval_every=5,
        workers=8,
    )


def deit_small_imagenet_x7() -> TrainConfig:
    """`deit-small-imagenet` with X = 7.

    torchrun --nproc-per-node=8 -m slicevit train --preset deit-small-imagenet-x7 --data /path/to/imagenet

    Not run here. The paper reports top-1 59.8 / 70.3 / 74.2 / 76.5 at widths 1/4, 1/2, 3/4, 1.
    """
    return deit_small_imagenet("1/4:1:1/8")


def deit_small_imagenet_x4() -> TrainConfig:
    """`deit-small-imagenet` with X = 4.

    torchrun --nproc-per-node=8 -m slicevit train --preset deit-small-imagenet-x4 --data /path/to/imagenet

    Not run here. The paper reports top-1 59.8 / 72.0 / 75.6 / 76.7 at widths 1/4, 1/2, 3/4, 1.
    """
    return deit_small_imagenet("1/4:1:1/4")


def deit_base_imagenet(grid: str = "1/4:1:1/16") -> TrainConfig:
    """DeiT-B on ImageNet-1K: X = 13, 300 epochs.

    torchrun --nproc-per-node=8 -m slicevit train --preset deit-base-imagenet --data /path/to/imagenet

    Not run here. The paper reports top-1 75.3 / 79.3 / 81.2 / 82.0 at widths 1/4, 1/2, 3/4, 1 (table 2).
    """
    return replace(
        deit_small_imagenet(grid),
        model="deit_base_distilled_patch16_224",
        teacher="deit_base_patch16_224",
        epochs=300,
        lr=2e-3,
        warmup_epochs=5,
        rand_augment="rand-m4-mstd0.5-inc1",
    )


def deit_base_imagenet_x7() -> TrainConfig:
    """`deit-base-imagenet` with X = 7.

    torchrun --nproc-per-node=8 -m slicevit train --preset deit-base-imagenet-x7 --data /path/to/imagenet

    Not run here. The paper reports top-1 75.3 / 79.7 / 81.4 / 82.0 at widths 1/4, 1/2, 3/4, 1.
    """
    return deit_base_imagenet("1/4:1:1/8")


def deit_base_imagenet_x4() -> TrainConfig:
    """`deit-base-imagenet` with X = 4.

    torchrun --nproc-per-node=8 -m slicevit train --preset deit-base-imagenet-x4 --data /path/to/imagenet

    Not run here. The paper reports top-1 75.6 / 80.9 / 81.9 / 82.2 at widths 1/4, 1/2, 3/4, 1.
    """
    return deit_base_imagenet("1/4:1:1/4")


def as_published(config: TrainConfig) -> TrainConfig:
    """The same with the choices of the paper's code (docs/concepts/method.md)."""
    return replace(config, widths_per_rank="own", **PUBLISHED)


def deit_small_imagenet_paper() -> TrainConfig:
    """DeiT-S on ImageNet-1K as the paper's code trains it: the flat layout, its attention scale, each rank its widths.

    torchrun --nproc-per-node=8 -m slicevit train --preset deit-small-imagenet-paper --data /path/to/imagenet

    Not run here. The paper reports top-1 58.7 / 68.3 / 73.3 / 76.1 at widths 1/4, 1/2, 3/4, 1.
    """
    return as_published(deit_small_imagenet())


def deit_base_imagenet_paper() -> TrainConfig:
    """DeiT-B on ImageNet-1K as the paper's code trains it.

    torchrun --nproc-per-node=8 -m slicevit train --preset deit-base-imagenet-paper --data /path/to/imagenet

    Not run here. The paper reports top-1 75.3 / 79.3 / 81.2 / 82.0 at widths 1/4, 1/2, 3/4, 1.
    """
    return as_published(deit_base_imagenet())


def deit_small_imagenet_dinov2() -> TrainConfig:
    """A DeiT-S with patches of 14 that learns DINOv2-B's tokens on ImageNet's images, without labels: X = 13.

    torchrun --nproc-per-node=8 -m slicevit train --preset deit-small-imagenet-dinov2 --data /path/to/images

    Not run here. By arithmetic (docs/guides/foundation-teachers.md) 3 hours on 8 H100. No figure of this size is
    published: the paper's teacher experiment has a student of size B. `slicevit train` ends with the distillation loss
    of every width, not with an accuracy.
    """
    return replace(
        deit_small_imagenet(),
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
    )


def tiny_imagenet() -> TrainConfig:
    """A DeiT-S with patches of 8 on folders of 64-pixel images, such as Tiny-ImageNet: X = 13, 100 epochs, one GPU.

    slicevit train --preset tiny-imagenet --data /path/to/tiny-imagenet

    39.5 ms a step on an H100 with 35,000 images, so about 10 minutes, 1.5 of them to compile. Not run to its end here.
    """
    return TrainConfig(
        model="deit_small_patch16_224",
        model_args={"img_size": 64, "patch_size": 8},
        grid="1/4:1:1/16",
        epochs=100,
        batch_size=256,
        lr=1e-3,
        warmup_epochs=5,
        amp="bf16",
        compile=True,
        cuda_graphs=True,
        rand_augment="rand-m9-mstd0.5-inc1",
        **DEIT,
        rrc_scale=(0.3, 1.0),
        eval_every=10,
        in_memory=True,
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    make.__name__.replace("_", "-"): make
    for make in (
        fashion,
        own_data,
        tiny_imagenet,
        deit_small_imagenet,
        deit_small_imagenet_x7,
        deit_small_imagenet_x4,
        deit_small_imagenet_paper,
        deit_base_imagenet,
        deit_base_imagenet_x7,
        deit_base_imagenet_x4,
        deit_base_imagenet_paper,
        deit_small_imagenet_dinov2,
        deit_base_imagenet_dinov2,
    )
}


def preset(name: str) -> TrainConfig:
    """The configuration called `name`. Raises ValueError naming the presets there are."""
    if name not in PRESETS:
        raise ValueError(f"--preset {name} is unknown; there are {', '.join(PRESETS)}")
    return PRESETS[name]()
