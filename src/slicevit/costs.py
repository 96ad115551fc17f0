"""What a width costs, counted on its skeleton: nothing is computed and no weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from slicevit.elastic import ElasticModel
from slicevit.widths import Width


@dataclass(frozen=True)
class Costs:
    """Of one width, for one image.

    Attributes:
        channels: embedding width.
        params: parameters.
        macs: multiply-accumulates of a forward pass; matrix products and convolutions, attention included.
        activations: bytes that a float32 training step keeps for the backward pass, weights not counted.
    """

    channels: int
    params: int
    macs: int
    activations: int


def width_costs(model: ElasticModel, width: Width, input_size: tuple[int, int, int] | None = None) -> Costs:
    """Costs of `model` at `width` for one image of `input_size` (C, H, W), by default the model's own; counted once.

    Raises ValueError when the grid does not hold `width`.
    """
    legal = model.width(width)
    known: dict[tuple[int, int, int], Costs] = model.skeleton(legal).costs
    size = input_size or model_input_size(model)
    if size not in known:
        known[size] = _counted(model, legal, size)
    return known[size]


def _counted(model: ElasticModel, width: Fraction, size: tuple[int, int, int]) -> Costs:
    module: Any = model.skeleton(width).module
    embed_dim = getattr(module, "embed_dim", None)
    embed_dim = embed_dim if isinstance(embed_dim, int) and embed_dim else module.num_features
    params = sum(parameter.numel() for parameter in module.parameters())
    on_meta = model._build_skeleton(width).module.to("meta").eval()
    image = torch.zeros(1, *size, device="meta")
    weights = {parameter.untyped_storage()._cdata for parameter in on_meta.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        output = getattr(on_meta, "raw", on_meta)(image)  # of a detector, what comes before boxes are picked
    del output
    return Costs(
        int(embed_dim), params, counter.get_total_flops() // 2, sum(storage.nbytes() for storage in kept.values())
    )


def model_input_size(model: ElasticModel) -> tuple[int, int, int]:
    """(C, H, W) of the images that the model takes."""
    if own := getattr(model, "image_shape", None):
        shape: tuple[int, int, int] = own  # of a model of ours, which has no configuration of timm's
        return shape
    channels, height, width = model.pretrained_cfg["input_size"]
    patch_embed: Any = getattr(model, "patch_embed", None)
    if getattr(patch_embed, "img_size", None):
        height, width = patch_embed.img_size
    elif getattr(model, "_traits", {}).get("img_size"):  # as timm recorded it (a Mixer has no patch_embed)
        height, width = model._traits["img_size"]
    for parameter in model.parameters():
        if parameter.ndim == 4:
            channels = parameter.shape[1]
            break
    return channels, height, width
