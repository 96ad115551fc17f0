"""The algorithms as settings of a run and its steps.

| method | widths of a step | narrower widths learn from | channels |
|---|---|---|---|
| scala | smallest, two sampled, full | labels and the next larger width | smallest isolated |
| rotated | the same, after the full width alone and a rotation | the same | leading |
| usnet | smallest, two sampled, full | the full width | leading |
| autoformer | one, at random | labels | leading |
| matformer | one, at random | labels | MLPs only, leading |
| separate | each width trained alone | labels | |
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from slicevit.families import Scope
from slicevit.widths import Isolation

Rewire: TypeAlias = Literal["off", "permute", "rotate"]
Draw: TypeAlias = Literal["stable", "free", "one", "full"]
Transfer: TypeAlias = Literal["next", "full", "larger", "off"]
MethodName: TypeAlias = Literal["scala", "rotated", "usnet", "autoformer", "matformer", "separate"]


@dataclass(frozen=True)
class Method:
    """What a method switches on.

    draw: how a step's widths are drawn (`sampling.draw_widths`).
    transfer: which logits a narrower width is taught with: the next larger width's (PKT), the full width's, the
        mean of all larger ones of the step, or none.
    calibration: whether narrower widths also learn from labels (NC).
    full_width_first: the share of a run from scratch that trains the full width alone, before any other.
    rewire: what is done to the full width's weights before the others are trained (`slicevit.rewiring`).
    """

    isolation: Isolation = "off"
    draw: Draw = "one"
    transfer: Transfer = "off"
    calibration: bool = True
    scope: Scope = "all"
    full_width_first: float = 0.0
    rewire: Rewire = "off"


METHODS: dict[str, Method] = {
    "scala": Method("smallest", "stable", "next", True),
    "rotated": Method("off", "stable", "next", True, full_width_first=2 / 3, rewire="rotate"),
    "usnet": Method("off", "free", "full", False),
    "autoformer": Method("off", "one", "off", True),
    "matformer": Method("off", "one", "off", True, "mlp"),
    "separate": Method("off", "full", "off", True),
}

SEPARATE = "separate"


def part_folder(run: Path, width: object) -> Path:
    """Where a run of the method `separate` keeps the run of `width`, which is the full width there."""
    return run / SEPARATE / str(width).replace("/", "-")


def is_separate(run: Path) -> bool:
    """Whether the run in this folder trained each width alone."""
    return (run / SEPARATE).is_dir()
