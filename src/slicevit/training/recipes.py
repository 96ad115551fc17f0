"""What several presets have in common."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from slicevit.published import PUBLISHED
from slicevit.training.config import TrainConfig

X4, X7, X13 = "1/4:1:1/4", "1/4:1:1/8", "1/4:1:1/16"
DEIT: dict[str, Any] = {"drop_path": 0.1, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "random_erasing": 0.25}


def rotated(config: TrainConfig) -> TrainConfig:
    """The same by the method `rotated`, at the same cost: as many epochs of the full width alone, then half as many of
    all widths, which cost twice as much each."""
    return replace(config, method="rotated", epochs=1.5 * config.epochs, full_width_first=None)


def as_published(config: TrainConfig) -> TrainConfig:
    """The same with the choices of the paper's code (docs/concepts/method.md)."""
    return replace(config, widths_per_rank="own", **PUBLISHED)
