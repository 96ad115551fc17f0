"""Whole configurations by name. A docstring says the command, its time and what to expect."""

from __future__ import annotations

from collections.abc import Callable

from slicevit.training import imagenet
from slicevit.training.config import TrainConfig
from slicevit.training.recipes import DEIT, X7, X13, rotated


def fashion() -> TrainConfig:
    """The default: a small ViT on the bundled Fashion-MNIST images, 7 widths, by the method `rotated`.

    slicevit train

    As long as `fashion-paper`: 10 epochs of the full width, then 5 of all widths. Top-1 with seed 0:
    83.2 / 84.3 / 84.2 / 84.3 at widths 1/4, 1/2, 3/4, 1.
    """
    return rotated(fashion_paper())


def fashion_paper() -> TrainConfig:
    """The same by the paper's method, at the same cost.

    slicevit train --preset fashion-paper

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
        grid=X7,
        epochs=10,
        lr=4e-3,
        crop="pad",
        eval_every=2,
    )


def own_data() -> TrainConfig:
    """What `slicevit train` takes when --data or --model is given and no preset: DeiT's recipe, shorter.

    slicevit train --data FOLDER --model vit_small_patch16_224 --init pretrained

    It takes every model, and therefore the method `scala`; for plain ViTs give --method rotated. Time and accuracy are
    those of the model and the images: 3.2 hours on an H100 for a million images of 224 pixels by the rate that was
    measured (docs/guides/scale.md), with --amp bf16 --compile --cuda-graphs.
    """
    return TrainConfig(
        model="vit_small_patch16_224",
        grid=X13,
        epochs=30,
        lr=5e-4,
        warmup_epochs=3,
        rand_augment="rand-m9-mstd0.5-inc1",
        **DEIT,
        workers=2,
    )


def tiny_imagenet() -> TrainConfig:
    """A DeiT-S with patches of 8 on folders of 64-pixel images, such as Tiny-ImageNet, by the method `rotated`: X = 13,
    100 epochs of the full width, then 50 of all widths, one GPU.

    slicevit train --preset tiny-imagenet --data /path/to/tiny-imagenet

    About 7 to 9 minutes on an H100 with 35,000 images by arithmetic: half of the steps of `tiny-imagenet-paper`, which
    were measured, and as many of the full width alone, each a third to a half of such a step (docs/experiments.md, a
    training step on a GPU). Not run to its end here, so there is no accuracy to expect.
    """
    return rotated(tiny_imagenet_paper())


def tiny_imagenet_paper() -> TrainConfig:
    """The same by the paper's method: all widths from the first step, 100 epochs.

    slicevit train --preset tiny-imagenet-paper --data /path/to/tiny-imagenet

    39.5 ms a step on an H100 with 35,000 images, so about 10 minutes, 1.5 of them to compile. Not run to its end here,
    so there is no accuracy to expect.
    """
    return TrainConfig(
        model="deit_small_patch16_224",
        model_args={"img_size": 64, "patch_size": 8},
        grid=X13,
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
        imagenet.deit_small_imagenet,
        imagenet.deit_small_imagenet_x7,
        imagenet.deit_small_imagenet_x4,
        imagenet.deit_base_imagenet,
        imagenet.deit_base_imagenet_x7,
        imagenet.deit_base_imagenet_x4,
        imagenet.deit_small_imagenet_dinov2,
        imagenet.deit_base_imagenet_dinov2,
        fashion_paper,
        tiny_imagenet_paper,
        imagenet.deit_small_imagenet_paper,
        imagenet.deit_small_imagenet_x7_paper,
        imagenet.deit_small_imagenet_x4_paper,
        imagenet.deit_base_imagenet_paper,
        imagenet.deit_base_imagenet_x7_paper,
        imagenet.deit_base_imagenet_x4_paper,
    )
}


def preset(name: str) -> TrainConfig:
    """The configuration called `name`. Raises ValueError naming the presets there are."""
    if name not in PRESETS:
        raise ValueError(f"--preset {name} is unknown; there are {', '.join(PRESETS)}")
    return PRESETS[name]()
