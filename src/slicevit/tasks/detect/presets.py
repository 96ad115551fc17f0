"""Whole detection configurations by name. A docstring says the command, its time and what to expect."""

from __future__ import annotations

from collections.abc import Callable

from slicevit.tasks.detect.config import DetectConfig


def coco() -> DetectConfig:
    """COCO 2017, 80 classes, all widths in one FCOS.

    torchrun --nproc-per-node=8 -m slicevit detect --preset coco --init RUN --data /path/to/coco

    Not run here. 36 epochs are torchvision's three-fold schedule; AdamW, its learning rate and the squashed images of
    512 pixels are ours.
    """
    return DetectConfig(
        folders="coco2017", epochs=36, batch_size=32, drop_path=0.1, amp="bf16", eval_every=6, workers=8
    )


PRESETS: dict[str, Callable[[], DetectConfig]] = {"coco": coco}


def preset(name: str) -> DetectConfig:
    """The configuration called `name`. Raises ValueError naming the presets there are."""
    if name not in PRESETS:
        raise ValueError(f"--preset {name} is unknown; there are {', '.join(PRESETS)}")
    return PRESETS[name]()
