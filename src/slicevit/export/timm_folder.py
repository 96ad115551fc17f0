"""A width as a plain timm folder, loadable without slicevit."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save as serialised
from timm.models._hub import save_config_for_hf
from torch import nn

from slicevit.checkpoint import CARD, CONFIG, WEIGHTS, from_pretrained, read_config
from slicevit.costs import model_input_size
from slicevit.files import replacing
from slicevit.widths import Width

_RESIDUAL_WRITERS = ("attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight", "mlp.fc2.bias")
_STREAM = (
    "patch_embed.proj.weight",
    "patch_embed.proj.bias",
    "cls_token",
    "dist_token",
    "reg_token",
    "pos_embed",
)
TOLERANCE = 1e-4


def export_timm(run: str | Path, out: str | Path, width: Width) -> float:
    """Write `width` of the model in `run` as a timm folder and check it; returns the largest logit error.

    Raises ValueError when `run` or `width` cannot be had, or when the folder's logits are off by more than
    1e-4 of the largest logit.
    """
    model = from_pretrained(run)
    legal = model.width(width)
    alone = model.to_timm(legal).eval()
    arguments = {k: v for k, v in (model.model_args | model.arguments(legal)).items() if not k.endswith("_rate")}
    read_off = ("num_classes", "img_size", "in_chans", "global_pool")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    config, _ = read_config(run)
    extra = {"label_names": config["label_names"]} if "label_names" in config else {}
    state = {name: tensor.detach().clone().contiguous() for name, tensor in alone.state_dict().items()}
    if model.settings.norm_eps is not None:
        _fold_eps(state, alone, model.settings.norm_eps)
    with replacing(out / WEIGHTS) as temporary:
        temporary.write_bytes(serialised(state))
    with replacing(out / CONFIG) as temporary:
        save_config_for_hf(
            alone,
            str(temporary),
            model_config=extra,
            model_args={k: v for k, v in arguments.items() if k not in read_off},
        )
    error = _check(alone, out, model_input_size(model))
    with replacing(out / CARD) as temporary:
        temporary.write_text(_card(config["architecture"], legal, out.name), encoding="utf-8")
    return error


def _card(architecture: str, width: Fraction, name: str) -> str:
    return (
        f"---\nlibrary_name: timm\npipeline_tag: image-classification\ntags: [timm, slicevit]\n---\n"
        f"# {architecture} at width {width}\n\nCut out of a sliceable model by slicevit; a plain timm model.\n\n"
        f'```python\nimport timm\n\nmodel = timm.create_model("local-dir:{name}", pretrained=True)\n```\n'
    )


def _fold_eps(state: dict[str, torch.Tensor], module: Any, eps: float) -> None:
    """Make the stock epsilon act as `eps`: LN(c x, c² eps) = LN(x, eps), so scale all that writes to the stream.

    Raises ValueError for a model whose stream has other writers.
    """
    stock = timm.create_model(module.pretrained_cfg["architecture"], depth=1)
    stock_eps = next(layer.eps for layer in stock.modules() if isinstance(layer, nn.LayerNorm))
    if type(module).__name__ not in ("VisionTransformer", "VisionTransformerDistilled") or any(
        name.startswith("norm_pre") or ".ls1." in name for name in state
    ):
        raise ValueError(f"a norm_eps of {eps} cannot be folded into the weights of a {type(module).__name__}")
    scale = math.sqrt(stock_eps / eps)
    for name in state:
        if name in _STREAM or name.endswith(_RESIDUAL_WRITERS):
            state[name] *= scale


@torch.inference_mode()
def _check(alone: nn.Module, out: Path, input_size: tuple[int, int, int]) -> float:
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
    expected, got = alone(images), loaded(images)
    error = float((expected - got).abs().max())
    if not error <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise ValueError(f"{out}: the exported model's logits are off by {error:.1e}; it is not to be used")
    return error
