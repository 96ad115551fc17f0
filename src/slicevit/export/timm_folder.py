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

from slicevit.checkpoint import CARD, CONFIG, WEIGHTS
from slicevit.data import TransformConfig, preprocessing
from slicevit.elastic import ElasticModel
from slicevit.export.artefact import Target
from slicevit.export.check import Predictor
from slicevit.registry import is_timms
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


def export_timm(run: str | Path, out: str | Path, width: Width) -> float:
    """Write `width` of the model in `run` as a timm folder and check it; returns the largest logit error.

    Raises ValueError when `run` or `width` cannot be had, or when the folder's logits are off (`export_widths`).
    """
    from slicevit.export.formats import Cut, export_widths

    (checked,) = export_widths("timm", Path(out), [Cut(Path(run), str(width), str(width))])
    return checked.parity.max_abs_error


def write(
    model: ElasticModel,
    width: Fraction,
    config: dict[str, Any],
    transform: TransformConfig,
    dtype: torch.dtype,
    folder: Path,
    name: str,
) -> None:
    """Write `model` at `width` into `folder`, its weights as `dtype`.

    Args:
        config: the saved model's.
        transform: how it was evaluated, which timm's data configuration of the folder then says too.
        name: what the model card calls the folder.

    Raises ValueError for a `norm_eps` that timm's configuration has no place for.
    """
    alone = model.to_timm(width)
    arguments = {
        k: v for k, v in (model.model_args | model.factory_arguments(width)).items() if not k.endswith("_rate")
    }
    read_off = ("num_classes", "img_size", "in_chans", "global_pool")
    extra = {"label_names": config["label_names"]} if "label_names" in config else {}
    state = {key: tensor.detach().clone().contiguous() for key, tensor in alone.state_dict().items()}
    if model.settings.norm_eps is not None:
        _fold_eps(state, alone, model.settings.norm_eps)
    cast = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    (folder / WEIGHTS).write_bytes(serialised(cast))
    save_config_for_hf(
        alone,
        str(folder / CONFIG),
        model_config=extra,
        model_args={k: v for k, v in arguments.items() if k not in read_off},
        data_config=preprocessing(transform),
    )
    (folder / CARD).write_text(_card(config["architecture"], width, name), encoding="utf-8")


def _load(folder: Path) -> Predictor:
    """In float32, as timm loads it whatever the weights' type."""
    module: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return module


TARGET = Target(files=(WEIGHTS, CONFIG, CARD), load=_load, dense=False)


def _card(architecture: str, width: Fraction, name: str) -> str:
    what, imports = "a plain timm model", "import timm"
    if not is_timms(architecture):
        what, imports = "its architecture is slicevit's", "import slicevit  # registers it\nimport timm"
    return (
        f"---\nlibrary_name: timm\npipeline_tag: image-classification\ntags: [timm, slicevit]\n---\n"
        f"# {architecture} at width {width}\n\nCut out of a sliceable model by slicevit; {what}.\n\n"
        f'```python\n{imports}\n\nmodel = timm.create_model("local-dir:{name}", pretrained=True)\n```\n'
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
