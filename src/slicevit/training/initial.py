"""What a run begins with, where `init` names a saved model."""

from __future__ import annotations

from dataclasses import replace

from slicevit.checkpoint import read_config
from slicevit.training.config import TrainConfig
from slicevit.widths import WidthGrid

_SLICING = ("layout", "attn_scale", "norm_eps", "heads")
_OF_THE_METHOD = ("isolation", "scope")


def with_slicing_of(config: TrainConfig, init: str, own_method: bool) -> TrainConfig:
    """`config` with the architecture of a saved model, and the grid and slicing that it was trained with.

    The grid of a model of one width is not taken, nor with `own_method` what follows the method.
    Raises ValueError when `init` names no saved model.
    """
    saved, _ = read_config(init)
    sliced = saved.get("slicevit", {})
    names = (*_SLICING, *(() if own_method else _OF_THE_METHOD))
    taken = {name: sliced[name] for name in names if name in sliced}
    grid = sliced.get("grid")
    if grid is not None and len(WidthGrid.parse(grid)) > 1:
        taken["grid"] = grid
    return replace(config, model=saved.get("architecture", config.model), model_args={}, **taken)


def image_channels(config: TrainConfig) -> int:
    """Channels of the images that the model takes: those of the saved model that `init` names, or of `model_args`.

    Raises ValueError when `init` names no saved model.
    """
    if config.init in ("scratch", "pretrained"):
        return int(config.model_args.get("in_chans", 3))
    saved, _ = read_config(config.init)
    return int(saved.get("pretrained_cfg", {}).get("input_size", (3,))[0])
