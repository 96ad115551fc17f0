"""Whole segmentation configurations by name. A docstring says the command, its time and what to expect."""

from __future__ import annotations

from collections.abc import Callable

from slicevit.tasks.segment.config import SegmentConfig


def camvid() -> SegmentConfig:
    """CamVid at 240 x 180, 11 classes, scored on its test images.

    slicevit segment --preset camvid --init RUN --data /path/to/camvid

    Not trained to its end here yet; benchmarks/accuracy/segment.py is to say what comes out.
    """
    return SegmentConfig(num_classes=11, eval_split="test", size=(192, 256), scale=(0.75, 1.5), decoder_channels=128)


def ade20k() -> SegmentConfig:
    """ADE20K, 150 classes: Semantic FPN as UniFormer's published configuration trains it, 80,000 steps.

    torchrun --nproc-per-node=8 -m slicevit segment --preset ade20k --init RUN --data /path/to/ADEChallengeData2016

    Not run here. The batch of 32, crops of 512 pixels and colour jitter are assumed: the configuration read
    (Sense-X/UniFormer, semantic_segmentation/fpn_seg/exp/fpn_hybrid_small/config.py) has AdamW, 2e-4, weight decay
    1e-4, a cosine after 1,000 steps of warm-up, and drop path 0.1. The paper reports, each width fine-tuned alone on
    UniFormer-S, mIoU 35.0 / 40.7 / 43.7 / 46.1 at widths 1/4, 1/2, 3/4, 1.
    """
    steps_per_epoch = 20_210 // 32
    return SegmentConfig(
        folders="ade20k",
        num_classes=150,
        size=(512, 512),
        epochs=80_000 / steps_per_epoch,
        batch_size=32,
        lr=2e-4,
        min_lr=2e-12,
        warmup_epochs=1_000 / steps_per_epoch,
        drop_path=0.1,
        color_jitter=0.2,
        amp="bf16",
        workers=8,
    )


PRESETS: dict[str, Callable[[], SegmentConfig]] = {make.__name__: make for make in (camvid, ade20k)}


def preset(name: str) -> SegmentConfig:
    """The configuration called `name`. Raises ValueError naming the presets there are."""
    if name not in PRESETS:
        raise ValueError(f"--preset {name} is unknown; there are {', '.join(PRESETS)}")
    return PRESETS[name]()
