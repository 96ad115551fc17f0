"""Whole configurations by name. A docstring says the command, its time and what to expect."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from slicevit.training.config import TrainConfig


def fashion() -> TrainConfig:
    """The default: a small ViT on the bundled Fashion-MNIST images, 7 widths.

    slicevit train

    7 minutes on 2 cores of a Xeon (1,560 steps). Top-1 of one run (seed 0): 79.2 / 82.3 / 82.8 / 83.1 at widths
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
        drop_path=0.1,
        mixup=0.8,
        cutmix=1.0,
        smoothing=0.1,
        rand_augment="rand-m9-mstd0.5-inc1",
        random_erasing=0.25,
        workers=2,
    )


def deit_small_imagenet() -> TrainConfig:
    """DeiT-S on ImageNet-1K as in the paper: X = 13, 100 epochs, DeiT's recipe.

    slicevit train --preset deit-small-imagenet --data /path/to/imagenet

    Not run here. The paper reports top-1 58.7 / 68.3 / 73.3 / 76.1 at widths 1/4, 1/2, 3/4, 1.
    """
    return TrainConfig(
        data="imagenet",
        model="deit_small_distilled_patch16_224",
        grid="1/4:1:1/16",
        teacher="deit_small_patch16_224",
        epochs=100,
        batch_size=1024,
        lr=4e-3,
        min_lr=1e-5,
        warmup_epochs=3,
        full_width_epochs=10,
        drop_path=0.1,
        ema_decay=0.0,
        amp="bf16",
        mixup=0.8,
        cutmix=1.0,
        smoothing=0.1,
        rand_augment="rand-m1-mstd0.5-inc1",
        color_jitter=0.3,
        random_erasing=0.25,
        eval_every=5,
        workers=8,
    )


def deit_base_imagenet() -> TrainConfig:
    """DeiT-B on ImageNet-1K as in the paper: X = 13, 300 epochs.

    slicevit train --preset deit-base-imagenet --data /path/to/imagenet

    Not run here. The paper reports top-1 75.3 / 79.3 / 81.2 / 82.0 at widths 1/4, 1/2, 3/4, 1.
    """
    return dataclasses.replace(
        deit_small_imagenet(),
        model="deit_base_distilled_patch16_224",
        teacher="deit_base_patch16_224",
        epochs=300,
        lr=2e-3,
        warmup_epochs=5,
        rand_augment="rand-m4-mstd0.5-inc1",
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "fashion": fashion,
    "own-data": own_data,
    "deit-small-imagenet": deit_small_imagenet,
    "deit-base-imagenet": deit_base_imagenet,
}


def preset(name: str) -> TrainConfig:
    """The configuration called `name`. Raises ValueError naming the presets there are."""
    if name not in PRESETS:
        raise ValueError(f"--preset {name} is unknown; there are {', '.join(PRESETS)}")
    return PRESETS[name]()
