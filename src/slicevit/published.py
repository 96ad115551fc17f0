"""Checkpoints of the method's published code, run as that code runs them.

Its facts (METHOD.md): the fused qkv is cut as one flat block; attention keeps the full head width's scale;
LayerNorm's epsilon is 1e-5 at every width; the smallest and the full width take leading channels, those between
trailing ones; LayerScale is computed and thrown away.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slicevit.elastic import ElasticModel, create_model
from slicevit.reasons import one_line
from slicevit.widths import WidthGrid

PUBLISHED: dict[str, Any] = {"layout": "flat", "isolation": "mirror", "attn_scale": "full", "norm_eps": 1e-5}
_IGNORED = re.compile(r"blocks\.\d+\.ls[12]\.gamma")


def load_scala_checkpoint(
    file: str | Path,
    model: str,
    grid: WidthGrid | str = "1/4:1:1/16",
    weights: str = "model",
    **timm_kwargs: Any,
) -> ElasticModel:
    """The model in a published file, in eval mode, with logits as the published code computes them.

    Args:
        file: a torch file with the weights under "model" (and "model_ema"), an argparse namespace beside them.
        model: the timm model that it is, such as "deit_small_distilled_patch16_224".
        grid: the grid that it was trained on.
        weights: which of the file's entries, "model" or "model_ema".
        timm_kwargs: further arguments of the timm model.

    Nothing but tensors, plain containers and an argparse namespace is unpickled.
    Raises ValueError when the file is missing, holds anything else, or does not fit the model.
    """
    state = _read(Path(file), weights)
    state = {name: tensor for name, tensor in state.items() if not _IGNORED.fullmatch(name)}
    if "head.weight" not in state:
        raise ValueError(f"{file} has no head.weight: it is not a classifier of the published code")
    timm_kwargs = {"num_classes": state["head.weight"].shape[0]} | timm_kwargs
    elastic = create_model(model, grid, **PUBLISHED, **timm_kwargs)
    try:
        elastic.load_state_dict(state)
    except RuntimeError as error:
        reason = one_line(error, 300)
        raise ValueError(f"{file} does not hold a {model} ({reason}): name its own model with --model") from None
    return elastic.eval()


def _read(file: Path, weights: str) -> dict[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and zipfile raise many kinds for a broken or unsafe file
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        if foreign:
            raise ValueError(
                f"{file} holds a {foreign[1]}; only tensors and an argparse namespace of plain values are unpickled"
            ) from None
        raise ValueError(f"{file} cannot be read as a checkpoint ({one_line(error, 160)})") from None
    state = content.get(weights, content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{file} holds no weights under {weights!r}")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}
