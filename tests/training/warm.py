"""What a driver does once, so that none of its forks has to."""

from __future__ import annotations

import gc

import torch.utils.tensorboard  # noqa: F401  # a run imports it, late

import slicevit
import slicevit.cli.train
from slicevit.costs import width_costs


def warm_up() -> None:
    """Load what the command loads late, and keep collections of garbage away from it: they would copy its pages."""
    tiny = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    width_costs(slicevit.create_model("vit_tiny_patch16_224", "1:1:1", **tiny), "1")  # torch's kernels of `meta`
    gc.collect()
    gc.freeze()
